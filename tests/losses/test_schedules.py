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


def test_temperature_grows_while_the_mean_exceeds_one_half():
    temperature = Temperature()
    assert temperature.value.item() == 1
    temperature.observe(torch.tensor([0.9, 0.2]))
    assert temperature.value.item() == 1  # the rule decides on the next step's temperature
    temperature.update()
    assert temperature.value.item() == pytest.approx(1.05)
    for statistic in (torch.tensor([0.9, 0.0]), torch.tensor(0.5), torch.tensor([float("nan")])):
        temperature.observe(statistic)
        temperature.update()
        assert temperature.value.item() == pytest.approx(1.05)


def test_temperature_is_monotone_and_stops_at_four():
    temperature, values = Temperature(), []
    for step in range(60):
        temperature.observe(torch.tensor([1.0 if step % 3 else 0.1]))
        temperature.update()
        values.append(temperature.value.item())
    assert values == sorted(values)
    assert values[-1] == 4
    assert values[3] == pytest.approx(1.05**2)  # steps 0 and 3 did not count


def test_temperature_accumulates_over_micro_batches():
    temperature = Temperature()
    temperature.observe(torch.tensor([0.9]))
    temperature.observe(torch.tensor([0.2, 0.2, 0.2]))
    temperature.update()  # mean over the four rows 0.375; the mean of the two means is 0.55
    assert temperature.value.item() == 1
    temperature.observe(torch.tensor([0.9, 0.9, 0.9]))
    temperature.observe(torch.tensor([0.2]))
    temperature.update()  # 0.725, and the rows of the step before are forgotten
    assert temperature.value.item() == pytest.approx(1.05)


def test_a_mean_counts_for_as_many_rows_as_it_is_of():
    for rows, expected in (([3, 1, 0], 1.0), ([1, 3, 0], 1.05), ([0, 0, 0], 1.0)):
        temperature = Temperature()
        temperature.observe(torch.tensor([0.2, 0.9, float("nan")]), torch.tensor(rows))
        temperature.update()  # means 0.375 and 0.725, then none
        assert temperature.value.item() == pytest.approx(expected)


def test_update_without_an_observation_changes_nothing():
    temperature = Temperature()
    temperature.update()
    assert temperature.value.item() == 1


def test_temperature_survives_a_checkpoint():
    temperature = Temperature()
    temperature.observe(torch.tensor([1.0]))
    temperature.update()
    restored = Temperature()
    restored.load_state_dict(temperature.state_dict())
    assert restored.value.item() == pytest.approx(1.05)


def test_statistic_carries_no_graph():
    temperature = Temperature()
    temperature.observe(torch.tensor([0.9], requires_grad=True))
    temperature.update()
    assert not temperature.value.requires_grad


def test_range_of_a_binary_map_stops_after_fifteen_updates():
    """The paper's statistic, range(x / tau) of a 0/1 map, is 1 / tau: it falls to 0.5 at tau = 2."""
    temperature, updates, previous = Temperature(), 0, 0.0
    for _ in range(40):
        previous = temperature.value.item()
        temperature.observe(1 / temperature.value)
        temperature.update()
        updates += temperature.value.item() > previous
    assert updates == 15
    assert temperature.value.item() == pytest.approx(2.079, abs=5e-4)
