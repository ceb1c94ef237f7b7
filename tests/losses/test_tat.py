import math

import numpy as np
import pytest
import torch
from loss_references import Operators, pair_of, randn, random_mask, softmax
from torch import Tensor

from hf_bcd.losses.tat import TATLoss, tat_loss
from hf_bcd.outputs import DenseOutput, FeatureSpec, LabelMaps


def reference(
    maps: list[np.ndarray], mask: np.ndarray, sides: tuple[int, int], group: int = 1, cell: tuple[int, int] = (1, 1)
) -> float:
    """Mean over images of the rebuilding error, patches of `sides` cells, cells of `cell` positions."""
    losses = []
    for image in range(len(mask)):
        height, width = (-(-side // step) for side, step in zip(mask.shape[1:], cell, strict=True))
        pooled = {}
        for y, x in np.ndindex(height, width):
            inside = (slice(y * cell[0], (y + 1) * cell[0]), slice(x * cell[1], (x + 1) * cell[1]))
            seen = mask[image][inside]
            if seen.any():
                pooled[y, x] = [part[image][(slice(None), *inside)][:, seen].mean(axis=1) for part in maps]
        errors = []
        for y, x in pooled:
            row, column = y // sides[0], x // sides[1]
            first = column // group * group
            places = [(row * sides[0] + v, u) for v in range(sides[0]) for u in range(sides[1])]
            at = (y, x - column * sides[1])
            keys = [(v, column * sides[1] + u) for v, u in places]
            scores = []
            for v, u in places:
                score = 0.0
                for neighbour in range(first, first + group):
                    a = pooled.get((at[0], neighbour * sides[1] + at[1]))
                    b = pooled.get((v, neighbour * sides[1] + u))
                    if a is not None and b is not None:
                        score += float(a[0] @ b[1])
                scores.append(score)
            known = [i for i, place in enumerate(keys) if place in pooled]
            weights = softmax(np.array([scores[i] for i in known]))
            rebuilt = sum(w * pooled[keys[i]][2] for w, i in zip(weights, known, strict=True))
            errors.append(((rebuilt - pooled[y, x][3]) ** 2).mean())
        losses.append(sum(errors) / len(errors) if errors else 0.0)
    return sum(losses) / len(losses)


def maps(*shape: int, seed: int = 0) -> list[Tensor]:
    return [randn(*shape, seed=seed + i) for i in range(4)]


def module(channels: int, **options) -> TATLoss:
    specs = {"stride_8": FeatureSpec(channels, 8)}
    return TATLoss(pair_of(specs), **options).double()


def forward(loss: TATLoss, student: Tensor, teacher: Tensor, labels: Tensor) -> dict[str, Tensor]:
    outputs = (DenseOutput({"stride_8": x}, x) for x in (student, teacher))  # logits are not looked at
    return loss(*outputs, LabelMaps(labels, 3))


def test_golden_value():
    # q = (0, ln 3), k = (0, 1), v = (2, 6), t = (3, 7).
    # scores of position 0: (0, 0), attention (1/2, 1/2), rebuilt 4, error (4 - 3)² = 1;
    # of position 1: (0, ln 3), attention (1/4, 3/4), rebuilt 5, error (5 - 7)² = 4; mean 2.5
    query, key, value, target = (
        torch.tensor(pair).view(1, 1, 1, 2) for pair in ([0, math.log(3)], [0.0, 1], [2.0, 6], [3.0, 7])
    )
    assert tat_loss(query, key, value, target).item() == pytest.approx(2.5)
    # without position 0: position 1 sees itself alone, (6 - 7)² = 1
    mask = torch.tensor([[[False, True]]])
    assert tat_loss(query, key, value, target, mask=mask).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("patches", "group", "sides"), [(1, 1, (6, 10)), (2, 2, (3, 5)), (3, 2, (2, 4)), (4, 1, (2, 3)), (9, 4, (2, 2))]
)
def test_it_equals_the_loops(patches, group, sides):
    given, mask = maps(2, 3, 6, 10), random_mask(2, 6, 10)
    mask[1, :, :5] = False
    expected = reference([x.numpy() for x in given], mask.numpy(), sides, group)
    query, key, value, target = given
    loss = tat_loss(query, key, value, target, patches=patches, group=group, mask=mask)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_terms_are_those_of_embedded_maps():
    loss, labels = module(4, patches=2, group=2, anchors=3), torch.zeros(2, 64, 80).long()
    labels[0, :40, :24] = 255
    labels[1, 32:] = 255
    student, target = randn(2, 4, 8, 10), randn(2, 4, 8, 10, seed=1)
    for i, parameter in enumerate(loss.parameters()):
        parameter.data = randn(*parameter.shape, seed=20 + i)
    terms = forward(loss, student, target, labels)
    mask = (labels[:, 4::8, 4::8] != 255).numpy()
    embedded = []
    for connector, x in ((loss.query, student), (loss.key, target), (loss.value, student)):
        projected = np.einsum("oi,bihw->bohw", connector.projection.weight.detach().numpy()[..., 0, 0], x.numpy())
        scale, shift = connector.weight.detach().numpy(), connector.bias.detach().numpy()
        normed = np.zeros_like(projected)
        for image, channel in np.ndindex(*projected.shape[:2]):
            seen = projected[image, channel][mask[image]]
            normed[image, channel] = (projected[image, channel] - seen.mean()) / (seen.std() + 1e-5)
        embedded.append(normed * scale + shift)
    every = [*embedded, target.numpy()]
    assert terms["patch_group"].item() == pytest.approx(reference(every, mask, (4, 5), 2), rel=1e-9)
    # anchors are cells of ceil(8 / 3) x ceil(10 / 3) positions, and attend to each other all over the map
    assert terms["anchor"].item() == pytest.approx(reference(every, mask, (3, 3), 1, (3, 4)), rel=1e-9)


def test_memory_is_bounded():
    loss, x = module(2), randn(1, 2, 96, 96)
    with Operators() as seen:
        forward(loss, x, x, torch.zeros(1, 96, 96))
    # at most 32 x 32 anchors, each with an attention to each; patches have 6 x 6 positions
    assert max(96 * 96 * 36, 1024**2) == seen.largest


def test_the_key_cannot_collapse_the_loss():
    # a student that is constant over the image knows nothing of it; the best it can rebuild is the target's mean
    loss, target = module(3), randn(2, 3, 8, 8)
    student, labels = torch.ones_like(target), torch.zeros(2, 64, 64).long()
    floor = target.var(dim=(2, 3), correction=0).mean().item()
    optimizer = torch.optim.Adam(loss.parameters(), 0.2)
    for _ in range(20):
        terms = forward(loss, student, target, labels)
        optimizer.zero_grad()
        torch.stack([*terms.values()]).sum().backward()
        optimizer.step()
    assert terms["patch_group"].item() >= floor
    assert terms["patch_group"].item() == pytest.approx(floor, rel=0.05)


def test_maps_of_different_grids_are_refused():
    query, key, value, target = maps(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 4\)"):
        tat_loss(query, key[:, :, :2], value, target)
    with pytest.raises(ValueError, match="channels"):
        tat_loss(query, key, value[:, :1], target)
