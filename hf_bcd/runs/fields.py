"""Which models and data a run is about. Nothing here imports torch, so that `--help` need not wait for it."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelArguments:
    """Student, teacher and what the run compares."""

    student: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Student: Hub id or folder, or a mapping such as {backbone: mobilenetv2_100, head: fpn}."},
    )
    teacher: dict[str, Any] | str | list[Any] | None = field(
        default=None,
        metadata={
            "help": "Teacher, given like the student. A timm backbone is first trained on the same data. A backbone without a "
            "head, such as facebook/dinov2-base or {backbone: ..., head: none, pretrained: true}, teaches features only. "
            "Several, all finished: '[A, B]'. None trains the student without one."
        },
    )
    teacher_training: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Training options that differ for a teacher trained here, e.g. {max_steps: 2000}."},
    )
    teacher_store: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Stored outputs of a teacher (folder or Hub id of `hf-bcd reinforce`), in the place of the teacher itself; or "
            "'[A, B]', beside the teachers of --teacher. A store of several gives all; STORE/NAME is one of them."
        },
    )
    with_baseline: bool = field(
        default=False, metadata={"help": "Also train the student without its teacher, on the same budget, to compare."}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Finished student without a teacher to compare with: folder or Hub id."}
    )
    export: str | None = field(
        default=None,
        metadata={"help": "File to export the finished student to, such as onnx-int8 (see `hf-bcd export -h`)."},
    )
    label_synonyms: str | None = field(
        default=None, metadata={"help": "JSON file {class of the data set: [names the teacher may use]}."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that lies in a Hub repository; read it first."}
    )


@dataclass
class DataArguments:
    """Which data set, and how its raw columns and labels are read."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Name of the catalog (ade20k, cityscapes, ...; see `hf-bcd check -h`), Hub id, or folder."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Local copy of a data set of the catalog, in its official layout; or a folder of the data set."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})
    streaming: bool = field(
        default=False, metadata={"help": "Read training data while training, without storing it; needs max_steps."}
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Images from which a stream draws at random; all of them stay in memory."}
    )
    cache_images: bool = field(
        default=False, metadata={"help": "Keep decoded training and validation images in memory: for small sets."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Image column, if it cannot be recognised."})
    label_column: str | None = field(
        default=None, metadata={"help": "Column of the masks or boxes, if it cannot be recognised."}
    )
    id2label: str | None = field(default=None, metadata={"help": "JSON file with the class names."})
    reduce_labels: bool = field(default=False, metadata={"help": "Raw label 0 is void and classes start at 1."})
    ignore_labels: list[int] = field(default_factory=list, metadata={"help": "Raw label ids that are void."})
    task: str | None = field(
        default=None, metadata={"help": "object-detection, to read the boxes of a source that has masks too."}
    )
    box_format: str | None = field(
        default=None,
        metadata={
            "help": "How boxes are stored, if it cannot be recognised: xywh, xyxy, cxcywh, voc, xywh_normalised, "
            "xyxy_normalised, cxcywh_normalised."
        },
    )
    dataset_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further options of the data set, e.g. {size: [96, 128]} for synthetic."}
    )
    unlabelled_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of pictures without labels, mixed into every batch; alone: distil without any labels."
        },
    )
    unlabelled_dataset: str | None = field(
        default=None, metadata={"help": "The same from a Hub data set, or a folder of tables, with an image column."}
    )
    label_free: bool = field(
        default=False, metadata={"help": "Leave the labels of the training split unread: only the teacher teaches."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first training samples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first samples of each other split."})
