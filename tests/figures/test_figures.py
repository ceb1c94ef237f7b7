import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from hf_bcd.figures.bcd import boundary_figure, relation_figure
from hf_bcd.figures.panels import DPI
from hf_bcd.figures.segmentation import ERROR_COLOUR, colorize, comparison_figure, palette


NAMES = {0: "sky", 1: "ground", 2: "pole"}


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def count(picture: np.ndarray, colour) -> int:
    return int((picture == np.array(colour)).all(-1).sum())


def make_sample(height: int = 64, width: int = 64, names=("baseline", "distilled")) -> dict:
    """Sky above ground with a pole of 8 columns; `distilled` is right, every other prediction misses the pole."""
    image = np.random.default_rng(0).integers(0, 200, (height, width, 3)).astype(np.uint8)
    label = np.zeros((height, width), np.int64)
    label[height // 2 :] = 1
    blind = label.copy()
    label[:, 16:24] = 2
    predictions = {name: label.copy() if name == "distilled" else blind for name in names}
    return {"image": Image.fromarray(image), "label": label, "predictions": predictions}


def test_palette_is_deterministic_and_separated():
    colours = palette(150)
    assert colours.shape == (150, 3) and colours.dtype == np.uint8
    assert np.array_equal(palette(20), colours[:20])
    everything = np.concatenate((colours, [[255, 255, 255]])).astype(int)
    distances = np.abs(everything[:, None] - everything[None]).sum(-1)
    assert distances[~np.eye(len(everything), dtype=bool)].min() > 25
    assert distances[:12, :12][~np.eye(12, dtype=bool)].min() > 60
    assert np.unique(palette(255), axis=0).shape == (255, 3)


@pytest.mark.parametrize("num_labels", [0, 256])
def test_palette_of_impossible_size(num_labels):
    with pytest.raises(ValueError, match=str(num_labels)):
        palette(num_labels)


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
def test_colorize_paints_each_class_and_leaves_void_white(convert):
    colours = palette(3)
    picture = colorize(convert(np.array([[0, 1], [2, 255]])), colours)
    assert picture.dtype == np.uint8
    assert picture.tolist() == [[colours[0].tolist(), colours[1].tolist()], [colours[2].tolist(), [255, 255, 255]]]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((1, 4, 4), int), r"\(1, 4, 4\)"),
        (np.zeros((4, 4)), "float64"),
        (np.full((4, 4), 3), r"\[3\]"),
        (np.full((4, 4), -1), r"\[-1\]"),
    ],
)
def test_colorize_rejects(labels, message):
    with pytest.raises(ValueError, match=message):
        colorize(labels, palette(3))


def test_comparison_shows_classes_in_their_colours(tmp_path):
    sample = make_sample()
    path = comparison_figure([sample], NAMES, tmp_path / "comparison.png")
    assert path == tmp_path / "comparison.png"
    picture, zoom = read(path), 4
    colours = palette(3)
    # 64 x 64 pixels are enlarged fourfold; truth and distilled show the pole, the baseline does not. The tolerance is
    # for the panels' frames and the legend.
    assert count(picture, colours[2]) == pytest.approx(2 * 64 * 8 * zoom**2, rel=0.06)
    assert count(picture, colours[0]) == pytest.approx((2 * 32 * 56 + 32 * 64) * zoom**2, rel=0.06)
    # Only the baseline errs, exactly at the pole.
    assert count(picture, ERROR_COLOUR) == pytest.approx(64 * 8 * zoom**2, rel=0.06)


def test_comparison_draws_the_scores_of_the_arrays(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles = []
    set_title = Axes.set_title
    monkeypatch.setattr(
        Axes, "set_title", lambda self, text, **more: titles.append(text) or set_title(self, text, **more)
    )
    sample = make_sample()
    sample["label"][:, :4] = 255
    sample["predictions"]["distilled"][:, :4] = 1
    baseline = "mIoU 0.58"
    sample["scores"] = {"baseline": baseline, "distilled": "mIoU 1.00"}
    comparison_figure([sample, sample], {**NAMES, 3: "absent"}, tmp_path / "a.png")
    assert titles[2:6] == [
        f"baseline\n{baseline}",
        "distilled\nmIoU 1.00",
        f"errors of baseline\n{8 / 60:.1%} wrong",
        "errors of distilled\n0.0% wrong",
    ]
    assert [title.split("\n")[0].strip() for title in titles[:2]] == ["input", "truth"]
    assert baseline in titles[6:]


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (384, 512)])
def test_comparison_has_a_sensible_size(tmp_path, size):
    height, width = read(comparison_figure([make_sample(*size)] * 2, NAMES, tmp_path / "a.png")).shape[:2]
    assert 6 * 1.2 * DPI < width < 6 * 3 * DPI
    panels = 2 * (width / 6) * size[0] / size[1]
    assert panels < height < panels + 0.9 * DPI


def test_legend_takes_any_class_name(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    legend = Figure.legend
    monkeypatch.setattr(Figure, "legend", lambda *args, **more: drawn.append(legend(*args, **more)) or drawn[-1])
    names = {0: "$x^$ \\frac{", 1: "_private\nclass", 2: "car, auto, automobile, machine, motorcar"}
    comparison_figure([make_sample()], names, tmp_path / "a.png")
    texts = [text.get_text() for text in drawn[0].get_texts()]
    assert texts == ["$x^$ \\frac{", " _private class", "car, auto, automobile, mach…", "wrong"]


def test_legend_of_twenty_long_names_stays_inside_the_figure(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    saved = []
    savefig = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: saved.append(self) or savefig(self, *args, **more)
    )
    generator = np.random.default_rng(0)
    label = generator.integers(0, 20, (60, 90))
    sample = {
        "image": Image.new("RGB", (90, 60)),
        "label": label,
        "predictions": dict.fromkeys(("teacher", "baseline", "distilled"), label),
    }
    names = {index: f"class {index} with a very long name indeed" for index in range(20)}
    comparison_figure([sample, sample], names, tmp_path / "a.png", errors=["distilled"])
    (figure,) = saved
    width, height = figure.get_size_inches() * DPI
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0
    lowest = min(axes.get_window_extent().y0 for axes in figure.axes)
    assert box.y1 <= lowest, "the legend covers pictures"
    assert len(figure.axes) == 2 * 6


def test_comparison_without_some_columns(tmp_path):
    widths = [
        read(comparison_figure([make_sample(names=names)], NAMES, tmp_path / "a.png", errors=errors)).shape[1]
        for names, errors in (
            ((), None),
            (("distilled",), ()),
            (("distilled", "teacher"), ()),
            (("distilled", "teacher"), ("teacher",)),
        )
    ]
    steps = np.diff(widths)
    assert steps[0] > 200 and (np.abs(steps - steps[0]) <= 1).all()


def test_comparison_accepts_tensors(tmp_path):
    sample = make_sample()
    tensors = {
        "image": torch.tensor(np.asarray(sample["image"])).permute(2, 0, 1),
        "label": torch.as_tensor(sample["label"]),
        "predictions": {name: torch.as_tensor(labels) for name, labels in sample["predictions"].items()},
    }
    first = read(comparison_figure([sample], NAMES, tmp_path / "a.png"))
    assert np.array_equal(first, read(comparison_figure([tensors], NAMES, str(tmp_path / "b.png"))))


def replaced(**changes) -> dict:
    return {**make_sample(), **changes}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "at least one sample"),
        ([replaced(label=np.zeros((32, 64), int))], r"label of samples\[0\].*\(32, 64\).*\(64, 64\)"),
        ([make_sample(), replaced(predictions={})], r"samples\[1\] has predictions \[\]"),
        ([replaced(predictions={"baseline": np.zeros((8, 8), int)})], r"baseline of samples\[0\].*\(8, 8\)"),
        ([replaced(predictions={"baseline": np.full((64, 64), 7)})], r"\[7\].*0\.\.2"),
        ([replaced(image=np.zeros((64, 64), np.uint8))], r"uint8 of shape \(64, 64\)"),
        ([replaced(image=np.zeros((64, 64, 3), np.float32))], "float32"),
    ],
)
def test_comparison_rejects(tmp_path, samples, message):
    with pytest.raises(ValueError, match=message):
        comparison_figure(samples, NAMES, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_comparison_rejects_unknown_error_columns_and_gaps_in_names(tmp_path):
    with pytest.raises(ValueError, match=r"\['student'\].*'baseline'"):
        comparison_figure([make_sample()], NAMES, tmp_path / "a.png", errors=["student"])
    with pytest.raises(ValueError, match=r"\[0, 2\]"):
        comparison_figure([make_sample()], {0: "sky", 2: "pole"}, tmp_path / "a.png")


def test_boundary_figure_glows_at_the_boundary(tmp_path):
    image = Image.new("RGB", (128, 128))
    field = np.zeros((16, 16), np.float32)
    field[:, 8] = 1
    tensor = torch.tensor(field, dtype=torch.bfloat16, requires_grad=True)
    path = boundary_figure(image, {"teacher": tensor, "student": field}, tmp_path / "boundary.png")
    picture = read(path)
    assert 0.9 * DPI < picture.shape[0] < 3 * DPI and 5 * DPI < picture.shape[1] < 8 * DPI
    # Three panels of 256 pixels 10 pixels apart, less their frames; column 8 of 16 glows in the second and third.
    plain, teacher, student = (picture[100, start + 2 : start + 254].astype(int).sum(-1) for start in (10, 276, 542))
    assert np.array_equal(teacher, student) and plain.max() < 30
    assert abs(int(teacher.argmax()) + 2 - 8.5 * 16) <= 8
    assert teacher.max() > 500 and teacher[20] < 60


def test_boundary_figure_of_a_constant_map(tmp_path):
    assert boundary_figure(Image.new("RGB", (64, 64)), {"flat": np.zeros((8, 8))}, tmp_path / "a.png").exists()


def test_relation_figure_marks_the_point(tmp_path):
    image = np.full((128, 128, 3), 40, np.uint8)
    relation = np.zeros((16, 16))
    relation[12, 3] = 1.0
    row, column = 32, 96
    picture = read(relation_figure(image, {"teacher": relation + 1e-3}, (row, column), tmp_path / "a.png"))
    marked = np.argwhere((picture == np.array([0x39, 0xE6, 0xFF])).all(-1))
    for j in range(2):
        inside = marked[(marked[:, 1] >= 10 + j * 266) & (marked[:, 1] < 266 + j * 266)]
        expected = (30 + 2 * row, 10 + j * 266 + 2 * column)
        assert np.abs(inside.mean(0) - expected).max() < 2


@pytest.mark.parametrize(
    ("field", "message"), [(np.zeros((1, 8, 8)), r"'teacher'.*\(1, 8, 8\)"), (np.full((8, 8), np.nan), "finite")]
)
def test_maps_must_be_fields(tmp_path, field, message):
    image = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match=message):
        boundary_figure(image, {"teacher": field}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        relation_figure(image, {"teacher": field}, (0, 0), tmp_path / "a.png")


def test_maps_and_point_must_exist(tmp_path):
    image = Image.new("RGB", (32, 16))
    with pytest.raises(ValueError, match="no map"):
        boundary_figure(image, {}, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"\(16, 0\).*16 x 32"):
        relation_figure(image, {"teacher": np.zeros((4, 4))}, (16, 0), tmp_path / "a.png")


@pytest.mark.slow
def test_matplotlib_is_imported_when_a_figure_is_drawn_and_pyplot_never(tmp_path):
    code = (
        "import sys, numpy as np, hf_bcd.figures.bcd as v\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"v.boundary_figure(np.zeros((32, 32, 3), np.uint8), {{'b': np.eye(4)}}, {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
