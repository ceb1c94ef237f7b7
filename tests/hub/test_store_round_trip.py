"""A stored teacher goes to the Hub with its card, and trains a student somewhere else."""

import ast
import json
from pathlib import Path

import pytest
import tiny
import yaml
from hub.server import HubServer
from transformers import Dinov2Config, Dinov2Model


REINFORCE = """
import sys
from hf_bcd.commands import main

common = [
    "--crop_size", "32", "--max_steps", "3", "--dataloader_num_workers", "0", "--disable_tqdm", "true", "--report_to", "none",
    "--eval_strategy", "no", "--calibration_images", "4",
]
one = ["--losses.bcd.channels", "16", "--losses.cwd.temperature", "4"]
two = ["--losses", "{seg: {cwd: {}, bcd: {channels: 16}}, dino: {pkd: {}}}"]
data = ["--dataset_name", "synthetic", "--dataset_options.size", "[48, 64]",
        "--dataset_options.num_images", "{train: 8, validation: 2, test: 2}"]
student = ["--student.backbone", "test_resnet", "--student.head", "fpn"]
teacher = ["--teacher.backbone", "resnet10t", "--teacher.head", "fpn", "--teacher_training.max_steps", "2"]
own = {
    "reinforce": [*data, *teacher, *one, "--views", "2", "--with_images", "--push_to_hub", "tester/reinforced", "--output_dir", "store"],
    "distill": ["--dataset_name", "tester/reinforced", "--dataset_config", "pictures", "--teacher_store", "tester/reinforced",
                *student, *one, "--output_dir", "run"],
    "reinforce_two": [*data, "--teacher", "[seg, dino]", *two, "--views", "2", "--push_to_hub", "tester/both", "--output_dir", "both"],
    "distill_two": [*data, "--teacher_store", "tester/both", *student, *two, "--output_dir", "run"],
    "distill_dino": [*data, "--teacher_store", "tester/both/dino@main", *student, "--losses", "{pkd: {}}", "--output_dir", "dino_run"],
}
command = sys.argv[1]
sys.argv = ["hf-bcd", command.partition("_")[0], *own[command], *common]
main()
"""
READ = """
import datasets
rows = datasets.load_dataset("tester/reinforced", split="train")
print(len(rows), sorted(rows.column_names))
"""


@pytest.mark.slow
def test_a_store_is_pushed_and_teaches_elsewhere(hub: HubServer, run_python, tmp_path: Path) -> None:
    printed = run_python(REINFORCE, "reinforce").stdout
    assert "pushed: " in printed
    assert "2 views of 8 pictures" in printed
    files = hub.files("tester/reinforced", kind="dataset")
    assert set(files) >= {"README.md", "store.json", "losses.safetensors", "scores.json", "id2label.json"}
    assert not any(name.startswith("_") for name in files), "the teacher and the lock stay at home"
    _, header, card = files["README.md"].decode().split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["task_categories"] == ["image-segmentation"]
    assert [config["config_name"] for config in metadata["configs"]] == ["default", "pictures"]
    assert "--teacher_store tester/reinforced" in card
    assert "`bcd/levels/stride_32`" in card and "even:" in card
    assert str(tmp_path) not in files["store.json"].decode() + card

    shown = run_python(READ, home=tmp_path / "elsewhere").stdout
    count, _, columns = shown.partition(" ")
    assert count == "16"
    assert {name for name in ast.literal_eval(columns) if not name.startswith("bcd/levels/")} == {
        "bcd/boundary", "checksum", "image", "index", "logits", "thumbnail", "view"
    }  # fmt: skip
    done = run_python(REINFORCE, "distill", home=tmp_path / "elsewhere")
    assert "re-using the teacher" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 3
    assert "distilled from a teacher (FPN on resnet10t)" in (tmp_path / "run" / "README.md").read_text().replace(
        "\\", ""
    )


@pytest.mark.slow
def test_a_store_of_two_teachers_is_pushed_and_both_or_one_teach_elsewhere(
    hub: HubServer, run_python, tmp_path: Path
) -> None:
    tiny.tiny_segformer().save_pretrained(tmp_path / "seg")
    small = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56)
    Dinov2Model(small).save_pretrained(tmp_path / "dino")
    run_python(REINFORCE, "reinforce_two")
    files = hub.files("tester/both", kind="dataset")
    assert {"README.md", "store.json", "losses.safetensors", "scores-seg.json"} <= set(files)
    card = files["README.md"].decode()
    assert "- **Teacher** seg: " in card and "- **Teacher** dino: " in card and "`seg/logits`" in card
    assert str(tmp_path) not in files["store.json"].decode() + card
    elsewhere = tmp_path / "elsewhere"
    run_python(REINFORCE, "distill_two", home=elsewhere)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher"] == json.loads(files["scores-seg.json"])["scores"]
    assert (tmp_path / "run" / "README.md").read_text().count("it did not run along") == 2
    run_python(REINFORCE, "distill_dino", home=elsewhere)
    assert (tmp_path / "dino_run" / "README.md").read_text().count("it did not run along") == 1
