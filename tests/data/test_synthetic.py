import pickle

import numpy as np
import pytest
from PIL import Image, ImageFilter

from hf_bcd.data.dataset import Sample
from hf_bcd.data.synthetic.scene import Scene
from hf_bcd.data.synthetic.scenes import TAXONOMIES, SyntheticScenes


NAMES = TAXONOMIES[8]
POLE = NAMES.index("pole")


@pytest.fixture(scope="module")
def scenes() -> list[Sample]:
    dataset = SyntheticScenes(size=(128, 128), num_images=48, seed=3)
    return [dataset[i] for i in range(len(dataset))]


def same(a, b) -> bool:
    return np.array_equal(a["label"], b["label"]) and a["image"].tobytes() == b["image"].tobytes()


def opened(mask: np.ndarray, width: int) -> np.ndarray:
    """What remains of a mask after erosion and dilation by a square: the parts that are at least `width` wide."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    image = image.filter(ImageFilter.MinFilter(width)).filter(ImageFilter.MaxFilter(width))
    return np.asarray(image) > 0


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (33, 47)])
def test_sample_has_the_canonical_form(size):
    dataset = SyntheticScenes(size=size, num_images=2)
    sample = dataset[0]
    assert sample["image"].mode == "RGB" and sample["image"].size == size[::-1]
    assert sample["label"].shape == size and sample["label"].dtype == np.uint8
    assert set(np.unique(sample["label"])) <= {*range(8), 255}
    assert dataset.id2label == dict(enumerate(NAMES)) and len(dataset) == 2


def test_sample_depends_only_on_seed_split_and_index():
    dataset = SyntheticScenes(size=(48, 64), num_images=4, seed=5)
    forwards = [dataset[i] for i in range(4)]
    longer = pickle.loads(pickle.dumps(SyntheticScenes(size=(48, 64), num_images=90, seed=5)))
    assert all(same(longer[i], forwards[i]) for i in (3, 1, 0, 2))
    assert same(dataset[-1], dataset[3])
    assert not same(SyntheticScenes(size=(48, 64), num_images=4, seed=6)[0], forwards[0])
    with pytest.raises(IndexError):
        dataset[4]


def test_stream_of_scenes_is_fixed():
    # Guards against a change of generator: the numbers of a run stay comparable between versions and machines.
    counts = np.bincount(SyntheticScenes(size=(64, 64), num_images=1, seed=0)[0]["label"].ravel())[:8]
    assert counts.tolist() == pytest.approx([764, 404, 591, 1134, 292, 242, 52, 461], abs=12)


def test_no_scene_is_shared_by_two_splits_or_indices():
    labels = {}
    for split in ("train", "validation", "test"):
        dataset = SyntheticScenes(size=(32, 32), num_images=12, seed=0, split=split)
        labels |= {(split, i): dataset[i]["label"].tobytes() for i in range(12)}
    assert len(set(labels.values())) == len(labels) == 36


def test_same_scene_at_two_sizes():
    small = SyntheticScenes(size=(96, 96), num_images=6)
    large = SyntheticScenes(size=(192, 192), num_images=6)
    for i in range(6):
        a, b = small[i]["label"], large[i]["label"][::2, ::2]
        known = (a != 255) & (b != 255)
        assert (a == b)[known].mean() > 0.9
        shrunk = np.asarray(large[i]["image"].reduce(2), float)
        assert np.abs(shrunk - np.asarray(small[i]["image"])).mean() < 9


def test_classes_appear_as_often_as_designed(scenes):
    counts = np.bincount(np.concatenate([scene["label"].ravel() for scene in scenes]), minlength=256)
    share = dict(zip([*NAMES, "void"], counts[[*range(8), 255]] / counts.sum(), strict=True))
    for name in ("sky", "ground", "road", "building"):
        assert 0.1 < share[name] < 0.35
    assert 0.05 < share["tree"] < 0.15
    for name in ("pole", "person", "vehicle"):
        assert 0.012 < share[name] < 0.1
    assert 0.002 < share["void"] < 0.03
    present = np.mean([[(scene["label"] == c).any() for c in range(8)] for scene in scenes], axis=0)
    assert present.min() > 0.6


def test_poles_are_thin_and_long(scenes):
    poles = [scene["label"] == POLE for scene in scenes]
    total = sum(mask.sum() for mask in poles)
    assert sum(opened(mask, 3).sum() for mask in poles) < 0.5 * total
    assert sum(opened(mask, 7).sum() for mask in poles) < 0.01 * total
    heights = [np.ptp(np.nonzero(mask)[0]) for mask in poles if mask.any()]
    assert np.median(heights) > 40


def test_void_rims_lie_outside_objects_and_spare_poles(scenes, monkeypatch):
    monkeypatch.setattr(Scene, "_void", lambda self, label, vague: np.zeros(label.shape, bool))
    exact = SyntheticScenes(size=(128, 128), num_images=12, seed=3)
    for i in range(12):
        label, whole = scenes[i]["label"], exact[i]["label"]
        void = label == 255
        assert np.array_equal(label[~void], whole[~void])
        assert np.array_equal(label == POLE, whole == POLE)
        # Every void pixel lies beside another class.
        grown = [np.roll(whole, shift, axis) != whole for axis in (0, 1) for shift in (-1, 1)]
        assert not (void & ~np.any(grown, axis=0)).any()
    assert any((scene["label"] == 255).any() for scene in scenes)
    assert any((scene["label"] != 255).all() for scene in scenes)


def test_outlines_of_label_and_image_coincide(scenes):
    """Colour steps are larger across the label's edges than beside them, and largest without a shift."""

    def step_at_edges(shift: int) -> float:
        steps = []
        for scene in scenes:
            grey = np.asarray(scene["image"].convert("L"), float)
            label = np.roll(scene["label"], shift, axis=1)
            edge = label[:, 1:] != label[:, :-1]
            steps.append(np.abs(np.diff(grey, axis=1))[:, 8:-8][edge[:, 8:-8]].mean())
        return float(np.mean(steps))

    aligned = step_at_edges(0)
    assert aligned > 1.25 * max(step_at_edges(-2), step_at_edges(2))
    assert aligned > max(step_at_edges(-1), step_at_edges(1))


def test_colour_alone_does_not_tell_the_class(scenes):
    def colours_and_classes(scenes: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
        bins = np.concatenate([np.asarray(scene["image"], int).reshape(-1, 3) // 32 @ [64, 8, 1] for scene in scenes])
        truth = np.concatenate([scene["label"].ravel() for scene in scenes])
        return bins[truth != 255], truth[truth != 255]

    counts, confusion = np.zeros((512, 8), int), np.zeros((8, 8), int)
    np.add.at(counts, colours_and_classes(scenes[:36]), 1)
    bins, truth = colours_and_classes(scenes[36:])
    np.add.at(confusion, (truth, counts.argmax(1)[bins]), 1)
    hits = np.diag(confusion)
    assert 0.1 < (hits / (confusion.sum(0) + confusion.sum(1) - hits)).mean() < 0.4


@pytest.mark.parametrize("num_classes", range(2, 9))
def test_fewer_classes_merge_the_eight(num_classes):
    full = SyntheticScenes(size=(64, 64), num_images=3)
    merged = SyntheticScenes(size=(64, 64), num_images=3, num_classes=num_classes)
    assert len(merged.id2label) == num_classes
    parents = [list(merged.id2label.values()).index(name) for name in TAXONOMIES[num_classes]]
    parents = np.array([*parents, *[255] * 248])
    for i in range(3):
        assert full[i]["image"].tobytes() == merged[i]["image"].tobytes()
        assert np.array_equal(merged[i]["label"], parents[full[i]["label"]])


@pytest.mark.parametrize(("arguments", "message"), [
    ({"size": (16, 128)}, "16"), ({"num_images": 0}, "num_images"), ({"seed": -1}, "seed"),
    ({"split": "val"}, "'val'.*validation"), ({"num_classes": 9}, "num_classes is 9"), ({"num_classes": 1}, "2 to 8"),
])  # fmt: skip
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticScenes(**arguments)
