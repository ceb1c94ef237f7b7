"""A teacher of features from the Hub: weights and image statistics come from one revision."""

from pathlib import Path

import pytest
import torch
from hub.server import HubServer
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model


READ = """
from hf_bcd.adapters.loading import load_adapter
from hf_bcd.adapters.specs import ModelSpec
for revision in (None, "v1"):
    adapter = load_adapter(ModelSpec("tester/foundation", revision), to_teach=True)
    first = adapter.model.embeddings.cls_token.flatten()[0].item()
    print(adapter.revision, round(adapter.image_mean.flatten()[0].item(), 2), adapter.repo_id, first)
"""


@pytest.mark.slow
def test_a_teacher_of_features_is_read_at_one_revision(hub: HubServer, run_python, tmp_path: Path) -> None:
    hub.add_repo("tester/foundation")
    expected = []
    for number, revision in enumerate(("main", "v1"), 1):
        folder = tmp_path / revision
        config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56)
        model = Dinov2Model(config)
        torch.nn.init.constant_(model.embeddings.cls_token, number)
        model.save_pretrained(folder)
        BitImageProcessor(image_mean=[number / 4] * 3, do_center_crop=False).save_pretrained(folder)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        commit = hub.add_files("tester/foundation", files, revision)
        expected.append(f"{commit} {number / 4} tester/foundation {number:.1f}")
    printed = run_python(READ).stdout.splitlines()
    assert printed == expected
