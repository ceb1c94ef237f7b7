import dataclasses
import math
from typing import Any

import loss_references as reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import dense_output, outputs_of, pair_of, randn, random_labels

from hf_bcd.losses import BCDLoss, context_distillation_loss
from hf_bcd.losses.boundary import score_boundary_loss, score_changes
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps


NUM_LABELS = 4
# four levels with a dilated last stage against five that go down to stride 32
STUDENT = {f"stride_{s}": FeatureSpec(c, min(s, 16)) for s, c in ((4, 4), (8, 6), (16, 8), (32, 10))}
TEACHER = {"stem": FeatureSpec(5, 4)} | {
    f"stride_{s}": FeatureSpec(c, s) for s, c in ((4, 8), (8, 16), (16, 24), (32, 32))
}
KINDS = pytest.mark.parametrize(
    ("mode", "teacher_head"),
    [("stable", "calibrated"), ("stable", "orthogonal"), ("stable", "logits"), ("paper", "calibrated")],
)


def make_loss(mode: Any = "stable", teacher_head: Any = "calibrated", seed: int = 0, **options: Any) -> BCDLoss:
    torch.manual_seed(0)
    pair = pair_of(STUDENT, TEACHER, NUM_LABELS, seed=seed)
    loss = BCDLoss(pair, mode=mode, teacher_head=teacher_head, channels=16, reduced_channels=8, **options)
    loss.teacher_head.theta.fill_(1.5)
    return loss


def make_batch(size: int = 64, seed: int = 0) -> tuple[DenseOutput, DenseOutput, LabelMaps]:
    labels = random_labels(2, size, size, num_labels=NUM_LABELS, seed=seed)
    labels[:, : size // 2, : size // 4] = 255
    student, teacher, _ = outputs_of(STUDENT, TEACHER, size=size, num_labels=NUM_LABELS, seed=seed)
    return student, teacher, LabelMaps(labels, NUM_LABELS)


def aggregate(
    features: dict[str, torch.Tensor], state: dict[str, torch.Tensor], prefix: str, size: int
) -> torch.Tensor:
    levels = []
    for name, feature in features.items():
        weight, bias = (state[f"{prefix}.aggregate.reduce.{name}.{key}"] for key in ("weight", "bias"))
        reduced = F.conv2d(feature.double(), weight.double(), bias.double())
        levels.append(F.interpolate(reduced, size=(size, size), mode="bilinear", align_corners=False))
    weight, bias = (state[f"{prefix}.aggregate.fuse.{key}"].double() for key in ("weight", "bias"))
    return F.conv2d(torch.cat(levels, dim=1), weight, bias, padding=1)


def norm_relu(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    seen = x.movedim(1, -1)[mask]
    return F.relu((x - seen.mean(dim=0)[:, None, None]) / (seen.std(dim=0, correction=0) + 1e-5)[:, None, None])


@KINDS
@torch.no_grad()
def test_terms_equal_plain_loops(mode, teacher_head):
    loss, (student, teacher, targets) = make_loss(mode, teacher_head), make_batch()
    loss.boundary_temperature.value.fill_(1.5)
    loss.context_temperature.value.fill_(2.0)
    actual = loss(student, teacher, targets)
    assert set(actual) == set(BCDLoss.weights)
    assert all(x.dtype == torch.float32 and x.shape == () for x in actual.values())

    state = loss.state_dict()
    mask = (targets.ids != 255)[:, 4::8, 4::8]  # the pixel under the centre of each stride-8 position
    s, t = (aggregate(o.features, state, f"{p}_head", 8) for o, p in ((student, "student"), (teacher, "teacher")))
    if teacher_head == "logits":
        grid = teacher.logits.shape[-2:]
        seen = targets.valid(grid).numpy()
        small = F.interpolate(student.logits, grid, mode="bilinear"), teacher.logits
        boundary = reference.score_boundary(*(x.double().numpy() for x in small), seen, seen.astype(float))
    else:
        z_student, z_teacher = (
            (x * state[f"{p}_head.readout.weight"]).sum(dim=1) + state[f"{p}_head.readout.bias"]
            for x, p in ((s, "student"), (t, "teacher"))
        )
        values = z_student[mask]
        z_student = (z_student - values.mean()) / (values.std(correction=0) + 1e-5)
        fields = z_student.numpy(), (z_teacher / (1 + 1e-5)).numpy(), mask.numpy()
        boundary = reference.boundary_loss(*fields, radius=3, theta=1.5, kappa=0.5, tau=1.5, mode=mode)
    if mode == "paper":
        s = norm_relu(F.conv2d(norm_relu(s, mask), state["student_relation.predictor.weight"].double()), mask)
        context = reference.literal_context_loss(s.numpy(), norm_relu(t, mask).numpy(), mask.numpy(), 2.0)
    else:
        context = reference.context_loss(s.numpy(), t.numpy(), mask.numpy(), 2.0)
    assert actual["boundary"].item() == pytest.approx(boundary, rel=1e-4)
    assert actual["context"].item() == pytest.approx(context, rel=1e-4)
    assert boundary > 1e-3 and context > 1e-3


def test_changes_of_scores_by_hand():
    scores = torch.tensor([[[[7.0, 7.0, 8.0, 50.0]], [[3.0, 3.0, 3.0, 0.0]]]])
    mask = torch.tensor([[[True, True, True, False]]])
    weights = [1.0, 1.0, math.e]  # of the first class around the middle; the second is level everywhere
    middle = sum(w / sum(weights) * math.log(3 * w / sum(weights)) for w in weights)
    right = sum(w / (1 + math.e) * math.log(2 * w / (1 + math.e)) for w in weights[1:])
    assert score_changes(scores, mask)[0, 0].tolist() == pytest.approx([0, middle, right, 0], abs=1e-6)
    assert score_changes(scores[..., :3] - 5)[0, 0].tolist() == pytest.approx([0, middle, right], abs=1e-6)


def test_the_border_of_the_void_is_no_boundary():
    loss, (_, teacher, targets) = make_loss(teacher_head="logits"), make_batch()
    targets.ids[:] = 0
    targets.ids[:, :, 32:] = 255
    teacher.logits = 10 * F.one_hot((targets.ids > 0)[:, ::4, ::4].long(), NUM_LABELS).movedim(-1, 1).float()
    mask = (targets.ids != 255)[:, 4::8, 4::8]
    features = loss.teacher_head(teacher.features, (8, 8))
    assert not loss.teacher_boundary(teacher, features, mask).any()
    assert loss.teacher_boundary(teacher, features, torch.ones_like(mask)).any()


@pytest.mark.parametrize("teacher_head", ["calibrated", "logits"])
def test_the_teachers_output_may_have_any_resolution_and_a_size_that_no_stride_divides(teacher_head):
    targets = LabelMaps(random_labels(2, 37, 50, num_labels=NUM_LABELS), NUM_LABELS)
    student = dense_output(STUDENT, 2, 32, NUM_LABELS, seed=1)
    teacher = dense_output(TEACHER, 2, 64, NUM_LABELS, seed=2)
    terms = make_loss(teacher_head=teacher_head)(student, teacher, targets)
    assert all(torch.isfinite(x) for x in terms.values())


def test_a_teacher_run_under_inference_mode_is_accepted():
    loss, (student, _, targets) = make_loss(), make_batch()
    with torch.inference_mode():
        teacher = dense_output(TEACHER, 2, 64, NUM_LABELS, seed=500)
    loss.calibrate([(teacher, targets)], num_steps=2)
    loss(student, teacher, targets)["boundary"].backward()
    assert student.features["stride_4"].grad is not None


def test_boundaries_among_scores_reach_the_scores_and_weigh_classes():
    loss, (student, teacher, targets) = make_loss(teacher_head="logits"), make_batch()
    student.logits.requires_grad_()
    found = loss(student, teacher, targets)["boundary"]
    (gradient,) = torch.autograd.grad(found, student.logits)
    assert gradient.abs().sum(1).bool().any() and loss.weights == {"boundary": 1.0, "context": 1.0}
    weights = torch.tensor([0.0, 0.0, 3.0, 0.0])
    weighed = loss(student, teacher, dataclasses.replace(targets, class_weights=weights))["boundary"]
    only = LabelMaps(torch.where(targets.ids == 2, 2, 255), NUM_LABELS).valid(teacher.logits.shape[-2:])
    mask = targets.valid(teacher.logits.shape[-2:])
    expected = score_boundary_loss(student.logits, teacher.logits, mask=mask, weights=only.float())
    torch.testing.assert_close(weighed, expected)
    assert abs(float(weighed.detach()) - float(found.detach())) > 1e-3


def test_targets_count_by_their_void_only():
    loss, (student, teacher, targets) = make_loss(), make_batch()
    ids, void = targets.ids, targets.ids == 255
    expected = loss(student, teacher, targets)
    other = LabelMaps(torch.where(void, ids, (ids + 1) % NUM_LABELS), NUM_LABELS)
    assert loss(student, teacher, other) == expected
    assert loss(student, teacher, LabelMaps(torch.where(void, 7, ids), NUM_LABELS, ignore_index=7)) == expected


# --- calibration, temperature, state ----------------------------------------------------------------------------------


def test_which_heads_need_calibration():
    _, teacher, targets = make_batch()
    assert not make_loss(teacher_head="logits").needs_calibration
    for kind in ("calibrated", "orthogonal"):
        loss = make_loss(teacher_head=kind)
        readout = loss.teacher_head.readout.weight.clone()
        assert loss.needs_calibration
        loss.calibrate([(teacher, targets)], num_steps=3)
        assert not loss.needs_calibration
        assert torch.equal(readout, loss.teacher_head.readout.weight) == (kind == "orthogonal")
        restored = make_loss(teacher_head=kind, seed=4)
        restored.load_state_dict(loss.state_dict())
        assert not restored.needs_calibration


@pytest.mark.parametrize("radius", [2, 3])
def test_calibration_sets_theta_to_the_share_of_the_teachers_own_boundaries(radius):
    loss, (_, teacher, targets) = make_loss(radius=radius), make_batch()
    teacher.logits = F.interpolate(randn(2, NUM_LABELS, 3, 3, dtype=torch.float32), (16, 16), mode="nearest")
    loss.calibrate([(teacher, targets)], num_steps=3)
    mask = (targets.ids != 255)[:, 4::8, 4::8]
    marked = loss.teacher_boundary(teacher, loss.teacher_head(teacher.features, (8, 8)), mask)[mask]
    classes = F.interpolate(teacher.logits, (8, 8), mode="bilinear").argmax(dim=1)
    expected = [reference.class_boundary(c.numpy(), m.numpy(), radius) for c, m in zip(classes, mask, strict=True)]
    share = np.stack(expected)[mask.numpy()].mean()
    assert 0.2 < share < 0.98
    assert marked.mean().item() == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(("mode", "teacher_head"), [("stable", "calibrated"), ("paper", "calibrated")])
@pytest.mark.parametrize("counted", [slice(0, 2), slice(0, 1)], ids=["both", "second void"])
def test_temperature_statistics(mode, teacher_head, counted):
    loss, (student, teacher, targets) = make_loss(mode, teacher_head), make_batch()
    targets.ids[0, : 3 * 8] = 255  # so that the images differ in their numbers of rows
    targets.ids[counted.stop :] = 255
    loss.boundary_temperature.value.fill_(1.5)
    loss.context_temperature.value.fill_(2.0)
    loss(student, teacher, targets)
    observed, counts = [], []
    for temperature in (loss.boundary_temperature, loss.context_temperature):
        assert temperature._observed is not None
        total, count = temperature._observed.tolist()
        observed.append(total / count)
        counts.append(count)
    mask = (targets.ids != 255)[:, 4::8, 4::8]
    features = loss.teacher_head(teacher.features, (8, 8))
    hard = loss.teacher_boundary(teacher, features, mask).numpy()[counted]
    rows = mask.sum(dim=(1, 2)).tolist()[counted]
    # one softmax an image in space, one a position in relations; ranges are one an image
    assert counts == [len(rows), len(rows) if mode == "paper" else sum(rows)]
    t, mask = features.double()[counted], mask[counted]
    if mode == "paper":
        ranges = [h[m].max() - h[m].min() for h, m in zip(hard, mask.numpy(), strict=True)]
        assert observed[0] == pytest.approx(np.mean(ranges) / 1.5, rel=1e-5)
        relu = norm_relu(t, mask).numpy()
        grams = [x.reshape(16, -1).T @ x.reshape(16, -1) / 4 for x in relu]
        peaks = [g.diagonal()[m.reshape(-1)].max() for g, m in zip(grams, mask.numpy(), strict=True)]
        assert observed[1] == pytest.approx(np.mean(peaks) / 2, rel=1e-5)
    else:
        peaks = [reference.softmax(h[m] / 1.5).max() for h, m in zip(hard, mask.numpy(), strict=True)]
        assert observed[0] == pytest.approx(np.mean(peaks), rel=1e-5)
        pairs = [(reference.layer_norm(x), m.reshape(-1)) for x, m in zip(t.numpy(), mask.numpy(), strict=True)]
        peaks = [reference.relation(x, x, m, 2.0)[1] for x, m in pairs]
        assert observed[1] == pytest.approx(np.average(peaks, weights=rows), rel=1e-5)


def test_a_temperature_below_one_sharpens_relations_without_shrinking_the_loss():
    cold, (student, teacher, targets) = make_loss(temperature=0.5), make_batch()
    mask = (targets.ids != 255)[:, 4::8, 4::8]
    s, t = cold.student_head.aggregate(student.features, (8, 8)), cold.teacher_head(teacher.features, (8, 8))
    relation = context_distillation_loss(s, t, tau=0.5, mask=mask)
    torch.testing.assert_close(cold(student, teacher, targets)["context"], relation / 0.5**2)


@KINDS
def test_inspect_shows_what_is_compared(mode, teacher_head):
    loss, (student, teacher, targets) = make_loss(mode, teacher_head), make_batch()
    shown = loss.inspect(student, teacher, targets.size)
    assert shown["teacher_features"].shape == shown["student_features"].shape == (2, 16, 8, 8)
    if teacher_head == "logits":
        for name, output in {"teacher": teacher, "student": student}.items():
            assert (
                torch.equal(shown[f"{name}_boundary"], score_changes(output.logits))
                and shown[f"{name}_boundary"].max() > 0
            )
    else:
        assert shown["teacher_boundary"].shape == shown["student_boundary"].shape == (2, 8, 8)
        assert set(shown["teacher_boundary"].unique().tolist()) <= {0.0, 1.0}
        assert 0 <= shown["student_boundary"].min() and shown["student_boundary"].max() <= 1
    assert not any(x.requires_grad for x in shown.values())


@pytest.mark.parametrize(("teacher_head", "reaches_scores"), [("calibrated", False), ("logits", True)])
def test_gradients_reach_the_levels_and_the_connector_and_no_more(teacher_head, reaches_scores):
    """The table of docs/bcd.md."""
    loss = make_loss(teacher_head=teacher_head)
    student, teacher, targets = make_batch()
    parts = [*student.features.values(), student.logits, *teacher.features.values(), teacher.logits]
    for part in parts:
        part.requires_grad_()
    sum(loss(student, teacher, targets).values()).backward()
    assert all(level.grad.abs().sum() > 0 for level in student.features.values())
    assert (student.logits.grad is not None) == reaches_scores
    assert all(part.grad is None for part in parts[len(student.features) + 1 :])
    trained = [name for name, parameter in loss.named_parameters() if parameter.grad is not None]
    assert all(name.startswith("student_head.") for name in trained)
    assert ("student_head.readout.weight" in trained) == (not reaches_scores)
    assert "student_head.aggregate.fuse.weight" in trained
