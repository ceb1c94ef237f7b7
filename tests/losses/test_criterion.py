import math
from typing import Any

import pytest
import torch
from loss_references import outputs_of, pair_of

from hf_bcd.losses import BCDLoss, KDLoss, build_criterion
from hf_bcd.losses.criterion import DistillationCriterion
from hf_bcd.outputs import FeatureSpec
from hf_bcd.utils.messages import UserError


SPECS = {"stride_4": FeatureSpec(4, 4), "stride_8": FeatureSpec(6, 8)}
SMALL: dict[str, Any] = {"channels": 8, "reduced_channels": 4}
TASK = {"loss_mask": torch.tensor(2.0), "loss_dice": torch.tensor(0.5)}  # whatever a family calls its own: 2.5 in all


def build(**options: Any) -> DistillationCriterion:
    torch.manual_seed(0)
    return build_criterion({"bcd": SMALL | options}, SPECS, SPECS, num_labels=3)


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("mode", ["stable", "paper"])
def test_weights_are_applied_once_and_decay_to_distillation_alone(mode, decays):
    criterion = build(mode=mode, weight={"boundary": 7, "context": 0.25}, decay=decays)
    student, teacher, targets = outputs_of(SPECS)
    unweighted = {f"bcd/{term}": x for term, x in criterion.losses["bcd"](student, teacher, targets).items()}
    distilled = 7 * unweighted["bcd/boundary"].item() + 0.25 * unweighted["bcd/context"].item()
    for factor in (1, 0.25):
        criterion.decay.fill_(factor)
        total, terms = criterion(TASK, student, teacher, targets)
        assert terms == TASK | unweighted and distilled > 0.01
        assert total.item() == pytest.approx(2.5 + distilled * (factor if decays else 1), rel=1e-6)
    assert build().decays == {"bcd"}  # r(t) is part of the method


def test_without_a_teacher_the_task_remains():
    student, _, targets = outputs_of(SPECS)
    for criterion in (build(), build_criterion({}, SPECS, SPECS, num_labels=3)):
        total, terms = criterion(TASK, student, None, targets)
        assert total.item() == 2.5 and terms == TASK


def test_calibration_and_steps_are_passed_on_and_kept_but_not_the_decay():
    criterion, (student, teacher, targets) = build(), outputs_of(SPECS)
    assert criterion.needs_calibration
    criterion.calibrate([(teacher, targets)], progress=lambda steps: list(steps)[:3])
    assert not criterion.needs_calibration
    loss = criterion.losses["bcd"]
    assert isinstance(loss, BCDLoss)
    loss.context_temperature.observe(torch.tensor([0.9]))
    criterion.after_step()
    assert loss.context_temperature.value.item() == pytest.approx(1.05)
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


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0, "2", True])
def test_a_wrong_weight_is_refused(weight):
    with pytest.raises(UserError, match=f"weight of kd/kd is {weight!r}"):
        DistillationCriterion({"kd": KDLoss(pair_of(SPECS))}, {"kd": {"kd": weight}}, [])


def test_plain_label_maps_are_looked_at():
    criterion, (student, teacher, targets) = build(), outputs_of(SPECS)
    for ids in (targets.ids, targets.ids.to(torch.uint8)):
        expected, found = (criterion(TASK, student, teacher, given)[0] for given in (targets, ids))
        assert torch.equal(expected, found)
    wrong = {
        "ids \\[-100\\].*ignore_index=255": targets.ids.masked_fill(targets.ids == 0, -100),
        "ids \\[-1\\].*ignore_index=255": targets.ids.masked_fill(targets.ids == 0, -1),
        "torch.float32 \\[2, 32, 32\\]; give class ids": targets.ids.float(),
        "torch.bool": targets.ids == 1,
        "torch.int64 \\[2, 1, 32, 32\\]": targets.ids[:, None],
    }
    for message, ids in wrong.items():
        with pytest.raises(UserError, match=message):
            criterion(TASK, student, teacher, ids)
        with pytest.raises(UserError, match=message):
            criterion.calibrate([(teacher, ids)])
    criterion.calibrate([(teacher, targets.ids)], progress=lambda steps: list(steps)[:3])
    assert not criterion.needs_calibration
    with pytest.raises(ValueError, match="knows no num_labels"):
        DistillationCriterion({}, {}, [])(TASK, student, teacher, targets.ids)
