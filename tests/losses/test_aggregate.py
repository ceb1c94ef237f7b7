import loss_references as reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_references import randn, random_mask

from hf_bcd.losses import boundary_strength
from hf_bcd.losses.modules.aggregate import FeatureAggregator, SelfRelationHead, TeacherHead
from hf_bcd.outputs import FeatureSpec


SPECS = {"stride_4": FeatureSpec(6, 4), "stride_8": FeatureSpec(12, 8), "stride_32": FeatureSpec(20, 32)}
FEATURES = {
    name: randn(2, spec.channels, 64 // spec.stride, 96 // spec.stride, seed=i, dtype=torch.float32)
    for i, (name, spec) in enumerate(SPECS.items())
}


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive scores above a negative (Mann-Whitney)."""
    a, b = scores[positive][:, None], scores[~positive][None]
    return float((a > b).mean() + 0.5 * (a == b).mean())


def class_scene(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features that are constant in each of four regions plus noise, the regions, and a mask."""
    classes = torch.zeros(2, 16, 16, dtype=torch.long)
    classes[:, 5:11, 2:9] = 1
    classes[:, 8:, 10:] = 2
    classes[1, :4, 6:] = 3
    centres = randn(4, 32, seed=1, dtype=torch.float32)  # the same in every scene
    features = centres[classes].movedim(-1, 1) + 1.5 * randn(2, 32, 16, 16, seed=seed, dtype=torch.float32)
    return features, classes, torch.ones(2, 16, 16, dtype=torch.bool)


def teacher_head(seed: int = 0) -> TeacherHead:
    return TeacherHead(SPECS, channels=32, reduced_channels=8, seed=seed)


def test_default_sizes_are_the_papers():
    aggregator = FeatureAggregator({f"level_{k}": FeatureSpec(32, 4) for k in range(5)})
    assert aggregator.fuse.weight.shape == (256, 5 * 64, 3, 3)
    assert sum(p.numel() for p in aggregator.fuse.parameters()) == pytest.approx(0.74e6, rel=0.01)
    with pytest.raises(ValueError, match="no feature levels"):
        FeatureAggregator({})


@pytest.mark.parametrize("predictor", [False, True])
def test_self_relation_head_is_norm_relu_and_optionally_conv_norm_relu(predictor):
    head, x, mask = SelfRelationHead(6, predictor), randn(2, 6, 3, 4, dtype=torch.float32), random_mask(2, 3, 4)

    def norm_relu(x: torch.Tensor) -> torch.Tensor:
        seen = x.movedim(1, -1)[mask]
        return F.relu((x - seen.mean(dim=0)[:, None, None]) / (seen.std(dim=0, correction=0) + 1e-5)[:, None, None])

    expected = norm_relu(x)
    if predictor:
        assert head.predictor is not None
        expected = norm_relu(F.conv2d(expected, head.predictor.weight))
    torch.testing.assert_close(head(x, mask), expected, rtol=1e-4, atol=1e-5)
    assert bool(list(head.parameters())) == predictor  # the teacher's side has nothing to train


def test_teachers_maps_are_orthogonal_without_bias():
    head = teacher_head()
    convolutions = [m for m in head.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == len(SPECS) + 2
    for convolution in convolutions:
        weight = convolution.weight.flatten(1).double()
        gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-5)
        assert convolution.bias is not None and not convolution.bias.any()


def test_teachers_head_is_frozen_and_cuts_the_graph():
    head = teacher_head()
    assert not any(p.requires_grad for p in head.parameters())
    aggregated = head({name: x.clone().requires_grad_() for name, x in FEATURES.items()}, (8, 12))
    assert not aggregated.requires_grad
    assert not head.boundary_field(aggregated.requires_grad_()).requires_grad


def test_its_seed_decides_the_maps_and_their_calibration_which_changes_no_relation():
    heads, relations, seen = [], [], []

    def progress(steps):
        for step in steps:
            seen.append(step)
            yield step

    for state, seed in enumerate((0, 0, 5)):
        torch.manual_seed(state)
        heads.append(teacher_head(seed))
        relations.append(heads[-1](FEATURES, (8, 12)))
        heads[-1].calibrate([class_scene(10)], radius=3, readout="fitted", num_steps=7, progress=progress)
        assert torch.equal(heads[-1](FEATURES, (8, 12)), relations[-1])
    first, second, other = (head.state_dict() for head in heads)
    assert seen == 3 * list(range(7)) and all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(relations[0], relations[2]) and not torch.equal(first["theta"], other["theta"])


def test_calibration_finds_the_teachers_boundaries():
    """On unseen noise: before, the random readout sees little of the regions; afterwards it ranks boundaries first."""
    head = teacher_head()
    features, classes, mask = class_scene(seed=50)
    positive = np.stack(
        [reference.class_boundary(c.numpy(), m.numpy(), 3) for c, m in zip(classes, mask, strict=True)]
    )

    def auc() -> float:
        strength = boundary_strength(head.boundary_field(features), 3, mask)
        return area_under_curve(strength.flatten().numpy(), positive.flatten().astype(bool))

    before = auc()
    head.calibrate([class_scene(seed) for seed in (10, 20)], radius=3, readout="fitted", num_steps=100)
    assert before < 0.75
    assert auc() > 0.95
    assert not any(p.requires_grad or p.grad is not None for p in head.parameters())


@pytest.mark.parametrize("readout", ["kept", "principal", "fitted"])
def test_theta_gives_the_boundary_share_of_the_class_map(readout):
    head, batches = teacher_head(), [class_scene(seed) for seed in (10, 20)]
    batches[1][2][0, 3:9, 4:12] = False
    head.calibrate(batches, radius=3, readout=readout, num_steps=20)
    marked, boundary, valid, values = 0, 0, 0, []
    for features, classes, mask in batches:
        field = head.boundary_field(features)
        values.append(field[mask])
        for b in range(2):
            positions = mask[b].numpy()
            strength = reference.boundary_strength(field[b].double().numpy(), positions, 3)
            marked += int((strength[positions] > head.theta.item()).sum())
            boundary += int(reference.class_boundary(classes[b].numpy(), positions, 3)[positions].sum())
            valid += int(positions.sum())
    # positions around one extreme share their strength, so that a threshold can be off by one such group
    assert abs(marked - boundary) <= 0.01 * valid
    assert 0.1 < boundary / valid < 0.9
    assert torch.cat(values).mean().item() == pytest.approx(0, abs=1e-4)
    assert torch.cat(values).std(correction=0).item() == pytest.approx(1, abs=1e-3)


def test_theta_separates_a_field_without_noise_exactly():
    """Two values only: every strength is 0 or the step, and theta must fall between."""
    head = teacher_head()
    classes = torch.zeros(1, 8, 8, dtype=torch.long)
    classes[:, :, 4:] = 1
    features = (head.readout.weight[0] * classes[:, None]).clone()
    head.calibrate([(features, classes, torch.ones_like(classes, dtype=torch.bool))], radius=3, readout="kept")
    hard = boundary_strength(head.boundary_field(features), 3) > head.theta
    assert torch.equal(hard[0], torch.tensor([[False, False, True, True, True, True, False, False]]).expand(8, 8))


@pytest.mark.parametrize("num_classes", [1, 64])
def test_calibration_on_degenerate_class_maps_stays_finite(num_classes):
    """One class: no position is a boundary. Every position its own class: all are."""
    head = teacher_head()
    classes = torch.arange(64).view(1, 8, 8) % num_classes
    batch = (randn(1, 32, 8, 8, dtype=torch.float32), classes, torch.ones(1, 8, 8, dtype=torch.bool))
    head.calibrate([batch], radius=3, readout="fitted", num_steps=5)
    share = (boundary_strength(head.boundary_field(batch[0]), 3) > head.theta).double().mean().item()
    assert share == 0 if num_classes == 1 else share > 0.8
    assert all(torch.isfinite(x).all() for x in head.state_dict().values())


def test_calibration_on_void_alone_is_an_error():
    features, classes, mask = class_scene(10)
    with pytest.raises(ValueError, match="no valid position.*label rule"):
        teacher_head().calibrate([(features, classes, torch.zeros_like(mask))], radius=3, readout="fitted")
