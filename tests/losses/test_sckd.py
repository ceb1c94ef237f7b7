"""The gradient gate: when it opens, what it hosts, and that nothing else of a training step notices it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from loss_references import dense_output, pair_of, randn, random_labels, softmax
from processes import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hf_bcd.losses import SCKDLoss, build_criterion, sckd_gate, segmentation_loss
from hf_bcd.losses.criterion import DistillationCriterion
from hf_bcd.losses.recipe import ALWAYS_OFFERED
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps


SPECS = {"stride_4": FeatureSpec(4, 4), "stride_8": FeatureSpec(6, 8)}
SMALL_BCD: dict[str, Any] = {"channels": 8, "reduced_channels": 4}
KD: dict[str, Any] = {"kd": {}}


class Student(nn.Module):
    """Two levels and a head on the last of them, in float64."""

    num_labels = 3

    def __init__(self, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.coarse, self.head = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 6, 2, 2), nn.Conv2d(6, 3, 1)
        self.checkpointing = checkpointing
        self.double()

    def forward(self, pixel_values: Tensor, targets: LabelMaps | None = None) -> DenseOutput:
        fine = self.fine(pixel_values.double()).tanh()
        coarse = checkpoint(self._stage, fine, use_reentrant=False) if self.checkpointing else self._stage(fine)
        output = DenseOutput({"stride_4": fine, "stride_8": coarse}, self.head(coarse))
        if targets is not None:
            task = segmentation_loss(output.logits, targets.ids, num_valid=targets.num_valid)
            output.task_losses = {"loss_task": task}
        return output

    def _stage(self, fine: Tensor) -> Tensor:
        return self.coarse(fine).tanh()


def batch(rows: slice = slice(None)) -> tuple[Tensor, Tensor, DenseOutput]:
    """Images, labels with void pixels, and a teacher's output on them."""
    labels = random_labels(4, 32, 32, num_labels=3)
    labels[1, :, 9:] = 255
    teacher = dense_output(SPECS, 4, 32, 3, seed=100)
    features = {name: x[rows].double() for name, x in teacher.features.items()}
    return randn(4, 3, 32, 32, seed=1)[rows], labels[rows], DenseOutput(features, teacher.logits[rows].double())


def build(threshold: float = 0.0, host: Any = KD, **options: Any) -> DistillationCriterion:
    torch.manual_seed(0)
    given = {"threshold": threshold, "host": host, **options}
    return build_criterion({"sckd": given}, SPECS, SPECS, num_labels=3, offers=ALWAYS_OFFERED | {"head"}).double()


def step(criterion: DistillationCriterion, output: DenseOutput, labels: Tensor, teacher: DenseOutput):
    return criterion({"loss_task": segmentation_loss(output.logits, labels)}, output, teacher, LabelMaps(labels, 3))


def kd(output: DenseOutput, labels: Tensor, teacher: DenseOutput) -> Tensor:
    loss = build_criterion(KD, SPECS, SPECS, num_labels=3).losses["kd"]
    return loss(output, teacher, LabelMaps(labels, 3))["kd"]


def cosine(point: Tensor, *losses: Tensor) -> float:
    task, term = (torch.autograd.grad(loss, point, retain_graph=True)[0].flatten() for loss in losses)
    return torch.cosine_similarity(task, term, dim=0).item()


def test_gate_worked_out_by_hand() -> None:
    # cos((3, 4), (4, 3)) = (12 + 12) / (5 · 5) = 0.96
    task, term = torch.tensor([3.0, 4.0]), torch.tensor([[4.0], [3.0]]).mT[0]
    assert sckd_gate(task, term) == 1 and sckd_gate(100 * task, 0.01 * term, threshold=0.9599) == 1
    assert sckd_gate(task, term, threshold=0.9601) == 0
    assert sckd_gate(task, -term) == 0 and sckd_gate(task, -term, threshold=-0.9601) == 1
    assert sckd_gate(task, 0 * term) == 0 and sckd_gate(task, 0 * term, threshold=-0.1) == 1  # cosine 0
    assert sckd_gate(task.bfloat16(), term.bfloat16()).dtype == torch.float32


def cosine_by_loops(output: DenseOutput, labels: np.ndarray, teacher: np.ndarray, kernel: np.ndarray) -> float:
    """Of the gradients of cross-entropy and of KD at the last level, whose grid is that of all logits."""
    logits = output.logits.detach().numpy()
    images, _, height, width = logits.shape
    spots = [(b, y, x) for b in range(images) for y in range(height) for x in range(width)]
    valid = [s for s in spots if labels[s] != 255]
    product = task_square = term_square = 0.0
    for b, y, x in valid:
        p, t = softmax(logits[b, :, y, x]), softmax(teacher[b, :, y, x])
        in_image = sum(v[0] == b for v in valid)
        task = kernel.T @ (p - np.eye(3)[labels[b, y, x]]) / len(valid)
        term = kernel.T @ (p - t) / in_image / images
        product, task_square, term_square = product + task @ term, task_square + task @ task, term_square + term @ term
    return product / math.sqrt(task_square * term_square)


def test_agrees_with_plain_loops() -> None:
    """The cosine is that at the deepest level: the gate turns exactly there, and not where that of the logits lies."""
    pixel_values, labels, teacher = batch()
    student = Student()
    output = student(pixel_values)
    # at the logits' own resolution, so that no resize stands between
    labels, teacher.logits = labels[:, ::8, ::8], teacher.logits[..., ::2, ::2]
    kernel = student.head.weight.detach().numpy()[..., 0, 0]
    expected = cosine_by_loops(output, labels.numpy(), teacher.logits.numpy(), kernel)
    of_logits = cosine(output.logits, segmentation_loss(output.logits, labels), kd(output, labels, teacher))
    assert abs(of_logits - expected) > 1e-3
    for margin, opens in ((-1e-6, True), (1e-6, False)):
        _, terms = step(build(expected + margin), output, labels, teacher)
        assert (terms["sckd/kd/kd"].item() > 0) is opens


@pytest.mark.parametrize("sign", [1, -1])
def test_a_teacher_counts_only_where_it_agrees_with_the_labels(sign: int) -> None:
    pixel_values, labels, teacher = batch()
    labels = labels.masked_fill(labels == 255, 0)
    teacher.logits = 5.0 * sign * F.one_hot(labels[:, 2::4, 2::4], 3).movedim(-1, 1).double()
    student = Student()
    output = student(pixel_values)
    total, terms = step(build(weight=7), output, labels, teacher)
    value = kd(output, labels, teacher)
    assert value > 0.1 and terms["sckd/kd/kd"].item() == (value.item() if sign > 0 else 0)
    expected = segmentation_loss(output.logits, labels) + (7 * value if sign > 0 else 0)
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    found, wanted = (torch.autograd.grad(x, list(student.parameters()), retain_graph=True) for x in (total, expected))
    torch.testing.assert_close(found, wanted)


def test_each_term_has_a_gate_of_its_own() -> None:
    pixel_values, labels, teacher = batch()
    output = Student()(pixel_values)
    hosts = {"kd": {}, "fitnet": {"level": "stride_8"}}
    task = segmentation_loss(output.logits, labels)
    given = output, teacher, LabelMaps(labels, 3)
    every = build(-1, hosts).losses["sckd"](*given, task_loss=output.logits.sum())
    cosines = {term: cosine(output.features["stride_8"], task, value) for term, value in every.items()}
    assert len(cosines) == 2 and abs(np.subtract(*cosines.values())) > 1e-3
    threshold = sum(cosines.values()) / 2
    _, terms = step(build(threshold, hosts), output, labels, teacher)
    assert {term: terms[f"sckd/{term}"].item() > 0 for term in cosines} == {
        term: cosine > threshold for term, cosine in cosines.items()
    }


class Apart(nn.Module):
    """Stands for a host whose second term, such as a discriminator's own, has nothing to do with the student."""

    needs, needs_calibration = frozenset(), False

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(()))

    def forward(self, student: DenseOutput, teacher: DenseOutput, targets: LabelMaps) -> dict[str, Tensor]:
        return {
            "of_student": -student.logits.square().sum() * self.own,
            "own": 3 * self.own,
            "constant": self.own.data,
        }


def test_terms_that_the_student_has_no_part_in_always_count() -> None:
    output = Student()(batch()[0])
    host = DistillationCriterion({"apart": Apart()}, {}, [])  # type: ignore[dict-item]
    terms = SCKDLoss(pair_of(SPECS), host=host)(
        output, output, LabelMaps(batch()[1], 3), task_loss=output.logits.square().sum()
    )
    assert {term: value.item() for term, value in terms.items()} == {
        "apart/of_student": 0, "apart/own": 3, "apart/constant": 1,
    }  # fmt: skip


def test_everything_counts_without_gradients() -> None:
    pixel_values, labels, teacher = batch()
    student, criterion = Student(), build(0.999)
    closed = step(criterion, student(pixel_values), labels, teacher)[1]["sckd/kd/kd"].item()
    with torch.no_grad():
        counted = step(criterion, student(pixel_values), labels, teacher)[1]["sckd/kd/kd"].item()
    student.requires_grad_(False)
    frozen = step(criterion, student(pixel_values), labels, teacher)[1]["sckd/kd/kd"].item()
    assert closed == 0 and counted == frozen > 0


def test_gradients_that_half_precision_would_lose_are_compared() -> None:
    """The gradients of a mean over many pixels are below the smallest number of float16."""
    size = (1, 3, 512, 512)
    leaf = torch.zeros(size, dtype=torch.float16, requires_grad=True)
    output = DenseOutput({"stride_8": leaf}, leaf.clone())
    teacher = DenseOutput({}, torch.zeros(size, dtype=torch.float16))
    teacher.logits[:, 0] = 0.02
    labels = torch.zeros(1, 512, 512, dtype=torch.long)
    _, terms = step(build(), output, labels, teacher)
    assert terms["sckd/kd/kd"].item() > 0


@pytest.mark.parametrize("threshold", [-1, 0.999])
def test_activation_checkpointing_changes_nothing(threshold: float) -> None:
    pixel_values, labels, teacher = batch()
    found = []
    for checkpointing in (False, True):
        student, criterion = Student(checkpointing), build(threshold, {"kd": {}, "fitnet": {}})
        total = step(criterion, student(pixel_values), labels, teacher)[0]
        total.backward()
        found.append([total.detach(), *(p.grad for p in student.parameters() if p.grad is not None)])
    assert len(found[0]) == 7
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_student_is_refused() -> None:
    """Its features and logits come out of one opaque step, so the gate would compare at another place, or nowhere."""
    pixel_values, labels, teacher = batch()
    student, criterion = torch.compile(Student(), backend="aot_eager"), build()
    with pytest.raises(ValueError, match="compiled student; set torch_compile to false"):
        step(criterion, student(pixel_values), labels, teacher)


def test_hosts_keep_their_weights_their_decay_and_their_steps() -> None:
    hosts = {"bcd": SMALL_BCD | {"weight": {"context": 0.25}}}
    criterion = build(-1, hosts)
    assert criterion.weights == {"sckd/bcd/boundary": 3, "sckd/bcd/context": 0.25}
    assert build(weight={"kd/kd": 2}, host={"kd": {"weight": 5}}).weights == {"sckd/kd/kd": 2}
    assert criterion.decays == {"sckd"} and not build().decays and not build(-1, hosts, decay=False).decays
    _, labels, teacher = batch()
    assert criterion.needs_calibration
    criterion.calibrate([(teacher, LabelMaps(labels, 3))], progress=lambda steps: list(steps)[:2])
    loss: Any = criterion.losses["sckd"]
    temperature = loss.hosts.losses["bcd"].context_temperature
    temperature.observe(torch.tensor([0.9]))
    criterion.after_step()
    assert temperature.value.item() == pytest.approx(1.05)
    restored = build(-1, hosts)
    restored.load_state_dict(criterion.state_dict())
    assert not criterion.needs_calibration and not restored.needs_calibration


def test_a_gate_that_could_never_close_is_refused() -> None:
    pixel_values, labels, teacher = batch()
    output = Student()(pixel_values)
    criterion = build(host={"fitnet": {"level": "stride_4"}})
    with pytest.raises(ValueError, match="no gradients to compare for its host 'fitnet'.*deepest feature level"):
        step(criterion, output, labels, teacher)
    with pytest.raises(ValueError, match="pass its loss as task_loss"):
        criterion.losses["sckd"](output, teacher, LabelMaps(labels, 3))


# ---- Two ranks -----------------------------------------------------------------------------------------------------


def head(levels: dict[str, Tensor]) -> Tensor:
    kernels = [randn(3, level.shape[1], 1, 1, seed=level.shape[1]) for level in levels.values()]
    maps = [F.conv2d(level, kernel) for level, kernel in zip(levels.values(), kernels, strict=True)]
    return maps[0] + F.interpolate(maps[1], maps[0].shape[-2:], mode="bilinear")


def train(threshold: float, rows: slice, ranks: int) -> dict[str, Any]:
    """A step of two accumulated batches: gradients, values, and how often a gradient was added or sent."""
    from hf_bcd.training.distiller import Distiller

    torch.manual_seed(0)
    losses = {"sckd": {"threshold": threshold}, "crosskd": {}}
    criterion = build_criterion(losses, SPECS, SPECS, num_labels=3, offers=ALWAYS_OFFERED | {"head"}).double()
    distiller = Distiller(Student(), criterion)  # type: ignore[arg-type]
    counts = dict.fromkeys((name for name, _ in distiller.named_parameters()), 0)
    sent: list[int] = []
    model: Any = distiller
    if ranks > 1:
        model = DistributedDataParallel(distiller)
        model.register_comm_hook(None, lambda _, bucket: _send(sent, bucket))
    for name, parameter in distiller.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: counts.update({name: counts[name] + 1}))
    pixel_values, labels, teacher = batch(rows)
    teacher.head = head
    targets = LabelMaps(labels, 3, num_valid=(batch()[1] != 255).sum() / ranks)
    values = {}
    for part in range(2):
        images = pixel_values.roll(part, dims=2)
        model.require_backward_grad_sync = part == 1  # as `no_sync` sets it
        outputs = model(pixel_values=images, targets=targets, teacher_output=teacher)
        outputs["loss"].backward()
        values |= {f"{part} {term}": value for term, value in outputs["terms"].items()}
    gradients = {name: parameter.grad for name, parameter in distiller.named_parameters()}
    return {"counts": counts, "sent": sent, "values": values, "gradients": gradients}


def _send(sent: list[int], bucket: Any) -> torch.futures.Future[Tensor]:
    sent.append(bucket.index())
    tensor = bucket.buffer().div_(dist.get_world_size())
    work: Any = dist.all_reduce(tensor, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def cosines(rows: slice) -> list[float]:
    """Of KD with the task at the deepest level, for each of the two accumulated batches."""
    pixel_values, labels, teacher = batch(rows)
    found = []
    for part in range(2):
        output = Student()(pixel_values.roll(part, dims=2))
        losses = segmentation_loss(output.logits, labels), kd(output, labels, teacher)
        found.append(cosine(output.features["stride_8"], *losses))
    return found


def train_half(thresholds: list[float]) -> list[dict[str, Any]]:
    dist.init_process_group("gloo")
    rows = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    return [train(threshold, rows, 2) for threshold in thresholds]


@pytest.mark.slow
def test_two_ranks_decide_and_train_as_one(tmp_path: Path) -> None:
    whole, halves = cosines(slice(None)), [cosines(rows) for rows in (slice(2), slice(2, 4))]
    # between the two accumulated batches, and just beside what each rank would find in its own half
    thresholds = [sum(whole) / 2, whole[0] - 1e-6, whole[0] + 1e-6]
    assert min(half[0] for half in halves) < whole[0] - 1e-4 and abs(whole[0] - whole[1]) > 1e-4
    ranks = run_ranks(tmp_path, train_half, thresholds)
    decisions = []
    for case, threshold in enumerate(thresholds):
        one = train(threshold, slice(None), 1)
        decisions.append([one["values"][f"{part} sckd/kd/kd"].item() > 0 for part in range(2)])
        assert decisions[-1] == [cosine > threshold for cosine in whole]
        for rank in ranks:
            found = rank[case]
            assert set(found["counts"].values()) == {2}, "a gradient was added more than once a backward pass"
            assert found["sent"] == sorted(set(found["sent"])), "a bucket was sent more than once"
            for name, gradient in one["gradients"].items():
                torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-6, atol=1e-10, msg=name)
        for term, value in one["values"].items():
            both = torch.stack([rank[case]["values"][term] for rank in ranks])
            torch.testing.assert_close(both.mean(), value, rtol=1e-6, atol=1e-10, msg=term)
    assert decisions[1] != decisions[2]
