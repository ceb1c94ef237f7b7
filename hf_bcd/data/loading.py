"""Finds images and label maps in folders, Hub data sets and known data sets."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.messages import UserError
from .box_loading import assemble_boxes
from .boxes import BoxRow, BoxRule, BoxSource
from .dataset import (
    SPLIT_NAMES,
    TASK,
    DenseDataset,
    DenseDatasets,
    ReadRows,
    Row,
    UnlabelledError,
    named_splits,
)
from .detection import DETECTION, INSTANCES, BoxDataset
from .labels import MAX_LABELS, LabelRule, NameSource, read_id2label
from .probing import PROBED_ROWS, Survey, infer_id2label, is_labelled, judge, probed_rows, survey
from .sources.box_layouts import misplaced_boxes, open_boxes
from .sources.box_tables import BoxTableRows, read_either
from .sources.catalog import CATALOG, open_copy, open_known
from .sources.layouts import folder_of, has_file_pairs, pair_folders
from .sources.tables import hub_names, load_tables
from .streaming import DenseStream, StreamRows, open_streams
from .unlabelled import pictures_and_more


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

NAME_FILES = ("id2label.json", "classes.json")
METADATA_FILES = [f"{folder}metadata.{kind}" for folder in ("", "*/") for kind in ("csv", "jsonl", "parquet")]
FOLDERS = {split: (f"{split}/images", f"{split}/masks") for split in SPLIT_NAMES}
SCENE_COUNTS = {"train": 1000, "validation": 200, "test": 200}
SCENES = {  # and num_images
    "synthetic": ("size", "seed", "num_classes"), "synthetic_detection": ("size", "seed"), "synthetic_instances": ("size", "seed"),
}  # fmt: skip


def load_dense_dataset(
    name_or_path: str | Path | datasets.Dataset | datasets.DatasetDict,
    *,
    data_dir: str | Path | None = None,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    id2label: NameSource | None = None,
    reduce_labels: bool = False,
    ignore_labels: Sequence[int] = (),
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    max_eval_samples: int | None = None,
    task: str | None = None,
    box_format: str | None = None,
    **scene_options: Any,
) -> DenseDatasets:
    """Loads a data set of pictures with label maps, boxes or masks of objects in canonical form, whatever its source.

    Args:
        name_or_path: one of
            - a name in `CATALOG`, whose label rule and class names are known;
            - a folder with `{train,val,test}/{images,masks}`, where image and mask have the same stem, and
              optionally `id2label.json` or `classes.json`; a `Path` is always a folder;
            - a folder with boxes in COCO's JSON, YOLO's text files or Pascal VOC's XML, see `sources.box_layouts`, or with
              maps of instance ids, see `sources.instance_maps`;
            - a folder that `datasets.load_dataset` reads, such as an `imagefolder` whose `metadata.jsonl` has `file_name`
              and `mask_file_name`, or `objects` with `bbox` and `category`;
            - a Hub id `user/name`;
            - a loaded data set; a single `Dataset` counts as the split `train`.
        data_dir: root of the local copy of a data set of the catalog; otherwise a folder inside the source.
        config: configuration of a Hub id or folder, if it has several.
        revision: branch, tag or commit of a Hub id.
        image_column: column of the images; found by its name if None.
        label_column: column of the masks or of the things with their boxes; found by its name if None.
        id2label: class names as mapping, list or JSON file. If None: from the features, or the file `id2label.json` of
            the folder or Hub id, else inferred as 0 to the largest id in all masks of `train`, or as the categories of
            its boxes.
        reduce_labels: stored 0 is void and class k is stored as k + 1.
        ignore_labels: further stored ids that are void. 255 always is.
        streaming: give `train` as a `DenseStream`, which is read while training and never stored; the other splits are
            stored. For Hub ids and folders that `datasets` reads, with known class names.
        shuffle_buffer: number of encoded samples of a stream from which the next one is drawn.
        max_eval_samples: number of samples of each other split that streaming stores; None for all.
        task: `semantic-segmentation`, `object-detection` or `instance-segmentation`, which a source may all serve; None takes
            label maps, then boxes, and the masks of objects only where there is nothing else.
        box_format: how boxes are stored, a key of `boxes.FORMATS` such as `xywh`; recognised if None.
        scene_options: for `synthetic`: `num_images` (split -> number), `size`, `seed`, `num_classes`; for
            `synthetic_detection` and `synthetic_instances` all but the last.

    Returns:
        The splits that exist, usually `train`, `validation` and `test`: `DenseDataset` of label maps, `BoxDataset` of boxes
        and of masks of objects.

    Raises:
        UserError: the source does not exist or is incomplete, columns or class names cannot be found, one of the rows
            that are looked at cannot be read, or the masks do not agree with names and rule; and see `assemble_boxes`.
    """
    if task not in (None, TASK, DETECTION, INSTANCES):
        raise UserError(f"task is {task!r}; data sets have {TASK!r}, {DETECTION!r} or {INSTANCES!r}.")
    if streaming and task in (DETECTION, INSTANCES):
        raise UserError("Pictures with boxes are not streamed: leave streaming out (`--streaming`).")
    if scene_options and name_or_path not in tuple(SCENES):
        raise UserError(f"Arguments {', '.join(scene_options)} are for the data sets {', '.join(SCENES)} only.")
    if shuffle_buffer < 1:
        raise UserError(f"shuffle_buffer is {shuffle_buffer}; a stream draws from at least one sample.")
    limits = {"shuffle_buffer": shuffle_buffer, "max_eval_samples": max_eval_samples}
    read: Any = partial(read_either, boxes=None if task is None else task != TASK, masks=task == INSTANCES)
    open_tables: Any = partial(open_streams, **limits) if streaming else partial(load_tables, read=read)
    columns = {"image_column": image_column, "label_column": label_column}
    if isinstance(name_or_path, str) and name_or_path in CATALOG:
        fixed = {"config": config, "revision": revision, **columns, "id2label": id2label}
        fixed |= {"reduce_labels": reduce_labels, "ignore_labels": ignore_labels}
        fixed |= {"data_dir": data_dir, "box_format": box_format} if name_or_path in SCENES else {}
        if any(fixed.values()):
            raise UserError(
                f"{', '.join(key for key, value in fixed.items() if value)} cannot be set for {name_or_path!r}, whose "
                "files and label rule are known. For a copy that differs, give its Hub id or folder instead."
            )
        if streaming and (data_dir is not None or name_or_path in SCENES):
            raise _nothing_to_stream(data_dir or name_or_path)
        if Path(name_or_path).is_dir():
            logger.warning(
                "%r is the known data set of that name; the folder %s here would be ./%s.", *[name_or_path] * 3
            )
        known_task = CATALOG[name_or_path].task
        instances = task == INSTANCES and CATALOG[name_or_path].instances is not None
        if (task not in (None, known_task) and not instances) or (box_format and known_task != DETECTION):
            others = [
                name for name, spec in CATALOG.items() if task == spec.task or (task == INSTANCES and spec.instances)
            ]
            hint = f" such as {', '.join(others[:4])}" if task not in (None, known_task) else ""
            raise UserError(
                f"{name_or_path} is a data set for {known_task}: leave task and box_format out, or take another{hint}."
            )
        if name_or_path in SCENES:
            return _load_scenes(name_or_path, **scene_options)
        if known_task == DETECTION or instances:
            root, found = open_copy(name_or_path, data_dir, instances)
            return assemble_boxes(name_or_path, found, str(root), box_format=box_format)
        known_tables = open_tables if streaming else load_tables
        opened = open_known(name_or_path, data_dir, known_tables, max_eval_samples if streaming else None)
        return _probed(_assemble(name_or_path, *opened))

    rule = LabelRule(reduce_zero=reduce_labels, void_ids=tuple(ignore_labels))
    hub_id = None
    if isinstance(name_or_path, str | Path):
        root = Path(name_or_path).expanduser()
        if root.is_dir() or isinstance(name_or_path, Path) or name_or_path.startswith((".", "/", "~")):
            root = root / (data_dir or "")
            if not root.is_dir():
                raise UserError(f"{root}: this folder does not exist.")
            name, source = root.resolve().name, str(root)
            id2label = id2label or next((root / file for file in NAME_FILES if (root / file).is_file()), None)
            # Metadata may pair files of different names, so it goes before the pairing by stem.
            described = any(has_file_pairs(file) for pattern in METADATA_FILES for file in root.glob(pattern))
            masks = described or any(folder_of(root, folder).is_dir() for _, folder in FOLDERS.values())
            wanted = task in (DETECTION, INSTANCES) or (task is None and not masks)
            if (boxes := open_boxes(root, task == INSTANCES, id2label) if wanted else None) is not None:
                if task == INSTANCES and not boxes.masks:
                    raise UserError(
                        f"{root}: {boxes.kind}, which has boxes and no masks. Instance segmentation needs COCO's JSON or YOLO's "
                        "text files with outlines, or maps of instance ids in {images,instances}; or train on boxes (`--task "
                        "object-detection`)."
                    )
                boxes = boxes._replace(masks=boxes.masks and task != DETECTION)
                fixed = {"config": config, "revision": revision, **columns, "reduce_labels": reduce_labels}
                _refuse_useless(
                    fixed | {"ignore_labels": ignore_labels, "streaming": streaming}, f"{root}: {boxes.kind}"
                )
                return assemble_boxes(name, boxes, source, id2label, box_format)
            if task == TASK and not masks and (boxes := open_boxes(root)) is not None:
                held = "masks of objects" if boxes.masks else "boxes"
                raise UserError(
                    f"{root}: {boxes.kind}, which has {held} and no label maps. Leave task out (`--task`)."
                )
            rows: Mapping[str, Any] = (
                {} if described or task in (DETECTION, INSTANCES) else pair_folders(root, FOLDERS)
            )
            if rows and streaming:
                raise _nothing_to_stream(root)
            of_tables = {"config": config, **columns} if rows else {}
            _refuse_useless({"revision": revision, **of_tables}, str(root))
            if rows:
                _refuse_useless({"box_format": box_format}, str(root))
                return _probed(_assemble(name, rows, source, id2label, rule))
            try:
                rows = open_tables(source, name, **columns, config=config)
            except UserError as error:
                if (hint := misplaced_boxes(root) or _misplaced_masks(root, task) or pictures_and_more(root)) is None:
                    raise
                raise UserError(f"{hint} As a table: {error}") from error
        else:
            name = source = hub_id = _checked_hub_id(name_or_path)
            options = {"revision": revision, "data_dir": None if data_dir is None else str(data_dir)}
            rows = open_tables(name, name, **columns, config=config, **options)
    elif streaming:
        raise _nothing_to_stream(type(name_or_path).__name__)
    else:
        name, source = "dataset", type(name_or_path).__name__
        rows = read(name_or_path, name, **columns)
    first = next(iter(rows.values()))
    if isinstance(first, BoxTableRows):
        _refuse_useless({"reduce_labels": reduce_labels, "ignore_labels": ignore_labels}, f"{source}: boxes", "data")
        names = None if first.class_names is None else dict(enumerate(first.class_names))
        if names is None and id2label is None and hub_id is not None:
            id2label = hub_names(hub_id, revision)
        found = BoxSource(rows, names, None, "a table", task == INSTANCES)
        return assemble_boxes(name, found, source, id2label, box_format, revision)
    _refuse_useless({"box_format": box_format}, source, "data")
    id2label = id2label or first.class_names
    if id2label is None and hub_id is not None:
        id2label = hub_names(hub_id, revision)
    return _probed(_assemble(name, rows, source, id2label, rule, revision))


def _refuse_useless(options: Mapping[str, Any], where: str, kind: str = "folder") -> None:
    if useless := [key for key, value in options.items() if value]:
        raise UserError(f"{where}: {', '.join(useless)} cannot be set for this kind of {kind}. Leave it out.")


def _misplaced_masks(root: Path, task: str | None) -> str | None:
    """What to do about a folder of masks that belongs to no split, or whose task is another one; None without one."""
    folders = [
        folder for pattern in ("masks", "*/masks", "masks/*") for folder in root.glob(pattern) if folder.is_dir()
    ]
    if not folders:
        return None
    if task == DETECTION:
        return f"{folders[0]} holds masks, but {root} holds no boxes: leave task out (`--task`)."
    return (
        f"{folders[0]} looks like masks, but is not where they are looked for: label maps are in {{train,val,test}}/masks, with the "
        "images of the same names in {train,val,test}/images."
    )


def _nothing_to_stream(source: object) -> UserError:
    return UserError(
        f"{source}: these images can be read at random as they are. Leave streaming out (`--streaming`): it is for Hub "
        "ids, and for folders of Parquet files or with metadata.jsonl."
    )


def _checked_hub_id(name: str) -> str:
    if name.count("/") != 1:
        near = difflib.get_close_matches(name, CATALOG, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UserError(
            f"{name!r} is neither a known data set ({', '.join(CATALOG)}), nor a folder, nor a Hub id 'user/name'{hint}"
        )
    return name


def _probed(data: DenseDatasets) -> DenseDatasets:
    """Looks at some rows of every split: faults show now, and evaluation splits without labels are left out."""
    kept: dict[str, DenseDataset] = {}
    train: Survey | None = None
    for split in sorted(data, key=lambda split: split != "train"):
        dataset, notes = data[split], list[str]()
        try:
            rows = probed_rows(dataset.rows)
            found = survey(rows, dataset.rule, dataset.num_labels, PROBED_ROWS)
        except UnlabelledError as error:
            if split == "train":
                raise
            logger.warning("%s: split %r is left out, since it has no labels. %s", dataset.source, split, error)
            continue
        if split == "train":
            train = found
            whole = hasattr(dataset, "__len__") and found.masks == len(dataset)
            notes = judge(found, dataset.id2label, dataset.source, whole=whole)
            for note in notes:
                logger.warning("%s: %s. Please check this before training.", dataset.source, note)
        elif not is_labelled(found, train):
            logger.warning(
                "%s: split %r is left out: the %d masks that were looked at store only %s, as where labels are withheld.",
                dataset.source,
                split,
                found.masks,
                ", ".join(map(str, sorted(found.stored))),
            )
            continue
        elif train is not None:
            found.compare_palettes(train, split)
        kept[split] = replace(dataset, notes=tuple(notes))
    return DenseDatasets({split: kept[split] for split in data if split in kept})


def _assemble(
    name: str,
    splits: Mapping[str, Any],
    source: str,
    id2label: NameSource | None,
    rule: LabelRule,
    revision: str | None = None,
) -> DenseDatasets:
    renamed = named_splits(splits, source)
    if id2label is not None:
        id2label = read_id2label(id2label)
    elif any(isinstance(rows, StreamRows) for rows in renamed.values()):
        raise UserError(
            f"{source}: a stream without class names; finding them would read all masks. Give id2label (`--id2label`)."
        )
    elif "train" in renamed:
        train = renamed["train"]
        logger.info("%s: no class names; reading all %d masks of 'train' for the largest id.", source, len(train))
        id2label = infer_id2label(
            survey(map(train.__getitem__, range(len(train))), rule, MAX_LABELS, images=0), source
        )
        logger.info("%s: %d classes found. Give id2label to name them and to start faster.", source, len(id2label))
    else:
        raise UserError(
            f"{source}: class names are inferred from a split 'train', but the splits are {', '.join(splits)}; rename the "
            "one that is it, or give id2label (`--id2label`)."
        )
    built: dict[str, Any] = {}
    for split, rows in renamed.items():
        kind: Any = DenseStream if isinstance(rows, StreamRows) else DenseDataset
        built[split] = kind(rows, name, split, source, id2label, rule, getattr(rows, "commit", None) or revision)
    return DenseDatasets(built)


def _load_scenes(name: str, num_images: Mapping[str, int] | None = None, **options: Any) -> DenseDatasets:
    from .synthetic.scenes import SyntheticBoxes, SyntheticScenes

    unknown = options.keys() - SCENES[name]
    if unknown:
        raise UserError(
            f"{name} has no option {', '.join(sorted(unknown))} (`--dataset_options`); it has num_images, {', '.join(SCENES[name])}."
        )
    kind, read = (SyntheticScenes, _read_scene) if name == "synthetic" else (SyntheticBoxes, _read_boxed_scene)
    counts = SCENE_COUNTS if num_images is None else num_images
    masks = name == "synthetic_instances"
    options |= {"masks": True} if masks else {}
    scenes = {split: kind(num_images=count, split=split, **options) for split, count in counts.items()}
    rows = {
        split: ReadRows([(index,) for index in range(len(some))], partial(read, some, name))
        for split, some in scenes.items()
    }
    names, source = next(iter(scenes.values())).id2label, CATALOG[name].source
    if kind is SyntheticScenes:
        return _assemble(name, rows, source, names, LabelRule())
    rule = BoxRule("xyxy", "as the scenes are drawn")
    return DenseDatasets(
        {split: BoxDataset(some, name, split, source, names, rule, masks=masks) for split, some in rows.items()}
    )


def _read_scene(scenes: Any, name: str, index: int) -> Row:
    scene, name = scenes[index], f"{name}/{scenes.split}[{index}]"
    return Row(scene["image"], scene["label"], name, name)


def _read_boxed_scene(scenes: Any, name: str, index: int) -> BoxRow:
    scene, name = scenes[index], f"{name}/{scenes.split}[{index}]"
    return BoxRow(scene["image"], scene["boxes"], name, name)
