import pytest
import tiny
import torch

from hf_bcd.data.class_weights import balancing_weights, class_weights
from hf_bcd.data.labels import UNLABELLED
from hf_bcd.utils.messages import UserError


NAMES = {0: "road", 1: "pole", 2: "sky"}


def maps():
    """Road has 12 of 16 pixels, pole 3 of 8, void does not count, and sky is nowhere."""
    first = torch.zeros(1, 8, dtype=torch.uint8)
    second = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 255, 255]], dtype=torch.uint8)
    return [first, second]


def test_a_weight_is_the_root_of_the_median_frequency_over_the_class_own():
    weights = balancing_weights(maps(), 3)
    road, pole = 13 / 16, 3 / 8
    median = (road + pole) / 2
    torch.testing.assert_close(weights, torch.tensor([median / road, median / pole, 1.0]).sqrt())


def test_auto_counts_labelled_pictures_only():
    unlabelled = {"label": torch.full((2, 8), UNLABELLED, dtype=torch.uint8)}
    samples = [unlabelled, *({"label": one} for one in maps())]
    torch.testing.assert_close(class_weights("auto", samples, NAMES), balancing_weights(maps(), 3))
    with pytest.raises(UserError, match="no labels, so class_weights: auto has nothing to count"):
        class_weights("auto", [unlabelled], NAMES)


def test_weights_by_name_are_in_the_order_of_the_classes():
    given = {"sky": 3, "road": 1, "pole": 2.5}
    assert class_weights(given, [], NAMES).tolist() == [1, 2.5, 3]
    with pytest.raises(UserError, match="says nothing of sky; give every class a weight"):
        class_weights({"road": 1, "pole": 2}, [], NAMES)
    with pytest.raises(UserError, match="unknown class in class_weights 'poles'.*'pole'"):
        class_weights({**given, "poles": 2}, [], NAMES)


def test_weights_that_would_do_nothing_are_refused():
    with pytest.raises(UserError, match="class_weights are all 0, so no label would teach"):
        class_weights(dict.fromkeys(NAMES.values(), 0), [], NAMES)
    train = tiny.scenes(train=4)["train"].without_labels()
    with pytest.raises(UserError, match="no labels for class_weights to weigh; leave it out"):
        class_weights(dict.fromkeys(tiny.ID2LABEL.values(), 2.0), train, tiny.ID2LABEL)


@pytest.mark.parametrize("streaming", [False, True])
def test_streams_and_data_sets_are_counted_alike(streaming):
    train = tiny.scenes(train=4)["train"]
    samples = [{"labels": torch.as_tensor(sample["label"])} for sample in train]
    expected = class_weights("auto", samples, tiny.ID2LABEL)

    class Stream:
        def take(self, count):
            return iter(samples[:count])

    found = class_weights("auto", Stream() if streaming else train, tiny.ID2LABEL)
    torch.testing.assert_close(found, expected)
    assert expected.unique().numel() > 3
