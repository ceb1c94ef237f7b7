from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from loss_references import outputs_of
from processes import run_ranks
from torch import Tensor

from hf_bcd.losses.criterion import DistillationCriterion
from hf_bcd.losses.modules.balance import GradientBalance, squared_gradients
from hf_bcd.losses.modules.schedules import Temperature
from hf_bcd.losses.recipe import build_criterion
from hf_bcd.outputs import DenseOutput, FeatureSpec
from hf_bcd.training.config import BCDConfig


STUDENT = {"stride_8": FeatureSpec(6, 8), "stride_32": FeatureSpec(10, 16)}
TEACHER = {"stride_8": FeatureSpec(16, 8), "stride_32": FeatureSpec(32, 16)}
CPU = {"output_dir": "unused", "report_to": "none", "use_cpu": True}


def balance() -> GradientBalance:
    return GradientBalance({"a": 3.0, "b": 1.0}, {"a": 0.3, "b": 0.5})


def test_squared_gradients_by_hand() -> None:
    x, other = torch.tensor([3.0, 4.0], requires_grad=True), torch.ones(1, requires_grad=True)
    terms = {"sum": x.sum(), "half the square": x.square().sum() / 2, "elsewhere": other.sum()}
    assert squared_gradients(terms, x).tolist() == [2, 25, 0]
    torch.stack(list(terms.values())).sum().backward()  # the graph is still there
    assert x.grad is not None and x.grad.tolist() == [4, 5]


@pytest.mark.parametrize(("total", "first", "last"), [(1000, 50, 150), (400, 50, 150), (80, 10, 30)])
def test_weights_are_measured_once_over_a_window_of_steps(total: int, first: int, last: int) -> None:
    one, measured = balance(), []
    for step in range(1, total + 1):
        one.begin_step(step, total)
        if one.measuring:
            measured.append(step)
            one.observe(torch.tensor([4.0, 1.0, 16.0]))  # norms 2, 1, 4
        one.after_step()
        expected = [3, 1] if step < last else [0.3 * 2 / 1, 0.5 * 2 / 4]
        assert one.weights.tolist() == pytest.approx(expected)
    assert (measured[0], measured[-1], len(measured)) == (first, last, last - first + 1)


def test_norms_are_averaged_over_steps_and_added_up_within_one() -> None:
    one = balance()
    for step, batches in ((1, [[1.0, 1.0, 1.0], [3.0, 3.0, 15.0]]), (2, [[16.0, 4.0, 4.0]])):
        one.begin_step(step, 6)  # of 6 steps the first two are measured
        for squares in batches:
            one.observe(torch.tensor(squares))
        one.after_step()
    # norms 2, 2, 4 and then 4, 2, 2: means 3, 2, 3
    assert one.weights.tolist() == pytest.approx([0.3 * 3 / 2, 0.5])


@pytest.mark.parametrize("squares", [[4.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
def test_a_term_or_a_task_without_a_gradient_keeps_the_weights(squares) -> None:
    one = balance()
    one.begin_step(3, 8)
    one.observe(torch.tensor(squares))
    one.after_step()
    assert one.weights.tolist() == [3, 1]  # the first has 0.5 · 2 / 1 for b, as it happens


def test_a_restored_balance_goes_on() -> None:
    whole, restored = balance(), balance()
    for step in range(1, 9):
        for one in (whole, restored):
            one.begin_step(step, 8)
            if one.measuring:
                one.observe(torch.tensor([4.0, float(step), 9.0]))
            one.after_step()
        if step == 2:
            restored = balance()
            restored.load_state_dict(whole.state_dict())
    assert torch.equal(whole.weights, restored.weights) and whole.weights[0] != 3


# --- in the criterion -------------------------------------------------------------------------------------------------


def criterion(**options) -> DistillationCriterion:
    torch.manual_seed(0)
    found = build_criterion({"bcd": options}, STUDENT, TEACHER, num_labels=4)
    found.losses["bcd"].teacher_head.theta.fill_(1.5)  # type: ignore[union-attr]
    return found


def task_loss(student: DenseOutput) -> Tensor:
    return sum(x.square().mean() for x in student.features.values())  # type: ignore[return-value]


def last_gradient(value: Tensor, student: DenseOutput) -> Tensor:
    return torch.autograd.grad(value, student.features["stride_32"], retain_graph=True)[0].norm()


def test_measured_weights_give_terms_their_share_of_the_tasks_gradient(monkeypatch) -> None:
    monkeypatch.setattr(Temperature, "threshold", float("inf"))  # so that all steps are alike
    auto, (student, teacher, labels) = criterion(weight="auto"), outputs_of(STUDENT, TEACHER, size=64, num_labels=4)
    plain_total, _ = criterion()({"loss_task": task_loss(student)}, student, teacher, labels)
    assert auto.weights == {"bcd/boundary": 3, "bcd/context": 1}
    for step in range(1, 9):
        auto.begin_step(step, 8)
        task = task_loss(student)
        total, terms = auto({"loss_task": task}, student, teacher, labels)
        if step == 1:
            torch.testing.assert_close(total, plain_total)  # the initial weights are the default ones
        auto.after_step()
    for key, share in (("bcd/boundary", 0.3), ("bcd/context", 0.5)):
        pull = auto.weights[key] * last_gradient(terms[key], student)
        assert pull.item() == pytest.approx(share * last_gradient(task, student).item(), rel=1e-4)
        assert terms[f"weight/{key}"] == pytest.approx(auto.weights[key])
    expected = task + auto.decay * sum(auto.weights[key] * terms[key] for key in auto.weights)
    torch.testing.assert_close(total, expected)


def test_gradients_are_logged_as_they_are_weighted() -> None:
    loud = criterion(weight={"context": 7})
    student, teacher, labels = outputs_of(STUDENT, TEACHER, size=64, num_labels=4)
    loud.log_gradients = True
    loud.begin_step(3, 4)  # r = 0.5
    task = task_loss(student)
    _, terms = loud({"loss_task": task}, student, teacher, labels)
    expected = {"loss_task": 1.0, "bcd/boundary": 3 * 0.5, "bcd/context": 7 * 0.5}
    for key, factor in expected.items():
        value = task if key == "loss_task" else terms[key]
        torch.testing.assert_close(terms[f"gradient/{key}"], factor * last_gradient(value, student))
    with torch.no_grad():
        assert not any("gradient" in key for key in loud({"loss_task": task}, student, teacher, labels)[1])


@pytest.mark.parametrize("options", [{"log_gradients": True}, {"losses": {"bcd": {"weight": "auto"}}}])
def test_a_compiled_step_hides_the_gradients_of_terms(options: dict) -> None:
    with pytest.raises(ValueError, match="which torch_compile hides"):
        BCDConfig(**CPU, torch_compile=True, **options)


# --- two ranks --------------------------------------------------------------------------------------------------------


def measure(rows: slice) -> Tensor:
    """Weights, and a temperature, after some steps on part of a batch, whose loss is a mean over that part."""
    one = GradientBalance({"a": 1.0}, {"a": 0.5})
    for step in range(1, 9):
        one.begin_step(step, 8)
        x = torch.arange(1.0, 5.0)[rows].mul(step).requires_grad_()
        if one.measuring:
            one.observe(squared_gradients({"task": x.square().mean(), "a": x.pow(3).mean()}, x))
        one.after_step()
    temperature = Temperature()
    temperature.observe(torch.tensor([0.9, 0.8, 0.3, 0.1])[rows])  # 0.525 together, 0.85 and 0.2 apart
    temperature.update()
    return torch.stack([*one.weights, temperature.value])


def measure_half() -> Tensor:
    dist.init_process_group("gloo")
    return measure(slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2))


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, measure_half)
    assert torch.equal(*ranks)
    torch.testing.assert_close(ranks[0], measure(slice(None)))
    assert ranks[0][1] == pytest.approx(1.05)
    # half of the batch would say another
    assert not torch.isclose(ranks[0][0], measure(slice(2))[0], rtol=0.05) and measure(slice(2, 4))[1] == 1
