"""One contract for the adapters of all detectors: levels, losses, padding, predictions, classes, processors."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from adapters.adapter_tiny_detectors import (
    BOXES_AND_MASKS,
    EOMTS,
    LABELS,
    MASK_QUERIES,
    MASKED,
    MODELS,
    OURS,
    PADDED,
    QUERIES,
    SOFTMAX,
    SQUARES,
    TOKENS,
    WITH_MASKS,
    tiny_detector,
)
from adapters.adapter_tiny_detectors import objects as boxes_of
from adapters.adapter_tiny_models import images
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from hf_bcd.adapters import FrozenTeacher, adapt, build_adapter, image_processor
from hf_bcd.adapters.detection import DetectionAdapter, detr_labels, picture_sizes
from hf_bcd.adapters.loading import build_model, load_adapter
from hf_bcd.adapters.mask2former import Mask2FormerAdapter
from hf_bcd.adapters.mask_queries import Mask2FormerInstanceAdapter
from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.data import BoxEvalTransform
from hf_bcd.outputs import DenseOutput, Objects
from hf_bcd.utils.masks import decode, unpack
from hf_bcd.utils.messages import UserError


OTHER_LABELS = {0: "dog", 1: "tree", 2: "person", 3: "car"}
family = pytest.mark.parametrize("name", MODELS)
objects = partial(boxes_of, masks=True)


def adapted(name: str, labels: dict[int, str] = LABELS, **fields) -> DetectionAdapter:
    task = "instance-segmentation" if name in WITH_MASKS else None
    return build_adapter(tiny_detector(name, labels, **fields), task=task)  # type: ignore[return-value]


def assert_levels(adapter: DetectionAdapter, output: DenseOutput, size: tuple[int, int]) -> None:
    for specs, levels in ((adapter.feature_specs, output.features), (adapter.pyramid_specs, output.pyramid)):
        assert list(levels) == list(specs)
        for level, spec in specs.items():
            expected = (2, spec.channels, *(-(-side // spec.stride) for side in size))
            assert levels[level].shape == expected, level


# ---- Levels and raw outputs --------------------------------------------------------------------------------------------


@family
@pytest.mark.parametrize("training", [False, True])
def test_levels_are_as_declared(name: str, training: bool) -> None:
    adapter, size = adapted(name).train(training), (96, 160) if name in SQUARES else (131, 167)
    with torch.no_grad():
        output = adapter(images(*size))
    assert_levels(adapter, output, size)
    assert {"stride_4", "stride_8", "stride_16", "stride_32"} <= set(output.features)
    by_stride = {spec.stride: level for level, spec in adapter.pyramid_specs.items()}
    rf_detr = {16: "p4"} if name.startswith("rf_detr") else {}
    assert by_stride == rf_detr if name in TOKENS else by_stride[32] == "p5"
    assert output.logits is None and output.task_losses == {}
    assert (output.dense is not None) == (name in OURS) and (output.queries is None) == (name in OURS + MASKED)


@pytest.mark.parametrize("name", [*SQUARES, *PADDED, "detr-masks"])
@pytest.mark.parametrize("counts", [(3, 1), (0, 0)])
def test_queries_are_the_ordinary_ones(name: str, counts: tuple[int, int]) -> None:
    """Those that denoise true boxes come first in training, as many as there are boxes: no teacher has them."""
    adapter = adapted(name).train()
    queries = adapter(images(96, 128), objects(*counts)).queries
    classes = 4 if name in SOFTMAX else 3
    layers = 1 if name == "yolos" else 2  # YOLOS answers once
    assert queries.class_logits.shape == (layers, 2, QUERIES, classes) and queries.boxes.shape == (
        layers,
        2,
        QUERIES,
        4,
    )
    assert queries.softmax == (name in SOFTMAX)
    assert (
        name.startswith("rf_detr") or 0 <= queries.boxes.min() <= queries.boxes.max() <= 1
    )  # RF-DETR's know no bounds
    corners = name in ("d_fine", "deimv2")
    assert (queries.corners is not None) == corners
    assert not corners or queries.corners.shape == (2, 2, QUERIES, 4 * 33)
    with torch.no_grad():
        adapter.eval()
        found, outputs = adapter(images(96, 128)).queries, adapter.model(adapter.shown(images(96, 128)))
    torch.testing.assert_close(found.class_logits[-1], outputs.logits)
    torch.testing.assert_close(found.boxes[-1], outputs.pred_boxes)


@pytest.mark.parametrize("name", MASK_QUERIES)
def test_queries_answer_with_classes_and_masks(name: str) -> None:
    """Of each layer in training, of the last one else."""
    adapter, pictures = adapted(name).train(), images(96, 128)
    queries = adapter(pictures, objects(3, 1)).queries
    layers = 2 if name.startswith("maskformer") else 3  # with what the queries say before the first one
    assert queries.class_logits.shape == (layers, 2, QUERIES, 4) and queries.masks.shape == (
        layers,
        2,
        QUERIES,
        24,
        32,
    )
    assert queries.boxes is None and queries.softmax
    assert (queries.class_logits.std(2) > 1e-3).any(-1).all(), "a layer whose queries all say the same"
    with torch.no_grad():
        queries = adapter.eval()(pictures).queries
        outputs = adapter.model(seen(adapter, pictures), output_hidden_states=True)
    torch.testing.assert_close(queries.class_logits, outputs.class_queries_logits[None])
    torch.testing.assert_close(queries.masks, outputs.masks_queries_logits[None, ..., :24, :32])


def seen(adapter: Any, pictures: Tensor) -> Tensor:
    """Images as the model gets them."""
    shown = adapter.shown(pictures)
    return adapter.on_canvas(shown) if hasattr(adapter, "on_canvas") else shown


# ---- Losses ------------------------------------------------------------------------------------------------------------


@family
@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_the_loss_reaches_every_parameter(name: str, counts: tuple[int, int]) -> None:
    adapter = adapted(name).train()
    adapter.freeze_unused()
    loss = adapter(images(96, 128), objects(*counts)).task_losses["loss_task"]
    assert loss.ndim == 0 and loss.isfinite() and loss > 0
    loss.backward()
    trained = {key: p for key, p in adapter.model.named_parameters() if p.requires_grad}
    assert [key for key, parameter in trained.items() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())
    assert sum(float(parameter.grad.abs().sum()) > 0 for parameter in trained.values()) > len(trained) / 3


@family
def test_the_loss_is_the_models_own(name: str) -> None:
    adapter, pictures, targets = adapted(name), images(96, 128), objects(3, 1)
    labels = [
        {
            "class_labels": classes,
            "boxes": torch.stack(
                [
                    (boxes[:, 0] + boxes[:, 2]) / 256,
                    (boxes[:, 1] + boxes[:, 3]) / 192,
                    (boxes[:, 2] - boxes[:, 0]) / 128,
                    (boxes[:, 3] - boxes[:, 1]) / 96,
                ],
                1,
            ),
        }
        for boxes, classes in zip(targets.boxes, targets.classes, strict=True)
    ]
    if targets.masks is not None and name in WITH_MASKS:
        whole = [unpack(masks, 128) for masks in targets.masks]
        labels = [label | {"masks": masks} for label, masks in zip(labels, whole, strict=True)]
    options: dict[str, Any] = {"labels": labels}
    if name in MASK_QUERIES:
        options = {"mask_labels": [masks.float() for masks in whole], "class_labels": targets.classes}
        options |= {"output_hidden_states": True}
    if name in EOMTS:
        options["mask_labels"] = [F.pad(masks, (0, 64, 0, 96)) for masks in options["mask_labels"]]
    with torch.no_grad():
        torch.manual_seed(0)
        expected = adapter.model(pixel_values=seen(adapter, pictures), **options).loss
        if name in MASKED:
            adapter.model.seed_sampling(0)
        torch.manual_seed(0)
        found = adapter(pictures, targets).task_losses["loss_task"]
    torch.testing.assert_close(found, expected)


# ---- Padding -----------------------------------------------------------------------------------------------------------


def padded_pair() -> tuple[Tensor, Tensor]:
    """A whole picture of 128 x 128 pixels beside one of 64 x 64, and the mask."""
    pictures, mask = images(128, 128), torch.zeros(2, 128, 128, dtype=torch.bool)
    mask[0], mask[1, :64, :64] = True, True
    return pictures.masked_fill(~mask[:, None], 124), mask


def without_neighbours(adapter: DetectionAdapter) -> DetectionAdapter:
    """The model whose maps have not seen the padding: convolutions see their own position only, and no norm all of them."""
    for module in adapter.modules():
        if isinstance(module, torch.nn.GroupNorm):
            vars(module)["forward"] = lambda x: x
        if isinstance(module, torch.nn.Conv2d) and max(module.kernel_size) > 1:
            kernel, middle = module.weight.data.clone(), module.kernel_size[0] // 2
            module.weight.data.zero_()
            module.weight.data[..., middle, middle] = kernel.sum((2, 3))
    return adapter


@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_no_box(name: str) -> None:
    adapter, (pictures, mask) = without_neighbours(adapted(name)), padded_pair()
    with torch.no_grad():
        together, blind = (adapter(pictures, pixel_mask=given).queries.boxes[-1, 1] for given in (mask, None))
        alone = adapter(pictures[1:, :, :64, :64]).queries.boxes[-1, 0]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)
    assert (blind - alone).abs().max() > 0.01, "padding would not show"


@pytest.mark.parametrize("name", PADDED)
def test_a_padded_picture_costs_what_it_costs_alone(name: str) -> None:
    """Both pictures have two boxes, so that the loss of both is the mean of their losses."""
    adapter, (pictures, mask) = without_neighbours(adapted(name)), padded_pair()
    targets = objects(2, 2, mask=mask, size=(128, 128))
    single = [
        Objects(targets.boxes[index : index + 1], targets.classes[index : index + 1], (side, side), 3)
        for index, side in ((0, 128), (1, 64))
    ]
    with torch.no_grad():
        whole, small = adapter(pictures[:1], single[0]), adapter(pictures[1:, :, :64, :64], single[1])
        found = adapter(pictures, targets).task_losses["loss_task"]
    expected = (whole.task_losses["loss_task"] + small.task_losses["loss_task"]) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_true_boxes_are_relative_to_the_picture_without_padding() -> None:
    _, mask = padded_pair()
    box = torch.tensor([[16.0, 0.0, 48.0, 32.0]])
    targets = Objects([box, box], [torch.tensor([1])] * 2, (128, 128), 3, mask)
    whole, small = detr_labels(targets, picture_sizes(targets))
    assert whole["boxes"].tolist() == [[0.25, 0.125, 0.25, 0.25]] and small["boxes"].tolist() == [
        [0.5, 0.25, 0.5, 0.5]
    ]


@pytest.mark.parametrize("name", SQUARES)
def test_families_of_squares_refuse_padding(name: str) -> None:
    adapter, (pictures, mask) = adapted(name), padded_pair()
    for arguments in ((pictures, objects(1, 1, size=(128, 128), mask=mask)), (pictures, None, mask)):
        with pytest.raises(UserError, match=r"takes only squares.*square_size: 640"):
            adapter(*arguments)
    for size in ((96, 128), (100, 100)):
        with pytest.raises(UserError, match=rf"takes only squares.*{size[0]} x {size[1]}.*square_size: 640"):
            adapter.check_size(size)
    with pytest.raises(UserError, match=r"takes only squares.*96 x 128.*square_size: 640"):
        adapter.predict(pictures[:, :, :96], [(96, 128)] * 2)
    adapter.check_size((128, 128))


# ---- Predictions -------------------------------------------------------------------------------------------------------


def shaped(adapter: Any) -> torch.Tensor:
    """Pictures that the family takes."""
    return images(96, 96 if adapter.squares else 128)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in MASK_QUERIES])
def test_predictions_are_those_of_the_familys_processor(name: str) -> None:
    adapter, sizes = adapted(name), [(100, 333), (480, 640)]
    pictures = shaped(adapter)
    found = adapter.predict(pictures, sizes)
    with torch.no_grad():
        outputs = adapter.model(pixel_values=adapter.shown(pictures))
    processor = getattr(transformers, adapter.processor_class)()
    expected = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=torch.tensor(sizes))
    for ours, theirs in zip(found, expected, strict=True):
        order = theirs["scores"].argsort(descending=True, stable=True)[:100]
        count = len(order)
        assert QUERIES <= count == len(ours["scores"]) <= 100
        assert len(ours["boxes"]) == len(ours["labels"]) == len(ours["scores"]) and ours["labels"].dtype == torch.int64
        for key, tolerance in (("scores", 1e-6), ("boxes", 0.01), ("labels", 0)):
            torch.testing.assert_close(
                ours[key][:count], theirs[key][order[:count]].to(ours[key].dtype), rtol=0, atol=tolerance
            )
        assert (ours["scores"].diff() <= 0).all()


@pytest.mark.parametrize("name", [*MASKED, "rf_detr-masks"])
def test_predicted_masks_are_those_of_the_familys_processor(name: str) -> None:
    adapter, sizes = adapted(name), [(50, 75), (96, 128)]
    assert adapter.task == "instance-segmentation" and "pred_masks" in adapter.exported
    pictures = shaped(adapter)
    found = adapter.predict(pictures, sizes)
    with torch.no_grad():
        outputs = adapter.model(pixel_values=adapter.shown(pictures))
    processor = getattr(transformers, adapter.processor_class)()
    for mask_threshold in (0.0, 0.5)[: 1 + (name in MASKED)]:  # the processor's own, and that of the pipeline
        expected = processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True, mask_threshold=mask_threshold
        )
        for ours, theirs, size in zip(found, expected, sizes, strict=True):
            masks = [decode(rle) for rle in ours["masks"]]
            assert len(masks) == len(ours["scores"]) and all(mask.shape == size for mask in masks)
            masks = [mask for mask in masks if mask.any()]  # the processor leaves out the others
            assert (
                len(masks) == len(theirs["segmentation"]) >= (QUERIES // 2 if name in BOXES_AND_MASKS else QUERIES + 1)
            )
            for mask, other in zip(masks, theirs["segmentation"].numpy(), strict=True):
                assert (mask & other).sum() >= 0.999 * (mask | other).sum()


@pytest.mark.parametrize("name", MASKED)
def test_a_recipe_builds_them_and_their_folder_is_loaded(name: str, tmp_path: Path) -> None:
    small = {"neck_channels": 8, "head_channels": 8, "fc_channels": 16, "strides": [4, 8, 16, 32], "mask_stride": 1}
    spec = ModelSpec.parse({"backbone": "test_resnet", "head": name, "options": small}, "student")
    model = build_model(spec, LABELS)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(str(tmp_path))
    assert type(adapter).__name__ == "TimmMaskAdapter" and list(adapter.pyramid_specs) == ["p2", "p3", "p4", "p5"]
    assert adapter.model.config.mask_stride == 1 and adapter.id2label == LABELS


@pytest.mark.parametrize("name", WITH_MASKS)
def test_boxes_alone_train_no_masks(name: str) -> None:
    targets = replace(objects(2, 1), masks=None)
    ours = rf"{name} learns masks, but the data set has boxes only; .*retinanet or gfl"
    other = r"Segmentation learns masks, but the data set has boxes only; .*--task instance-segmentation.*detector"
    with pytest.raises(UserError, match=ours if name in MASKED else other):
        adapted(name)(images(96, 128), targets)


# ---- Classes -----------------------------------------------------------------------------------------------------------


@family
def test_a_teacher_answers_in_the_datas_classes(name: str) -> None:
    """Of four classes in another order, one of which nobody asked for."""
    plain, matched = adapted(name, OTHER_LABELS), adapted(name, OTHER_LABELS)
    assert matched.match(LABELS).is_complete and matched.num_labels == 3 and matched.id2label == LABELS
    plain.within_queries = matched.within_queries = False  # type: ignore[misc] # so that all answers are there to compare
    pictures, new = shaped(plain), {0: 2, 2: 0, 3: 1}
    (before, _), (after, _) = (adapter.predict(pictures, [(96, 128)] * 2) for adapter in (plain, matched))
    with torch.no_grad():
        raw = [adapter(pictures) for adapter in (plain, matched)]
    known = [row for row, label in enumerate(before["labels"].tolist()) if label in new]
    if name not in SOFTMAX:
        assert 0 < len(known) < len(before["labels"])
        for key in ("boxes", "scores"):
            torch.testing.assert_close(after[key], before[key][known])
        assert after["labels"].tolist() == [new[int(before["labels"][row])] for row in known]
    if name in MASKED:
        assert after["masks"] == [before["masks"][row] for row in known]
        return
    ours, theirs = (x.dense.class_logits if name in OURS else x.queries.class_logits for x in raw)
    expected = ours[..., [2, 3, 0]]
    if name in SOFTMAX:  # a tree is no object here
        expected = torch.cat([expected, ours[..., [1, 4]].logsumexp(-1, keepdim=True)], -1)
    torch.testing.assert_close(theirs, expected)
    if name in SOFTMAX and name not in MASK_QUERIES:  # probabilities stay, also those of queries that see a tree
        best, classes = ours[-1, 0].softmax(-1)[:, [2, 3, 0]].max(-1)
        best, order = best.sort(descending=True)
        torch.testing.assert_close(after["scores"], best)
        assert after["labels"].tolist() == classes[order].tolist()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in MASKED])
def test_several_classes_of_a_teacher_stand_for_one(name: str) -> None:
    adapter = adapted(name, OTHER_LABELS)
    pictures = shaped(adapter)
    with torch.no_grad():
        raw = adapter(pictures)
        before = (raw.dense.class_logits if name in OURS else raw.queries.class_logits).clone()
        adapter.match({0: "thing", 1: "person"}, {"thing": ["dog", "car"]})
        raw = adapter(pictures)
    after = raw.dense.class_logits if name in OURS else raw.queries.class_logits
    torch.testing.assert_close(after[..., 1], before[..., 2])
    both = before[..., [0, 3]]  # of classes that exclude each other, probabilities add
    torch.testing.assert_close(after[..., 0], both.logsumexp(-1) if name in SOFTMAX else both.amax(-1))
    found = adapter.predict(pictures, [(96, 128)] * 2)[0]
    pairs = torch.cat([found["boxes"], found["labels"][:, None]], 1)
    # our detectors suppress boxes in the model's own classes
    # masks of two queries may have one box
    assert name in (*OURS, *MASK_QUERIES) or len(pairs.unique(dim=0)) == len(pairs), (
        "a box of two classes is there twice"
    )
    assert set(found["labels"].tolist()) <= {0, 1}


# ---- The frozen teacher ------------------------------------------------------------------------------------------------


@family
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_teacher_gives_constants_in_float32(name: str, dtype: torch.dtype | None) -> None:
    teacher = FrozenTeacher(adapted(name), LABELS, dtype=dtype)
    output = teacher(images(90, 128))  # which it sees at 96 x 128
    assert_levels(teacher.adapter, output, (128, 192) if name in EOMTS else (96, 128))  # type: ignore[arg-type]
    tensors = [*output.features.values(), *output.pyramid.values()]
    for part in (output.dense, output.queries):
        tensors += [value for value in vars(part).values() if isinstance(value, Tensor)] if part else []
    if output.dense is not None:
        tensors += [output.dense.boxes(), *output.dense.tower["class"], *output.dense.tower["box"]]
    assert all(not tensor.requires_grad for tensor in tensors)
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


# ---- Pairs -------------------------------------------------------------------------------------------------------------

OF_ALL = {"features", "pyramid", "boxes", "classes"}
SIGMOID = [name for name in MODELS if name not in (*OURS, *MASKED, *SOFTMAX)]


def offered(student: str, teacher: str) -> set[str]:
    return offered_with_pyramids(student, teacher) - ({"pyramid"} if {"yolos", *EOMTS} & {student, teacher} else set())


def offered_with_pyramids(student: str, teacher: str) -> set[str]:
    if student in MASKED or teacher in MASKED:
        return OF_ALL | ({"final_boxes"} if {student, teacher} <= {*MASKED} else set())
    if student in MASK_QUERIES or teacher in MASK_QUERIES:
        return OF_ALL | ({"mask_queries"} if {student, teacher} <= {*MASK_QUERIES} else set())
    if student in OURS:
        same = {"dense", "tower"} | ({"distributions"} if student == "gfl" else set())
        return OF_ALL | (same if student == teacher else set())
    queries = all(name in SIGMOID for name in (student, teacher)) or all(
        name in SOFTMAX for name in (student, teacher)
    )
    # the tiny D-FINE and DEIMv2 have the same bins
    corners = {student, teacher} <= {"d_fine", "deimv2"}
    return OF_ALL | ({"queries"} if queries else set()) | ({"corners"} if corners else set())


@pytest.fixture(scope="module")
def adapters() -> dict[str, DetectionAdapter]:
    return {name: adapted(name) for name in MODELS}


@pytest.mark.parametrize("student", MODELS)
def test_what_two_families_have_in_common(student: str, adapters: dict[str, DetectionAdapter]) -> None:
    for teacher in MODELS:
        assert adapters[student].offers_with(adapters[teacher]) == offered(student, teacher), teacher


def test_models_of_one_family_need_not_be_alike(adapters: dict[str, DetectionAdapter]) -> None:
    def lost(student: str, **fields) -> set[str]:
        return set(offered(student, student) - adapters[student].offers_with(adapted(student, **fields)))

    assert lost("gfl", reg_max=8) == {"distributions"}
    assert lost("gfl", head_convs=2) == lost("gfl", head_channels=32) == {"tower"}
    assert lost("retinanet", strides=[8, 16, 32, 64]) == {"dense", "tower"}
    assert lost("d_fine", reg_scale=8.0) == lost("d_fine", max_num_bins=16) == {"corners"}
    assert lost("rt_detr", num_queries=20) == set()


# ---- Stages ------------------------------------------------------------------------------------------------------------


@family
def test_depths_count_the_stages_of_the_backbone(name: str) -> None:
    adapter = adapted(name)
    depths, seen = adapter.depths(), set()
    for key, parameter in adapter.model.named_parameters():
        marks = [(f".stages.{i}.", f".layer{i + 1}.") for i in range(4)]
        if name in TOKENS:  # every block is a stage
            blocks = ".layers" if name in EOMTS else "encoder.layer"
            marks = [(f"{blocks}.{i}.",) for i in range(len(adapter.stage_modules()))]
        elif name in MASK_QUERIES:
            parts = ("encoder.swin.encoder.layers", "encoder.model.encoder.layers", "encoder.encoder.stages")
            marks = [tuple(f"pixel_level_module.{part}.{i}." for part in parts) for i in range(4)]
        stage = next((i for i, those in enumerate(marks) if any(mark in f".{key}" for mark in those)), None)
        stem = (".embedder.", "backbone.conv1.", "backbone.bn1.", "model.conv1.", "model.bn1.", ".embeddings.")
        within = stage is not None or any(part in f".{key}" for part in stem)
        assert depths.get(parameter) == (None if not within else 0 if stage is None else stage + 1), key
        seen.add(depths.get(parameter))
    assert seen == {None, *range(len(adapter.stage_modules()) + 1)}


# ---- Image processors --------------------------------------------------------------------------------------------------


def picture(width: int = 150, height: int = 100) -> Image.Image:
    generator = np.random.default_rng(0)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in EOMTS])
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ({"shortest_edge": 64, "longest_edge": 1333}, (64, 96)),
        ({"shortest_edge": 64, "longest_edge": 80}, (53, 80)),
        ({"shortest_edge": None, "square_size": 96}, (96, 96)),
    ],
)
def test_the_saved_processor_shows_what_evaluation_shows(
    name: str, size: dict[str, int], shape: tuple[int, int], tmp_path: Path
) -> None:
    adapter = adapted(name)
    image_processor(adapter, **size).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__.removesuffix("Fast") == adapter.processor_class
    expected = processor(picture(), return_tensors="pt")["pixel_values"]
    sample = {"image": picture(), "boxes": np.zeros((0, 4), np.float32), "classes": np.zeros(0, np.int64)}
    sample |= {"areas": np.zeros(0), "crowd": np.zeros(0, bool)}
    shape = (48, 80) if name == "yolos" and shape == (53, 80) else shape  # whose processor rounds down to patches
    found = BoxEvalTransform(processor)(sample)
    assert found["pixel_values"].shape == (3, *shape) and found["orig_size"].tolist() == [100, 150]
    torch.testing.assert_close(adapter.shown(found["pixel_values"][None]), expected, rtol=0, atol=1e-4)


@family
def test_a_loaded_model_is_shown_what_its_own_processor_shows(name: str, tmp_path: Path) -> None:
    model = tiny_detector(name)
    model.save_pretrained(tmp_path)
    processor = getattr(transformers, build_adapter(model).processor_class)()
    processor.save_pretrained(tmp_path)
    adapter = adapt(type(model).from_pretrained(tmp_path), "instance-segmentation" if name in WITH_MASKS else None)
    plain = (not processor.do_normalize, name in SQUARES and name not in TOKENS)
    assert plain in ((False, False), (True, True))
    assert adapter.image_mean.flatten().tolist() == pytest.approx([0.0] * 3 if plain[0] else processor.image_mean)
    assert adapter.image_std.flatten().tolist() == pytest.approx([1.0] * 3 if plain[0] else processor.image_std)
    edge = None if name in EOMTS else 64
    assert image_processor(adapter, shortest_edge=edge).do_normalize == processor.do_normalize


def test_a_frozen_backbone_is_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_detector("detr")
    build_adapter(model).freeze_unused()
    assert not caplog.records
    model.model.freeze_backbone()
    build_adapter(model).freeze_unused()
    assert "DetrForObjectDetection is frozen" in caplog.text and "unfreeze_backbone()" in caplog.text


# ---- Models of two tasks -----------------------------------------------------------------------------------------------


def test_the_task_says_which_of_its_two_a_model_serves(tmp_path: Path) -> None:
    model = tiny_detector("mask2former")
    model.save_pretrained(tmp_path)
    for task, kind in ((None, Mask2FormerAdapter), ("semantic-segmentation", Mask2FormerAdapter)):
        assert type(adapt(model, task)) is kind and type(load_adapter(str(tmp_path), task=task)) is kind
    adapter = load_adapter(str(tmp_path), task="instance-segmentation")
    assert type(adapter) is Mask2FormerInstanceAdapter and adapter.task == "instance-segmentation"
    assert adapt(adapter, None) is adapter


@pytest.mark.parametrize("name", [name for name in WITH_MASKS if name not in (*MASKED, "mask2former")])
def test_other_models_with_masks_need_no_task(name: str, tmp_path: Path) -> None:
    """Their weights are loaded into the class that they came from."""
    model = tiny_detector(name)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(str(tmp_path), task=None if "mask2former" not in name else "instance-segmentation")
    assert type(adapter.model) is type(model) and adapter.task == "instance-segmentation"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "MaskFormerModel",
            "masks; load the weights with AutoModelForUniversalSegmentation.*--task instance-segmentation",
        ),
        (
            "Mask2FormerModel",
            "masks; load the weights with AutoModelForUniversalSegmentation.*--task instance-segmentation",
        ),
    ],
)
def test_a_model_without_a_head_names_what_to_load(kind: str, words: str) -> None:
    model = tiny_detector(kind.removesuffix("Model").lower())
    with pytest.raises(UserError, match=f"{kind} predicts no {words}"):
        build_adapter(model.model)


# ---- Instances of queries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASK_QUERIES)
def test_instances_of_queries_are_scored_by_class_and_mask(name: str) -> None:
    """By a plain loop; masks are brought from logits to the picture, whatever its size."""
    adapter, (height, width) = adapted(name), (90, 128)
    pictures, sizes = images(height, width), [(50, 75), (200, 301)]
    found = adapter.predict(pictures, sizes)
    with torch.no_grad():
        outputs = adapter.model(seen(adapter, pictures), output_hidden_states=True)
    for picture, (ours, size) in enumerate(zip(found, sizes, strict=True)):
        expected = []
        for logits, classes in zip(
            outputs.masks_queries_logits[picture], outputs.class_queries_logits[picture], strict=True
        ):
            whole = F.interpolate(logits[None, None], scale_factor=4, mode="bilinear")[..., :height, :width]
            whole = F.interpolate(whole, size, mode="bilinear")[0, 0]
            if (whole > 0).any():
                certainty = whole.sigmoid()[whole > 0].mean()
                scores = classes.softmax(-1)[:-1] * certainty
                expected += [(score.item(), label, whole.numpy() > 0) for label, score in enumerate(scores)]
        expected.sort(key=lambda row: -row[0])
        assert QUERIES < len(expected) == len(ours["masks"])
        torch.testing.assert_close(ours["scores"], torch.tensor([row[0] for row in expected]))
        assert ours["labels"].tolist() == [row[1] for row in expected]
        for rle, box, (*_, mask) in zip(ours["masks"], ours["boxes"].tolist(), expected, strict=True):
            assert np.array_equal(decode(rle), mask)
            rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
            assert box == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("name", ["mask2former", "maskformer", "eomt"])
def test_the_processors_find_much_the_same_instances(name: str) -> None:
    """They bring masks to another size first, see `MaskQueryAdapter`."""
    adapter, size = adapted(name), (128, 192)
    picture = images(128, 192)[:1]
    (found,) = adapter.predict(picture, [size])
    with torch.no_grad():
        outputs = adapter.model(seen(adapter, picture), output_hidden_states=True)
    processor = getattr(transformers, adapter.processor_class)(**adapter.processor_options(None))
    maps = {} if name == "eomt" else {"return_binary_maps": True}
    (theirs,) = processor.post_process_instance_segmentation(outputs, target_sizes=[size], threshold=0.0, **maps)
    ours = {
        (round(score, 2), label)
        for score, label in zip(found["scores"].tolist(), found["labels"].tolist(), strict=True)
    }
    for place, segment in enumerate(theirs["segments_info"]):
        near = [
            score for score, label in ours if label == segment["label_id"] and abs(score - segment["score"]) < 0.03
        ]
        assert near, segment
        if maps:
            mask = theirs["segmentation"][place].numpy() > 0
            overlaps = [(decode(rle) & mask).sum() / (decode(rle) | mask).sum() for rle in found["masks"]]
            assert max(overlaps) > 0.85
    assert len(theirs["segments_info"]) > QUERIES / 2


def test_a_query_without_a_mask_finds_nothing() -> None:
    adapter = adapted("mask2former")
    classes, masks = torch.zeros(2, 4), torch.full((2, 8, 8), -5.0)
    masks[1, 2:4, 3:7] = 5.0
    found = adapter.instances(classes, masks, (32, 32), (32, 32))
    assert found["scores"].shape == (3,) and sorted(found["labels"].tolist()) == [0, 1, 2]
    assert (found["boxes"] - torch.tensor([12.0, 8, 28, 16])).abs().max() <= 2
    nothing = adapter.instances(classes, masks - 10, (32, 32), (32, 32))
    assert nothing["boxes"].shape == (0, 4) and len(nothing["scores"]) == len(nothing["labels"]) == 0
    assert nothing["masks"] == []


@pytest.mark.parametrize("name", EOMTS)
def test_eomt_sets_pictures_in_a_corner_of_its_square(name: str, tmp_path: Path) -> None:
    adapter = adapted(name)
    image_processor(adapter, shortest_edge=192, longest_edge=192).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    sample = {"image": picture(), "boxes": np.zeros((0, 4), np.float32), "classes": np.zeros(0, np.int64)}
    sample |= {"areas": np.zeros(0), "crowd": np.zeros(0, bool)}
    shown = BoxEvalTransform(processor)(sample)["pixel_values"][None]
    assert shown.shape == (1, 3, 128, 192)
    expected = processor(picture(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen(adapter, shown), expected, rtol=0, atol=0.02)
    mask = torch.ones(1, 128, 192, dtype=torch.bool)
    mask[:, :, 160:] = False
    black = adapter.on_canvas(adapter.shown(shown, mask), mask)
    assert (
        torch.equal(black[..., :160], seen(adapter, shown)[..., :160])
        and (black[..., 160:] == black[..., -1:, -1:]).all()
    )


def test_eomt_refuses_other_sizes() -> None:
    adapter = adapted("eomt")
    remedy = r"image_size: 192 and image_longest: 192 .*--image_size 192 --image_longest 192"
    for size in ((192, 224), (224, 96)):
        with pytest.raises(UserError, match=rf"at most 192 x 192 pixels, not {size[0]} x {size[1]}.*{remedy}"):
            adapter.check_size(size)
        with pytest.raises(UserError, match=remedy):
            adapter(images(*size))
    for options in (
        {"shortest_edge": 192},
        {"shortest_edge": 64, "longest_edge": 192},
        {"shortest_edge": 192, "square_size": 192},
    ):
        with pytest.raises(UserError, match=remedy):
            image_processor(adapter, **options)
    adapter.check_size((96, 192))
    assert adapter.size_as_teacher((800, 1333)) == (112, 192) and adapter.size_as_teacher((64, 96)) == (128, 192)


def test_semantic_classes_of_shared_families_stay_segmenters() -> None:
    """A DETR with a mask head predicts label maps of no kind that is here."""
    config = transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, layer_type="basic"),
        backbone=None, use_timm_backbone=False, use_pretrained_backbone=False, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
    )  # fmt: skip
    with pytest.raises(
        UserError, match="DetrModel predicts no boxes; load the weights with AutoModelForObjectDetection"
    ):
        build_adapter(transformers.DetrModel(config))
