"""What the trainer asks of the Hub; the Hub itself is in tests/hub."""

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import TrainerControl, TrainerState

from hf_bcd import BCDTrainer
from hf_bcd.hub.errors import HubError
from hf_bcd.training.hub import HubCallback


# transformers turns the progress bars off and on around a run that pushes, whatever the environment says
pytestmark = pytest.mark.filterwarnings("ignore:Cannot enable progress bars:UserWarning")


@pytest.fixture
def pushes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every push, and of every repository made ready for one."""
    calls: list[dict[str, Any]] = []

    def prepare(repo_id: str, **options: Any) -> str:
        calls.append({"prepare": repo_id, **options})
        return f"me/{repo_id}"

    def push(folder: str, repo_id: str, **options: Any) -> str:
        calls.append({"push": repo_id, "card": (Path(folder) / "README.md").read_text(), **options})
        return "a commit"

    monkeypatch.setattr("hf_bcd.training.hub.prepare_repository", prepare)
    monkeypatch.setattr("hf_bcd.training.hub.push_folder", push)
    return calls


def test_a_run_prepares_its_repository_first_and_pushes_what_its_arguments_say(
    pushes: list[dict[str, Any]], tmp_path: Path
) -> None:
    options = {"push_to_hub": True, "hub_private_repo": True, "hub_revision": "v1", "hub_token": "secret"}
    run = tiny.trainer(tmp_path / "student", max_steps=1, **options)
    assert pushes == [{"prepare": "student", "private": True, "revision": "v1", "token": "secret"}]
    run.train()
    assert run.push_to_hub() == "a commit"
    later = run.push_to_hub("Another", blocking=False, revision="v2", private=False)
    assert isinstance(later, Future) and later.result() == "a commit"
    (tmp_path / "student" / "README.md").write_text("the report's card")
    run.has_card = True
    run.push_to_hub(commit_message="Report")
    assert pushes.pop()["card"] == "the report's card", "a finished card was replaced"
    cards = [call.pop("card") for call in pushes[1:]]
    assert all("knowledge-distillation" in card and "secret" not in card for card in cards)
    assert pushes[1:] == [
        {"push": "me/student", "private": True, "revision": "v1", "token": "secret", "commit_message": "End of training"},
        {"push": "me/student", "private": False, "revision": "v2", "token": "secret", "commit_message": "Another"},
    ]  # fmt: skip


def test_copies_that_a_killed_run_left_are_removed(pushes: list[dict[str, Any]], tmp_path: Path) -> None:
    left, outside = tmp_path / "x" / "_push" / "1", tmp_path / "outside"
    for folder in (left, outside):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    (left / "link").symlink_to(outside)
    HubCallback(tiny.config(tmp_path / "x")).prepare()
    assert not left.parent.exists() and (outside / "model.safetensors").exists()


def test_an_evaluation_needs_no_repository(pushes: list[dict[str, Any]], tmp_path: Path) -> None:
    args = tiny.config(tmp_path, push_to_hub=True)
    BCDTrainer(model=tiny.tiny_timm(), args=args, eval_dataset=tiny.scenes()["validation"])
    assert pushes == []


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [("end", []), ("every_save", [None, None]), ("checkpoint", ["last-checkpoint"] * 2),
     ("all_checkpoints", ["checkpoint-1", "checkpoint-2"])],
)  # fmt: skip
def test_every_strategy_pushes_checkpoints_to_its_place_and_survives_a_failure(
    strategy: str,
    folders: list[str | None],
    pushes: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pushed: list[tuple[int, str | None, set[str]]] = []

    def push(checkpoint: Path, path_in_repo: str | None, repo_id: str, *, step: int, **_: Any) -> None:
        pushed.append((step, path_in_repo, {path.name for path in checkpoint.iterdir()}))
        raise HubError("the Hub has a problem with secret")

    monkeypatch.setattr("hf_bcd.training.hub.push_checkpoint", push)
    args = tiny.config(
        tmp_path / "x", push_to_hub=True, hub_strategy=strategy, hub_always_push=True, hub_token="secret"
    )
    callback = HubCallback(args)
    for step in (1, 2):
        checkpoint = tmp_path / "x" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").touch()
        callback.on_save(args, TrainerState(global_step=step), TrainerControl())
        shutil.rmtree(checkpoint)  # as `save_total_limit` does
    callback.on_train_end()
    assert pushed == [(step, folder, {"model.safetensors"}) for step, folder in enumerate(folders, start=1)]
    warnings = [record.getMessage() for record in caplog.records if "was not pushed" in record.getMessage()]
    assert len(warnings) == len(folders)
    assert all("training goes on: the Hub has a problem with <token>" in warning for warning in warnings)
    assert not list((tmp_path / "x").glob("_push/*"))
