"""Codecs: what comes back, what it costs, and that nothing depends on the batch."""

from collections.abc import Mapping

import pytest
import torch

from hf_bcd.losses.context import relation_map, row_divergence
from hf_bcd.stores.codecs import Column, filtered, unfiltered
from hf_bcd.stores.writing import MAX_DIVERGENCE, choose, choose_together
from hf_bcd.utils.messages import UserError


def smooth(channels: int, size: tuple[int, int], seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    coarse = scale * torch.randn(1, channels, 5, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False)[0]


def there_and_back(column: Column, *tensors: torch.Tensor) -> torch.Tensor:
    unpacked = [column.unpack(column.pack(x)) for x in tensors]
    return column.restore({name: torch.stack([one[name] for one in unpacked]) for name in unpacked[0]})


def test_exact_keeps_every_bit_and_bits_keep_a_map_of_bits() -> None:
    x = torch.randn(2, 3, 7, 9)
    assert torch.equal(there_and_back(Column("exact", (3, 7, 9)), *x), x)
    bits = torch.rand(2, 7, 13) > 0.5
    assert torch.equal(there_and_back(Column("bits", (7, 13)), *bits), bits.float())


@pytest.mark.parametrize("width", [1, 2, 9])
def test_the_filter_undoes_itself_for_all_bytes(width: int) -> None:
    array = torch.randint(-128, 128, (4, 5, width)).to(torch.int8).numpy()
    assert (unfiltered(filtered(array)) == array).all()


def test_int8_is_off_by_half_a_step_of_its_channel_at_most() -> None:
    x = smooth(4, (12, 10)) * torch.tensor([0.01, 1, 100, 1])[:, None, None]
    x[3] = 5.0  # a constant channel
    kept = there_and_back(Column("int8", (4, 12, 10)), x)[0]
    step = (x.flatten(1).amax(1) - x.flatten(1).amin(1)) / 254
    assert ((kept - x).flatten(1).abs().amax(1) <= 0.5001 * step + 1e-6).all()


def test_scores_keep_classes_and_their_probabilities() -> None:
    x = smooth(19, (64, 64))
    found = choose("logits", [x])
    assert found.column.codec == "scores"
    assert found.error < 0.01
    kept = there_and_back(found.column, x)[0]
    assert (kept - x).abs().max() <= 0.13
    assert len(found.column.pack(x)) < 0.5 * x.numel()  # less than half a byte a score


def test_above_64_classes_the_largest_are_kept_and_the_rest_has_its_mass() -> None:
    x = smooth(150, (16, 16))
    found = choose("logits", [x])
    assert found.column.codec == "top:16"
    kept = there_and_back(found.column, x)[0]
    assert (x.amax(0) - x.gather(0, kept.argmax(0)[None])[0]).max() < 0.2  # but for ties
    top = x.topk(16, 0)
    assert (kept.gather(0, top.indices) - top.values).abs().max() < 0.1
    rest = 1 - kept.log_softmax(0).exp().gather(0, top.indices).sum(0)
    assert (rest - (1 - x.softmax(0).gather(0, top.indices).sum(0))).abs().max() < 0.05


def test_levels_share_the_widest_step_that_moves_their_relations_by_a_hundredth_of_a_nat() -> None:
    levels = {"fine": [3 * smooth(16, (12, 10), seed) for seed in range(2)], "coarse": [smooth(8, (12, 10), 5)] * 2}
    views: list[int] = []

    def divergence(exact: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor]) -> torch.Tensor:
        views.append(len(exact))
        joined = [relation_map(torch.cat([x["fine"], x["coarse"]], 1))[0] for x in (exact, kept)]
        return row_divergence(*joined)

    found = choose_together(levels, list(levels), divergence)
    steps = {float(one.column.codec.partition(":")[2]) for one in found.values()}
    assert len(steps) == 1
    assert 0 < next(iter(found.values())).error <= MAX_DIVERGENCE
    wider = {name: Column(f"even:{1.15 * next(iter(steps))}", one.column.shape) for name, one in found.items()}
    moved = [
        divergence({name: x[view][None] for name, x in levels.items()},
                   {name: wider[name].kept(x[view])[None] for name, x in levels.items()}) for view in range(2)
    ]  # fmt: skip
    assert torch.stack(moved).mean() > MAX_DIVERGENCE
    assert len(views) < 20


def test_even_steps_are_off_by_half_of_one_and_widen_where_127_do_not_reach() -> None:
    x = smooth(3, (6, 8))
    assert (Column("even:0.25", (3, 6, 8)).kept(x) - x).abs().max() <= 0.1251
    x[0, 0, 0] = 1000.0
    kept = Column("even:0.25", (3, 6, 8)).kept(x)
    assert kept[0, 0, 0] == pytest.approx(1000)
    assert (kept - x).abs().max() <= 1000 / 127 / 2 + 1e-3


def test_row_divergence_agrees_with_a_plain_loop() -> None:
    first, second = torch.randn(5, 3, 4), torch.randn(6, 3, 4)
    expected = 0.0
    for row in range(12):
        logs = []
        for x in (first.flatten(1), second.flatten(1)):
            gram = x[:, row] @ x
            logs.append(torch.cat([gram[:row], gram[row + 1 :]]).log_softmax(0))
        expected += float((logs[0].exp() * (logs[0] - logs[1])).sum()) / 12
    assert row_divergence(first, second, block=5).item() == pytest.approx(expected, rel=1e-5)


def test_a_row_does_not_depend_on_the_others() -> None:
    x = torch.stack([smooth(8, (6, 6), seed) for seed in range(3)])
    for codec in ("half", "int8", "scores", "even:0.3", "top:3"):
        column = Column(codec, (8, 6, 6))
        together = there_and_back(column, *x)
        assert torch.equal(together, torch.cat([there_and_back(column, one) for one in x])), codec


def test_views_of_other_sizes_and_unknown_codecs_are_refused() -> None:
    with pytest.raises(UserError, match=r"\[3, 5, 5\].*\[3, 4, 4\].*square_size"):
        Column("exact", (3, 4, 4)).pack(torch.zeros(3, 5, 5))
    with pytest.raises(UserError, match="'zip' is no codec"):
        Column("zip", (3, 4, 4)).pack(torch.zeros(3, 4, 4))
    with pytest.raises(UserError, match="'even:nan' is no codec"):
        Column("even:nan", (3, 4, 4)).pack(torch.zeros(3, 4, 4))
