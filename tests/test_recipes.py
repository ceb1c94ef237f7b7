"""Every recipe is usable as it stands: it parses, names a known data set, and its models can be built."""

import re
from pathlib import Path

import pytest
import torch

from hf_bcd.config import ModelSpec, parse_arguments
from hf_bcd.data import CATALOG
from hf_bcd.models import TimmSegmentationConfig, TimmSegmentationModel


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "examples" / "recipes").rglob("*.yaml"))
PAPER_ROWS = {
    "voc2012_aug": {"pspnet18", "pspnet38", "efficientnet_b1", "segformer_b0"},
    "cityscapes": {"pspnet18", "pspnet38", "efficientnet_b1", "segformer_b0"},
    "ade20k": {"pspnet18", "espnet", "mobilenetv2", "segformer_b0"},
    "coco_stuff_10k": {"mobilenetv2", "segformer_b0", "deeplabv3plus18"},
}


def parse(recipe: Path):
    return parse_arguments(["--config", str(recipe), "--use_cpu", "true", "--report_to", "none"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_describes_a_run(recipe: Path) -> None:
    model, data, config = parse(recipe)
    assert data.dataset_name in CATALOG and recipe.parent.name == data.dataset_name
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    commands = [line for line in header if "accelerate launch scripts/distill.py" in line]
    assert commands and (data.dataset_name == "synthetic" or any(str(recipe.relative_to(ROOT)) in h for h in header))
    for role, given in (("student", model.student), ("teacher", model.teacher)):
        spec = ModelSpec.parse(given or "", role)
        if spec.name_or_path:
            assert re.fullmatch(r"(nvidia|facebook)/[a-zA-Z0-9-]+", spec.name_or_path)
        elif spec.backbone != "espnet":
            fields = {"backbone": spec.backbone, "head": spec.head, "output_stride": spec.output_stride}
            with torch.device("meta"):
                TimmSegmentationModel(TimmSegmentationConfig(**fields, **spec.options, num_labels=5))
    assert config.max_steps > 0


@pytest.mark.parametrize("dataset", PAPER_ROWS)
def test_every_student_of_the_papers_tables_has_a_recipe_with_its_numbers(dataset: str) -> None:
    students = set()
    for recipe in RECIPES:
        if recipe.parent.name == dataset and "Paper, Table" in (text := recipe.read_text()):
            numbers = re.search(r"teacher (\d+\.\d+), student (\d+\.\d+), with BCD (\d+\.\d+)", text)
            assert numbers and float(numbers[2]) < float(numbers[3]), recipe
            students.add(recipe.stem.split("_to_")[1])
    assert students == PAPER_ROWS[dataset]
