"""Wrong recipes, command lines, models, image processors, checkpoints and studies, each made in a folder of its own."""

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import tiny
import torch
import yaml
from PIL import Image
from torch._utils import ExceptionWrapper
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor

from hf_bcd.adapters import adapt, read_synonyms
from hf_bcd.adapters.loading import build_model, load_adapter
from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.commands import check, distill, evaluate, export, push, study
from hf_bcd.data import load_dense_dataset
from hf_bcd.models import TimmSegmentationModel
from hf_bcd.runs import report
from hf_bcd.runs.arguments import parse_arguments
from hf_bcd.runs.experiment import alone_in, check_sizes
from hf_bcd.runs.study import Study, read_study
from hf_bcd.training.checkpoints import finished_state, read_state
from hf_bcd.utils.files import write_json
from hf_bcd.utils.messages import UserError


Kind = Literal["error", "warning", "result"]
Case = tuple[Kind, str, Callable[[Path], Any]]
CPU = ["--use_cpu", "true", "--report_to", "none"]
TINY = {
    "backbone": "resnet10t",
    "options": {"head_channels": 8, "backbone_kwargs": {"channels": [8, 8, 8, 8], "stem_width": 8}},
}
SCENES = {"size": [48, 64], "num_images": {"train": 4, "validation": 2, "test": 2}}
WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"


def error(regex: str, function: Callable[[Path], Any]) -> Case:
    return "error", regex, function


# ---- Recipes and command lines -----------------------------------------------------------------------------------------


def recipe(content: str | bytes, *argv: str, **files: str) -> Callable[[Path], Any]:
    """Reads r.yaml of this content, with others beside it."""

    def read(place: Path) -> Any:
        for name, text in files.items():
            (place / f"{name}.yaml").write_text(text)
        path = place / "r.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return parse_arguments(["--config", str(path), *argv, *CPU])

    return read


def value(key: str, given: Any) -> Callable[[Path], Any]:
    """Reads a recipe with this value, and gives the argument that it becomes."""
    text = yaml.safe_dump({key: given})

    def read(place: Path) -> Any:
        for args in recipe(text)(place):
            if hasattr(args, key):
                return repr(getattr(args, key))
        return None

    return read


def line(*argv: str) -> Callable[[Path], Any]:
    """Reads a command line."""
    return lambda place: parse_arguments(["--student", "a/b", *argv, *CPU])


ALIASES = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]" for i in range(9))
RECIPES: dict[str, Case] = {
    "key twice": error(
        r"r\.yaml is no valid YAML: the key 'seed' stands there twice at line 2", recipe("seed: 1\nseed: 2")
    ),
    "key of a loss twice": error("the key 'kd' stands there twice", recipe("losses: {kd: {}, kd: {weight: 2}}")),
    "list": error(r"r\.yaml: expected a mapping of arguments, found list", recipe("[1, 2]")),
    "number": error(r"r\.yaml: expected a mapping of arguments, found int", recipe("3")),
    "alias bomb": error(r"r\.yaml: its aliases stand for more than 100000 values", recipe(ALIASES)),
    "alias of itself": error(r"r\.yaml: its aliases stand for more", recipe("student: &a [*a]")),
    "long list": error(r"losses is \[0, 0.*\.\.\.\]; it must be", recipe(f"losses: [{'0, ' * 2000}0]")),
    "long word": error(
        r"crop_size is 'xxx.*\.\.\.x+'; it must be a whole number", recipe(f"crop_size: {'x' * 10**6}")
    ),
    "cp1252": error(
        r"r\.yaml: no UTF-8 text \(byte 9: .*save it with that encoding", recipe("student: äö".encode("cp1252"))
    ),
    "byte order mark": (
        "result",
        "^a/b$",
        lambda place: recipe(b"\xef\xbb\xbfstudent: a/b")(place)[0].student,
    ),
    "zero byte": error(r"r\.yaml is no valid YAML: .*special characters", recipe(b"\0")),
    "tab": error(r"r\.yaml is no valid YAML: .* at line 2", recipe("student: a\n\tb: 3")),
    "open quote": error(r"r\.yaml is no valid YAML: .*quoted scalar", recipe("student: 'a")),
    "no date": error(r"r\.yaml is no valid YAML: month must be", recipe("student: 2026-13-45")),
    "list as key": error(r"r\.yaml is no valid YAML: .*unhashable", recipe("? [1, 2]\n: 3")),
    "tag of Python": error(r"no valid YAML: .*python/object", recipe("student: !!python/object/apply:os.getcwd []")),
    "own tag": error(r"no valid YAML: .*'!mine'", recipe("student: !mine 3")),
    "unknown key": error(r"r\.yaml: unknown key 'crop_sise'. Did you mean 'crop_size'", recipe("crop_sise: 3")),
    "number as key": error(r"r\.yaml: unknown key '3'. The nearest of \d+: ", recipe("3: 4")),
    "null as key": error(r"r\.yaml: unknown key 'None'", recipe("null: 4")),
    "base of itself": error(r"a recipe is its own base: .*r\.yaml -> .*r\.yaml", recipe("base: r.yaml")),
    "bases in a ring": error(
        r"a recipe is its own base: .*r\.yaml -> .*b\.yaml -> .*r\.yaml", recipe("base: b.yaml", b="base: r.yaml")
    ),
    "missing base": error(r"r\.yaml: base .*none\.yaml: no such file", recipe("base: none.yaml")),
    "number as base": error(r"r\.yaml: base is 3; it must be the name", recipe("base: 3")),
    "wrong base": error(r"b\.yaml: unknown key 'sed'. Did you mean 'seed'", recipe("base: b.yaml", b="sed: 3")),
    "no recipe": error("none.yaml: no such file", line("--config", "none.yaml")),
    "folder as recipe": error("no such file", lambda place: parse_arguments(["--config", str(place), *CPU])),
    "term of a term": error("unknown term of loss 'cwd' 'x'. Known: cwd", line("--losses.cwd.weight.x", "5")),
    "mapping as weight": error(r"weight of cwd/cwd is \{'y': 5\}", line("--losses.cwd.weight.cwd.y", "5")),
    "field of a number": error(
        "sets a field of losses.cwd, which is 3", line("--losses", "{cwd: 3}", "--losses.cwd.x", "1")
    ),
    "field without value": error("--losses.cwd.weight has no value", line("--losses.cwd.weight")),
    "unknown mapping": error("unknown mapping 'losess'. Did you mean 'losses'", line("--losess.kd.weight", "3")),
    "unknown argument": error(
        "unknown argument 'lerning_rate'. Did you mean 'learning_rate'", line("--lerning_rate", "3")
    ),
    "stray word": error("unknown argument 'word'", line("word")),
    "open mapping": error("losses is no valid YAML", line("--losses", "{")),
    "steps and epochs": error(
        "--max_steps and --num_train_epochs exclude", line("--max_steps", "3", "--num_train_epochs", "2")
    ),
    "word for a number": error("argument --crop_size.*: invalid int value: 'many'", line("--crop_size", "many")),
    "comma in a number": error("argument --learning_rate.*invalid float value: '1,5'", line("--learning_rate", "1,5")),
    "no value": error("argument --crop_size.*: expected one argument", line("--crop_size")),
    "word for a truth value": error("argument --bf16: .*maybe", line("--bf16", "maybe")),
    "stream without an end": error(
        "max_steps is -1, but a stream has no end", line("--streaming", "true", "--num_train_epochs", "2")
    ),
    "file as output folder": error(
        r"output_dir is .*r\.yaml, which is a file", lambda place: recipe(f"output_dir: {place}/r.yaml")(place)
    ),
}

WHOLE, NUMBER = "it must be a (whole )?number", "it must be a number"
WRONG: dict[str, dict[Any, str]] = {
    "learning_rate": {
        None: NUMBER, "fast": "learning_rate is 'fast'; it must be a number", -1: "is -1; it must be a number of more than 0",
        0: "more than 0", math.nan: "learning_rate is nan", math.inf: "learning_rate is inf", True: "is True; it must be a number",
    },
    "crop_size": {
        "[]": r"crop_size is \[\]; it must be a whole number", None: WHOLE, 0: "of at least 1", -64: "of at least 1",
        64.5: "is 64.5; it must be a whole number", "big": "is 'big'",
    },
    "seed": {
        -1: "seed is -1; it must be a number of at least 0", None: "seed is None", 1.5: "whole number", 1e30: "whole number",
        "lucky": "seed is 'lucky'", "[1]": r"seed is \[1\]",
    },
    "ignore_labels": {
        1: "ignore_labels is 1; it must be a list of whole numbers", "[void]": r"\['void'\]; it must be a list of whole numbers",
        "[1.5]": "list of whole numbers", "[null]": "list of whole numbers",
    },
    "max_steps": {0: "max_steps is 0; train", -5: "max_steps is -5; it must be at least 1", "[3]": WHOLE, math.nan: WHOLE, math.inf: WHOLE},
    "num_train_epochs": {0: "num_train_epochs is 0", -2: "num_train_epochs is -2", math.nan: "num_train_epochs is nan"},
    "per_device_train_batch_size": {0: "at least 1", -1: "at least 1", "x": WHOLE, None: WHOLE},
    "warmup_steps": {-1: "warmup_steps is -1", math.nan: "warmup_steps is nan", "soon": NUMBER},
    "color_jitter": {-0.5: "color_jitter is -0.5", 2: "at most 1", "[1]": NUMBER},
    "scale_min": {0: "scale_min is 0", 3: "scale_min 3 exceeds scale_max 2.0", None: NUMBER},
    "adam_beta1": {2: "adam_beta1 is 2; .*at most 1", -1: "adam_beta1 is -1"},
    "image_size": {0: "image_size is 0", "{}": "image_size is {}; it must be a whole number or null"},
    "bf16": {"yes please": "bf16 is 'yes please'; it must be true or false", 3: "true or false", None: "true or false"},
    "with_baseline": {"perhaps": "true or false", 1: "with_baseline is 1; it must be true or false"},
    "student": {3: "student is 3; it must be a mapping or text", "[a]": "it must be a mapping or text"},
    "preset": {"papper": "unknown preset 'papper'. Did you mean 'paper'", 3: "preset is 3; it must be text"},
    "optim": {"sgdd": "unknown optim 'sgdd'. Did you mean 'sgd'", 3: "optim is 3; it must be text"},
    "optim_args": {"momentum": "optim sgd cannot be built with optim_args 'momentum'", "momentum=lots": "cannot be built with optim_args"},
    "lr_scheduler_type": {"polynom": "unknown lr_scheduler_type 'polynom'. Did you mean 'polynomial'"},
    "lr_scheduler_kwargs": {
        "{powr: 1}": r"lr_scheduler_type .*polynomial cannot be built with lr_scheduler_kwargs \{'powr': 1\}", "[1]": "a mapping",
        "power": "cannot be built|expected a mapping|lr_scheduler_kwargs",
    },
    "eval_strategy": {"sometimes": "unknown eval_strategy 'sometimes'. Known: epoch, no, steps"},
    "train_sampling_strategy": {"group_by_length": "unknown train_sampling_strategy 'group_by_length'. Known: random, sequential"},
    "teacher_training": {
        "{max_step: 3}": "unknown training argument 'max_step'. Did you mean 'max_steps'", "[1]": "it must be a mapping",
        "{max_steps: many}": "max_steps is 'many'; it must be a whole number",
    },
    "losses": {
        3: "losses is 3; it must be a mapping", "{kd: 3}": "options of loss 'kd' are 3", "{kdd: {}}": "unknown loss 'kdd'. Did you mean 'kd'",
        "{kd: {weight: .nan}}": "weight of kd/kd is nan", "{kd: {weight: 0}}": "no term has a weight above 0",
    },
}  # fmt: skip
RIGHT: dict[str, dict[Any, str]] = {
    "learning_rate": {"1e-4": r"^0\.0001$", 1: "^1$"},
    "max_steps": {"1e3": "^1000$", "2": "^2$"},
    "bf16": {"no": "^False$"},
    "eval_strategy": {False: "NO"},
}


def plain(given: Any) -> Any:
    """What a written value means: lists and mappings stand as text in the table."""
    return yaml.safe_load(given) if isinstance(given, str) and given[0] in "[{" else given


VALUES: dict[str, Case] = {
    f"{key}: {given}": ("error", regex, value(key, plain(given)))
    for key, all_ in WRONG.items()
    for given, regex in all_.items()
} | {
    f"{key}: {given!r}": ("result", regex, value(key, given))
    for key, all_ in RIGHT.items()
    for given, regex in all_.items()
}


# ---- Models ------------------------------------------------------------------------------------------------------------


def built(options: dict[Any, Any] | None = None, **fields: Any) -> Callable[[Path], Any]:
    """Builds the tiny student with other options, and gives its configuration."""
    given = {**TINY, **fields}
    if options is not None:
        given["options"] = {**TINY["options"], **options} if "espnet" not in fields.values() else options
    return lambda place: build_model(ModelSpec.parse(given, "student"), tiny.ID2LABEL).config


def named(name: Any) -> Callable[[Path], Any]:
    return lambda place: build_model(ModelSpec.parse(name, "student"), tiny.ID2LABEL)


def field(key: str, function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda place: getattr(function(place), key)


def sized(size: int, **fields: Any) -> Callable[[Path], Any]:
    """Shows a model black pictures of a size, as before a run."""

    def look(place: Path) -> None:
        model = adapt(build_model(ModelSpec.parse(fields, "student"), tiny.ID2LABEL))
        check_sizes(model, tiny.config(place, crop_size=size), tiny.scenes(2, 1))

    return look


NO_NUMBER = "option {} of student is .*; it must be a (whole )?number"
OPTIONS: dict[str, Case] = {
    **{
        f"head_channels {given}": error(NO_NUMBER.format("head_channels"), built({"head_channels": given}))
        for given in ("many", [8], True, 2.5, 0, -4, 10**7)
    },
    **{f"dropout {given}": error(NO_NUMBER.format("dropout"), built({"dropout": given})) for given in ("x", 2, -1, None, math.nan)},
    **{
        f"image_std {given}": error("option image_std of student is .*(three numbers|list of numbers|above 0)", built({"image_std": given}))
        for given in ([0.5], 0.5, [0, 0, 0], "x", [0.1, 0.2, "x"], [math.nan] * 3)
    },
    "auxiliary_head maybe": error("option auxiliary_head of student is 'maybe'", built({"auxiliary_head": "maybe"})),
    "auxiliary_head 'false'": ("result", "^False$", field("auxiliary_head", built({"auxiliary_head": "false"}))),
    "head_channels '8'": ("result", "^8$", field("head_channels", built({"head_channels": "8"}))),
    "backbone_kwargs 5": error("option backbone_kwargs of student is 5; it must be a mapping", built({"backbone_kwargs": 5})),
    "backbone_kwargs unknown": error("cannot build backbone 'resnet10t'.*no_such", built({"backbone_kwargs": {"no_such": 1}})),
    "backbone_kwargs wrong": error("cannot build backbone 'resnet10t'.*'many'", built({"backbone_kwargs": {"channels": "many"}})),
    "backbone_kwargs too few": error(
        r"backbone 'resnet10t' cannot be built with the options .*'channels': \[8\]", built({"backbone_kwargs": {"channels": [8]}})
    ),
    "backbone_kwargs four channels": error("in_chans 4; pictures have 3 channels", built({"backbone_kwargs": {"in_chans": 4}})),
    "backbone_kwargs reserved": error(r"must not hold \['features_only'\]", built({"backbone_kwargs": {"features_only": True}})),
    "option near another": error("unknown option of student 'resnet10t' 'head_chanels'. Did you mean 'head_channels'", built({"head_chanels": 8})),
    "classes as option": error("unknown option of student 'resnet10t' 'num_labels'", built({"num_labels": 3})),
    "number as option": error("unknown option of student 'resnet10t' '3'", built({3: 4})),
    "head 3": error("head of student is 3; it must be text", built(head=3)),
    "head unknown": error("head 'pspp' is unknown; choose one of", built(head="pspp")),
    "output_stride eight": error("output_stride of student is 'eight'", built(output_stride="eight")),
    "output_stride 7": error("output_stride 7 is not possible; choose one of", built(output_stride=7)),
    "pretrained maybe": error("pretrained of student is 'maybe'; it must be true or false", built(pretrained="maybe")),
    "weights 3": error("weights of student is 3; it must be text or null", built(weights=3)),
    "weights nowhere": error("nowhere.safetensors", built(weights="nowhere.safetensors")),
    "weights of another kind": error("'x.bin' must be a .safetensors file", built(weights="x.bin")),
    "backbone 3": error("backbone of student is 3; it must be text", built(backbone=3)),
    "backbone unknown": error("'resnet1' is not an architecture of timm", built(backbone="resnet1")),
    "backbone of an unknown tag": error("has an unknown tag; timm knows", built(backbone="resnet18.no_such")),
    "backbone and name": error("needs either name_or_path", built(name_or_path="a/b")),
    "options a list": error(r"options of student is \[1\]; it must be a mapping", named({"backbone": "resnet10t", "options": [1]})),
    "options of a finished model": error("options of student belong to a timm backbone", named({"name_or_path": "a/b", "options": {"head": 1}})),
    "espnet p many": error("option p of student is 'many'; it must be a whole number", built({"p": "many"}, backbone="espnet")),
    "espnet p 0": error("p is 0; it must be an integer of at least 1", built({"p": 0}, backbone="espnet")),
    "espnet decoder": error("option decoder of student is 'x'; it must be true or false", built({"decoder": "x"}, backbone="espnet")),
    "espnet unknown": error("unknown option of student 'espnet' 'pp'. Did you mean 'p'", built({"pp": 2}, backbone="espnet")),
    "espnet head": error("head is 'psp', but backbone 'espnet' is a whole network", built({}, backbone="espnet", head="psp")),
    "model nowhere": error("'/no/where' is neither a folder nor a Hub id", named("/no/where")),
    "model of too long a name": error(r"^'x+ \.\.\. .*Hub|alphanumeric", named("x" * 5000)),
    "model 3": error("name_or_path of student is 3; it must be text", named({"name_or_path": 3})),
    "no model": error("student needs either name_or_path", named("")),
    "revision 3": error("revision of student is 3; it must be text or null", named({"name_or_path": "a/b", "revision": 3})),
    "field near another": error("unknown field of student 'heads'. Did you mean 'head'", named({"backbone": "resnet10t", "heads": "psp"})),
    "one input size": error(
        "cannot take images of 64x64 pixels .*was made for 224x224. Train at that size",
        sized(64, backbone="swin_tiny_patch4_window7_224", head="psp", options={"head_channels": 8, "backbone_kwargs": {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}}),
    ),
}  # fmt: skip


def saved(place: Path, **files: Any) -> Path:
    """A finished tiny SegFormer whose files are changed: bytes, None for none, or a function of what their JSON says."""
    tiny.tiny_segformer().save_pretrained(place)
    SegformerImageProcessor().save_pretrained(place)
    for name, change in files.items():
        path = place / {"weights": WEIGHTS, "config": CONFIG, "processor": PROCESSOR}[name]
        if change is None:
            path.unlink()
        elif callable(change):
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        else:
            path.write_bytes(change)
    return place


def loaded(**files: Any) -> Callable[[Path], Any]:
    """Loads it, and gives its means and deviations."""

    def load(place: Path) -> Any:
        adapter = load_adapter(str(saved(place, **files)))
        return [round(x, 4) for x in torch.stack([adapter.image_mean, adapter.image_std]).flatten().tolist()]

    return load


def with_(**changes: Any) -> Callable[[dict], dict]:
    return lambda content: content | changes


def without(name: str) -> Callable[[dict], dict]:
    return lambda content: {key: kept for key, kept in content.items() if key != name}


def cut(place: Path) -> Path:
    whole = (saved(place) / WEIGHTS).read_bytes()
    (place / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    return place


HOLES = {str(index + (index == 7)): name for index, name in tiny.ID2LABEL.items()}
CROPPED = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
IMAGENET_255 = {"image_mean": [123.675, 116.28, 103.53], "image_std": [58.395, 57.12, 57.375]}
IMAGENET = r"^\[0\.485, 0\.456, 0\.406, 0\.229, 0\.224, 0\.225\]$"
NO_NUMBERS = "{} of its image processor is .*; it must be three numbers, for R, G and B"
MODELS: dict[str, Case] = {
    "weights cut": error(r"model\.safetensors: damaged \(.*Fetch it again", lambda place: load_adapter(str(cut(place)))),
    "weights empty": error(r"model\.safetensors: damaged", loaded(weights=b"")),
    "weights a pointer": error(r"model\.safetensors: a Git LFS pointer", loaded(weights=POINTER)),
    "weights a page": error(r"model\.safetensors: damaged", loaded(weights=b"<html>404</html>")),
    "weights missing": error("the model cannot be loaded. .*model.safetensors", loaded(weights=None)),
    "config no JSON": error("config.json' is not a valid JSON", loaded(config=b"{")),
    "config empty": error("config.json' is not a valid JSON", loaded(config=b"")),
    "config a list": error("the model cannot be loaded. .*config.json", loaded(config=b"[1]")),
    "config null": error("the model cannot be loaded", loaded(config=b"null")),
    "config missing": error("holds no model, for it has no config.json.*one of its checkpoints", loaded(config=None)),
    "config without type": error("Should have a `model_type` key", loaded(config=without("model_type"))),
    "config of an unknown type": error("model type `no_such`", loaded(config=with_(model_type="no_such"))),
    "config of a language model": error(
        "is a bert model, for which transformers has no segmentation class|the model cannot be loaded",
        loaded(config=lambda _: {"model_type": "bert"}),
    ),
    "config of other widths": error("config.json and the weights disagree", loaded(config=with_(hidden_sizes=[8, 8, 16, 32]))),
    "config of too few widths": error("the model cannot be loaded", loaded(config=with_(hidden_sizes=[8]))),
    "config of more blocks": error("it lacks the weights of 22 parameters", loaded(config=with_(depths=[2, 1, 1, 1]))),
    "config of fewer blocks": ("warning", "no place for 22 of the stored weights, such as ", loaded(config=with_(depths=[0, 1, 1, 1]))),
    "config of other classes": error("disagree in shapes or in the number of classes", loaded(config=with_(id2label={"0": "a", "1": "b"}))),
    "config of one class": error("disagree in shapes or in the number of classes", loaded(config=with_(id2label={"0": "a"}))),
    "config of words as ids": error("the model cannot be loaded", loaded(config=with_(id2label={"sky": "sky"}))),
    "config with a hole": error(r"id2label .*8 classes, but none of the id 7: it has \[0, .*8\]. Number them", loaded(config=with_(id2label=HOLES))),
    "config of objects": error(
        r"id2label .*names class 0 .*it must be text",
        loaded(config=with_(id2label={str(index): {"name": name} for index, name in tiny.ID2LABEL.items()})),
    ),
    "config of four channels": error("disagree in shapes", loaded(config=with_(num_channels=4))),
    "four channels": error(
        "takes 4 channels, but pictures are RGB", lambda place: adapt(SegformerForSemanticSegmentation(with_channels(4)))
    ),
    "one class": error("has 1 class, which every pixel would get", lambda place: adapt(TimmSegmentationModel.from_backbone("resnet10t", num_labels=1))),
    "processor no JSON": error(r"preprocessor_config\.json: cannot be read as JSON", loaded(processor=b"{")),
    "processor in another encoding": error(r"preprocessor_config\.json: no UTF-8 text", loaded(processor=b"\xff")),
    "processor a list": error(r"preprocessor_config\.json: no image processor's", loaded(processor=b"[1]")),
    "processor null": error(r"preprocessor_config\.json: no image processor's", loaded(processor=b"null")),
    "processor of an unknown type": error(r"preprocessor_config\.json: .*cannot be loaded", loaded(processor=with_(image_processor_type="No"))),
    "processor of a number as type": error(r"preprocessor_config\.json: .*cannot be loaded", loaded(processor=with_(image_processor_type=3))),
    "processor missing": ("warning", "No image processor beside .*normalised as is usual for segformer", loaded(processor=None)),
    **{
        f"processor mean {given}": error(NO_NUMBERS.format("image_mean"), loaded(processor=with_(image_mean=given)))
        for given in ([0.5], 0.5, "x", None, [math.nan] * 3)
    },
    **{
        f"processor std {given}": error(NO_NUMBERS.format("image_std") + ", above 0", loaded(processor=with_(image_std=given)))
        for given in ([0, 0, 0], [-1, 1, 1], [math.nan] * 3, [0.5])
    },
    **{
        f"processor factor {given}": error("rescale_factor of its image processor is .*; it must be a number above 0", loaded(processor=with_(rescale_factor=given)))
        for given in (0, "x", None, -1)
    },
    "processor size": error("image processor cannot be loaded .*size", loaded(processor=with_(size="x"))),
    "processor as usual": ("result", IMAGENET, loaded()),
    "processor without rescaling": ("result", IMAGENET, loaded(processor=with_(do_rescale=False, **IMAGENET_255))),
    "processor of half the range": ("result", r"^\[0\.2425, 0\.228, 0\.203, 0\.1145, 0\.112, 0\.1125\]$", loaded(processor=with_(rescale_factor=1 / 127.5))),
    "processor without normalising": ("result", r"^\[0\.0, 0\.0, 0\.0, 1\.0, 1\.0, 1\.0\]$", loaded(processor=with_(do_normalize=False))),
    "processor without rescaling, of small means": ("warning", r"a channel's range of 1092 for 0\.\.255", loaded(processor=with_(do_rescale=False))),
    "processor with rescaling, of large means": ("warning", r"a channel's range of 0\.01\d+ for 0\.\.255", loaded(processor=with_(**IMAGENET_255))),
    "processor that flips channels": error(
        r"its MobileViTImageProcessor shows .*models of type segformer are shown .*channels RGB",
        loaded(processor=lambda _: {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True}),
    ),
    "processor that crops": ("warning", r"crops pictures to \{'height': 32, 'width': 32\}; here .*whole", loaded(processor=with_(**CROPPED))),
}  # fmt: skip


def with_channels(number: int) -> Any:
    config = tiny.tiny_segformer().config
    config.num_channels = number
    return config


# ---- Commands ----------------------------------------------------------------------------------------------------------


def command(module: Any, *argv: Any, make: Callable[[Path], Any] = lambda place: None) -> Callable[[Path], Any]:
    """Runs a command on what `make` makes in the folder {place}."""

    def start(place: Path) -> None:
        make(place)
        module.main([str(text).replace("{place}", str(place)) for text in argv])

    return start


DATA = ["--dataset_name", "synthetic", "--dataset_options", json.dumps(SCENES)]
SCORE = ["--student", "{place}", *DATA, *CPU, "--output_dir", "{place}/out"]
STUDENT = ["--student", json.dumps(TINY), *DATA, *CPU]
TEACHER = ["--teacher", json.dumps(TINY), "--output_dir", "{place}/out"]


def distilled(*argv: str, make: Callable[[Path], Any] = lambda place: None) -> Callable[[Path], Any]:
    """Starts a run that would train its teacher first; the test lets nothing be trained."""
    return command(distill, *STUDENT, *TEACHER, "--max_steps", "2", "--crop_size", "48", *argv, make=make)


def in_use(place: Path) -> None:
    """Starts a run in a folder that another thread is in."""
    entered, done = threading.Event(), threading.Event()

    def stay() -> None:
        with alone_in(place / "out", tiny.config(place)):
            entered.set()
            done.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    entered.wait()
    try:
        distilled()(place)
    finally:
        done.set()
        thread.join()


def worker_error(place: Path) -> None:
    """What torch makes of an error in a worker that loads data."""
    try:
        raise UserError("photo_5.png: cannot be decoded.")
    except UserError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    wrapped.reraise()


def tall_report(place: Path) -> Any:
    """Reports on pictures of 20000 x 2 pixels, and gives the scores that are left."""
    for split in ("train", "validation"):
        for kind, picture in (
            ("images", np.zeros((20000, 2, 3), np.uint8)),
            ("masks", np.zeros((20000, 2), np.uint8)),
        ):
            (place / split / kind).mkdir(parents=True)
            picture[::2] = 1
            Image.fromarray(picture).save(place / split / kind / "a.png")
    (place / "id2label.json").write_text(json.dumps(tiny.ID2LABEL))
    data = load_dense_dataset(place)
    run = tiny.trainer(place / "out", teacher=None, data=data, image_size=None)
    with (
        mock.patch.object(report, "measured_costs", return_value={}),
        mock.patch.object(report, "record_run"),
        mock.patch.object(report, "write_card"),
        mock.patch.object(report, "write_figures", side_effect=RuntimeError("a picture of 20000x2")),
    ):
        (place / "out").mkdir(exist_ok=True)
        scores = {"student": {"mean_iou": 0.5, "classes_averaged": 8}}
        report.write_report(run, {"student": run.distiller.student}, scores, data, "validation")
    return json.loads((place / "out" / "results.json").read_text())["student"]["mean_iou"]


SYNONYMS = {
    "synonyms nowhere": error("label_synonyms .*s.json: cannot be read", lambda place: read_synonyms(place / "s.json")),
    **{
        f"synonyms {text!r}": error("label_synonyms .*s.json: .*" + regex, lambda place, text=text: read_synonyms(written(place / "s.json", text)))
        for text, regex in {
            b"{": "is no JSON", b"[1]": "holds a list; expected", b"3": "holds a int", b'{"sky": "heaven"}': "'sky' has 'heaven'; expected",
            b'{"sky": [3]}': r"'sky' has \[3\]", b'{"sky": null}': "'sky' has None", b"\xff": "no UTF-8",
        }.items()
    },
    "synonyms of an unknown class": error(
        "label_synonyms: 'skyy' is no class of the data set. Did you mean 'sky'", lambda place: adapt(tiny.tiny_segformer()).match(tiny.ID2LABEL, {"skyy": ["sky"]})
    ),
    "synonyms twice": error(
        "the teacher's 'sky' is given to", lambda place: adapt(tiny.tiny_segformer()).match(tiny.ID2LABEL, {"sky": ["sky"], "road": ["sky"]})
    ),
}  # fmt: skip


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


COMMANDS: dict[str, Case] = {
    "evaluate damaged weights": error(r"model\.safetensors: damaged", command(evaluate, *SCORE, make=cut)),
    "evaluate an empty folder": error("holds no model, for it has no config.json", command(evaluate, *SCORE)),
    "evaluate with a hole": error("none of the id 7", command(evaluate, *SCORE, make=lambda place: saved(place, config=with_(id2label=HOLES)))),
    "evaluate a backbone": error("--student must be a trained model", command(evaluate, "--student", "{backbone: resnet10t}", *DATA, *CPU)),
    "evaluate nothing": error("name the model to evaluate", command(evaluate, *DATA, *CPU)),
    "evaluate with missing synonyms": error("cannot be read", command(evaluate, *SCORE, "--label_synonyms", "{place}/none.json", make=saved)),
    "evaluate into a file": error("output_dir is .*, which is a file", command(evaluate, *SCORE, "--output_dir", "{place}/config.json", make=saved)),
    "error of a loader's worker": error(r"^photo_5\.png: cannot be decoded\.$", worker_error),
    "figure that fails": ("warning", "no figures, because one failed: RuntimeError: a picture of 20000x2", tall_report),
    "scores of a figure that fails": ("result", r"^0\.5$", tall_report),
    "export damaged weights": error(r"model\.safetensors: damaged", command(export, "{place}", make=cut)),
    "export an empty folder": error("holds no model, for it has no config.json", command(export, "{place}")),
    "export of no size": error("--size is 0 x 64; height and width must be at least 1", command(export, "{place}", "--size", 0, 64, make=saved)),
    "push an empty folder": error("holds no finished student: model.safetensors is missing", command(push, "{place}", "me/x", "--dry_run")),
    "push without card": error("has no card README.md", command(push, "{place}", "me/x", "--dry_run", make=saved)),
    "push nowhere": error("is no folder", command(push, "{place}/none", "me/x", "--dry_run")),
    "check an empty folder": error("no data found", command(check, "{place}")),
    "check nowhere": error("does not exist", command(check, "{place}/none")),
    "check nothing": error("no data set: name one", command(check)),
    "resume from nowhere": error("which is no folder here and no Hub id", distilled("--resume_from_checkpoint", "{place}/none")),
    "resume from a file": error("which is no folder here and no Hub id", distilled("--resume_from_checkpoint", "{place}/f", make=lambda place: (place / "f").write_text(""))),
    "resume from an empty folder": error(r"trainer_state\.json: cannot be read", distilled("--resume_from_checkpoint", "{place}")),
    "two runs": error(rf"out is in use by process {os.getpid()} on ", in_use),
    "temperature before a teacher": error("temperature is 0", distilled("--losses", "{kd: {temperature: 0}}")),
    "weight before a teacher": error("weight of kd/kd is nan", distilled("--losses", "{kd: {weight: .nan}}")),
    "weights before a teacher": error("no term has a weight above 0", distilled("--losses", "{kd: {weight: 0}, cwd: {weight: 0}}")),
    "level before a teacher": error("stride_2", distilled("--losses", "{fitnet: {level: stride_2}}")),
    "teacher's arguments before a teacher": error("crop_size is 0", distilled("--teacher_training", "{crop_size: 0}")),
    "baseline and with_baseline": error("exclude each other", distilled("--baseline", "{place}", "--with_baseline", "true")),
    "baseline without teacher": error("a baseline is there to compare", command(distill, *STUDENT, "--with_baseline", "true", "--output_dir", "{place}/o")),
    "no student": error("no student: give --student", command(distill, *DATA, *CPU, "--output_dir", "{place}/o")),
    "no data": error("no data: give --dataset_name", command(distill, "--student", json.dumps(TINY), *CPU, "--output_dir", "{place}/o")),
    "no training images": error("--max_train_samples is 0", command(distill, *STUDENT, "--max_train_samples", "0", "--output_dir", "{place}/o")),
    "data options a list": error("dataset_options is", command(distill, "--dataset_name", "synthetic", "--dataset_options", "3", *STUDENT[:2], *CPU, "--output_dir", "{place}/o")),
}  # fmt: skip


# ---- Checkpoints -------------------------------------------------------------------------------------------------------


def state(**changes: Any) -> Callable[[Path], Any]:
    """Reads the state of a checkpoint."""

    def read(place: Path) -> Any:
        content = {"global_step": 2, "max_steps": 4, "log_history": [], "epoch": 1.0} | changes
        write_json(place / "trainer_state.json", content)
        return finished_state(place, read_state(place), 2)

    return read


CHECKPOINTS: dict[str, Case] = {
    "checkpoint without a state": error(r"trainer_state\.json: cannot be read", lambda place: read_state(place)),
    "checkpoint of a list": error(
        "global_step is None", lambda place: read_state(written(place / "trainer_state.json", b"[]").parent)
    ),
    "checkpoint of a longer run": error("has taken 2 steps of a run of 4, but this run has 2", state()),
    "checkpoint of a step that is a path": error("global_step is '../../x'", state(global_step="../../x")),
    "checkpoint of a huge step": error("steps of a run of 4, but this run has 2", state(global_step=10**9)),
    "checkpoint of no length": error("max_steps is None", state(max_steps=None)),
    "checkpoint with damaged weights": error(
        r"model\.safetensors: damaged .*Resume from another",
        lambda place: (written(place / WEIGHTS, b"x"), state()(place)),
    ),
    "checkpoint with a pointer": error(
        r"optimizer\.pt: a Git LFS pointer", lambda place: (written(place / "optimizer.pt", POINTER), state()(place))
    ),
}


# ---- Studies -----------------------------------------------------------------------------------------------------------


def grid(place: Path, **changes: Any) -> Path:
    keys = {
        "dataset_name": "synthetic",
        "dataset_options": SCENES,
        "student": TINY,
        "use_cpu": True,
        "report_to": "none",
    }
    keys |= {"runs": {"a": None}, "seeds": [1], "output_dir": str(place / "out")} | changes
    (place / "grid.yaml").write_text(yaml.safe_dump(keys))
    return place / "grid.yaml"


def planned(*argv: str, **changes: Any) -> Callable[[Path], Study]:
    return lambda place: read_study(grid(place, **changes), argv=argv)


def finished(content: bytes) -> Callable[[Path], Any]:
    """Asks for the result of a run whose study.json has this content."""

    def ask(place: Path) -> Any:
        run = read_study(grid(place)).runs[0]
        run.folder.mkdir(parents=True)
        (run.folder / "study.json").write_bytes(content)
        return run.result()

    return ask


def token_in_file(place: Path) -> str:
    """What a study with a token shows and would write."""
    found = read_study(grid(place, hub_token="hf_" + "a" * 30))
    return f"{found} {[run.arguments for run in found.runs]}"


def renewed_token(place: Path) -> Any:
    """A finished run, asked for again with another token."""
    run = read_study(grid(place, hub_token="hf_" + "a" * 30)).runs[0]
    run.folder.mkdir(parents=True)
    write_json(run.folder / "study.json", {"arguments": run.arguments, "scores": {"mean_iou": 0.5}})
    result = read_study(grid(place, hub_token="hf_" + "b" * 30)).runs[0].result()
    return result and result["scores"]


NO_NAME = r"grid\.yaml: a run is called .*; a name has letters"
STUDIES: dict[str, Case] = {
    **{f"study name {name!r}": error(NO_NAME, planned(runs={name: None})) for name in ("../../x", "", "/tmp/x", "a/b", ".x", "a" * 200, None, "a b")},
    "study name 3": ("result", "seed_1", lambda place: planned(runs={3: None})(place).runs[0].folder.name),
    "study names that differ in case": error("would have one folder; rename one", planned(runs={"Kd": None, "kd": None})),
    **{f"study run {own}": error("run 'a' is .*; expected what it changes", planned(runs={"a": own})) for own in (3, [1], "x")},
    **{f"study runs {runs}": error(r"grid\.yaml: runs is ", planned(runs=runs)) for runs in (None, [], "a", 3)},
    **{
        f"study seeds {seeds}": error(r"grid\.yaml: seeds is .*; expected a list of integers", planned(seeds=seeds))
        for seeds in (3, [], [-1], [1.5], ["1"], [2**40], [True])
    },
    "study seeds twice": error("are not distinct", planned(seeds=[1, 1])),
    **{f"study split {split}": error("split is .*; choose one of train, validation, test", planned(split=split)) for split in ("tset", 3, ["a"])},
    **{f"study reference {name}": error("reference is .*; choose one of a", planned(reference=name)) for name in ("b", 3, ["a"])},
    "study folder": error("output_dir is 3; it must be text", planned(output_dir=3)),
    "study of a run's seed": error("run 'a' sets seed, which the study decides", planned(runs={"a": {"seed": 3}})),
    "study of a run's unknown key": error("run 'a' has the unknown key 'max_step'", planned(runs={"a": {"max_step": 3}})),
    "study of a wrong value": error("run 'b': learning_rate is -1", planned(runs={"a": None, "b": {"learning_rate": -1}})),
    "study of a wrong model": error("run 'b': option head_channels of student is 'x'", planned(runs={"a": None, "b": {"student": {"backbone": "resnet10t", "options": {"head_channels": "x"}}}})),
    "study nowhere": error("none.yaml: no such file", lambda place: read_study(place / "none.yaml")),
    "study of an unknown key": error("unknown key 'sedes'. Did you mean 'seeds'", planned(sedes=[1])),
    "study on the command line": error("--seed belongs into the study file", lambda place: study.main([str(grid(place)), "--seed", "3"])),
    "study of no part": error("--part is '3/2'; expected", lambda place: study.main([str(grid(place)), "--part", "3/2"])),
    **{
        f"study.json {content!r}": error(r"study\.json: (holds no results|cannot be read)|holds a finished run with", finished(content))
        for content in (b"{", b"[]", b"{}", b'{"arguments": 3}', b'{"arguments": {}}')
    },
    "study with a token": ("result", r"^(?!.*hf_aaa)", token_in_file),
    "study with a renewed token": ("result", r"^\{'mean_iou': 0\.5\}$", renewed_token),
}  # fmt: skip


CASES: dict[str, Case] = RECIPES | VALUES | OPTIONS | MODELS | SYNONYMS | COMMANDS | CHECKPOINTS | STUDIES
