"""What every loss promises for detectors, and BCD's calibration on boxes. Values: test_detection_values.py."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from adapters.adapter_tiny_detectors import MODELS, WITH_MASKS, objects, tiny_detector
from adapters.adapter_tiny_models import images
from host_sync import no_host_synchronisation
from torch import Tensor

from hf_bcd.adapters import FrozenTeacher, build_adapter
from hf_bcd.losses import build_criterion
from hf_bcd.losses.bcd import regions_of
from hf_bcd.losses.boundary import boundary_strength
from hf_bcd.losses.query_kd import match_queries
from hf_bcd.losses.recipe import OFFERED_BY_ALL
from hf_bcd.outputs import DenseOutput, FeatureSpec, Objects
from hf_bcd.utils.masks import pack
from hf_bcd.utils.messages import UserError


# ---- What every loss promises, on models -------------------------------------------------------------------------------

HEADS = {
    "pkd": {"features": "pyramid", "levels": ["p3", "p4", "p5", "p6"]},
    "fgd": {"features": "pyramid", "levels": ["p3", "p4"], "on": "boxes"},
    "gid": {},
    "crosskd": {"on": "tower"},
    "skd": {"features": "pyramid", "level": "p4", "on": "boxes"},
    "sstkd": {"level": "stride_8", "on": "boxes", "intensity_levels": 8},
    "bcd": {"channels": 8, "reduced_channels": 4},
}
DECODER = {"query_kd": {"least_score": 1e-3}, "pkd": {"features": "pyramid", "levels": ["p5"]}}
PAIRS = {
    "gfl": ("gfl", "gfl", HEADS | {"ld": {}}),
    "retinanet": ("retinanet", "retinanet", HEADS),
    "d_fine": ("d_fine", "d_fine", DECODER | {"ddf": {"least_score": 1e-3}}),
    "rt_detr": ("rt_detr", "rt_detr_v2", DECODER),
    "detr": ("detr", "detr", DECODER),
    "mask2former": (
        "mask2former",
        "mask2former",
        {
            "query_kd": {"least_score": 1e-3, "on": "masks"},
            "pkd": HEADS["pkd"] | {"levels": ["p2", "p5"]},
            "bcd": HEADS["bcd"],
        },
    ),
    "mask_rcnn": (
        "mask_rcnn",
        "cascade_mask_rcnn",
        {
            "gid": {"on": "boxes"},
            "skd": {"features": "pyramid", "level": "p4", "on": "features"},
            "sstkd": {"level": "stride_8", "on": "features", "intensity_levels": 8},
        },
    ),
    "masks across": ("mask_rcnn", "mask2former", {"bcd": HEADS["bcd"], "pkd": {}, "fgd": {"on": "boxes"}}),
    "across": ("gfl", "d_fine", {"bcd": HEADS["bcd"], "pkd": DECODER["pkd"], "fgd": HEADS["fgd"]}),
}
CASES = [(pair, name) for pair, (_, _, losses) in PAIRS.items() for name in losses]
# the teacher's boundary map is hard and connectors of both are their own; or the teacher is of another family
NOT_ZERO = {
    case for case in CASES if case[1] == "bcd" or case[0] in ("across", "masks across", "mask_rcnn", "rt_detr")
}
# terms that are 0 without objects
EMPTY = {"ld": {"main", "vlr", "classes"}, "fgd": {"foreground"}}


class Case:
    """A student in training mode, another model of the same kind as its frozen teacher, and one loss between them."""

    def __init__(self, pair: str, name: str, same: bool = False, options: dict | None = None) -> None:
        ours, theirs, losses = PAIRS[pair]
        task = "instance-segmentation" if ours in WITH_MASKS else None
        self.student = build_adapter(tiny_detector(ours), task=task).train()
        teacher = tiny_detector(theirs)
        if not same:
            with torch.no_grad():
                for parameter in teacher.parameters():
                    # D-FINE's boxes are small, and must overlap the student's
                    parameter.add_((1e-3 if pair == "d_fine" else 0.05) * torch.randn_like(parameter))
        self.teacher = FrozenTeacher(build_adapter(teacher, task=task), self.student.id2label)
        offers = OFFERED_BY_ALL | self.student.offers_with(self.teacher.adapter)
        pyramids = self.student.pyramid_specs, self.teacher.adapter.pyramid_specs
        self.criterion = build_criterion(
            {name: losses[name] | (options or {})}, self.student.feature_specs, self.teacher.feature_specs, num_labels=3, seed=0,
            offers=offers, pyramids=pyramids,
        )  # fmt: skip
        self.name, self.pixel_values = name, images(64, 96)

    def outputs(self, targets: Objects) -> tuple[DenseOutput, DenseOutput]:
        return self.student(self.pixel_values, targets), self.teacher(self.pixel_values)

    def terms(self, ours: DenseOutput, theirs: DenseOutput, targets: Objects) -> dict[str, Tensor]:
        _, terms = self.criterion(ours.task_losses, ours, theirs, targets)
        return {key.removeprefix(f"{self.name}/"): value for key, value in terms.items() if key != "loss_task"}


each_case = pytest.mark.parametrize(("pair", "name"), CASES)


def truth(*counts: int) -> Objects:
    return objects(*counts, size=(64, 96), masks=True)


@each_case
def test_the_student_learns_and_the_teacher_does_not(pair: str, name: str) -> None:
    case, targets = Case(pair, name), truth(3, 2)
    ours, theirs = case.outputs(targets)
    terms = case.terms(ours, theirs, targets)
    assert all(value.ndim == 0 and value.isfinite() and value.requires_grad for value in terms.values())
    assert sum(value.item() for value in terms.values()) > 0 and min(value.item() for value in terms.values()) >= 0
    sum(terms.values()).backward()
    parameters = dict(case.student.model.named_parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())
    assert all(p.grad.isfinite().all() for p in parameters.values() if p.grad is not None)
    connectors = [p for p in case.criterion.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in connectors)
    assert all(p.grad is None for p in case.teacher.parameters())


@pytest.mark.parametrize(("pair", "name"), [case for case in CASES if case not in NOT_ZERO])
def test_nothing_is_left_where_the_student_is_the_teacher(pair: str, name: str) -> None:
    case, targets = Case(pair, name, same=True), truth(3, 2)
    case.student.eval()
    ours = case.student(case.pixel_values, targets)
    if ours.queries is not None:  # every layer is compared with the teacher's last one
        for key in ("class_logits", "boxes", "corners", "masks"):
            value = getattr(ours.queries, key)
            setattr(ours.queries, key, None if value is None else value[-1:])
    terms = case.terms(ours, case.teacher(case.pixel_values), targets)
    if name == "query_kd" and pair != "detr":  # cross-entropy of sigmoids with themselves, as officially
        for term in ("masks", "dice") if pair == "mask2former" else ("classes",):
            terms.pop(term)
    # a deviation's epsilon moves each of a thousand boxes a little
    tolerance = 1e-2 if (pair, name) == ("retinanet", "crosskd") else 2e-5
    for term, value in terms.items():
        assert value.item() == pytest.approx(0, abs=tolerance), term


@each_case
@pytest.mark.parametrize("counts", [(2, 0), (0, 0)])
def test_pictures_without_objects_cost_something_finite(pair: str, name: str, counts: tuple[int, int]) -> None:
    case, targets = Case(pair, name), truth(*counts)
    ours, theirs = case.outputs(targets)
    terms = case.terms(ours, theirs, targets)
    assert all(value.isfinite() and value.requires_grad for value in terms.values())
    sum(terms.values()).backward()
    grads = [p.grad for p in [*case.student.parameters(), *case.criterion.parameters()] if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)
    if counts == (0, 0):
        assert {term for term, value in terms.items() if value.item() == 0} >= EMPTY.get(name, set())


@each_case
def test_maths_is_float32_under_autocast(pair: str, name: str) -> None:
    case, targets = Case(pair, name), truth(3, 2)
    with torch.no_grad():
        ours, theirs = case.outputs(targets)
        expected = case.terms(ours, theirs, targets)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = case.terms(ours, theirs, targets)
    for term, value in found.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[term], rtol=1e-6, atol=0)


WAITS = {"query_kd": "matching runs on the CPU", "ddf": "matching runs on the CPU"}
# finding the final boxes of two stages waits as well, see the docstring of GIDLoss


@pytest.mark.parametrize(
    ("pair", "name"), [case for case in CASES if case[1] not in WAITS and case != ("mask_rcnn", "gid")]
)
def test_no_loss_waits_for_the_device(pair: str, name: str) -> None:
    case, targets = Case(pair, name), truth(3, 0)
    ours, theirs = case.outputs(targets)
    if name == "bcd":
        case.criterion.calibrate([(theirs, targets)])
    case.terms(ours, theirs, targets)  # tables that are built once
    with no_host_synchronisation():
        sum(case.terms(ours, theirs, targets).values()).backward()


@pytest.mark.parametrize("name", WAITS)
def test_matching_waits_as_its_docstring_says(name: str) -> None:
    case, targets = Case("d_fine", name), truth(3, 2)
    ours, theirs = case.outputs(targets)
    with pytest.raises(RuntimeError, match="waits for the device"), no_host_synchronisation():
        case.terms(ours, theirs, targets)
    assert "waits for the device" in match_queries.__doc__


def test_padding_adds_nothing_to_features() -> None:
    """Whatever the maps hold where nothing is."""
    case = Case("gfl", "fgd")
    mask = torch.ones(2, 64, 96, dtype=torch.bool)
    mask[1, 32:], mask[1, :, 64:] = False, False
    targets = objects(2, 1, size=(64, 96), mask=mask)
    with torch.no_grad():
        ours, theirs = case.outputs(targets)
        before = case.terms(ours, theirs, targets)
        noise = 100 * torch.randn(theirs.pyramid["p3"][1].shape)
        void = ~targets.valid((8, 12))[1]
        for output in (ours, theirs):
            output.pyramid["p3"][1] += noise * void
        after = case.terms(ours, theirs, targets)
    for term, value in before.items():
        torch.testing.assert_close(after[term], value, rtol=1e-4, atol=1e-6, msg=term)


# ---- Which features a loss gets, and what is refused -------------------------------------------------------------------


def test_a_recipe_chooses_stages_or_pyramid() -> None:
    stages, neck = {"stride_8": FeatureSpec(4, 8)}, {"p3": FeatureSpec(6, 8)}
    ours, theirs = (
        DenseOutput({"stride_8": torch.randn(1, 4, 4, 4)}, None, pyramid={"p3": torch.randn(1, 6, 4, 4)})
        for _ in range(2)
    )
    task, offers = {"loss_task": torch.zeros(())}, OFFERED_BY_ALL | {"pyramid"}
    values = {}
    for name, pyramid in (("backbone", False), ("pyramid", True)):
        options = {"fitnet": {"features": name}}
        criterion = build_criterion(options, stages, stages, num_labels=3, offers=offers, pyramids=(neck, neck))
        (projection,) = (module for module in criterion.modules() if isinstance(module, torch.nn.Conv2d))
        assert projection.in_channels == (6 if pyramid else 4)
        total, _ = criterion(task, ours, theirs, truth(1))
        levels = [x.pyramid["p3"] if pyramid else x.features["stride_8"] for x in (ours, theirs)]
        values[name] = (total.item(), F.mse_loss(*levels).item())
    assert values["backbone"][0] != pytest.approx(values["pyramid"][0])
    ratios = [total / plain for total, plain in values.values()]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)
    with pytest.raises(UserError, match="choose backbone or pyramid"):
        build_criterion({"fitnet": {"features": "neck"}}, stages, stages, num_labels=3)
    with pytest.raises(UserError, match=r"levels of a detector's neck"):
        build_criterion({"fitnet": {"features": "pyramid"}}, stages, stages, num_labels=3)


@pytest.mark.parametrize(
    ("student", "teacher", "loss", "words"),
    [
        ("retinanet", "retinanet", {"ld": {}}, "distributions.*which GFL has"),
        ("gfl", "retinanet", {"gid": {}}, "which two RetinaNets or two GFLs have"),
        ("gfl", "rt_detr", {"crosskd": {"on": "tower"}}, "as many and as wide in both"),
        ("rt_detr", "detr", {"query_kd": {}}, "of the DETR kind"),
        ("rt_detr", "d_fine", {"ddf": {}}, "D-FINE's distributions on one scale"),
        ("gfl", "gfl", {"kd": {}}, "scores of each pixel"),
        ("gfl", "gfl", {"bcd": {"teacher_head": "logits"}}, "of each pixel"),
    ],
)
def test_what_a_pair_cannot_have_is_refused_with_what_it_can(
    student: str, teacher: str, loss: dict, words: str
) -> None:
    ours, theirs = (build_adapter(MODELS[name]()) for name in (student, teacher))
    with pytest.raises(UserError, match=rf"{words}.*or another loss: .*pkd"):
        build_criterion(
            loss,
            ours.feature_specs,
            theirs.feature_specs,
            num_labels=3,
            offers=OFFERED_BY_ALL | ours.offers_with(theirs),
        )


# ---- BCD on boxes ------------------------------------------------------------------------------------------------------


def test_bcd_is_calibrated_by_outlines_of_boxes() -> None:
    """The readout is the first principal component; as many positions are a boundary as near an outline."""
    case, targets = Case("gfl", "bcd"), objects(3, 2, size=(64, 96))
    loss = case.criterion.losses["bcd"]
    outputs = [case.teacher(case.pixel_values), case.teacher(images(64, 96).flip(-1))]
    assert loss.needs_calibration
    case.criterion.calibrate([(output, targets) for output in outputs])
    assert not loss.needs_calibration

    features = [loss.teacher_head(output.features, (8, 12)) for output in outputs]
    rows = torch.cat([x.movedim(1, -1).flatten(0, 2) for x in features]).double()
    centred = rows - rows.mean(0)
    component = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    readout = loss.teacher_head.readout.weight.flatten().double()
    assert abs(float(component @ readout)) == pytest.approx(1, abs=1e-4)

    regions, near = targets.regions((8, 12)), 0
    for b, i, j in itertools.product(range(2), range(8), range(12)):
        near += any(
            regions[b, y, x] != regions[b, i, j]
            for y in range(max(0, i - 3), min(8, i + 4))
            for x in range(max(0, j - 3), min(12, j + 4))
            if (y - i) ** 2 + (x - j) ** 2 < 9
        )
    assert 0 < near < 192
    mask = torch.ones(2, 8, 12, dtype=torch.bool)
    strengths = torch.cat(
        [boundary_strength(loss.teacher_head.boundary_field(x), loss.radius, mask).flatten() for x in features]
    )
    maps = torch.cat([loss.teacher_boundary(o, x, mask) for o, x in zip(outputs, features, strict=True)])
    theta = loss.teacher_head.theta
    assert maps.sum() == (strengths > theta).sum()
    # neighbours of one strong position are equally strong
    assert (strengths > theta).sum() <= 2 * near <= (strengths >= theta).sum()


def masked(targets: Objects, grow: int = 0) -> Objects:
    """The same objects with masks: discs in their boxes, or `grow` pixels beyond."""
    (height, width), packed = targets.size, []
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for boxes in targets.boxes:
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 + grow
        away = ((x - centre[:, 0, None, None]) / half[:, 0, None, None]) ** 2 + (
            (y - centre[:, 1, None, None]) / half[:, 1, None, None]
        ) ** 2
        packed.append(pack(away < 1))
    return replace(targets, masks=packed)


@pytest.mark.parametrize("kind", ["instances", "classes"])
def test_bcd_takes_the_boundaries_of_masks(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of the teacher where it finds any, so that no truth is needed; its readout is fitted to them."""
    truth_of_it, found = objects(3, 2, size=(64, 96)), masked(objects(2, 4, size=(64, 96)))
    outputs = {}
    for name, (targets, answers) in {
        "boxes": (truth_of_it, None), "masks": (masked(truth_of_it), None), "teacher": (truth_of_it, found),
        "teacher, other truth": (objects(5, 1, size=(64, 96)), found), "teacher's as truth": (found, None),
    }.items():  # fmt: skip
        case = Case("gfl", "bcd", options={"boundary_regions": kind})
        loss = case.criterion.losses["bcd"]
        case.criterion.calibrate([(replace(case.teacher(case.pixel_values), answers=answers), targets)])
        outputs[name] = torch.cat([loss.teacher_head.readout.weight.flatten(), loss.teacher_head.theta.view(1)])
    assert torch.equal(outputs["teacher"], outputs["teacher, other truth"])
    assert torch.equal(outputs["teacher"], outputs["teacher's as truth"])
    names = ("boxes", "masks", "teacher")
    nothing = Objects(
        [torch.zeros(0, 4)] * 2,
        [torch.zeros(0, dtype=torch.long)] * 2,
        (64, 96),
        3,
        masks=[torch.zeros(0, 64, 12, dtype=torch.uint8)] * 2,
    )
    case = Case("gfl", "bcd", options={"boundary_regions": kind})
    case.criterion.calibrate([(replace(case.teacher(case.pixel_values), answers=nothing), masked(truth_of_it))])
    assert torch.equal(case.criterion.losses["bcd"].teacher_head.readout.weight.flatten(), outputs["masks"][:-1])
    assert "the teacher is sure of no object" in caplog.text
    assert not any(torch.equal(outputs[a], outputs[b]) for a, b in itertools.combinations(names, 2))


def test_regions_are_instances_or_classes() -> None:
    targets = masked(objects(6, 0, size=(64, 96)))
    output = DenseOutput({}, None)
    instances, real = regions_of(output, targets, (16, 24))
    classes, _ = regions_of(output, targets, (16, 24), "classes")
    assert (
        real and torch.equal(instances, targets.regions((16, 24))) and instances[0].max() > 3 and not classes[1].any()
    )
    ids = torch.cat([torch.zeros(1, dtype=torch.long), targets.classes[0] + 1])
    assert torch.equal(classes[0], ids[instances[0]])
    assert not regions_of(output, objects(2, 2), (16, 24))[1]


def test_r_of_t_counts_epochs() -> None:
    case, found = Case("gfl", "bcd"), []
    for epoch in range(1, 13):
        case.criterion.set_decay(epoch, 12)
        found.append(round(float(case.criterion.decay), 6))
    assert found == [
        1, 0.916667, 0.833333, 0.75, 0.666667, 0.583333, 0.5, 0.416667, 0.333333, 0.25, 0.166667, 0.083333,
    ]  # fmt: skip
