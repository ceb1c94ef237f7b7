from typing import Any

import pytest
import torch
from loss_references import outputs_of

from hf_bcd.losses import BCDLoss, build_criterion
from hf_bcd.losses.criterion import DistillationCriterion
from hf_bcd.outputs import FeatureSpec


SPECS = {"stride_4": FeatureSpec(4, 4), "stride_8": FeatureSpec(6, 8)}
SMALL: dict[str, Any] = {"channels": 8, "reduced_channels": 4}


def build(options: dict | None = None) -> DistillationCriterion:
    torch.manual_seed(0)
    return build_criterion({"bcd": SMALL | (options or {})}, SPECS, SPECS, num_labels=3)


TASK = {"loss_mask": torch.tensor(2.0), "loss_dice": torch.tensor(0.5)}  # whatever a family calls its own: 2.5 in all


@pytest.mark.parametrize("mode", ["stable", "paper"])
def test_weights_are_applied_once(mode):
    criterion = build({"mode": mode, "weight": {"boundary": 7, "context": 0.25}})
    student, teacher, targets = outputs_of(SPECS)
    total, terms = criterion(TASK, student, teacher, targets)
    assert set(terms) == {*TASK, "bcd/boundary", "bcd/context"}
    unweighted = criterion.losses["bcd"](student, teacher, targets)
    assert {k: v.item() for k, v in unweighted.items()} == {
        term: terms[f"bcd/{term}"].item() for term in ("boundary", "context")
    }
    expected = 2.5 + 7 * terms["bcd/boundary"].item() + 0.25 * terms["bcd/context"].item()
    assert total.item() == pytest.approx(expected, rel=1e-6)


def test_decay_multiplies_distillation_and_not_the_task():
    student, teacher, targets = outputs_of(SPECS)
    for decays in (True, False):
        criterion = build({"decay": decays})
        full, terms = criterion(TASK, student, teacher, targets)
        criterion.decay.fill_(0.25)
        quarter, same_terms = criterion(TASK, student, teacher, targets)
        distilled = full.item() - 2.5
        assert distilled > 0.01
        assert quarter.item() - 2.5 == pytest.approx(distilled * (0.25 if decays else 1), rel=1e-5)
        assert {k: v.item() for k, v in terms.items()} == {k: v.item() for k, v in same_terms.items()}
    assert build().decays == {"bcd"}  # r(t) is part of the method


def test_without_a_teacher_the_task_alone_remains():
    student, _, targets = outputs_of(SPECS)
    total, terms = build()(TASK, student, None, targets)
    assert total.item() == 2.5
    assert set(terms) == set(TASK)
    empty, _ = build_criterion({}, SPECS, SPECS, num_labels=3)(TASK, student, None, targets)
    assert empty.item() == 2.5


def test_total_carries_the_gradient_of_every_term():
    student, teacher, targets = outputs_of(SPECS)
    task = torch.tensor(1.0, requires_grad=True)
    level = student.features["stride_8"]
    criterion = build({"weight": 2})
    total, _ = criterion({"loss_task": task}, student, teacher, targets)
    total.backward()
    assert task.grad == 1
    assert level.grad is not None and level.grad.any()


def test_calibration_and_steps_are_passed_on():
    criterion, (_, teacher, targets) = build(), outputs_of(SPECS)
    assert criterion.needs_calibration
    criterion.calibrate([(teacher, targets)], progress=lambda steps: list(steps)[:3])
    assert not criterion.needs_calibration
    loss = criterion.losses["bcd"]
    assert isinstance(loss, BCDLoss)
    loss.context_temperature.observe(torch.tensor([0.9]))
    criterion.after_step()
    assert loss.context_temperature.value.item() == pytest.approx(1.05)


def test_state_holds_what_a_resumed_run_needs_and_not_the_decay():
    criterion, (student, teacher, targets) = build(), outputs_of(SPECS)
    criterion.calibrate([(teacher, targets)], progress=lambda steps: list(steps)[:3])
    criterion.decay.fill_(0.5)
    state = criterion.state_dict()
    assert "decay" not in state
    assert {"losses.bcd.teacher_head.theta", "losses.bcd.context_temperature.value"} <= set(state)
    restored = build_criterion({"bcd": SMALL}, SPECS, SPECS, num_labels=3, seed=8)
    restored.load_state_dict(state)
    restored.decay.fill_(0.5)
    assert not restored.needs_calibration
    totals = [c(TASK, student, teacher, targets)[0].item() for c in (criterion, restored)]
    assert totals[0] == totals[1]
