"""Everything about a named checkpoint comes from one revision, whatever the default branch holds."""

from pathlib import Path

import pytest
import tiny
from hub.server import HubServer
from transformers import SegformerImageProcessor


pytestmark = pytest.mark.slow

READ = """
import logging, sys
from transformers import AutoModelForSemanticSegmentation
from hf_bcd.adapters import build_adapter, image_statistics
from hf_bcd.adapters.loading import load_model, saved_size
from hf_bcd.training.recording import record_model
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
for revision in (None, "v1", "bare"):
    model = load_model("tester/teacher", revision=revision)
    commit = model.config._commit_hash
    size = saved_size("tester/teacher", revision=commit)
    print(commit, model.decode_head.classifier.bias[0].item(), image_statistics(model)[0][0], size.get("height"))
    assert record_model(build_adapter(model), "teacher").revision == commit and commit not in model.config.to_json_string()
"""


def test_weights_statistics_and_size_are_read_at_one_revision(hub: HubServer, run_python, tmp_path: Path) -> None:
    hub.add_repo("tester/teacher")
    expected = []
    for number, revision in enumerate(("main", "v1", "bare"), 1):
        folder, model = tmp_path / revision, tiny.tiny_segformer()
        model.decode_head.classifier.bias.data.fill_(number)
        model.save_pretrained(folder)
        if revision != "bare":
            SegformerImageProcessor(image_mean=[number / 4] * 3, size={"height": number, "width": 9}).save_pretrained(
                folder
            )
        commit = hub.add_files("tester/teacher", {file.name: file.read_bytes() for file in folder.iterdir()}, revision)
        shown = "0.485 None" if revision == "bare" else f"{number / 4} {number}"  # the family's own, no size
        expected.append(f"{commit} {number:.1f} {shown}")
    printed = run_python(READ).stdout.splitlines()
    assert [line for line in printed if not line.startswith("WARNING")] == expected
    (warning,) = [line for line in printed if line.startswith("WARNING")]
    assert "No image processor beside 'tester/teacher'; images are normalised as is usual for segformer" in warning
