"""Damages inputs at random and checks that each ends in one line of words or in the right labels, never in silence.

    python scripts/fuzz.py --times 500 --seed 0

Prints how the inputs ended, and every traceback and silent wrong label with the seed that repeats it alone:
`python scripts/fuzz.py --times 1 --seed SEED`.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from hf_bcd import load_dense_dataset
from hf_bcd.adapters.loading import load_adapter
from hf_bcd.runs.arguments import RECIPE_KEYS, build_arguments, read_arguments
from hf_bcd.utils.messages import UserError


VALUES = [None, [], [1], {}, {"a": 1}, "word", "", -1, 0, 3, 0.5, math.nan, math.inf, 1e30, True, [None], "ä", [[]]]
Outcome = tuple[str, str]


class Warned(logging.Handler):
    """Remembers whether anything was said."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def discs(rng: np.random.Generator, num_classes: int, size: tuple[int, int]) -> np.ndarray:
    """A map of discs of all classes on class 0."""
    y, x = np.mgrid[: size[0], : size[1]]
    ids = np.zeros(size, np.uint8)
    for index in range(1, num_classes):
        centre, radius = rng.integers(0, size), rng.integers(6, 12)
        ids[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2] = index
    return ids


def fuzz_data(rng: np.random.Generator, root: Path) -> Outcome:
    """A folder of images and masks, stored in one of many ways and then damaged in one more."""
    num_classes, size = int(rng.integers(2, 9)), (int(rng.integers(40, 60)), int(rng.integers(60, 80)))  # never square
    truth: dict[tuple[str, int], np.ndarray] = {}
    store = STORES[rng.integers(len(STORES))]
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for index in range(5):
            truth[split, index] = ids = discs(rng, num_classes, size)
            picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / split / "images" / f"{index}.png")
            store(ids, root / split / "masks" / str(index), rng)
    if rng.random() < 0.5:
        (root / "id2label.json").write_text(json.dumps([f"name {i}" for i in range(num_classes)]), encoding="utf-8")
    damage = DAMAGES[rng.integers(len(DAMAGES))]
    damage(rng, root)
    what = f"{store.__name__}, {damage.__name__}"
    warned = Warned()
    logging.getLogger("hf_bcd").addHandler(warned)
    try:
        data = load_dense_dataset(root)
        meaning: dict[int, int] = {}  # ids may be others, if they are so everywhere: class_3 is only a name then
        rows: Any
        for split, rows in (("train", data["train"]), ("val", data.get("validation", []))):
            for index, sample in enumerate(rows):
                expected = truth[split, int(Path(rows.rows[index].image_name).stem)]
                if sample["label"].shape == expected.shape:
                    pairs = set(zip(sample["label"].ravel().tolist(), expected.ravel().tolist(), strict=True))
                    if all(meaning.setdefault(found, right) == right for found, right in pairs):
                        continue
                return ("warned" if warned.said else "SILENT WRONG LABELS"), what
    finally:
        logging.getLogger("hf_bcd").removeHandler(warned)
    return "right", what


def grey(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(ids).save(f"{path}.{rng.choice(['png', 'bmp', 'tif', 'gif'])}")


def palette(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    image = Image.fromarray(ids)
    image.putpalette(list(range(30)))
    image.save(f"{path}.png")


def own_palette(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    colours = np.random.default_rng(5).integers(0, 256, (10, 3), dtype=np.uint8)
    Image.fromarray(colours[ids]).quantize(16).save(f"{path}.png")


def sixteen_bits(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(ids.astype(np.uint16)).save(f"{path}.{rng.choice(['png', 'tif'])}")


def equal_channels(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(np.repeat(ids[..., None], 3, 2)).save(f"{path}.{rng.choice(['png', 'bmp', 'tif'])}")


def webp(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(ids).convert("RGB").save(f"{path}.webp", lossless=bool(rng.random() < 0.5))


def lossy(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    file = io.BytesIO()
    Image.fromarray(ids * 25).save(file, "JPEG", quality=int(rng.integers(30, 96)))
    Image.open(file).save(f"{path}.png")


def jpeg(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(ids).save(f"{path}.jpg")


def jpeg_in_tiff(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(ids).save(f"{path}.tif", compression="jpeg")


def soft(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(ids * 25).filter(ImageFilter.GaussianBlur(2)).save(f"{path}.png")


def foreground_255(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(np.where(ids > 0, 255, 0).astype(np.uint8)).save(f"{path}.png")


def floats(ids: np.ndarray, path: Path, rng: np.random.Generator) -> None:
    Image.fromarray(ids.astype(np.float32)).save(f"{path}.tif")


STORES = [
    grey, palette, own_palette, sixteen_bits, equal_channels, webp, lossy, jpeg, jpeg_in_tiff, soft, foreground_255, floats,
]  # fmt: skip


def a_file(rng: np.random.Generator, root: Path, kind: str = "*") -> Path:
    found = sorted(root.glob(f"*/{kind}/*.*"))
    return found[rng.integers(len(found))]


def nothing(rng: np.random.Generator, root: Path) -> None:
    """No damage: what is stored well must come out right."""


def cut_file(rng: np.random.Generator, root: Path) -> None:
    path = a_file(rng, root)
    path.write_bytes(path.read_bytes()[: int(rng.integers(0, path.stat().st_size))])


def flipped_byte(rng: np.random.Generator, root: Path) -> None:
    found = sorted(root.glob("*/*/*.png"))
    path = found[rng.integers(len(found))]
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= int(rng.integers(1, 256))
    path.write_bytes(content)


def lost_file(rng: np.random.Generator, root: Path) -> None:
    a_file(rng, root).unlink()


def renamed_file(rng: np.random.Generator, root: Path) -> None:
    path = a_file(rng, root)
    path.rename(path.with_stem(path.stem + "x"))


def smaller_file(rng: np.random.Generator, root: Path) -> None:
    path = a_file(rng, root)
    image = Image.open(path)
    image.resize((image.width // 2, image.height // 2)).save(path)


def turned_file(rng: np.random.Generator, root: Path) -> None:
    path = a_file(rng, root, "masks")
    Image.open(path).rotate(90, expand=True).save(path)


def random_names(rng: np.random.Generator, root: Path) -> None:
    (root / "id2label.json").write_text(json.dumps(VALUES[rng.integers(len(VALUES))]), encoding="utf-8")


def strange_text(rng: np.random.Generator, root: Path) -> None:
    name = rng.choice(["metadata.csv", "metadata.jsonl", "classes.json", "train/metadata.jsonl", "id2label.json"])
    (root / str(name)).write_bytes(
        rng.choice([b"", b"\xff\xfe\x00", b"{", b"a,b\n1,2\n", b"null", b"[[[", b"\xef\xbb\xbf[]"])
    )


def noise_file(rng: np.random.Generator, root: Path) -> None:
    a_file(rng, root).write_bytes(rng.bytes(int(rng.integers(0, 500))))


DAMAGES = [
    nothing, cut_file, flipped_byte, lost_file, renamed_file, smaller_file, turned_file, random_names, strange_text, noise_file,
]  # fmt: skip


def fuzz_recipe(rng: np.random.Generator, root: Path) -> Outcome:
    """A recipe with two random values, sometimes a field of a loss or a model."""
    keys = sorted(
        RECIPE_KEYS - {"local_rank", "torch_compile", "fsdp", "deepspeed", "debug", "tf32", "full_determinism"}
    )
    recipe = {str(key): VALUES[rng.integers(len(VALUES))] for key in rng.choice(keys, 2)}
    command = ["--output_dir", str(root), "--use_cpu", "true"]
    if rng.random() < 0.5:
        path = rng.choice(
            ["losses.bcd.radius", "losses.kd.weight", "losses.cwd.weight.x", "student.options.a", "teacher.x.y"]
        )
        command += [f"--{path}", str(VALUES[rng.integers(len(VALUES))])]
    build_arguments(read_arguments(command, recipe=recipe))
    return "accepted", str((recipe, command))


def fuzz_model(rng: np.random.Generator, root: Path) -> Outcome:
    """A saved model of which one file is damaged, or one field of its configuration."""
    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16, id2label={0: "a", 1: "b", 2: "c"}
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(root)
    SegformerImageProcessor().save_pretrained(root)
    files = ("config.json", "preprocessor_config.json", "model.safetensors")
    path = root / files[rng.integers(3)]
    what = path.name
    if path.suffix == ".json" and rng.random() < 0.7:
        content = json.loads(path.read_text(encoding="utf-8"))
        key, value = str(rng.choice(sorted(content))), VALUES[rng.integers(len(VALUES))]
        path.write_text(json.dumps({**content, key: value}), encoding="utf-8")
        what = f"{path.name}: {key} = {value!r}"
    else:
        content = path.read_bytes()
        path.write_bytes(content[: int(rng.integers(0, len(content)))])
    load_adapter(str(root)).check_size((32, 32))
    return "accepted", what


AREAS = {"data": fuzz_data, "recipe": fuzz_recipe, "model": fuzz_model}


def run(seed: int, area: str | None) -> tuple[str, Outcome]:
    """One damaged input, and how it ended."""
    rng = np.random.default_rng(seed)
    name = area or list(AREAS)[rng.choice(3, p=[0.6, 0.2, 0.2])]
    with tempfile.TemporaryDirectory() as folder:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                return name, AREAS[name](rng, Path(folder) / "x")
        except UserError as error:
            text = str(error)
            return name, ("SEVERAL LINES" if "\n" in text else "told", text)
        except Exception as error:  # a traceback is what is looked for
            where = traceback.extract_tb(error.__traceback__)[-1]
            return name, ("TRACEBACK", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first input; the next one has the next seed")
    parser.add_argument("--area", choices=AREAS)
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    ends: Counter[tuple[str, str]] = Counter()
    for seed in range(args.seed, args.seed + args.times):
        area, (end, words) = run(seed, args.area)
        ends[area, end] += 1
        if end.isupper() or args.times == 1:
            print(f"seed {seed}, {area}: {end}: {words[:300]}", flush=True)
    for (area, end), count in sorted(ends.items()):
        print(f"{area:8} {end:20} {count}")


if __name__ == "__main__":
    main()
