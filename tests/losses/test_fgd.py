import math

import numpy as np
import pytest
import torch
from loss_references import dense_output, pair_of, randn, random_labels, random_mask, softmax
from torch import Tensor

from hf_bcd.losses.fgd import FGDLoss, GlobalContext, attention_losses, fgd_loss
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps


def attention(x: np.ndarray, mask: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Of one image `[C, h, w]`: over the valid positions, in order, and over channels."""
    valid = np.stack([x[:, y, u] for y, u in np.argwhere(mask)])
    positions = softmax(np.array([np.abs(v).mean() for v in valid]) / temperature) * len(valid)
    channels = softmax(np.array([np.abs(valid[:, c]).mean() for c in range(len(x))]) / temperature) * len(x)
    return positions, channels


def reference(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, background: int | None, temperature: float = 0.5
) -> dict[str, float]:
    """All terms but the global one, of maps `[B, C, h, w]` with labels `[B, h, w]`."""
    terms = dict.fromkeys(["foreground", "background", "spatial", "channel"], 0.0)
    for s, t, label in zip(student, teacher, labels, strict=True):
        mask = label != 255
        if not mask.any():
            continue
        ours, theirs = attention(s, mask, temperature), attention(t, mask, temperature)
        terms["spatial"] += sum(abs(a - b) for a, b in zip(ours[0], theirs[0], strict=True)) / mask.sum()
        terms["channel"] += sum(abs(a - b) for a, b in zip(ours[1], theirs[1], strict=True)) / len(s)
        errors: dict[int, list[float]] = {}
        for weight, (y, x) in zip(theirs[0], np.argwhere(mask), strict=True):
            squares = [theirs[1][c] * (s[c, y, x] - t[c, y, x]) ** 2 for c in range(len(s))]
            errors.setdefault(int(label[y, x]), []).append(weight * sum(squares) / len(s))
        for name, values in errors.items():
            terms["background" if name == background else "foreground"] += sum(values) / len(values)
    return {term: value / len(student) for term, value in terms.items()}


def module(channels: int = 3, **options) -> FGDLoss:
    specs = {"stride_8": FeatureSpec(channels, 8)}
    return FGDLoss(pair_of(specs, num_labels=4), **options).double()


def forward(loss: FGDLoss, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
    targets = LabelMaps(labels, 4)
    return loss(DenseOutput({"stride_8": student}, student), DenseOutput({"stride_8": teacher}, teacher), targets)


def test_golden_value():
    # one channel, so its attention is 1. |t| / T = (0, ln 3): softmax (1/4, 3/4), times 2 positions: S = (1/2, 3/2).
    # (s - t)² = (1, 4): errors (1/2, 6), which add up if each position is a region, 6.5, and average in one, 3.25
    teacher = torch.tensor([0, 0.5 * math.log(3)]).view(1, 1, 1, 2)
    student = teacher + torch.tensor([1.0, -2])
    apart = torch.eye(2, dtype=torch.bool).view(1, 2, 1, 2)
    assert fgd_loss(student, teacher, apart).item() == pytest.approx(6.5)
    assert fgd_loss(student, teacher, apart.any(dim=1, keepdim=True)).item() == pytest.approx(3.25)
    # a student of zeros has S = (1, 1): (1/2 + 1/2) / 2 over positions; nothing over the one channel
    spatial, channel = attention_losses(torch.zeros_like(teacher), teacher)
    assert (spatial.item(), channel.item()) == (pytest.approx(0.5), 0)


@pytest.mark.parametrize("background", [None, 0, 2])
def test_it_equals_the_loops(background):
    student, teacher = randn(3, 3, 4, 5), randn(3, 3, 4, 5, seed=1)
    labels = random_labels(3, 4, 5, num_labels=3).masked_fill(~random_mask(3, 4, 5), 255)
    labels[1] = 255
    labels[2][labels[2] == 2] = 1  # an image without this class
    loss = module(background=background, temperature=0.7)
    terms = forward(loss, student, teacher, labels)
    expected = reference(student.numpy(), teacher.numpy(), labels.numpy(), background, 0.7)
    if background is None:
        del expected["background"]
    assert set(terms) == set(loss.weights) == {*expected, "global"}
    for term, value in expected.items():
        assert terms[term].item() == pytest.approx(value, rel=1e-9), term


def test_weights_are_the_official_ones_of_sums():
    # 256 channels at 64 x 64, one object that fills half of the image: the official code sums, see the docstring
    student, teacher = randn(1, 256, 64, 64), randn(1, 256, 64, 64, seed=1)
    labels = torch.zeros(1, 64, 64).long()
    labels[:, :32] = 1
    loss = module(256, background=0)
    terms = forward(loss, student, teacher, labels)
    ours = sum(loss.weights[term] * value.item() for term, value in terms.items())
    value, target = (x.numpy()[0] for x in (student, teacher))
    places_s, places_t = (4096 * softmax(np.abs(x).mean(axis=0) / 0.5) for x in (value, target))
    channels_s, channels_t = (256 * softmax(np.abs(x).mean(axis=(1, 2)) / 0.5) for x in (value, target))
    square = (value - target) ** 2
    error = (square * channels_t[:, None, None]).sum(axis=0) * places_t
    focal = 5e-5 * error[:32].sum() / 2048 + 2.5e-5 * error[32:].sum() / 2048
    differences = np.abs(places_s - places_t).sum() + np.abs(channels_s - channels_t).sum()
    assert ours == pytest.approx(focal + 5e-5 * differences + 5e-7 * square.sum(), rel=1e-6)


def test_global_context_equals_the_loops():
    block, x, mask = GlobalContext(4).double(), randn(2, 4, 3, 3), random_mask(2, 3, 3)
    torch.testing.assert_close(block(x, mask), x, rtol=0, atol=0)  # nothing is added at first
    for i, parameter in enumerate(block.parameters()):
        parameter.data = randn(*parameter.shape, seed=i)
    weights = {name: value.detach().numpy() for name, value in block.named_parameters()}
    for image in range(2):
        valid = [x[image, :, y, u].numpy() for y, u in mask[image].nonzero().tolist()]
        scores = softmax(np.array([weights["attend.weight"][0, :, 0, 0] @ v for v in valid]))
        context = sum(a * v for a, v in zip(scores, valid, strict=True))
        hidden = weights["add.0.weight"] @ context + weights["add.0.bias"]
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5)
        hidden = np.maximum(hidden * weights["add.1.weight"] + weights["add.1.bias"], 0)
        added = weights["add.3.weight"] @ hidden + weights["add.3.bias"]
        expected = x[image].numpy() + added[:, None, None]
        np.testing.assert_allclose(block(x, mask)[image].detach().numpy(), expected, rtol=1e-9)


def test_the_global_term_compares_both_models_behind_blocks_of_their_own():
    loss, student, teacher = module(), randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    labels = torch.zeros(2, 4, 4).long()
    plain = (student - teacher).square().mean().item()
    assert forward(loss, student, teacher, labels)["global"].item() == pytest.approx(plain)
    dict(loss.named_parameters())["contexts.0.1.add.3.bias"].data.fill_(1)
    shifted = (student - teacher - 1).square().mean().item()
    assert forward(loss, student, teacher, labels)["global"].item() == pytest.approx(shifted)


def test_the_blocks_cannot_collapse_the_global_term():
    # whatever they learn, they shift a channel of an image; the rest of the difference stays
    loss, student, teacher = module(8), randn(2, 8, 4, 4), randn(2, 8, 4, 4, seed=1)
    floor = (student - teacher).var(dim=(2, 3), correction=0).mean().item()
    blocks = list(loss.contexts.parameters())
    optimizer = torch.optim.Adam(blocks, 0.05)
    for _ in range(30):
        value = forward(loss, student, teacher, torch.zeros(2, 4, 4).long())["global"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert floor <= value.item() < floor * 1.02


def test_the_student_is_projected_and_resized():
    ours, theirs = {"stride_8": FeatureSpec(2, 8)}, {"stride_8": FeatureSpec(5, 4)}
    loss = FGDLoss(pair_of(ours, theirs))
    student, teacher = (dense_output(specs, 2, 32, 3, seed=0) for specs in (ours, theirs))
    value = loss(student, teacher, LabelMaps(torch.zeros(2, 32, 32), 3))["global"]
    grown = torch.nn.functional.interpolate(
        loss.pairs[0].projection(student.features["stride_8"]), scale_factor=2.0, mode="bilinear"
    )
    expected = (grown - teacher.features["stride_8"]).square().mean()
    torch.testing.assert_close(value, expected)


def test_terms_of_levels_add_up():
    specs = {"p3": FeatureSpec(3, 8), "p4": FeatureSpec(5, 16)}
    student = DenseOutput({"p3": randn(2, 3, 8, 12), "p4": randn(2, 5, 4, 6)}, None)
    teacher = DenseOutput({"p3": randn(2, 3, 8, 12, seed=1), "p4": randn(2, 5, 4, 6, seed=1)}, None)
    targets = LabelMaps(random_labels(2, 32, 48, num_labels=4), 4)

    def terms(*levels: str) -> dict[str, Tensor]:
        return FGDLoss(pair_of(specs, num_labels=4), background=0, levels=levels).double()(student, teacher, targets)

    both, fine, coarse = terms("p3", "p4"), terms("p3"), terms("p4")
    assert both.keys() == fine.keys() == coarse.keys()
    for term, value in both.items():
        torch.testing.assert_close(value, fine[term] + coarse[term])
        assert value > fine[term] > 0, term
