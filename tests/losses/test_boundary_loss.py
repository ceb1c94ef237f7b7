import math

import loss_references as reference
import numpy as np
import pytest
import torch
from loss_references import randn, random_mask

from hf_bcd.losses import boundary_distillation_loss, boundary_strength
from hf_bcd.losses.boundary import different_neighbour, pair_differences, score_boundary_loss, spatial_divergence
from hf_bcd.losses.ops.windows import window_divergence


MODES = pytest.mark.parametrize("mode", ["stable", "paper"])


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of)[0]


@pytest.mark.parametrize("radius", [2, 3])
def test_boundaries_equal_plain_loops(radius):
    z, classes, mask = randn(2, 5, 6), (randn(2, 5, 6) * 0.7).round().long(), random_mask(2, 5, 6)
    for b in range(2):
        expected = reference.boundary_strength(z[b].numpy(), mask[b].numpy(), radius)
        np.testing.assert_array_equal(boundary_strength(z, radius, mask)[b].numpy(), expected)
        for valid, seen in ((mask, mask), (torch.ones_like(mask), None)):
            expected = reference.class_boundary(classes[b].numpy(), valid[b].numpy(), radius)
            np.testing.assert_array_equal(different_neighbour(classes, radius, seen)[b].numpy(), expected)


def test_pair_differences_need_two_valid_ends():
    classes = torch.tensor([[[0, 0, 1, 1]]])
    mask = torch.tensor([[[True, True, True, False]]])
    differs, both = pair_differences(classes, 2, "half", mask)
    # directions of radius 2: (0, 1), (1, -1), (1, 0), (1, 1); all but the first leave this image
    assert differs[0, :, 0].tolist() == [[False, True, False, False]] + [[False] * 4] * 3
    assert both[0, :, 0].tolist() == [[True, True, False, False]] + [[False] * 4] * 3


def test_step_edge_by_hand():
    # z = 0 0 0 1 1 1, R = 2: only the positions beside the step have a line across it, u = 0 0 1 1 0 0.
    z = torch.tensor([[[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]], dtype=torch.float64)
    assert boundary_strength(z, 2).tolist() == [[[0, 0, 1, 1, 0, 0]]]

    # Teacher, theta = 0.5: b = u; p = e/(2e+4) twice and 1/(2e+4) four times.
    # A flat student has q = 1/6, so KL = 2e/(2e+4) - log((2e+4)/6) = e/(e+2) - log((e+2)/3).
    flat = torch.zeros_like(z)
    against_flat = boundary_distillation_loss(flat, z, radius=2, theta=0.5)
    assert against_flat.item() == pytest.approx(math.e / (math.e + 2) - math.log((math.e + 2) / 3), abs=1e-12)

    # A student with the same step, kappa = 0.5: b = sigmoid(±1) = 0.731059, 0.268941, a gap of g = 0.462117 = tanh(1/2),
    # so q = e^g/(2e^g+4) twice and 1/(2e^g+4) four times and
    # KL = sum p log(p/q) = P (1 - g) - log((2e+4)/(2e^g+4)) with P = 2e/(2e+4), the teacher's mass on the edge.
    g, mass = math.tanh(0.5), math.e / (math.e + 2)
    expected = mass * (1 - g) - math.log((math.e + 2) / (math.exp(g) + 2))
    loss = boundary_distillation_loss(z, z, radius=2, theta=0.5)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert 0 < loss < against_flat

    # Paper: T = 1 - b, p = 1/(4e+2) twice and e/(4e+2) four times, for both nets: L = H(p).
    entropy = math.log(4 * math.e + 2) - 4 * math.e / (4 * math.e + 2)
    literal = boundary_distillation_loss(z, z, radius=2, theta=0.5, mode="paper")
    assert literal.item() == pytest.approx(entropy, abs=1e-12)


@pytest.mark.parametrize(
    ("share", "nat"), [(0.02, 0.019), (0.05, 0.043), (0.1, 0.073), (0.3, 0.122), (0.5, 0.111), (0.9, 0.026)]
)
def test_divergence_of_a_binary_map_from_uniform(share, nat):
    n = 4096
    ones = torch.zeros(n, dtype=torch.float64)
    ones[: round(share * n)] = 1
    divergence = spatial_divergence(torch.zeros(1, 64, 64, dtype=torch.float64), ones.view(1, 64, 64))
    assert divergence.item() == pytest.approx(nat, abs=5e-4)
    entropy_kept = spatial_divergence(torch.zeros(1, 64, 64), ones.view(1, 64, 64).float(), entropy=False)
    assert entropy_kept.item() == pytest.approx(8.318, abs=5e-4)  # log n, whatever the teacher


@MODES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("radius", "theta", "kappa", "tau"), [(2, 1.0, 0.5, 1.0), (3, 1.5, 0.5, 2.3), (3, 0.7, 0.1, 1.05)]
)
def test_loss_equals_plain_loops(mode, masked, radius, theta, kappa, tau):
    student, teacher = randn(3, 5, 6, seed=1), randn(3, 5, 6, seed=2)
    mask = random_mask(3, 5, 6) if masked else torch.ones(3, 5, 6, dtype=torch.bool)
    if masked:
        mask[1] = False  # one image is void throughout
    options = {"radius": radius, "kappa": kappa, "mode": mode}
    expected = reference.boundary_loss(student.numpy(), teacher.numpy(), mask.numpy(), theta=theta, tau=tau, **options)
    tensors = {key: torch.tensor(x, dtype=torch.float64) for key, x in (("theta", theta), ("tau", tau))}
    loss = boundary_distillation_loss(student, teacher, mask=mask if masked else None, **tensors, **options)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_equal_boundary_maps_give_zero_with_zero_gradient():
    field = randn(2, 5, 5)
    student = field.clone().requires_grad_()
    divergence = spatial_divergence(student, field)
    assert divergence.abs().max() < 1e-12
    assert gradient(divergence.sum(), student).abs().max() < 1e-12

    # the teacher's map is hard and the student's soft: equal fields give equal maps as kappa goes to 0
    loss = boundary_distillation_loss(student, field, kappa=1e-5, theta=2.0)
    assert loss.abs() < 1e-12
    assert gradient(loss, student).abs().max() < 1e-12


def test_straight_through_gradient_of_paper_mode():
    """Hard forward: d L / d b = q_i - p_i at the hard map; backward through the sigmoid of the strength."""
    student, teacher = randn(1, 4, 5, seed=1).requires_grad_(), randn(1, 4, 5, seed=2)
    theta, kappa, tau = 2.0, 0.5, 1.5
    loss = boundary_distillation_loss(student, teacher, theta=theta, kappa=kappa, tau=tau, mode="paper")
    actual = gradient(loss, student)

    everything = np.ones((4, 5), dtype=bool)
    strengths = [reference.boundary_strength(x[0].detach().numpy(), everything, 3) for x in (teacher, student)]
    p, q = (reference.softmax((u.flatten() <= theta) / tau) for u in strengths)
    # L = -tau² sum p log softmax((1 - b) / tau): dL/db_i = -tau (q_i - p_i)
    wrt_map = torch.from_numpy(-tau * (q - p)).view(1, 4, 5)
    strength = boundary_strength(student)
    slope = torch.sigmoid((strength.detach() - theta) / kappa)
    surrogate = (wrt_map * slope * (1 - slope) / kappa * strength).sum()
    torch.testing.assert_close(actual, gradient(surrogate, student), rtol=1e-9, atol=1e-12)


def test_different_grids_are_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"\(1, 4, 4\).*\(1, 4, 5\)"):
        boundary_distillation_loss(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5))


# --- among class scores ------------------------------------------------------------------------------------------------


def test_score_boundaries_equal_plain_loops_and_weigh_positions():
    student, teacher, mask = randn(2, 3, 5, 6, seed=1), randn(2, 3, 5, 6, seed=2), random_mask(2, 5, 6)
    mask[1] = False
    weights = torch.rand(2, 5, 6, dtype=torch.float64)
    for given in (mask.double(), weights):
        expected = reference.score_boundary(student.numpy(), teacher.numpy(), mask.numpy(), (given * mask).numpy())
        found = score_boundary_loss(student, teacher, mask=mask, weights=given * mask)
        assert found.item() == pytest.approx(expected, rel=1e-12)
    without = score_boundary_loss(student, teacher, mask=mask)
    assert without.item() == pytest.approx(
        score_boundary_loss(student, teacher, mask=mask, weights=mask.double()).item()
    )


def test_a_step_of_one_class_by_hand():
    # the teacher's second class is ln 3 higher at the last of three positions in a row, the student's is even
    teacher = torch.zeros(1, 2, 1, 3, dtype=torch.float64)
    teacher[0, 1, 0, 2] = math.log(3)
    found = window_divergence(torch.zeros_like(teacher), teacher, torch.ones(1, 1, 3, dtype=torch.bool))
    three, two = (
        math.log(3) - 0.95027054,
        math.log(2) - 0.56233514,
    )  # less the entropies of (1, 1, 3) / 5 and (1, 3) / 4
    assert found[0, 0].abs().max() < 1e-15
    assert found[0, 1, 0].tolist() == pytest.approx([0, three, two], abs=1e-8)


def test_only_differences_within_a_class_count_and_far_scores_stay_finite():
    teacher, mask = randn(1, 3, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    shifted = teacher + torch.tensor([5.0, -3.0, 100.0], dtype=torch.float64)[:, None, None]
    assert score_boundary_loss(shifted, teacher, mask=mask).item() == pytest.approx(0, abs=1e-12)
    far = (1e4 * randn(1, 3, 4, 4, seed=3)).float().requires_grad_()
    loss = score_boundary_loss(far, teacher.float(), mask=mask)
    assert torch.isfinite(loss) and torch.isfinite(gradient(loss, far)).all()
    assert score_boundary_loss(far, teacher.float(), mask=torch.zeros_like(mask)) == 0


def test_gradients_of_windows():
    teacher, mask = randn(1, 2, 4, 5, seed=1), random_mask(1, 4, 5)
    student = randn(1, 2, 4, 5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: window_divergence(x, teacher, mask), (student,))
