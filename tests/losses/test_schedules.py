import math

import pytest
import torch

from hf_bcd.losses import Temperature, decay


def test_decay_is_one_at_the_first_step_and_one_over_total_at_the_last():
    assert decay(1, 40_000) == 1
    assert decay(40_000, 40_000) == pytest.approx(1 / 40_000, rel=1e-9)
    assert decay(3, 4) == 0.5
    assert decay(1, 1) == 1
    values = [decay(t, 12) for t in range(1, 13)]
    assert values == sorted(values, reverse=True) and min(values) > 0


@pytest.mark.parametrize("step", [0, -1, 5])
def test_decay_outside_the_run_is_an_error(step):
    with pytest.raises(ValueError, match=rf"step {step} is outside 1\.\.4"):
        decay(step, 4)


@pytest.mark.parametrize(
    ("observed", "grows"),
    [
        ([], False),
        ([([0.9, 0.2],)], True),
        ([([0.9, 0.0],)], False),
        ([(0.5,)], False),
        ([(math.nan,)], False),
        # batches of a step count by their rows: the mean over four rows is 0.375, of the two means 0.55; then 0.725
        ([([0.9],), ([0.2, 0.2, 0.2],)], False),
        ([([0.9, 0.9, 0.9],), ([0.2],)], True),
        # a mean counts for as many rows as it is of: means 0.375 and 0.725, then none
        ([([0.2, 0.9, math.nan], [3, 1, 0])], False),
        ([([0.2, 0.9, math.nan], [1, 3, 0])], True),
        ([([0.2, 0.9, math.nan], [0, 0, 0])], False),
    ],
)
def test_temperature_grows_where_the_mean_of_a_step_exceeds_one_half(observed, grows):
    temperature = Temperature()
    for given in observed:
        temperature.observe(*(torch.tensor(x, requires_grad=i == 0) for i, x in enumerate(given)))
        assert temperature.value.item() == 1  # the rule decides on the next step's temperature
    temperature.update()
    assert temperature.value.item() == pytest.approx(1.05 if grows else 1)
    temperature.update()  # a step is forgotten when it ends, and carries no graph
    assert temperature.value.item() == pytest.approx(1.05 if grows else 1) and not temperature.value.requires_grad
    restored = Temperature()
    restored.load_state_dict(temperature.state_dict())
    assert torch.equal(restored.value, temperature.value)


def test_temperature_is_monotone_and_stops_at_four():
    temperature, values = Temperature(), []
    for step in range(60):
        temperature.observe(torch.tensor([1.0 if step % 3 else 0.1]))
        temperature.update()
        values.append(temperature.value.item())
    assert values == sorted(values)
    assert values[-1] == 4
    assert values[3] == pytest.approx(1.05**2)  # steps 0 and 3 did not count


def test_range_of_a_binary_map_stops_after_fifteen_updates():
    """The paper's statistic, range(x / tau) of a 0/1 map, is 1 / tau: it falls to 0.5 at tau = 2."""
    temperature = Temperature()
    for _ in range(40):
        temperature.observe(1 / temperature.value)
        temperature.update()
    assert temperature.value.item() == pytest.approx(1.05**15) == pytest.approx(2.079, abs=5e-4)
