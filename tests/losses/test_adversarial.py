"""The discriminator of holistic distillation, and its own training."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import randn, softmax
from torch import Tensor

from hf_bcd.losses import Adversary
from hf_bcd.losses.modules.adversarial import Discriminator, SelfAttention, SpectralConv2d, gradient_penalty


def adversary(num_labels: int = 3) -> Adversary:
    torch.manual_seed(0)
    return Adversary(num_labels, channels=2).double()


def scores(seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Noise of a student, and of a teacher whose score maps are stripes."""
    stripes = torch.arange(16).remainder(2).mul(2).sub(1).double()
    return randn(batch, 3, 16, 16, seed=seed), randn(batch, 3, 16, 16, seed=seed + 1) + 3 * stripes


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(module.state_dict())


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_gradient_penalty_by_hand() -> None:
    """D(x) = a ‖x‖² / 2 has slope a x. A quarter of the way from (0, 0) to (12, 16), that is a (3, 4), of length 5 a.

    So the penalty is (5 a - 1)², at a = 1 it is 16, and its derivative is 2 (5 a - 1) 5 = 40.
    The second image stays at (0, 0): the slope is 0, the penalty 1, its derivative 0 and not NaN.
    """
    a = torch.ones((), dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[12.0, 16.0], [0.0, 0.0]], dtype=torch.float64)
    found = gradient_penalty(lambda x: a * x.square().sum(dim=1) / 2, torch.zeros_like(teacher), teacher, 0.25)
    assert found.tolist() == [16, 1]
    assert torch.autograd.grad(found.sum(), a)[0] == 40


def test_spectral_norm_divides_by_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    layer = SpectralConv2d(3, 5, 4, stride=2, padding=1).double()
    for _ in range(200):
        layer.follow()
    largest = np.linalg.svd(layer.weight.detach().reshape(5, -1).numpy(), compute_uv=False)[0]
    x = randn(2, 3, 8, 8)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight / largest, layer.bias, 2, 1))


def test_self_attention_against_loops() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(16).double()
    layer.gamma.data.fill_(0.5)
    x = randn(2, 16, 2, 3)
    query, key, value = (
        np.einsum("oc,bcn->bno", weight.detach()[:, :, 0, 0].numpy(), x.flatten(2).numpy())
        for weight in (layer.query.weight, layer.key.weight, layer.value.weight)
    )
    query, value = (
        projected + bias.detach().numpy()
        for projected, bias in ((query, layer.query.bias), (value, layer.value.bias))
        if bias is not None
    )
    assert query.shape == (2, 6, 2)
    expected = x.flatten(2).numpy().copy()
    for b, i in np.ndindex(2, 6):
        attention = softmax(np.array([query[b, i] @ key[b, j] for j in range(6)]))
        expected[b, :, i] += 0.5 * sum(attention[j] * value[b, j] for j in range(6))
    np.testing.assert_allclose(layer(x).flatten(2).detach().numpy(), expected)


@pytest.mark.parametrize("size", [(5, 9), (16, 16), (70, 65)])
def test_the_discriminator_judges_each_image_alone_and_no_scale(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    judge, x = Discriminator(3, 2).double(), randn(2, 3, *size)
    mask = torch.ones(2, *size, dtype=torch.bool)
    mask[0, :2] = False
    found = judge(x, mask)
    assert found.shape == (2,) and found[0] != found[1]
    for i in range(2):
        torch.testing.assert_close(
            judge(4 * x[i : i + 1] + 1, mask[i : i + 1]), found[i : i + 1], rtol=1e-4, atol=1e-6
        )
    elsewhere = x.clone()
    elsewhere[0, :, :2] += 100
    torch.testing.assert_close(judge(elsewhere, mask), found)


def test_its_steps_are_those_of_adam_on_the_formula() -> None:
    """Two batches a step, whose gradients are averaged, three steps."""
    ours = adversary()
    theirs = copy.deepcopy(ours.discriminator).requires_grad_()
    optimizer = torch.optim.Adam(theirs.parameters(), lr=4e-4, betas=(0.9, 0.99))
    mask, shares = torch.ones(2, 16, 16, dtype=torch.bool), set()
    for step in range(3):
        optimizer.zero_grad()
        share = ours.noise.draw(1)
        shares.add(share.item())
        assert len(shares) == step + 1 and 0 <= share < 1
        for batch in range(2):
            student, teacher = scores(seed=10 * step + batch)
            distance = ours(student, teacher)
            real, fake = theirs(teacher, mask), theirs(student, mask)
            assert distance.item() == pytest.approx((real - fake).mean().item(), rel=1e-9)
            between = (share * teacher + (1 - share) * student).requires_grad_()
            slope = torch.autograd.grad(theirs(between, mask).sum(), between, create_graph=True)[0]
            penalty = (slope.square().sum(dim=(1, 2, 3)).sqrt() - 1).square()
            ((fake.mean() - real.mean() + 10 * penalty.mean()) / 2).backward()
        optimizer.step()
        ours.after_step()
        for layer in theirs.modules():
            if isinstance(layer, SpectralConv2d):
                layer.follow()
        expected_state = theirs.state_dict()
        for name, found in ours.discriminator.state_dict().items():
            expected = expected_state[name]
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


def test_it_learns_nothing_without_gradients_or_valid_pixels() -> None:
    ours = adversary()
    weights = state(ours.discriminator)
    with torch.no_grad():
        ours(*scores(seed=0))
    ours.after_step()
    assert_same(state(ours.discriminator), weights)
    assert ours(*scores(seed=0), torch.zeros(2, 16, 16, dtype=torch.bool)) == 0
    ours.after_step()
    for name, weight in ours.discriminator.named_parameters():
        assert torch.equal(weight, weights[name])


def test_void_pixels_teach_it_nothing() -> None:
    mask = torch.ones(2, 16, 16, dtype=torch.bool)
    mask[0, :5], mask[1] = False, False
    found = []
    for noise in (0, 10):
        ours, (student, teacher) = adversary(), scores(seed=0)
        for seed, x in enumerate((student, teacher)):
            x += noise * randn(*x.shape, seed=50 + seed).masked_fill(mask[:, None], 0)
        found.append((ours(student, teacher, mask), ours))
    assert torch.equal(found[0][0], found[1][0])
    for _, ours in found:
        ours.after_step()
    assert_same(state(found[0][1]), state(found[1][1]))
    # the image without a valid pixel counts as one of two images, with nothing to teach
    alone = adversary()
    student, teacher = scores(seed=0)
    half = alone(student[:1], teacher[:1], mask[:1])
    assert half.item() == pytest.approx(2 * found[0][0].item(), rel=1e-9)
    alone.after_step()
    torch.testing.assert_close(alone.mean, 2 * found[0][1].mean)


def test_scores_that_overflowed_leave_it_as_it_was() -> None:
    ours, (student, teacher) = adversary(), scores(seed=0)
    weights = state(ours.discriminator)
    for given, moves in ((student.masked_fill(student > 1, torch.inf), False), (student, True)):
        ours(given, teacher)
        ours.after_step()
        pairs = [(weight, weights[name]) for name, weight in ours.discriminator.named_parameters()]
        assert all(torch.equal(*pair) for pair in pairs) is not moves
    assert all(tensor.isfinite().all() for tensor in ours.state_dict().values())
