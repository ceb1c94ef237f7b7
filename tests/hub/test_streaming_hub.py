"""Distilling from a stream of a data set on the local Hub, as a user starts it."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import tiny
from hub.server import MARKER_TOKEN, HubServer
from PIL import Image


SCRIPT = Path(__file__).parents[2] / "scripts" / "distill.py"
NETWORK = {"backbone": "resnet10t", "head": "fpn", "pretrained": False, "options": {"head_channels": 8}}


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_distilling_fetches_only_what_it_trains_on(hub: HubServer, tmp_path: Path) -> None:
    folder = tiny.parquet_scenes(tmp_path / "d", [3] * 12)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add_repo("me/data", kind="dataset", private=True)
    hub.users[MARKER_TOKEN] = "me"
    hub.add_files("me/data", files, kind="dataset")
    arguments = tiny.command_line(
        dataset_name="me/data", streaming="true", shuffle_buffer=2, max_eval_samples=1, max_steps=2,
        student=json.dumps(NETWORK), teacher=json.dumps(NETWORK), with_baseline="true", dataloader_num_workers=1,
        calibration_images=2, eval_strategy="steps", eval_steps=2, logging_steps=1, output_dir=tmp_path / "run",
    )  # fmt: skip
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(
        command, env=hub.environment(tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert MARKER_TOKEN not in done.stdout + done.stderr

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"teacher", "baseline", "student"} <= results.keys()
    assert results["protocol"]["num_images"] == 1
    card = (tmp_path / "run" / "README.md").read_text()
    assert "train: streamed, validation: 1" in card
    reads = [(unquote(r.path), r.status) for r in hub.requests if r.method == "GET" and ".parquet" in r.path]
    assert {status for _, status in reads} == {206}, "a file was fetched whole"
    trained_on = {path for path, _ in reads if "/train-" in path}
    # at most 8 rows of 3 shards each, the same for all three models, and the first shard
    assert 1 < len(trained_on) < 7
    stored = [path for path in (tmp_path / "home").rglob("*.arrow") if path.is_file()]
    assert len(stored) == 1 and not list((tmp_path / "home").rglob("*.parquet"))


@pytest.mark.slow
def test_pictures_of_a_repository_are_read_one_by_one(
    hub: HubServer, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    files, lines = {}, []
    for number in range(6):
        files[f"train/{number}.png"] = png(np.full((4, 4, 3), [number, 0, 0], np.uint8))
        files[f"train/{number}_mask.png"] = png(np.full((4, 4), number % 2, np.uint8))
        lines.append(json.dumps({"file_name": f"{number}.png", "mask_file_name": f"{number}_mask.png"}))
    files |= {"train/metadata.jsonl": "\n".join(lines).encode(), "id2label.json": b'["wall", "road"]'}
    for name in ("pictures", "broken"):
        hub.add_repo(f"tester/{name}", files, kind="dataset")
    hub.fail(500, r"tester/broken/.*/5\.png")
    code = """
        import itertools
        import numpy as np
        from torch.utils.data import DataLoader
        from hf_bcd.data import load_dense_dataset

        def keep(sample):
            return {"red": int(np.asarray(sample["image"])[0, 0, 0])}

        for name in ("tester/pictures", "tester/broken"):
            data = load_dense_dataset(name, streaming=True)
            assert data["train"].id2label == {0: "wall", 1: "road"}
            for rank in range(2):
                stream = data["train"].with_transform(keep).for_rank(rank, 2, 1)
                loader = DataLoader(stream, batch_size=None, num_workers=1)
                print([sample["red"] for sample in itertools.islice(loader, 3)])
    """
    done = run_python(code, check=False)
    reds = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(reds[0] + reds[1]) == list(range(6)) and len(reds) < 4
    assert "data set tester/broken: the Hub has a problem (HTTP 500" in done.stderr
    assert MARKER_TOKEN not in done.stderr
