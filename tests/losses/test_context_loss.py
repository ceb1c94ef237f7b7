import math

import loss_references as reference
import pytest
import torch
from loss_references import randn, random_mask

from hf_bcd.losses import boundary_distillation_loss, context_distillation_loss
from hf_bcd.losses.context import context_relation, literal_relation
from hf_bcd.utils.messages import UserError


MODES = pytest.mark.parametrize("mode", ["stable", "paper"])
REFERENCES = {"stable": reference.context_loss, "paper": reference.literal_context_loss}


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of)[0]


def test_three_positions_by_hand():
    # Two channels: layer norm leaves the sign, (+1, -1) or (-1, +1), so G = O·O/sqrt(2) = ±sqrt(2).
    # Teacher signs + + -: row 0 sees (G01, G02) = (√2, -√2), row 1 likewise (G10, G12), row 2 sees (-√2, -√2).
    # Student signs + - -: row 0 sees (-√2, -√2), row 1 sees (G10, G12) = (-√2, √2), row 2 (G20, G21) = (-√2, √2).
    # With p = sigmoid(2√2):
    #   row 0: KL((p, 1-p) ‖ (1/2, 1/2)) = log 2 - H(p)
    #   row 1: KL((p, 1-p) ‖ (1-p, p))   = (2p - 1) · 2√2
    #   row 2: KL((1/2, 1/2) ‖ (1-p, p)) = -log 2 - log(p (1-p)) / 2
    def features(*signs: int) -> torch.Tensor:
        return torch.tensor([[[[1000.0 * s for s in signs]], [[-1000.0 * s for s in signs]]]], dtype=torch.float64)

    p = 1 / (1 + math.exp(-2 * math.sqrt(2)))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    rows = [math.log(2) - entropy, (2 * p - 1) * 2 * math.sqrt(2), -math.log(2) - math.log(p * (1 - p)) / 2]
    student, teacher = features(1, -1, -1), features(1, 1, -1)
    assert context_distillation_loss(student, teacher).item() == pytest.approx(sum(rows) / 3, rel=1e-9)
    peak = context_relation(student, teacher).peak
    assert peak.item() == pytest.approx((p + p + 0.5) / 3, rel=1e-9)


@MODES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.3])
def test_loss_equals_plain_loops(mode, masked, tau):
    student, teacher = randn(3, 4, 2, 3, seed=1), randn(3, 6, 2, 3, seed=2)
    mask = random_mask(3, 2, 3, seed=3) if masked else torch.ones(3, 2, 3, dtype=torch.bool)
    if masked:
        mask[1] = False
    loss = context_distillation_loss(
        student, teacher, tau=torch.tensor(tau, dtype=torch.float64), mask=mask if masked else None, mode=mode
    )
    expected = REFERENCES[mode](student.numpy(), teacher.numpy(), mask.numpy(), tau)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_literal_equations_hardly_depend_on_the_student():
    """n = 4096: even one-hot relations leave an outer softmax 2.4e-4 nat from uniform, on a constant of 8.318 a row."""
    n = 4096
    bits = (torch.arange(n)[:, None] >> torch.arange(12)) & 1
    codes = (20.0 * (2 * bits - 1)).double().T.reshape(1, 12, 64, 64)  # neighbours lose 2·400/√12 = 231: one-hot rows
    against_flat = math.log(n)
    against_itself = literal_relation(codes, codes).item() / n

    on, off = math.e / (math.e + n - 1), 1 / (math.e + n - 1)
    assert on == pytest.approx(6.63e-4, abs=5e-7) and off == pytest.approx(2.44e-4, abs=5e-7)
    assert against_flat == pytest.approx(8.318, abs=5e-4)
    assert against_itself == pytest.approx(-on * math.log(on) - (n - 1) * off * math.log(off), rel=1e-10)
    assert against_flat - against_itself == pytest.approx(2.4e-4, abs=5e-6)


def test_equal_features_give_zero_with_zero_gradient():
    student = randn(2, 8, 3, 3).requires_grad_()
    loss = context_distillation_loss(student, student.detach().clone())
    assert loss.abs() < 1e-12
    assert gradient(loss, student).abs().max() < 1e-12
    # paper: zero gradient too, on a constant that only the entropy of the teacher decides
    loss = context_distillation_loss(student, student.detach().clone(), mode="paper")
    assert loss.item() == pytest.approx(9 * math.log(9), rel=0.05)
    assert gradient(loss, student).abs().max() < 1e-12


def test_invariant_to_a_scale_of_every_position_and_to_rotations_of_the_channels_that_keep_their_mean():
    student, teacher = 30 * randn(2, 16, 3, 3, seed=1), 30 * randn(2, 16, 3, 3, seed=2)
    ones = torch.full((16, 1), 0.25, dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([ones, randn(16, 15, seed=3)], dim=1)).Q[:, 1:]  # of the other directions
    rotation = basis @ torch.linalg.qr(randn(15, 15, seed=4)).Q @ basis.T + ones @ ones.T
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16, dtype=torch.float64))
    scale = 0.5 + random_mask(2, 1, 3, 3).double() * 7
    turned = scale * torch.einsum("dc,bchw->bdhw", rotation, student)
    expected = context_distillation_loss(student, teacher)
    torch.testing.assert_close(context_distillation_loss(turned, teacher), expected, rtol=1e-5, atol=0)


@MODES
def test_different_grids_are_an_error_that_names_both(mode):
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 2\).*\(1, 4, 2, 3\).*resize"):
        context_distillation_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 3), mode=mode)


@pytest.mark.parametrize("loss", [context_distillation_loss, boundary_distillation_loss])
def test_a_temperature_is_a_positive_constant(loss):
    shape = (1, 3, 3, 3) if loss is context_distillation_loss else (1, 3, 3)
    student, teacher = randn(*shape), randn(*shape, seed=1)
    for tau in (0, -1.0, math.nan, math.inf, torch.tensor(0.0), torch.tensor(-2.0)):
        with pytest.raises(UserError, match="a temperature is .*; it must be > 0"):
            loss(student, teacher, tau=tau)
    with pytest.raises(UserError, match=r"needs a gradient.*detach"):
        loss(student, teacher, tau=torch.tensor(1.0, requires_grad=True))
    assert torch.equal(loss(student, teacher, tau=torch.tensor(2.0)), loss(student, teacher, tau=2.0))


# torch 2.12 itself scripts a function when it imports forward mode
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # PyTorch's own, on first use
@MODES
def test_forward_mode_is_refused_instead_of_zero(mode):
    student, teacher = randn(1, 3, 3, 3).abs(), randn(1, 3, 3, 3, seed=1).abs()

    def loss(features: torch.Tensor) -> torch.Tensor:
        return context_distillation_loss(features, teacher, mode=mode)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (student,), (torch.ones_like(student),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        loss(torch.autograd.forward_ad.make_dual(student, torch.ones_like(student)))
