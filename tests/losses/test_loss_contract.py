"""Promises of every distillation loss, whatever it computes. Values are tested beside it."""

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from host_sync import no_host_synchronisation
from loss_references import Regions, leaves, outputs_of, randn, random_labels
from processes import run_ranks
from torch import Tensor, nn

from hf_bcd.losses import LOSSES, DistillationLoss, build_criterion, segmentation_loss
from hf_bcd.losses.criterion import DistillationCriterion
from hf_bcd.losses.ops.functional import resize, spatial_size
from hf_bcd.losses.recipe import ALWAYS_OFFERED
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps, Targets


NUM_LABELS, SIZE = 3, 64
STUDENT = {"stride_4": FeatureSpec(4, 4), "stride_8": FeatureSpec(6, 8), "stride_16": FeatureSpec(8, 16)}
# other channels, and a last stage that is dilated
TEACHER = {"stride_4": FeatureSpec(6, 4), "stride_8": FeatureSpec(8, 8), "stride_16": FeatureSpec(12, 8)}

# options that make a loss small, or give it all its parts
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "at": [{}, {"levels": ["stride_4", "stride_16"]}],
    "bcd": [
        {"channels": 8, "reduced_channels": 4},
        {"channels": 8, "reduced_channels": 4, "mode": "paper", "teacher_head": "orthogonal"},
        {"channels": 8, "reduced_channels": 4, "teacher_head": "logits"},
    ],
    "cirkd": [{"memory_mib": 0.01}],  # so small that it runs over
    "cwd": [{}, {"on": "features"}],
    "fgd": [{}, {"background": 0}],
    "ifvd": [{"discriminator_channels": 4}],
    "pkd": [{}, {"levels": ["stride_4", "stride_16"]}],
    # open gates; tests/losses/test_sckd.py closes them
    "sckd": [
        {"threshold": -1},
        {"threshold": -1, "host": {"cwd": {"weight": 2.0}, "ifvd": {"discriminator_channels": 4}}},
    ],
    "skd": [{"discriminator_channels": 4}, {"discriminator_channels": 0, "nodes": 4, "level": "stride_4"}],
    "sstkd": [{"discriminator_channels": 4, "intensity_levels": 16}],
}
# (loss, term) -> why it is not zero where student and teacher agree
FLOORS = {
    ("bcd", "boundary"): "the teacher's boundary map is hard, the student's soft",
    ("bcd", "context"): "student and teacher have connectors of their own",
    ("bglsseg", "boundary"): "cross-entropy with the ground truth, of a head that starts at random",
    ("cirkd", "memory_pixel"): "a head that is no identity stands behind the student only",
    ("cirkd", "memory_region"): "a head that is no identity stands behind the student only",
    ("cwt", "cwt"): "its MLP starts at random",
    ("fam", "fam"): "a spectral filter and a normalisation stand behind the student only",
    ("ifd", "ifd"): "its projectors start at random, or they would remain equal",
    ("mgd", "mgd"): "its generator starts at random and sees a quarter of the positions",
    ("slimseg", "boundary"): "cross-entropy with the ground truth",
    ("tat", "anchor"): "attention rebuilds the teacher from other positions",
    ("tat", "patch_group"): "attention rebuilds the teacher from other positions",
}
# losses whose gradient is meant to differ from the values' own, and why
NO_GRADCHECK = {("bcd", 1): "straight-through estimator"}


# (loss, term) -> what it takes from all images of a forward pass together, so that accumulated batches do not add up
OF_A_BATCH = {
    ("bcd", "boundary"): "its boundary scalar is standardised",
    ("bcd", "context"): "in paper mode, O standardises the features",
    ("c2vkd", "covariance"): "pairs of positions run over the batch",
    ("cirkd", "batch_pixel"): "images are related to each other",
    ("cirkd", "memory_pixel"): "its head is normalised",
    ("cirkd", "memory_region"): "its head is normalised",
    ("crosskd", "crosskd"): "channels get the teacher's moments",
    ("fam", "fam"): "its attention is normalised",
    ("pkd", "pkd"): "channels are standardised",
    ("sckd", "kd/kd"): "a gate that each forward pass opens or closes",
}


def documented() -> dict[str, type[DistillationLoss]]:
    """The loss that CONTRIBUTING.md writes down, from that very text."""
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text().partition("## Adding a loss")[2]
    code = text.partition("```python\n")[2].partition("```")[0]
    assert code.count("\n") <= 60
    module = {"__name__": "hf_bcd.losses.ickd", "__package__": "hf_bcd.losses"}
    exec(code, module)
    return {"ickd": module["ICKDLoss"]}  # type: ignore[dict-item]


SEGMENTERS = ALWAYS_OFFERED | {"head"}  # detectors' own losses have promises of their own, test_detection_losses.py
EVERY = {name: loss for name, loss in (LOSSES | documented()).items() if loss.needs <= SEGMENTERS}
CASES = [(name, options) for name in sorted(EVERY) for options in OPTIONS.get(name, [{}])]
each_loss = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])


def build(name: str, options: dict[str, Any], student=STUDENT, teacher=TEACHER) -> DistillationCriterion:
    torch.manual_seed(0)
    offers = SEGMENTERS
    with patch.dict(LOSSES, EVERY):
        return build_criterion({name: options}, student, teacher, num_labels=NUM_LABELS, seed=0, offers=offers)


def with_head(teacher: DenseOutput) -> DenseOutput:
    """Gives a teacher a frozen head: its own logits, plus a 1x1 convolution of what differs from its own levels."""

    def head(levels: dict[str, Tensor]) -> Tensor:
        logits = teacher.logits.detach()
        for name, level in levels.items():
            change = level - teacher.features[name].detach()
            kernel = randn(NUM_LABELS, level.shape[1], 1, 1, seed=level.shape[1], dtype=level.dtype)
            logits = logits + resize(nn.functional.conv2d(change, kernel), spatial_size(logits))
        return logits

    teacher.head = head
    return teacher


def outputs(
    dtype: torch.dtype = torch.float32, student=STUDENT, teacher=TEACHER, rows: Any = slice(None)
) -> tuple[DenseOutput, DenseOutput]:
    """Student with gradients and teacher, of four images."""
    ours, theirs, _ = outputs_of(student, teacher, size=SIZE, images=4, dtype=dtype, rows=rows)
    return ours, with_head(theirs)


def label_maps() -> LabelMaps:
    """Regions of three classes, void ones of unequal size in two of the four images."""
    labels = random_labels(4, 8, 8, num_labels=NUM_LABELS).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, :, :32] = 255
    labels[2, :16] = 255
    return LabelMaps(labels, NUM_LABELS)


def regions() -> Regions:
    """Two classes of overlapping boxes with soft edges; the left half of the first image is void."""
    targets, boxes = label_maps(), torch.zeros(4, NUM_LABELS, SIZE, SIZE)
    boxes[:, 0, 8:40, 20:60] = 1
    boxes[:, 0, 7, 20:60] = 0.3
    boxes[:, 2, 30:60, 10:50] = 1
    return Regions(boxes, targets.valid(targets.size))


def step(
    criterion: DistillationCriterion, student: DenseOutput, teacher: DenseOutput, targets: Targets
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total of the distillation terms, and the terms."""
    task = {"loss_task": segmentation_loss(student.logits, label_maps().ids[: len(student.logits)])}
    total, terms = criterion(task, student, teacher, targets)
    distilled = {term: value for term, value in terms.items() if term != "loss_task"}
    return total - terms["loss_task"], distilled


each_kind_of_targets = pytest.mark.parametrize("targets_of", [label_maps, regions])


def ready(name: str, options: dict[str, Any], student=STUDENT, teacher=TEACHER) -> DistillationCriterion:
    """As `build`, with something in its memory."""
    criterion = build(name, options, student, teacher)
    if EVERY[name].keeps == "memory":
        step(criterion, *outputs(student=student, teacher=teacher), label_maps())
        criterion.after_step()
    return criterion


def values(terms: dict[str, Tensor]) -> dict[str, float]:
    return {term: value.item() for term, value in terms.items()}


@each_loss
def test_it_says_what_it_is(name, options):
    cls = EVERY[name]
    loss = build(name, options).losses[name]
    assert isinstance(loss, DistillationLoss) and cls.__name__.removesuffix("Loss").lower() == name
    assert cls.citation.lstrip().startswith("@") and cls.source.startswith("https://")
    assert cls.transfers and cls.checked and cls.keeps in {"", "discriminator", "memory"}
    assert loss.needs and loss.needs <= {"logits", "features", "labels", "task_loss", "head"}
    assert all(isinstance(value, float) and value > 0 for value in loss.weights.values())


@each_loss
def test_terms_are_unweighted_float32_scalars(name, options):
    criterion, (student, teacher) = build(name, options), outputs()
    _, terms = step(criterion, student, teacher, label_maps())
    assert set(terms) == {f"{name}/{term}" for term in criterion.losses[name].weights}
    for value in terms.values():
        assert value.shape == () and value.dtype == torch.float32 and value.isfinite() and value.requires_grad
    heavy = build(name, options | {"weight": 7})
    _, same = step(heavy, student, teacher, label_maps())
    assert values(same) == pytest.approx(values(terms), rel=1e-6)


@each_kind_of_targets
@each_loss
def test_gradient_reaches_the_student_and_never_the_teacher(name, options, targets_of):
    criterion, (student, teacher) = ready(name, options), outputs()
    for leaf in leaves(teacher).values():
        leaf.requires_grad_()
    total, terms = step(criterion, student, teacher, targets_of())
    for term, value in terms.items():
        assert value.isfinite(), term
        found = torch.autograd.grad(value, list(leaves(student).values()), retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.any() for gradient in found), term
    total.backward()
    assert all(leaf.grad is None for leaf in leaves(teacher).values())
    assert all(parameter.grad is not None for parameter in criterion.parameters() if parameter.requires_grad)


@each_loss
def test_no_parameter_is_without_effect(name, options):
    if name == "bcd":
        pytest.skip("biases of its heads stand before the standardisation of the boundary map")
    criterion, (student, teacher) = ready(name, options).double(), outputs(torch.float64)
    trained = [(key, parameter) for key, parameter in criterion.named_parameters() if parameter.requires_grad]
    for i, (_, parameter) in enumerate(trained):
        parameter.data += 0.1 * randn(*parameter.shape, seed=i)  # away from zeros at the start
    step(criterion, student, teacher, label_maps())[0].backward()
    for key, parameter in trained:
        # rounding errors, which Adam would blow up, of what a softmax or a normalisation cancels
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-12, key


@each_loss
def test_gradients_are_those_of_the_values(name, options):
    if reason := NO_GRADCHECK.get((name, OPTIONS.get(name, [{}]).index(options))):
        pytest.skip(reason)
    criterion, (student, teacher) = ready(name, options).double(), outputs(torch.float64)
    labels = label_maps()

    def total(*given: Tensor) -> Tensor:
        logits, *levels = given
        output = DenseOutput(dict(zip(STUDENT, levels, strict=True)), logits)
        return step(criterion, output, teacher, labels)[0]

    assert torch.autograd.gradcheck(total, tuple(leaves(student).values()), fast_mode=True, atol=1e-6)


@each_kind_of_targets
@each_loss
def test_void_pixels_change_nothing(name, options, targets_of):
    criterion, targets = ready(name, options), targets_of()
    totals, gradients = [], []
    for noise in (0, 5):
        student, teacher = outputs()
        for output in (student, teacher):
            for leaf in leaves(output).values():
                leaf.data[0, ..., : leaf.shape[-1] // 4] += noise * torch.randn_like(
                    leaf[0, ..., : leaf.shape[-1] // 4]
                )
        total, _ = step(criterion, student, teacher, targets)
        total.backward()
        totals.append(total.item())
        gradients.append(
            [leaf.grad[..., leaf.shape[-1] // 2 :] for leaf in leaves(student).values() if leaf.grad is not None]
        )
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@each_loss
def test_a_batch_without_a_valid_pixel_gives_a_connected_zero(name, options):
    criterion, (student, teacher) = ready(name, options), outputs()
    _, terms = step(criterion, student, teacher, LabelMaps(torch.full((4, SIZE, SIZE), 255), NUM_LABELS))
    assert all(value == 0 for value in values(terms).values()), values(terms)
    torch.stack(list(terms.values())).sum().backward()
    trained = [parameter for parameter in criterion.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)
    criterion.after_step()
    assert all(buffer.isfinite().all() for buffer in criterion.buffers())


@each_loss
def test_half_precision_and_autocast_change_little(name, options):
    criterion, targets, task = ready(name, options), label_maps(), {"task_loss": torch.tensor(1.0)}
    loss = criterion.losses[name]
    given = task if "task_loss" in loss.needs else {}
    exact, rounded = outputs(), outputs(torch.bfloat16)
    expected = values(loss(*exact, targets, **given))
    with torch.autocast("cpu", torch.bfloat16):
        assert values(loss(*exact, targets, **given)) == pytest.approx(expected, rel=1e-6)
        half = loss(*rounded, targets, **given)
    assert all(value.dtype == torch.float32 for value in half.values())
    assert values(half) == pytest.approx(expected, rel=0.1, abs=1e-3)


@each_loss
@pytest.mark.parametrize("case", ["even features", "a position of zeros", "saturated scores", "one valid pixel"])
def test_degenerate_images_keep_gradients_moderate(name, options, case):
    criterion, (student, teacher), labels = ready(name, options), outputs(), label_maps()
    for level in student.features.values():
        if case == "even features":
            level.data[:] = level.data.mean(dim=(0, 2, 3), keepdim=True)
        elif case == "a position of zeros":
            level.data[:, :, -1, -1] = 0
    if case == "saturated scores":
        student.logits.data, teacher.logits = (1e4 * x.detach().sign() for x in (student.logits, teacher.logits))
    elif case == "one valid pixel":
        labels.ids[:] = 255
        labels.ids[:, 40, 40] = 1
    total, terms = step(criterion, student, teacher, labels)
    total.backward()
    given = [*leaves(student).values(), *criterion.parameters()]
    assert all(value.isfinite() for value in terms.values())
    assert all(x.grad.abs().max() < 1e7 for x in given if x.grad is not None)
    criterion.after_step()
    assert all(buffer.isfinite().all() for buffer in criterion.buffers())


@each_loss
def test_agreement_gives_zero(name, options):
    criterion = ready(name, options, STUDENT, STUDENT)
    student, _ = outputs()
    teacher = DenseOutput({level: x.detach() for level, x in student.features.items()}, student.logits.detach())
    teacher = with_head(teacher)
    apart = values(step(criterion, *outputs(student=STUDENT, teacher=STUDENT), label_maps())[1])
    for term, value in values(step(criterion, student, teacher, label_maps())[1]).items():
        if (name, term.removeprefix(f"{name}/")) not in FLOORS:
            assert abs(value) < 1e-5 * max(1.0, abs(apart[term])), term


@pytest.mark.parametrize(("name", "default"), [("at", ["stride_16"]), ("fam", list(STUDENT)), ("pkd", ["stride_16"])])
def test_levels_add_up(name, default):
    def value(options: dict[str, Any]) -> float:
        criterion = build(name, options, STUDENT, STUDENT)  # projections that are the identity
        return step(criterion, *outputs(teacher=STUDENT), label_maps())[1][f"{name}/{name}"].item()

    parts = {level: value({"levels": [level]}) for level in STUDENT}
    assert min(parts.values()) > 0 and value({}) == pytest.approx(sum(parts[level] for level in default))
    assert value({"levels": list(STUDENT)}) == pytest.approx(sum(parts.values()))


@each_loss
def test_scores_of_other_classes_are_refused(name, options):
    criterion, (student, teacher) = build(name, options), outputs()
    if "logits" not in criterion.losses[name].needs:
        pytest.skip("compares no class scores")
    teacher.logits = torch.cat([teacher.logits, teacher.logits], dim=1)
    with pytest.raises(ValueError, match=r"3.*6|6.*3"):
        step(criterion, student, teacher, label_maps())


@each_loss
def test_a_step_never_waits_for_the_device(name, options):
    criterion, (student, teacher), targets = build(name, options), outputs(), label_maps()
    with no_host_synchronisation():
        for _ in range(2):
            step(criterion, student, teacher, targets)[0].backward()
            criterion.after_step()
    assert any(leaf.grad is not None and leaf.grad.any() for leaf in leaves(student).values())


def parts(name: str, options: dict[str, Any], rows: slice, share: float) -> dict[str, list[Tensor]]:
    """Every term of some of the images, and its gradients at the student's logits and features."""
    criterion, (student, teacher) = ready(name, options).double(), outputs(torch.float64, rows=rows)
    targets = LabelMaps(label_maps().ids[rows], NUM_LABELS)
    task = {"loss_task": segmentation_loss(student.logits, targets.ids)}
    _, terms = criterion(task, student, teacher, targets, share)
    found, given = {}, list(leaves(student).values())
    for term, value in terms.items():
        if term != "loss_task":
            gradients = torch.autograd.grad(value, given, retain_graph=True, allow_unused=True)
            found[term] = [
                value.detach(),
                *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, given, strict=True)),
            ]
    return found


@each_loss
def test_unequal_accumulated_batches_add_up_or_it_is_said(name, options):
    whole = parts(name, options, slice(0, 3), 1)
    two, one = parts(name, options, slice(0, 2), 2 / 1.5), parts(name, options, slice(2, 3), 1 / 1.5)
    for term, (value, *gradients) in whole.items():
        if (name, term.removeprefix(f"{name}/")) in OF_A_BATCH:
            assert "accumulated batches" in EVERY[name].checked
            continue
        torch.testing.assert_close((two[term][0] + one[term][0]) / 2, value, rtol=1e-9, atol=1e-12)
        for whole_gradient, *of_parts in zip(gradients, two[term][1:], one[term][1:], strict=True):
            torch.testing.assert_close(torch.cat(of_parts) / 2, whole_gradient, rtol=1e-6, atol=1e-12)


def test_what_is_said_not_to_add_up_does_not():
    off, named = set(), {name for name, _ in OF_A_BATCH}
    for name, options in [case for case in CASES if case[0] in named]:  # all others do, as the test above says
        whole = parts(name, options, slice(0, 3), 1)
        two, one = parts(name, options, slice(0, 2), 2 / 1.5), parts(name, options, slice(2, 3), 1 / 1.5)
        for term, (_, *gradients) in whole.items():
            pairs = zip(gradients, two[term][1:], one[term][1:], strict=True)
            if any((torch.cat(of_parts) / 2 - g).norm() > 1e-4 * g.norm() for g, *of_parts in pairs):
                off.add((name, term.removeprefix(f"{name}/")))
    assert off == OF_A_BATCH.keys() - {("sckd", "kd/kd")}  # the gate is open in both


@pytest.mark.gpu
@each_loss
def test_cuda_reports_no_synchronisation(name, options):
    criterion, pair = build(name, options).cuda(), outputs()
    for output in pair:
        output.features = {level: x.detach().cuda().requires_grad_() for level, x in output.features.items()}
        output.logits = output.logits.detach().cuda().requires_grad_()
    targets, task = LabelMaps(label_maps().ids.cuda(), NUM_LABELS), {"loss_task": pair[0].logits.square().mean()}
    for mode in ("default", "error"):  # the first step lets the libraries set themselves up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            criterion(task, *pair, targets)[0].backward(retain_graph=True)
            criterion.after_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def advance(criterion: DistillationCriterion, steps: int, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Terms, gradients and buffers of some optimizer steps of two accumulated batches each, of images in turn."""
    found = {}
    for number in range(steps):
        criterion.zero_grad()
        for part in range(2):
            order = torch.arange(4).roll(2 * number + part)[rows]
            student, teacher = outputs(torch.float64, rows=order)
            targets = LabelMaps(label_maps().ids[order], NUM_LABELS)
            total, terms = step(criterion, student, teacher, targets)
            total.backward()
            found |= {f"{number} {part} {term}": value.detach() for term, value in terms.items()}
            given = {leaf: x.grad for leaf, x in leaves(student).items() if x.grad is not None}
            found |= {f"{number} {part} of {leaf}": gradient for leaf, gradient in given.items()}
        criterion.after_step()
        gradients = {key: p.grad for key, p in criterion.named_parameters() if p.grad is not None}
        found |= {f"{number} gradient {key}": gradient.clone() for key, gradient in gradients.items()}
        found |= {f"{number} state {key}": x.clone() for key, x in criterion.named_buffers()}
    return found


@each_loss
def test_a_restored_loss_goes_on_as_if_never_stopped(name, options):
    torch.manual_seed(0)
    whole = build(name, options).double()
    advance(whole, 2)
    state = copy.deepcopy(whole.state_dict())
    restored = build(name, options).double()
    for parameter in restored.parameters():
        nn.init.zeros_(parameter)
    restored.load_state_dict(state)
    expected, actual = advance(whole, 2), advance(restored, 2)
    assert expected and all(torch.equal(expected[key], actual[key]) for key in expected)


def advance_all() -> dict[str, Tensor]:
    """What one of two ranks finds for all cases, with the means over both that the log and DDP take."""
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    for case, (name, options) in enumerate(CASES):
        for key, value in advance(build(name, options).double(), 2, slice(2 * rank, 2 * rank + 2)).items():
            if " of " not in key and " state " not in key:
                dist.all_reduce(value)
                value /= 2
            results[f"{case} {key}"] = value
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict[str, Tensor]]:
    return run_ranks(tmp_path_factory.mktemp("contract"), advance_all)


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
def test_two_ranks_equal_one(case, two_ranks):
    whole = advance(build(*CASES[case]).double(), 2)
    assert whole
    for key, value in whole.items():
        halves = [rank[f"{case} {key}"] for rank in two_ranks]
        # a rank's loss is the mean over its own half, so its gradients of its images are twice as large
        found = torch.cat(halves) / 2 if " of " in key else halves[0]
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
