"""Every recipe is usable as it stands: it parses, names a known data set, and its models and losses can be built."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    RfDetrConfig,
    RfDetrDinov2Config,
    RfDetrForInstanceSegmentation,
    SwinConfig,
)

from hf_bcd.adapters import DenseAdapter, build_adapter
from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.data import CATALOG
from hf_bcd.losses import LOSSES, build_criterion
from hf_bcd.losses.recipe import ALWAYS_OFFERED
from hf_bcd.models import TimmDetectionConfig, TimmDetectionModel, TimmSegmentationConfig, TimmSegmentationModel
from hf_bcd.models.configuration_timm_detection import HEAD_NAMES
from hf_bcd.runs.arguments import named_teachers, parse_arguments, read_arguments
from hf_bcd.runs.methods import tasks_of
from hf_bcd.runs.recipes import find_recipe
from hf_bcd.training.teaching import build_losses, inherit
from hf_bcd.utils.messages import UserError


ROOT = Path(__file__).parents[2]
# a base of several is no run of its own
RECIPES = sorted(path for path in (ROOT / "examples" / "recipes").rglob("*.yaml") if not path.name.startswith("_"))
PAPER_ROWS = {
    "voc2012_aug": {"pspnet18", "pspnet38", "efficientnet_b1", "segformer_b0"},
    "cityscapes": {"pspnet18", "pspnet38", "efficientnet_b1", "segformer_b0"},
    "ade20k": {"pspnet18", "espnet", "mobilenetv2", "segformer_b0"},
    "coco_stuff_10k": {"mobilenetv2", "segformer_b0", "deeplabv3plus18"},
}


# where the recipes of the paper's comparisons stand, how their names begin, and the joint rows
COMPARISONS = {
    "voc2012_aug": ("psp101_to_psp18_", {"ifvd_bcd", "tat_bcd", "sstkd_bcd"}),
    "coco_stuff_10k": ("deeplabv3plus101_to_18_", {"tat_bcd", "slimseg_bcd", "bpkd_bcd"}),
}
COMPARED = {
    dataset: [path for path in RECIPES if path.parent.name == dataset and path.stem.startswith(prefix)]
    for dataset, (prefix, _) in COMPARISONS.items()
}
each_comparison = pytest.mark.parametrize(
    ("dataset", "recipe"),
    [(d, r) for d, recipes in COMPARED.items() for r in recipes],
    ids=lambda x: getattr(x, "stem", x),
)


@cache
def adapter_of(model: str, num_labels: int) -> DenseAdapter:
    """The model that a recipe describes (as JSON), without its weights."""
    spec = ModelSpec.parse(json.loads(model), "model")
    fields: dict[str, Any] = {"backbone": spec.backbone, "head": spec.head}
    with torch.device("meta"):
        if spec.head in HEAD_NAMES:
            built: Any = TimmDetectionModel(TimmDetectionConfig(**fields, **spec.options, num_labels=num_labels))
        else:
            fields["output_stride"] = spec.output_stride
            built = TimmSegmentationModel(TimmSegmentationConfig(**fields, **spec.options, num_labels=num_labels))
    return build_adapter(built)


def published_mask2former(name: str) -> DenseAdapter:
    """A Mask2Former of the Hub in its widths, without its weights."""
    width, depth = {"tiny": (96, 6), "large": (192, 18)}[name.split("-")[2]]
    backbone = SwinConfig(
        embed_dim=width,
        depths=[2, 2, depth, 2],
        num_heads=[width // 32 * 2**stage for stage in range(4)],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    with torch.device("meta"):
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=backbone, num_labels=80))
    return build_adapter(model, task="instance-segmentation")


def published_rf_detr(name: str) -> DenseAdapter:
    """Likewise an RF-DETR with masks."""
    size, layers, queries = {"small": (384, 4, 100), "medium": (432, 5, 200)}[name.split("-")[3]]
    backbone = RfDetrDinov2Config(
        hidden_size=384,
        num_attention_heads=6,
        image_size=size,
        patch_size=12,
        num_windows=2,
        out_features=["stage3", "stage6", "stage9", "stage12"],
    )
    options: dict[str, Any] = {"decoder_layers": layers, "num_queries": queries, "d_model": 256, "num_labels": 80}
    with torch.device("meta"):
        model = RfDetrForInstanceSegmentation(RfDetrConfig(backbone_config=backbone, **options))
    return build_adapter(model, task="instance-segmentation")


PUBLISHED = {"mask2former_l_to_t": published_mask2former, "rfdetr_seg_m_to_s": published_rf_detr}


def parse(recipe: Path):
    return parse_arguments(["--config", str(recipe), "--use_cpu", "true", "--report_to", "none"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_describes_a_run(recipe: Path) -> None:
    model, data, config = parse(recipe)
    assert data.dataset_name in CATALOG
    assert recipe.parent.name == data.dataset_name.removesuffix("_detection").removesuffix("_instances")
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    commands = [line for line in header if "accelerate launch scripts/distill.py" in line]
    assert commands and (
        recipe.stem == "resnet18_to_resnet10" or any(str(recipe.relative_to(ROOT)) in h for h in header)
    )
    config.check_teachers(list(named_teachers(model)))
    for role, given in (
        ("student", model.student),
        *(("teacher", one.teacher) for one in named_teachers(model).values()),
    ):
        spec = ModelSpec.parse(given or "", role)
        if spec.name_or_path:
            assert re.fullmatch(r"(nvidia|facebook|ustc-community|PekingU|Roboflow)/[a-zA-Z0-9_-]+", spec.name_or_path)
        elif spec.backbone != "espnet":
            assert adapter_of(json.dumps(given), 5).feature_specs
    assert config.max_steps > 0 or config.num_train_epochs > 0


@pytest.mark.parametrize("dataset", PAPER_ROWS)
def test_every_student_of_the_papers_tables_has_a_recipe_with_its_numbers(dataset: str) -> None:
    students = set()
    for recipe in RECIPES:
        if recipe.parent.name == dataset and "with BCD" in (text := recipe.read_text()):
            numbers = re.search(r"teacher (\d+\.\d+), student (\d+\.\d+), with BCD (\d+\.\d+)", text)
            assert numbers and float(numbers[2]) < float(numbers[3]), recipe
            students.add(recipe.stem.split("_to_")[1])
    assert students == PAPER_ROWS[dataset]


@each_comparison
def test_a_method_of_the_papers_comparisons_differs_from_its_base_in_nothing_else(dataset: str, recipe: Path) -> None:
    lines = recipe.read_text().splitlines()
    assert len(lines) <= 8
    base = re.search(r"^base: (.*)$", recipe.read_text(), re.M)
    assert base and "Re-use: --teacher runs/" in recipe.read_text()
    models, data, config = parse(recipe)
    base_models, base_data, base_config = parse(recipe.parent / base[1])
    assert not models.with_baseline and models.teacher == base_models.teacher and models.student == base_models.student
    assert data == base_data and config.output_dir == f"runs/{dataset}/{recipe.stem}"
    assert f"--teacher {base_config.output_dir}/_teacher" in recipe.read_text()
    changed = {key for key, value in config.to_dict().items() if value != base_config.to_dict()[key]}
    assert changed <= {"output_dir", "logging_dir", "losses"}
    alone = re.search(r"student alone (\d+\.\d+)|\(student (\d+\.\d+) mIoU", lines[0])
    number = re.search(r"student (\d+\.\d+), with BCD", (recipe.parent / base[1]).read_text())
    assert alone and number and (alone[1] or alone[2]) == number[1]


@each_comparison
def test_its_losses_can_be_built_for_its_models(dataset: str, recipe: Path) -> None:
    models, _, config = parse(recipe)
    losses = config.loss_options
    assert recipe.stem.removeprefix(COMPARISONS[dataset][0]) == "_".join(losses)
    num_labels = len(CATALOG[dataset].id2label or {})
    student, teacher = (adapter_of(json.dumps(given), num_labels) for given in (models.student, models.teacher))
    criterion = build_criterion(
        losses,
        student.feature_specs,
        teacher.feature_specs,
        num_labels=num_labels,
        offers=ALWAYS_OFFERED | teacher.offers,
        head_levels=teacher.head_levels,
    )
    assert set(criterion.losses) == set(losses) and set(criterion.weights)


@pytest.mark.parametrize("dataset", COMPARED)
def test_every_method_has_a_recipe(dataset: str) -> None:
    prefix, joint = COMPARISONS[dataset]
    rows = {recipe.stem.removeprefix(prefix) for recipe in COMPARED[dataset]}
    assert joint <= rows
    if dataset == "voc2012_aug":  # the paper compares fewer on COCO-Stuff
        of_segmentation = {name for name, loss in LOSSES.items() if loss.needs <= ALWAYS_OFFERED | {"head"}}
        assert rows - joint == of_segmentation - {"bcd"}
    assert rows - joint <= set(LOSSES)


# of detectors, and below them of models with masks
DETECTORS = {
    "retinanet_r101_to_r50": {
        "at",
        "bcd",
        "crosskd",
        "cwd",
        "cwt",
        "fam",
        "fgd",
        "fitnet",
        "gid",
        "ifd",
        "mgd",
        "pkd",
        "skd",
        "sstkd",
        "tat",
    },  # fmt: skip
    "gfl_r50_to_r18": {"bcd", "crosskd", "fgd", "gid", "ld", "pkd", "skd", "sstkd"},
    "dfine_l_to_s": {"bcd", "ddf", "pkd", "query_kd"},
    "rtdetr_r101_to_r18": {"bcd", "pkd", "query_kd"},
}
INSTANCE_MODELS = {
    "cascade_mask_rcnn_r101_to_r50": {
        "at",
        "bcd",
        "cwd",
        "cwt",
        "fam",
        "fgd",
        "fitnet",
        "gid",
        "ifd",
        "mgd",
        "pkd",
        "skd",
        "sstkd",
        "tat",
    },  # fmt: skip
    "mask2former_l_to_t": {"bcd", "pkd", "query_kd"},
    "rfdetr_seg_m_to_s": {"bcd", "pkd", "query_kd"},
}


@pytest.mark.parametrize(("task", "families"), [("detection", DETECTORS), ("instances", INSTANCE_MODELS)])
def test_every_method_that_serves_detectors_has_a_recipe(task: str, families: dict[str, set[str]]) -> None:
    serving = {name for name in LOSSES if task in tasks_of(name)}
    assert set().union(*families.values()) == serving


@pytest.mark.parametrize("base", [*DETECTORS, *INSTANCE_MODELS])
def test_a_detectors_recipe_differs_from_its_base_in_its_losses_which_can_be_built(base: str) -> None:
    folder = ROOT / "examples" / "recipes" / "coco"
    base_models, base_data, base_config = parse(folder / f"{base}.yaml")
    found = set()
    for recipe in sorted(folder.glob(f"{base}*.yaml")):
        models, data, config = parse(recipe)
        found |= set(config.loss_options)
        assert data.task == ("instance-segmentation" if base in INSTANCE_MODELS else None)
        assert data == base_data and (models.teacher, models.student) == (base_models.teacher, base_models.student)
        changed = {key for key, value in config.to_dict().items() if value != base_config.to_dict()[key]}
        assert (
            changed <= {"output_dir", "logging_dir", "losses", "inherit"}
            and config.output_dir == f"runs/coco/{recipe.stem}"
        )
        pair = (models.student, models.teacher)
        if isinstance(models.student, dict) or base in PUBLISHED:
            student, teacher = (
                PUBLISHED[base](given) if isinstance(given, str) else adapter_of(json.dumps(given), 80)
                for given in pair
            )
            if config.square_size is not None:
                assert all(config.square_size % one.size_multiple == 0 for one in (student, teacher))
            with torch.device("meta"):
                build_losses(student, teacher, config)
                inherit(student, teacher, config.inherit or ())  # which refuses what the two have not in common
    assert found == (DETECTORS | INSTANCE_MODELS)[base]


def test_methods_of_cascade_mask_rcnn_have_the_numbers_of_the_paper() -> None:
    base = ROOT / "examples" / "recipes" / "coco" / "cascade_mask_rcnn_r101_to_r50.yaml"
    assert "masks: teacher 37.3, student 36.5, with BCD 37.0" in base.read_text()
    for method in INSTANCE_MODELS[base.stem] - {"bcd"}:
        first = base.with_stem(f"{base.stem}_{method}").read_text().splitlines()[0]
        pairs = {
            "fgd": (35.3, 42.1),
            "skd": (36.5, 42.2),
            "gid": (36.7, 42.0),
            "pkd": (36.8, 42.0),
            "sstkd": (37.0, 42.2),
        }
        row = "{} AP of masks and {} of boxes".format(*pairs[method]) if method in pairs else None
        assert "36.5" in first and "41.9" in first and (row or "The paper has no row") in first


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("synthetic/resnet18_to_resnet10.yaml", "recipes"),
        ("synthetic/resnet18_to_resnet10", "recipes"),
        ("examples/recipes/synthetic/resnet18_to_resnet10.yaml", "recipes"),
        ("camvid_cpu.yaml", "studies"),
        ("examples/studies/camvid_cpu.yaml", "studies"),
    ],
)
def test_recipes_are_found_away_from_the_checkout(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_recipe(name, kind)
    assert found.samefile(
        ROOT / "hf_bcd" / "examples" / kind / f"{name.removesuffix('.yaml').removeprefix(f'examples/{kind}/')}.yaml"
    )
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")  # a file of the user's wins
    assert find_recipe(name, kind) == Path(name)


def test_a_recipe_that_is_nowhere_has_near_ones_named() -> None:
    with pytest.raises(UserError, match="near it are .*cityscapes/pspnet101_to_pspnet18.yaml"):
        find_recipe("pspnet101_to_pspnet18.yaml")
    with pytest.raises(UserError, match="of the package's studies; near it are camvid_cpu.yaml"):
        find_recipe("camvid_cpus.yaml", "studies")


def test_synonyms_of_the_package_are_found_away_from_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values = read_arguments(["--config", "camvid/segformer_b5_to_mobilenetv2_fpn_label_free"])
    assert Path(values["label_synonyms"]).samefile(
        ROOT / "hf_bcd" / "examples" / "studies" / "camvid_cityscapes_names.json"
    )
    assert read_arguments(["--label_synonyms", "examples/mine.json"])["label_synonyms"] == "examples/mine.json"
