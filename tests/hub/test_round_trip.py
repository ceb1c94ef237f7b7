"""From a data set and a teacher on the Hub to a student there that runs where hf_bcd is not installed."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hub.server import MARKER_TOKEN, HubServer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hf_bcd.adapters.loading import load_model
from hf_bcd.data.synthetic.scenes import SyntheticScenes


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
DISTILL = ROOT / "scripts" / "distill.py"
SIZES = [(48, 64), (37, 57)]
SHORT = [
    "--crop_size", "48", "--per_device_train_batch_size", "2", "--calibration_images", "4", "--max_steps", "4",
    "--learning_rate", "1e-4", "--dataloader_num_workers", "0", "--logging_steps", "1", "--eval_strategy", "no",
    "--disable_tqdm", "true",
]  # fmt: skip
STUDENTS = ("native", "timm")

# somebody else's environment
USE = """
import re, sys
from importlib.util import find_spec
from pathlib import Path

assert find_spec("hf_bcd") is None, "this environment was meant to lack hf_bcd"
import numpy as np
from huggingface_hub import hf_hub_download
from transformers import AutoModelForSemanticSegmentation, pipeline

for repo, revision in (("tester/native", None), ("tester/timm", "v1")):
    segment = pipeline("image-segmentation", repo, revision=revision, trust_remote_code=revision is not None)
    for path in sorted(Path("pictures").glob("*.png")):
        results = segment(str(path))
        masks = np.stack([np.asarray(result["mask"]) > 0 for result in results])
        assert (masks.sum(0) == 1).all(), "masks overlap or leave gaps"
        ids = np.array([segment.model.config.label2id[result["label"]] for result in results])
        np.save(f"{repo.split('/')[1]}-{path.stem}.npy", ids[masks.argmax(0)])

    card = Path(hf_hub_download(repo, "README.md", revision=revision)).read_text()
    blocks = re.findall(r"(?ms)^```python$(.*?)^```$", card)
    assert len(blocks) == 2
    for block in blocks:  # as a reader copies them
        exec(block, {})

segment.model.save_pretrained("saved-again")
AutoModelForSemanticSegmentation.from_pretrained("saved-again", trust_remote_code=True)
"""

# several command lines in one process, because each process spends seconds on imports; it ends as the last of them does
TRY = """
import json, os, sys
from hf_bcd.commands import run
from hf_bcd.commands import distill

token = os.environ.pop("HF_TOKEN", "")
*tried, last = json.loads(sys.argv[1])
for argv, signed_in in tried:
    os.environ |= {"HF_TOKEN": token} if signed_in else {}
    try:
        run(lambda: distill.main(argv))
        print(json.dumps("went through"))
    except SystemExit as end:
        print(json.dumps(str(end)))
    os.environ.pop("HF_TOKEN", None)
os.environ |= {"HF_TOKEN": token} if last[1] else {}
run(lambda: distill.main(last[0]))
"""


class World:
    """The Hub, a user's folder, and what the user has run in it."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        self.output = ""

    def run(
        self, *command: object, token: str | None = MARKER_TOKEN, code: int = 0, home: str = "home", **variables: str
    ) -> str:
        """Runs a command in the user's folder and returns what it printed."""
        environment = self.hub.environment(self.folder / home, token) | {"ACCELERATE_USE_CPU": "true"} | variables
        done = subprocess.run(
            [*map(str, command)], env=environment, cwd=self.folder, capture_output=True, text=True, timeout=300
        )
        self.output += done.stdout + done.stderr
        assert done.returncode == code, done.stdout[-1500:] + done.stderr[-4000:]
        return done.stdout

    def arguments(self, student: str, output_dir: str, *more: str) -> list[str]:
        data = ["--dataset_name", "tester/scenes", "--id2label", "id2label.json", "--teacher", "tester/teacher"]
        return ["--student", f"tester/{student}-start", *data, *SHORT, "--output_dir", output_dir, *more]

    def distill(self, student: str, output_dir: str, *more: str, **options: object) -> str:
        launcher = options.pop("launcher", (sys.executable,))
        return self.run(*launcher, DISTILL, *self.arguments(student, output_dir, *more), **options)

    def try_all(self, command_lines: list[tuple[list[str], bool]], **options: object) -> list[str]:
        """How command lines end, with or without a token, in one process; the last one with an error."""
        before = len(self.output)
        lines = self.run(sys.executable, "-c", TRY, json.dumps(command_lines), code=1, **options).splitlines()
        ends = [json.loads(line) for line in lines if line.startswith('"')]
        assert len(ends) == len(command_lines) - 1
        return [*ends, self.output[before:].strip().splitlines()[-1]]


def balanced(model: PreTrainedModel) -> PreTrainedModel:
    """Every class gets logits of mean 0 and deviation 1; otherwise one of them would win everywhere."""
    scene = SyntheticScenes(size=(48, 64), num_images=1, seed=1)[0]
    pixel_values = (torch.from_numpy(np.array(scene["image"])).permute(2, 0, 1)[None] / 255 - 0.45) / 0.225
    classifier = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        for _ in range(50):  # so that training does not move the statistics of batch norms far
            model.train()(pixel_values)
        deviation, mean = torch.std_mean(model.eval()(pixel_values).logits, dim=(0, 2, 3))
        classifier.weight.div_(deviation[:, None, None, None])
        assert classifier.bias is not None
        classifier.bias.sub_(mean).div_(deviation)
    return model


def prepare(hub: HubServer, folder: Path) -> None:
    """What its owner has put on the Hub beforehand: data, a teacher, and students to start from."""

    def put(name: str, place: Path, kind: str = "model") -> None:
        files = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        hub.add_repo(f"tester/{name}", files, kind=kind)

    data = tiny.parquet_scenes(folder / "owner" / "scenes", [8], validation=3)
    (data / "id2label.json").rename(folder / "id2label.json")
    put("scenes", data, "dataset")
    teacher = tiny.tiny_segformer(seed=1, width=16)
    students = {"native-start": balanced(tiny.tiny_segformer()), "timm-start": balanced(tiny.tiny_timm())}
    for name, model in {"teacher": teacher, **students}.items():
        model.save_pretrained(folder / "owner" / name)
        put(name, folder / "owner" / name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub with a data set, a teacher and two students distilled from it, pushed by the runs themselves."""
    folder = tmp_path_factory.mktemp("world")
    with HubServer(folder / "hub") as hub:
        world = World(hub, folder)
        prepare(hub, folder)
        every_push = ("--hub_always_push", "true")  # also where the one before is not done yet
        world.distill(
            "native", "runs/native", "--push_to_hub", "--hub_model_id", "tester/native", "--save_strategy", "steps",
            "--save_steps", "2", "--hub_strategy", "checkpoint", *every_push,
        )  # fmt: skip
        two_processes = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
        # the token comes by the argument alone, and must not be stored with the others
        world.distill(
            "timm", "runs/timm", "--push_to_hub", "--hub_model_id", "timm", "--hub_private_repo", "true",
            "--hub_revision", "v1", "--hub_token", MARKER_TOKEN, "--save_strategy", "steps", "--save_steps", "2",
            "--hub_strategy", "all_checkpoints", *every_push, token=None, launcher=two_processes,
        )  # fmt: skip
        yield world


# error -> arguments, in an empty place of a user who has not signed in
MISTAKES = {
    "data set owner/gated-data is gated: accept its terms on": ["--dataset_name", "owner/gated-data"],
    "data set owner/none does not exist on": ["--dataset_name", "owner/none"],
    "data set tester/scenes has no revision 'v9'": ["--dataset_revision", "v9"],
    "model owner/gated is gated: accept its terms on": ["--teacher", "owner/gated"],
    "model owner/private does not exist on": ["--teacher", "owner/private"],
    "model owner/none does not exist on": ["--teacher", "owner/none"],
    "model tester/teacher has no revision 'v9'": ["--teacher.revision", "v9"],
    "model owner/code only runs with the code in its own repository": ["--teacher", "owner/code"],
    "model tester/new: the Hub wants a valid access token": ["--push_to_hub", "--hub_model_id", "tester/new"],
    "model owner/none does not exist on http": ["--resume_from_checkpoint", "owner/none"],
    "model tester/teacher holds no checkpoint": ["--resume_from_checkpoint", "tester/teacher"],
}


@dataclass
class Later:
    """How the command lines of one process have ended after `world`, by their purpose, and what it has printed."""

    ends: dict[str, str]
    printed: str


@pytest.fixture(scope="module")
def later(world: World) -> Later:
    """A run that is resumed from the Hub, one whose last push fails, and everybody's mistakes."""
    hub = world.hub
    hub.add_repo("owner/gated-data", hub.files("tester/scenes", kind="dataset"), kind="dataset", gated=True)
    hub.add_repo("owner/gated", hub.files("tester/teacher"), gated=True)
    hub.add_repo("owner/private", hub.files("tester/teacher"), private=True)
    code = json.loads(hub.files("tester/timm", "v1")["config.json"]) | {"model_type": "foreign"}
    hub.add_repo("owner/code", {**hub.files("tester/timm", "v1"), "config.json": json.dumps(code).encode()})
    hub.fail(500, "/api/models/tester/late/commit/")
    commits = {commit.title: commit for commit in hub.repos["model", "tester/native"].commits.values()}
    halfway = commits["Training in progress, step 2"].sha
    quiet, before = ("--report_to", "none"), len(world.output)
    lines = {
        name: (world.arguments("native", "runs/never", *quiet, *arguments), False)
        for name, arguments in MISTAKES.items()
    }
    lines["resumed"] = (
        world.arguments(
            "native",
            "runs/resumed",
            "--resume_from_checkpoint",
            f"tester/native@{halfway}",
            "--save_strategy",
            "no",
            *quiet,
        ),
        True,
    )
    lines["late"] = (
        world.arguments(
            "native", "runs/late", "--push_to_hub", "--hub_model_id", "tester/late", "--max_steps", "2", "--save_strategy",
            "steps", "--save_steps", "1", "--hub_strategy", "every_save", *quiet,
        ),
        True,
    )  # fmt: skip
    ends = world.try_all(list(lines.values()))
    hub.clear_faults()
    return Later(dict(zip(lines, ends, strict=True)), world.output[before:])


def test_round_trip(world: World, elsewhere: Path) -> None:
    pictures = world.folder / "pictures"
    pictures.mkdir()
    scenes = [SyntheticScenes(size=size, num_images=1, seed=1)[0] for size in SIZES]
    for index, scene in enumerate(scenes):
        scene["image"].save(pictures / f"{index}.png")
    scenes[0]["image"].save(world.folder / "picture.jpg")  # the name in the cards' examples
    world.run(elsewhere, "-c", USE, home="elsewhere", PYTHONPATH="", OMP_NUM_THREADS=str(torch.get_num_threads()))

    for name in STUDENTS:
        run = tiny.trainer(world.folder / "again", load_model(str(world.folder / "runs" / name)), None)
        transform, student = run.task.eval_transform(run.processing_class), run.distiller.student.eval()
        for index, scene in enumerate(scenes):
            pixel_values = transform(scene)["pixel_values"][None]
            predicted = student.predict(pixel_values, [scene["label"].shape])[0].numpy()
            assert len(np.unique(predicted)) >= 3, "too few classes for the comparison to tell anything"
            np.testing.assert_array_equal(np.load(world.folder / f"{name}-{index}.npy"), predicted)

    again = world.folder / "saved-again"
    assert json.loads((again / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_timm_segmentation.TimmSegmentationConfig",
        "AutoModelForSemanticSegmentation": "modeling_timm_segmentation.TimmSegmentationModel",
    }
    assert (again / "heads.py").read_bytes() == world.hub.files("tester/timm", "v1")["heads.py"]


def test_a_pushed_student_is_complete_and_names_nothing_of_this_machine(world: World) -> None:
    native, timm = world.hub.files("tester/native"), world.hub.files("tester/timm", "v1")
    shared = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "results.json"}
    assert shared <= native.keys() and shared <= timm.keys()
    assert any(name.startswith("figures/") for name in timm)
    assert {name for name in timm if name.endswith(".py") and "/" not in name} == {
        "configuration_timm_segmentation.py", "heads.py", "modeling_timm_segmentation.py", "segmentation_model.py",
        "timm_backbone.py",
    }  # fmt: skip
    assert not any(name.endswith(".py") for name in native)
    assert world.hub.repos["model", "tester/timm"].private and world.hub.files("tester/timm") == {}
    commit = world.hub.repos["dataset", "tester/scenes"].refs["refs/heads/main"]
    for files in (native, timm):
        assert json.loads(files["results.json"])["protocol"]["dataset_revision"] == commit
        assert commit in files["README.md"].decode()
        config = json.loads(files["config.json"])
        assert str(world.folder) not in files["config.json"].decode()
        assert not re.search(r'"(/|runs/)', files["config.json"].decode())
        if "auto_map" in config:
            assert all("--" not in value for value in config["auto_map"].values())
        assert not any("training_args" in name for name in files)


def test_two_processes_push_once_and_each_ones_random_state(world: World) -> None:
    commits = {commit.title: commit for commit in world.hub.repos["model", "tester/timm"].commits.values()}
    assert list(commits) == [
        "initial commit", "Training in progress, step 2", "Training in progress, step 4", "End of training",
    ]  # fmt: skip
    end = set(commits["End of training"].files)
    assert {f"checkpoint-{step}/rng_state_{rank}.pth" for step in (2, 4) for rank in (0, 1)} <= end


def test_the_token_is_nowhere(world: World) -> None:
    assert MARKER_TOKEN not in world.output
    written = [path for path in world.folder.rglob("*") if path.is_file()]
    assert any("events.out.tfevents" in path.name for path in written)
    holding = [path for path in written if MARKER_TOKEN.encode() in path.read_bytes()]
    assert holding == []


def test_checkpoints_are_pushed_while_training_and_resumed_exactly(world: World, later: Later) -> None:
    commits = {commit.title: commit for commit in world.hub.repos["model", "tester/native"].commits.values()}
    assert list(commits) == [
        "initial commit", "Training in progress, step 2", "Training in progress, step 4", "End of training",
    ]  # fmt: skip
    halfway = commits["Training in progress, step 2"]
    assert {"model.safetensors", "last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= set(
        halfway.files
    )
    assert not any("training_args" in name for name in halfway.files)

    assert later.ends["resumed"] == "went through"
    assert (world.folder / "runs/resumed/checkpoint-2").is_dir()
    whole, resumed = (load_file(world.folder / "runs" / name / "model.safetensors") for name in ("native", "resumed"))
    start = load_file(world.folder / "runs/resumed/checkpoint-2/model.safetensors")
    assert any((start[name] != whole[name]).any() for name in whole), "the last two steps changed nothing"
    assert all((resumed[name] == whole[name]).all() for name in whole)


def test_a_second_run_needs_no_network(world: World) -> None:
    requests = len(world.hub.requests)
    world.distill("native", "runs/offline", "--max_steps", "1", "--report_to", "none", HF_HUB_OFFLINE="1")
    assert (world.folder / "runs/offline/model.safetensors").is_file()
    assert len(world.hub.requests) == requests


def test_mistakes_are_told_in_one_line_before_training(world: World, later: Later) -> None:
    for message in MISTAKES:
        end = later.ends[message]
        assert end.startswith(f"error: {message}") and "\n" not in end
    assert not (world.folder / "runs/never/model.safetensors").exists()
    assert ("model", "tester/new") not in world.hub.repos


def test_no_network_is_told_before_training(world: World) -> None:
    local = ["--dataset_name", "synthetic", "--dataset_options", "{size: [48, 64], num_images: {train: 4}}"]
    cases = {"data set tester/scenes": ["--dataset_name", "tester/scenes"], "model tester/native-start": local}
    common = [*SHORT, "--student", "tester/native-start", "--report_to", "none", "--output_dir", "runs/never"]
    lines = [([*common, *arguments], True) for arguments in cases.values()]
    ends = world.try_all(lines, home="unplugged", HF_ENDPOINT="http://127.0.0.1:9")
    for end, message in zip(ends, cases, strict=True):
        assert end.startswith(f"error: {message}") and "http://127.0.0.1:9" in end and "\n" not in end


def test_a_push_that_fails_at_the_end_of_training_keeps_the_student(world: World, later: Later) -> None:
    expected = "checkpoint-1 was not pushed, and training goes on: model tester/late: the Hub has a problem"
    assert expected in later.printed
    error = later.ends["late"]
    assert error.startswith("error: model tester/late: the Hub has a problem (HTTP 500")
    assert error.endswith("The student lies in runs/late; try again with: hf-bcd push runs/late tester/late")
    for name in ("model.safetensors", "README.md", "results.json"):
        assert (world.folder / "runs/late" / name).is_file()
    assert not list((world.folder / "runs/late").glob("_push/*"))

    world.run(sys.executable, "-m", "hf_bcd", "push", "runs/late", "tester/late")
    assert (
        world.hub.files("tester/late")["model.safetensors"]
        == (world.folder / "runs/late/model.safetensors").read_bytes()
    )
    assert [commit.title for commit in world.hub.repos["model", "tester/late"].commits.values()] == [
        "initial commit", "Upload student",
    ]  # fmt: skip
