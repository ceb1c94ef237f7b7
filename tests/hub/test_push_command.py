"""`hf-bcd push` as a user starts it, against the local Hub; and which files it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub.server import MARKER_TOKEN, OTHER_TOKEN, HubServer
from hub.student_folder import LEFT_OUT, finished, finished_timm

from hf_bcd.hub.errors import HubError
from hf_bcd.hub.pushing import check_files, last_checkpoint, name_in_examples, push_folder, pushed_files


NATIVE = [
    "README.md", "config.json", "figures/comparison.png", "model.safetensors", "preprocessor_config.json", "results.json",
]  # fmt: skip
CODE = ["configuration_timm_segmentation.py", "heads.py", "modeling_timm_segmentation.py"]


def push(hub: HubServer, home: Path, *arguments: object, code: int = 0, **environment: str) -> str:
    """Runs the command, which must show no token, and returns what it printed."""
    variables = hub.environment(home) | environment
    command = [sys.executable, "-m", "hf_bcd", "push", *map(str, arguments)]
    done = subprocess.run(command, env=variables, cwd=home.parent, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output
    assert MARKER_TOKEN not in output and OTHER_TOKEN not in output
    return output


def titles(hub: HubServer, name: str) -> list[str]:
    return [commit.title for commit in hub.repos["model", name].commits.values()]


def test_a_finished_student_is_pushed_and_nothing_else(tmp_path: Path) -> None:
    assert pushed_files(finished(tmp_path / "native")) == NATIVE
    assert pushed_files(finished_timm(tmp_path / "timm")) == sorted(NATIVE + CODE)
    assert all((tmp_path / "native" / name).is_file() for name in LEFT_OUT)


def test_the_cards_examples_load_what_is_pushed() -> None:
    code = (
        '```python\npipeline("image-segmentation", model={0}, trust_remote_code=True)\nA.from_pretrained({0})\n```\n'
    )
    text = 'The model="x" in words stays.\n\n{}\n```bash\nrun model="x"\n```\n'
    first, branch, main = (text.format(code.format(name)) for name in ('"x"', '"me/y", revision="v2"', '"me/y"'))
    assert name_in_examples(first, "me/y") == name_in_examples(first, "me/y", "main") == main
    assert name_in_examples(first, "me/y", "v2") == name_in_examples(main, "me/y", "v2") == branch
    assert name_in_examples(branch, "me/y") == main


def test_sharded_weights_come_with_their_index(tmp_path: Path) -> None:
    folder = finished(tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    files = pushed_files(folder)
    assert {"model-00001-of-00001.safetensors", "model.safetensors.index.json"} < set(files)
    assert "model.safetensors" not in files


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "holds no finished student: model.safetensors is missing"),
        ("config.json", "holds no finished student: config.json is missing"),
        ("README.md", "has no card README.md"),
    ],
)
def test_an_unfinished_folder_is_refused(tmp_path: Path, missing: str, message: str) -> None:
    folder = finished(tmp_path / "x")
    (folder / missing).unlink()
    with pytest.raises(HubError, match=message):
        pushed_files(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="nowhere is no folder"):
        pushed_files(tmp_path / "nowhere")


def test_what_belongs_to_this_machine_alone_is_refused(tmp_path: Path) -> None:
    folder = finished(tmp_path / "x")
    files = {path: folder / path for path in pushed_files(folder)}
    check_files(files)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"backbone": {"weights": "/home/me/w.safetensors"}}))
    with pytest.raises(HubError, match=r"config.json: backbone.weights is the local path '/home/me/w.safetensors'"):
        check_files(files)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "results.json").write_text(json.dumps({"command": f"--hub_token {MARKER_TOKEN}"}))
    with pytest.raises(HubError, match="results.json holds an access token") as caught:
        check_files(files)
    assert MARKER_TOKEN not in str(caught.value)
    (folder / "results.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n# Card\n")
    with pytest.raises(HubError, match="the card's YAML is not valid"):
        check_files(files)


def test_the_last_checkpoint_of_a_repository_is_found() -> None:
    assert last_checkpoint(["README.md", "checkpoint-2/trainer_state.json", "checkpoint-10/trainer_state.json"]) == (
        "checkpoint-10"
    )
    assert last_checkpoint(["checkpoint-2/trainer_state.json", "last-checkpoint/trainer_state.json"]) == (
        "last-checkpoint"
    )
    assert last_checkpoint(["config.json", "checkpoint-x/trainer_state.json", "checkpoint-3/config.json"]) is None


@pytest.mark.slow
def test_a_dry_run_lists_the_files_and_sends_nothing(hub: HubServer, tmp_path: Path) -> None:
    folder = finished(tmp_path / "x")
    before = (folder / "README.md").read_text()
    printed = push(hub, tmp_path / "home", folder, "tester/y", "--revision", "v2", "--dry_run")
    for name in NATIVE:
        assert f"{(folder / name).stat().st_size:,}  {name}\n" in printed
    assert not any(name in printed for name in LEFT_OUT)
    assert "pipeline_tag: image-segmentation" in printed and "# A student" in printed
    assert 'model="tester/y", revision="v2")' in printed and (folder / "README.md").read_text() == before
    assert hub.requests == [] and hub.repos == {}


@pytest.mark.slow
def test_pushing_again_overwrites(hub: HubServer, tmp_path: Path) -> None:
    folder, home = finished(tmp_path / "x"), tmp_path / "home"
    assert f"{hub.url}/tester/x/commit/" in push(hub, home, folder, "x")  # a bare name belongs to the user
    assert sorted(hub.files("tester/x")) == NATIVE
    assert all(content == (folder / name).read_bytes() for name, content in hub.files("tester/x").items())
    push(hub, home, folder, "tester/x")
    assert titles(hub, "tester/x") == ["initial commit", "Upload student"], "nothing changed, so nothing to commit"
    (folder / "README.md").write_text((folder / "README.md").read_text() + "better\n")
    push(hub, home, folder, "tester/x", "--commit_message", "Better card")
    assert hub.files("tester/x")["README.md"].endswith(b"better\n")
    assert titles(hub, "tester/x") == ["initial commit", "Upload student", "Better card"]
    assert list(hub.repos) == [("model", "tester/x")]


@pytest.mark.slow
def test_a_private_repository_and_a_branch(hub: HubServer, tmp_path: Path) -> None:
    folder, home = finished(tmp_path / "x"), tmp_path / "home"
    push(hub, home, folder, "tester/x", "--private", "--revision", "v2")
    assert hub.repos["model", "tester/x"].private
    assert sorted(hub.files("tester/x", "v2")) == NATIVE and hub.files("tester/x") == {}
    push(hub, home, folder, "tester/x", "--private", "--revision", "v2")
    assert 'model="tester/x", revision="v2")' in hub.files("tester/x", "v2")["README.md"].decode()

    hub.add_repo("tester/open")
    printed = push(hub, home, folder, "tester/open", "--private", code=1)
    assert "tester/open exists and is public, which --private does not change" in printed
    assert hub.files("tester/open") == {}


def test_nothing_is_pushed_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"nothing can be pushed while HF_HUB_OFFLINE is set; unset it.*hf-bcd push"):
        push_folder(finished(tmp_path / "x"), "tester/x")


@pytest.mark.slow
def test_a_reader_is_told_before_anything_is_sent(hub: HubServer, tmp_path: Path) -> None:
    folder, home = finished(tmp_path / "x"), tmp_path / "home"
    hub.add_repo("tester/x")
    printed = push(hub, home, folder, "tester/x", code=1, HF_TOKEN=OTHER_TOKEN)
    assert "no permission for this (HTTP 403" in printed and "pushing needs one with write access" in printed
    assert not any(request.method == "PUT" or "commit" in request.path for request in hub.requests)
