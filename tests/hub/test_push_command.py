"""`hf-bcd push` as a user starts it, against the local Hub; and which files it takes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub.server import MARKER_TOKEN, OTHER_TOKEN, HubServer
from hub.student_folder import LEFT_OUT, finished, finished_timm

from hf_bcd.commands.push import show
from hf_bcd.hub.errors import HubError
from hf_bcd.hub.pushing import fetch_checkpoint, name_in_examples, push_checkpoint, pushed_checkpoint, student_files


Push = Callable[..., tuple[str, str]]
NATIVE = [
    "README.md", "config.json", "figures/comparison.png", "model.safetensors", "preprocessor_config.json", "results.json",
]  # fmt: skip
CODE = [
    "configuration_timm_segmentation.py",
    "heads.py",
    "modeling_timm_segmentation.py",
    "segmentation_model.py",
    "timm_backbone.py",
]


def titles(hub: HubServer, name: str) -> list[str]:
    return [commit.title for commit in hub.repos["model", name].commits.values()]


def test_a_finished_student_is_pushed_and_nothing_else(tmp_path: Path) -> None:
    assert list(student_files(finished(tmp_path / "native"))) == NATIVE
    folder = finished_timm(tmp_path / "timm")
    assert list(student_files(folder)) == sorted(NATIVE + CODE)
    assert all((folder / name).is_file() for name in LEFT_OUT)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")  # sharded, with an index
    (folder / "model.safetensors.index.json").write_text("{}")
    sharded = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"}
    assert set(student_files(folder)) == {*NATIVE, *CODE, *sharded} - {"model.safetensors"}


def test_the_cards_examples_load_what_is_pushed() -> None:
    code = (
        '```python\npipeline("image-segmentation", model={0}, trust_remote_code=True)\nA.from_pretrained({0})\n```\n'
    )
    text = 'The model="x" in words stays.\n\n{}\n```bash\nrun model="x"\n```\n'
    first, branch, main = (text.format(code.format(name)) for name in ('"x"', '"me/y", revision="v2"', '"me/y"'))
    assert name_in_examples(first, "me/y") == name_in_examples(first, "me/y", "main") == main
    assert name_in_examples(first, "me/y", "v2") == name_in_examples(main, "me/y", "v2") == branch
    assert name_in_examples(branch, "me/y") == main


def change_config(folder: Path, text: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | json.loads(text)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "x is no folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no finished student: model.safetensors is missing"),
        (lambda folder: (folder / "config.json").unlink(), "no finished student: config.json is missing"),
        (lambda folder: (folder / "README.md").unlink(), "has no card README.md"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json holds no mapping"),
        (
            lambda folder: change_config(folder, '{"id2label": {"0": "/a"}, "x": [{"weights": "/home/me/w.pt"}]}'),
            "config.json: x.0.weights is the local path '/home/me/w.pt'",
        ),
        (
            lambda folder: (folder / "results.json").write_text(f'{{"command": "--hub_token {MARKER_TOKEN}"}}'),
            "results.json holds an access token",
        ),
        (
            lambda folder: (folder / "heads.py").write_text("SECRET = 'of-another-form'"),
            "heads.py holds an access token",
        ),
        (
            lambda folder: (folder / "figures" / "notes.txt").write_text(f"token {MARKER_TOKEN}"),
            "notes.txt holds an access token",
        ),
        (
            lambda folder: (folder / "figures" / "table").write_text(f"from {folder.resolve()}/checkpoint-2"),
            "table holds the local path '.*/x/checkpoint-2'",
        ),
        (
            lambda folder: (folder / "results.json").write_text(json.dumps({"data": str(Path.home() / "data")})),
            "results.json holds the local path",
        ),
        (
            lambda folder: (folder / "figures" / "passwords.png").symlink_to("/etc/hostname"),
            "passwords.png is a link that leads out of",
        ),
        (
            lambda folder: (folder / "README.md").write_text("---\nlicense: [mit\n---\n# Card\n"),
            "the card's YAML is not valid",
        ),
    ],
)
def test_what_is_unfinished_or_private_is_refused(
    change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folder = finished_timm(tmp_path / "x")
    change(folder)
    with pytest.raises(HubError, match=message) as caught:
        student_files(folder, "of-another-form")
    assert MARKER_TOKEN not in str(caught.value) and "\n" not in str(caught.value)


def test_a_link_within_the_folder_is_pushed_and_a_linked_folder_is_not(tmp_path: Path) -> None:
    folder = finished(tmp_path / "x")
    (folder / "figures" / "again.png").symlink_to(folder / "figures" / "comparison.png")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.txt").write_text("x")
    (folder / "figures" / "linked").symlink_to(tmp_path / "private")
    assert set(student_files(folder)) == {*NATIVE, "figures/again.png"}


def test_a_pushed_checkpoint_names_its_best_one_without_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Path | bytes] = {}
    monkeypatch.setattr("hf_bcd.hub.pushing.commit_files", lambda files, *_, **__: sent.update(files))
    checkpoint = finished(tmp_path / "checkpoint-4")
    state = {"global_step": 4, "best_model_checkpoint": str(tmp_path / "checkpoint-2"), "epoch": 0.1}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    options: dict[str, Any] = {"revision": None, "token": None, "step": 4}
    push_checkpoint(checkpoint, "last-checkpoint", "me/x", **options)
    pushed = sent["last-checkpoint/trainer_state.json"]
    assert isinstance(pushed, bytes) and json.loads(pushed) == state | {"best_model_checkpoint": "checkpoint-2"}
    assert (checkpoint / "trainer_state.json").read_text() == json.dumps(state)
    assert isinstance(sent["last-checkpoint/optimizer.pt"], Path)
    for name, message in (("log.txt", "log.txt holds the local path"), ("link.pt", "link.pt is a link")):
        sent.clear()
        path = checkpoint / name
        path.symlink_to("/etc/hostname") if name == "link.pt" else path.write_text(f"{checkpoint.resolve()}/x")
        with pytest.raises(HubError, match=message):
            push_checkpoint(checkpoint, "last-checkpoint", "me/x", **options)
        assert not sent
        path.unlink()


@pytest.mark.parametrize("step", ["../../outside", "/tmp/outside", -1, 2.5, None, True, [1], {}])
def test_a_fetched_step_is_no_path(step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = tmp_path / "cache" / "last-checkpoint"
    fetched.mkdir(parents=True)
    (fetched / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    monkeypatch.setattr(
        "hf_bcd.hub.pushing.HfApi.list_repo_files", lambda *_, **__: ["last-checkpoint/trainer_state.json"]
    )
    monkeypatch.setattr("hf_bcd.hub.pushing.HfApi.snapshot_download", lambda *_, **__: str(fetched.parent))
    out = tmp_path / "a" / "b" / "run"
    with pytest.raises(HubError, match="last-checkpoint/trainer_state.json: global_step is .*no number of steps"):
        fetch_checkpoint("a/stranger", out)
    assert not (tmp_path / "a").exists()
    (fetched / "trainer_state.json").write_text("[]")
    with pytest.raises(HubError, match="no state of a trainer"):
        fetch_checkpoint("a/stranger", out)
    (fetched / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    assert fetch_checkpoint("a/stranger", out) == str(out / "checkpoint-3")


def test_the_last_checkpoint_of_a_repository_is_found() -> None:
    assert pushed_checkpoint(["README.md", "checkpoint-2/trainer_state.json", "checkpoint-10/trainer_state.json"]) == (
        "checkpoint-10"
    )
    assert pushed_checkpoint(["checkpoint-2/trainer_state.json", "last-checkpoint/trainer_state.json"]) == (
        "last-checkpoint"
    )
    assert pushed_checkpoint(["config.json", "checkpoint-x/trainer_state.json", "checkpoint-3/config.json"]) is None


def test_a_dry_run_lists_the_files_and_sends_nothing(hub: HubServer, push: Push, tmp_path: Path) -> None:
    folder = finished(tmp_path / "x")
    before = (folder / "README.md").read_text()
    _, printed = push(folder, "tester/y", "--revision", "v2", "--dry_run")
    for name in NATIVE:
        assert f"{(folder / name).stat().st_size:,}  {name}\n" in printed
    assert not any(name in printed for name in LEFT_OUT)
    assert "pipeline_tag: image-segmentation" in printed and "# A student" in printed
    assert 'model="tester/y", revision="v2")' in printed and (folder / "README.md").read_text() == before
    assert hub.requests == [] and hub.repos == {}


@pytest.mark.parametrize("name", ["me/x/y", "bad name!"])
def test_a_dry_run_refuses_a_name_that_the_push_would_be_refused_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=f"'{name}' is neither a folder nor a Hub id"):
        show(finished(tmp_path / "x"), name, None)


def test_pushing_again_overwrites(hub: HubServer, push: Push, tmp_path: Path) -> None:
    folder = finished(tmp_path / "x")
    assert f"{hub.url}/tester/x/commit/" in push(folder, "x")[1]  # a bare name belongs to the user
    assert sorted(hub.files("tester/x")) == NATIVE
    assert all(content == (folder / name).read_bytes() for name, content in hub.files("tester/x").items())
    assert not push(folder, "tester/x")[0]
    assert titles(hub, "tester/x") == ["initial commit", "Upload student"], "nothing changed, so nothing to commit"
    (folder / "README.md").write_text((folder / "README.md").read_text() + "better\n")
    assert not push(folder, "tester/x", "--commit_message", "Better card")[0]
    assert hub.files("tester/x")["README.md"].endswith(b"better\n")
    assert titles(hub, "tester/x") == ["initial commit", "Upload student", "Better card"]
    assert list(hub.repos) == [("model", "tester/x")]


def test_a_private_repository_and_a_branch(hub: HubServer, push: Push, tmp_path: Path) -> None:
    folder = finished(tmp_path / "x")
    for _ in range(2):
        assert not push(folder, "tester/x", "--private", "--revision", "v2")[0]
        assert hub.repos["model", "tester/x"].private
        assert sorted(hub.files("tester/x", "v2")) == NATIVE and hub.files("tester/x") == {}
    assert 'model="tester/x", revision="v2")' in hub.files("tester/x", "v2")["README.md"].decode()

    hub.add_repo("tester/open")
    error, _ = push(folder, "tester/open", "--private")
    assert "tester/open exists and is public, which --private does not change" in error
    assert hub.files("tester/open") == {}


def test_nothing_is_pushed_offline(push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error, _ = push(finished(tmp_path / "x"), "tester/x")
    assert re.search("nothing can be pushed while HF_HUB_OFFLINE is set; unset it.*hf-bcd push", error)


def test_a_reader_is_told_before_anything_is_sent(
    hub: HubServer, push: Push, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("tester/x")
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    error, _ = push(finished(tmp_path / "x"), "tester/x")
    assert "no permission for this (HTTP 403" in error and "pushing needs one with write access" in error
    assert not any(request.method == "PUT" or "commit" in request.path for request in hub.requests)
