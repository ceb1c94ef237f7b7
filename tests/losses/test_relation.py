from collections.abc import Callable

import loss_references as reference
import pytest
import torch
import torch.nn.functional as F
from host_sync import no_host_synchronisation
from loss_references import Operators, randn, random_mask
from torch.utils.checkpoint import checkpoint

from hf_bcd.losses import relation_divergence
from hf_bcd.losses.ops import relation
from hf_bcd.losses.ops.relation import literal_divergence, relation_divergence_reference, stream_relation


STREAMED_OR_REFERENCE = pytest.mark.parametrize("divergence_of", [relation_divergence, relation_divergence_reference])


def inputs(batch: int = 3, n: int = 7, student: int = 4, teacher: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(batch, n, student, seed=1), randn(batch, n, teacher, seed=2)


def value_and_gradient(function: Callable[[torch.Tensor], torch.Tensor], student: torch.Tensor):
    """Values `[B]` and the gradient of their sum, weighted unequally."""
    student = student.detach().requires_grad_()
    values = function(student)
    (values * torch.linspace(1, 3, len(values), dtype=values.dtype)).sum().backward()
    assert student.grad is not None
    return values.detach(), student.grad


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@STREAMED_OR_REFERENCE
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.3])
def test_divergence_and_peak_equal_plain_loops(divergence_of, masked, tau):
    student, teacher = inputs()
    mask = random_mask(3, 7) if masked else torch.ones(3, 7, dtype=torch.bool)
    if masked:
        mask[1] = False
        mask[2] = torch.arange(7) == 3  # a single valid position has no other one to relate to
    result = divergence_of(student, teacher, tau=torch.tensor(tau), mask=mask if masked else None)
    for b in range(3):
        divergence, peak = reference.relation(student[b].numpy(), teacher[b].numpy(), mask[b].numpy(), tau)
        assert result.divergence[b].item() == pytest.approx(divergence, rel=1e-6, abs=1e-12)
        assert result.peak[b].item() == pytest.approx(peak, rel=1e-6, abs=1e-12)


def test_peak_carries_no_gradient_and_the_teacher_none():
    student, teacher = (x.requires_grad_() for x in inputs())
    result = relation_divergence(student, teacher)
    assert not result.peak.requires_grad
    result.divergence.sum().backward()
    assert teacher.grad is None and student.grad is not None and student.grad.any()


# --- streaming --------------------------------------------------------------------------------------------------------


def literal_formula(student: torch.Tensor, teacher: torch.Tensor, *, tau: float, mask: torch.Tensor) -> torch.Tensor:
    values = []
    for s, t, m in zip(student, teacher, mask, strict=True):
        p, q = ((x[m] @ x[m].mT).softmax(dim=-1) / tau for x in (t, s))
        values.append(-(p.softmax(dim=-1) * q.log_softmax(dim=-1)).sum())
    return torch.stack(values)


# in bytes of workspace for 3 images of 150 positions in float64: 64 rows at a time, one image, two images, all three
@pytest.mark.parametrize("block_bytes", [1, 4 * 8 * 150**2, 2 * 4 * 8 * 150**2 + 1, 2**24])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_change_neither_value_nor_gradient(monkeypatch, block_bytes, masked):
    monkeypatch.setattr(relation, "BLOCK_BYTES", block_bytes)
    student, teacher = inputs(n=150)
    mask = random_mask(3, 150) if masked else torch.ones(3, 150, dtype=torch.bool)
    if masked:
        mask[1] = torch.arange(150) == 70  # in the second block of rows
    given = {"tau": 1.7, "mask": mask if masked else None}
    found = value_and_gradient(lambda s: relation_divergence(s, teacher, **given).divergence, student)
    expected = value_and_gradient(lambda s: relation_divergence_reference(s, teacher, **given).divergence, student)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    peaks = [f(student, teacher, **given).peak for f in (relation_divergence, relation_divergence_reference)]
    torch.testing.assert_close(*peaks, rtol=1e-9, atol=0)
    mask[1] = not masked  # of the literal form a whole image may be void
    found = value_and_gradient(lambda s: literal_divergence(s, teacher, **given), student)
    expected = value_and_gradient(lambda s: literal_formula(s, teacher, tau=1.7, mask=mask), student)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("literal", [False, True])
def test_gradcheck_over_several_blocks(monkeypatch, literal):
    monkeypatch.setattr(relation, "BLOCK_BYTES", 1)
    student, teacher, mask = randn(1, 70, 2, seed=1), randn(1, 70, 3, seed=2), random_mask(1, 70)
    function = literal_divergence if literal else lambda *args, **options: relation_divergence(*args, **options)[0]
    assert torch.autograd.gradcheck(
        lambda s: function(s, teacher, tau=1.3, mask=mask), student.requires_grad_(), fast_mode=True
    )


@pytest.mark.parametrize("literal", [False, True])
def test_nothing_of_n_by_n_exists(literal, monkeypatch):
    monkeypatch.setattr(relation, "BLOCK_BYTES", 1)  # four blocks of 64 rows
    n = 500
    student, teacher = (randn(1, n, 2, seed=seed, dtype=torch.float32) for seed in (1, 2))
    with Operators() as seen, torch.no_grad():
        stream_relation(student, teacher, torch.tensor(1.0), random_mask(1, n), literal, True)
    assert seen.largest == 4 * 64 * n < n * n
    with Operators() as seen:  # the guard notices
        relation_divergence_reference(student, teacher)
    assert seen.largest == n * n


def test_four_products_with_a_gradient_and_two_without():
    counts = []
    for with_gradient in (True, False):
        with Operators() as seen, torch.no_grad():
            stream_relation(*inputs(), torch.tensor(1.0), None, False, with_gradient)
        counts.append(sum(name in ("bmm", "baddbmm_") for name in seen.names))
    assert counts == [4, 2]


@pytest.mark.parametrize("literal", [False, True])
def test_the_device_is_never_waited_for(literal):
    """Nothing inside the operator either, where a dispatch mode around it does not look."""
    with no_host_synchronisation(), torch.no_grad():
        value, _, gradient = stream_relation(*inputs(), torch.tensor(1.0), random_mask(3, 7), literal, True)
    assert value.isfinite().all() and gradient.isfinite().all()  # a wait would have raised above


def test_only_the_gradient_is_kept():
    student, teacher = inputs()
    kept = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        relation_divergence(student.requires_grad_(), teacher)
        literal_divergence(student, teacher)
    assert kept == [student.shape] * 2
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        assert not relation_divergence(student.detach(), teacher).divergence.requires_grad
        with torch.no_grad():
            assert not relation_divergence(student, teacher).divergence.requires_grad
    assert not kept


@pytest.mark.parametrize("distance", [0.03, 0.3, 2.0])
def test_precision(distance):
    """Against float64, from almost equal relations (0.007 nat) to unrelated ones."""
    teacher = F.layer_norm(randn(2, 300, 64, seed=2), (64,)) / 64**0.25
    student = F.layer_norm(teacher + distance * randn(2, 300, 64, seed=1), (64,)) / 64**0.25

    def compute(dtype: torch.dtype, rounded: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
        s, t = (x.to(rounded).to(dtype) for x in (student, teacher))
        return value_and_gradient(lambda s: relation_divergence(s, t).divergence, s)

    exact, single = compute(torch.float64), compute(torch.float32)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(single, exact, strict=True))
    half = compute(torch.bfloat16)
    assert half[0].dtype == torch.float32 and half[1].dtype == torch.bfloat16
    if distance > 0.03:  # the rounding of features to bfloat16 is itself a distance of 0.002
        assert all(relative_error(a, b) < 2e-2 for a, b in zip(half, exact, strict=True))
    of_rounded = compute(torch.float64, rounded=torch.bfloat16)
    assert relative_error(half[0], of_rounded[0]) < 1e-5
    assert relative_error(half[1], of_rounded[1]) < 4e-3  # the gradient's own rounding


def test_second_derivatives_are_an_error():
    student, teacher = inputs()
    (grad,) = torch.autograd.grad(
        relation_divergence(student.requires_grad_(), teacher).divergence.sum(), student, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    student, teacher = inputs()

    def loss(student: torch.Tensor) -> torch.Tensor:
        return relation_divergence(3 * student, teacher).divergence

    plain = value_and_gradient(loss, student)
    saved = value_and_gradient(lambda s: checkpoint(loss, s, use_reentrant=use_reentrant), student)
    torch.testing.assert_close(saved, plain, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph_for_every_temperature(dynamic):
    student, teacher = inputs()
    mask = random_mask(3, 7)

    def loss(student: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        stable = relation_divergence(student, teacher, tau=tau, mask=mask).divergence
        return stable + literal_divergence(student, teacher, tau=tau, mask=mask)

    torch._dynamo.reset()  # what other tests compiled of this function counts as a recompilation
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tau in (1.0, 1.05, 4.0):
            tau = torch.tensor(tau)
            plain = value_and_gradient(lambda s, tau=tau: loss(s, tau), student)
            torch.testing.assert_close(value_and_gradient(lambda s, tau=tau: compiled(s, tau), student), plain)


@pytest.mark.parametrize("literal", [False, True])
def test_operator_is_registered_correctly(literal):
    student, teacher = inputs()
    tau = torch.tensor(1.3, dtype=torch.float64)
    args = (student.requires_grad_(), teacher, tau, random_mask(3, 7), literal, True)
    # the fourth check differentiates every output, the gradient too, which is an error here
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    results = torch.library.opcheck(torch.ops.hf_bcd.relation.default, args, test_utils=checks)
    assert results == dict.fromkeys(checks, "SUCCESS")
