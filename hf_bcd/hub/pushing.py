"""Pushing a finished student, or a checkpoint to resume from, to the Hub: which files, and what if it fails."""

import json
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.utils import get_session, hf_raise_for_status

from ..export.onnx_folder import onnx_files
from ..utils.text import redacted, shortened
from .errors import HubError, cause_of, explained


LOCAL_PATH = re.compile(r"^(/|~|\.{1,2}/|[A-Za-z]:\\)")
# seconds: a connection that stays silent for longer is dead, and nobody waits longer in silence for a rate limit
SILENCE, RATE_LIMIT_WAIT = 120, 30
STUDENT_FILES = (
    "config.json",
    "preprocessor_config.json",
    "README.md",
    "results.json",
    "model.safetensors.index.json",
)
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
TEXT_FILES = (".json", ".md", ".py")
NOT_TO_RESUME = ("training_args.bin",)  # pickled
PYTHON_BLOCK = re.compile(r"^```python\n.*?^```$", re.DOTALL | re.MULTILINE)
LOADED_NAME = re.compile(r'(\bmodel=|\.from_pretrained\(|\bhf_hub_download\()"[^"\n]*"(, revision="[^"\n]*")?')


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload student",
) -> CommitInfo:
    """Pushes the finished student in `folder` in one commit; the repository and the branch are created if missing.

    Args:
        folder: output folder of a run.
        repo_id: `user/name`; a bare name belongs to the token's user.
        private: visibility of a repository that is created now; True also refuses one that exists and is public.
        revision: branch to push to.
        token: access token; the stored one by default.
        commit_message: first line of the commit.

    Raises:
        HubError: if the folder holds no finished student, or the push fails; names the command to try again.
    """
    folder = Path(folder)
    files = {path: folder / path for path in pushed_files(folder)}
    check_files(files, token)
    again = ["hf-bcd", "push", str(folder), repo_id, *(["--private"] if private else [])]
    again += ["--revision", revision] if revision else []
    with _retry_named(repo_id, revision, folder, shlex.join(again), token):
        repo_id = prepare_repository(repo_id, private=private, revision=revision, token=token)
        card = name_in_examples((folder / "README.md").read_text(), repo_id, revision)
        sent: dict[str, Path | bytes] = {**files, "README.md": card.encode()}
        commit = commit_files(sent, repo_id, revision=revision, token=token, commit_message=commit_message)
        (folder / "README.md").write_text(card)
        return commit


def name_in_examples(card: str, repo_id: str, revision: str | None = None) -> str:
    """The card with examples that load the student from where it is pushed to, which is known only then.

    Args:
        card: contents of README.md.
        repo_id: full name on the Hub.
        revision: branch that is pushed to.
    """
    loaded = json.dumps(repo_id) + (f", revision={json.dumps(revision)}" if revision not in (None, "main") else "")
    return PYTHON_BLOCK.sub(lambda block: LOADED_NAME.sub(lambda name: name[1] + loaded, block[0]), card)


@contextmanager
def _retry_named(repo_id: str, revision: str | None, folder: Path, command: str, token: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, the user must learn where the student lies
        cause = str(error) if isinstance(error, HubError) else cause_of(error, "model", repo_id, revision)
        cause = cause or f"model {repo_id}: the push failed ({type(error).__name__}: {shortened(error)})."
        message = f"{cause} The student lies in {folder}; try again with: {command}"
        raise HubError(redacted(message, token=token)) from None


def prepare_repository(
    repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Creates the repository and the branch where missing, and checks that they may be written; returns the full id.

    Raises:
        HubError: if that is not possible, or `private` is true and the repository is public.
    """
    if constants.is_offline_mode():
        raise HubError(f"model {repo_id}: nothing can be pushed while HF_HUB_OFFLINE is set; unset it.")
    api = HfApi(token=token)
    with explained("model", repo_id, revision=revision), _bounded_waiting():
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)  # `create_repo` is content with one that exists, even for a reader
        if private and not api.model_info(repo_id).private:
            raise HubError(
                f"model {repo_id} exists and is public, which --private does not change; make it private on "
                f"{constants.ENDPOINT}/{repo_id}/settings, or choose another name."
            )
        if revision not in (None, "main") and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def commit_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str,
) -> CommitInfo:
    """Uploads files or contents, by path in the repository, in one commit; unchanged ones are not sent again.

    Raises:
        HubError: if the Hub does not take them.
    """
    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files.items()]
    with explained("model", repo_id, revision=revision), _bounded_waiting():
        # not `upload_folder`, which may split one push into several commits
        return HfApi(token=token).create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, num_threads=2
        )


@contextmanager
def _bounded_waiting() -> Iterator[None]:
    """Keeps the client from waiting for ever on a dead connection, and from obeying a long Retry-After in silence."""
    client = get_session()
    timeout, hooks = client.timeout, client.event_hooks
    client.timeout = SILENCE
    client.event_hooks = {**hooks, "response": [*hooks["response"], _refuse_long_waits]}
    try:
        yield
    finally:
        client.timeout, client.event_hooks = timeout, hooks


def _refuse_long_waits(response: Any) -> None:
    wait = response.headers.get("Retry-After", "")
    if response.status_code == 429 and wait.isdigit() and int(wait) > RATE_LIMIT_WAIT:
        response.read()
        hf_raise_for_status(response)


# ---- What is pushed --------------------------------------------------------------------------------------------------


def pushed_files(folder: str | Path) -> list[str]:
    """Paths of a finished student's files, relative to its folder: model, processor, code, card, results, figures, ONNX.

    Checkpoints, optimizer states, logs and unfinished files are left out.

    Raises:
        HubError: if the folder lacks a model or a card.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise HubError(f"{folder} is no folder; name the output folder of a finished run.")
    files = student_files(folder)
    if not (folder / "README.md").is_file():
        raise HubError(f"{folder} has no card README.md; a finished run of hf_bcd writes one.")
    return sorted(files + onnx_files(folder))


def student_files(folder: Path) -> list[str]:
    """Like `pushed_files`, of a folder or checkpoint that may lack a card."""
    weights = [path.name for pattern in WEIGHTS for path in folder.glob(pattern)]
    if not weights or not (folder / "config.json").is_file():
        missing = "model.safetensors" if not weights else "config.json"
        raise HubError(f"{folder} holds no finished student: {missing} is missing.")
    files = [*weights, *code_files(folder), *(name for name in STUDENT_FILES if (folder / name).is_file())]
    figures = [path.relative_to(folder).as_posix() for path in (folder / "figures").rglob("*") if path.is_file()]
    return sorted(files + [path for path in figures if not path.endswith(".part")])


def code_files(folder: Path) -> list[str]:
    """The Python files that `auto_map` of config.json names, and those that they import from beside them."""
    named = _read_config(folder / "config.json").get("auto_map", {}).values()
    modules, found = {str(value).split(".")[0] for value in named if "--" not in str(value)}, set()
    while modules:
        name = modules.pop()
        path = folder / f"{name}.py"
        if name not in found and path.is_file():
            found.add(name)
            modules |= set(re.findall(r"^\s*from \.(\w+) import", path.read_text(), flags=re.MULTILINE))
    return [f"{name}.py" for name in found]


def check_files(files: Mapping[str, Path], token: str | None = None) -> None:
    """Checks that nothing is pushed that belongs to this machine alone, and that the Hub can read the card.

    Args:
        files: file on disk by path in the repository.
        token: access token in use.

    Raises:
        HubError: if config.json names a local path, any text holds an access token, or the card's YAML is not valid.
    """
    for key, value in _strings(_read_config(files["config.json"])):
        if LOCAL_PATH.match(value) and not key.startswith("id2label."):
            raise HubError(
                f"{files['config.json']}: {key} is the local path {value!r}; remove it, nobody else has it."
            )
    for file in files.values():
        if file.suffix in TEXT_FILES:
            text = file.read_text()
            if redacted(text, token=token) != text:
                raise HubError(f"{file} holds an access token; remove it before the folder is pushed.")
    if "README.md" in files:
        try:
            ModelCard(files["README.md"].read_text())
        except Exception as error:  # whatever the YAML parser raises
            raise HubError(f"{files['README.md']}: the card's YAML is not valid: {shortened(error)}") from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise HubError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise HubError(f"{path} holds no mapping.")
    return config


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value with the path of keys to it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, inner in items:
            yield from _strings(inner, f"{key}.{name}" if key else str(name))


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def push_checkpoint(
    checkpoint: Path, path_in_repo: str | None, repo_id: str, *, revision: str | None, token: str | None, step: int
) -> CommitInfo:
    """Pushes a checkpoint's student and, in the same commit, what it takes to resume from it.

    Args:
        checkpoint: folder of the checkpoint.
        path_in_repo: folder in the repository for the whole checkpoint; None pushes the student alone.
        repo_id: `user/name` of a repository that exists.
        revision: branch to push to.
        token: access token; the stored one by default.
        step: optimizer steps done.

    Raises:
        HubError: if the Hub does not take it.
    """
    files = {path: checkpoint / path for path in student_files(checkpoint)}
    check_files(files, token)
    if path_in_repo is not None:
        for file in sorted(checkpoint.rglob("*")):
            if file.is_file() and file.name not in NOT_TO_RESUME:
                files[f"{path_in_repo}/{file.relative_to(checkpoint).as_posix()}"] = file
    message = f"Training in progress, step {step}"
    return commit_files(files, repo_id, revision=revision, token=token, commit_message=message)


def fetch_checkpoint(source: str, folder: Path, *, token: str | None = None) -> str:
    """Downloads the last checkpoint that a run has pushed, to `folder/checkpoint-N`, and returns that path.

    Args:
        source: `user/name`, or `user/name@revision`.
        folder: output folder of the run that continues.
        token: access token; the stored one by default.

    Raises:
        HubError: if the repository cannot be read, holds no checkpoint, or `folder` holds another checkpoint of that
            step.
    """
    repo_id, _, given = source.partition("@")
    api, revision = HfApi(token=token), given or None
    with explained("model", repo_id, revision=revision):
        paths = api.list_repo_files(repo_id, revision=revision)
        name = last_checkpoint(paths)
        if name is None:
            raise HubError(
                f"model {repo_id} holds no checkpoint, neither last-checkpoint/ nor checkpoint-N/; "
                "--hub_strategy checkpoint pushes them."
            )
        if any(path.startswith(f"{name}/") and path.endswith(".metadata") for path in paths):
            raise HubError(f"{name} of model {repo_id} is sharded by FSDP, which loads by pickle alone; refused.")
        snapshot = api.snapshot_download(repo_id, revision=revision, allow_patterns=f"{name}/*")
    fetched = Path(snapshot) / name
    step = json.loads((fetched / "trainer_state.json").read_text())["global_step"]
    target, part = folder / f"checkpoint-{step}", folder / f"_checkpoint-{step}.part"
    if not target.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(fetched, part)  # follows the links of the cache
        part.rename(target)
    elif (target / "trainer_state.json").read_bytes() != (fetched / "trainer_state.json").read_bytes():
        raise HubError(
            f"{target} is a checkpoint of another run than {source}; choose another --output_dir, or continue it with "
            "--resume_from_checkpoint true."
        )
    return str(target)


def last_checkpoint(paths: Iterable[str]) -> str | None:
    """The folder of the newest checkpoint among a repository's files."""
    folders = {path.split("/")[0] for path in paths if path.endswith("/trainer_state.json")}
    if "last-checkpoint" in folders:
        return "last-checkpoint"
    steps = [int(name.removeprefix("checkpoint-")) for name in folders if re.fullmatch(r"checkpoint-\d+", name)]
    return f"checkpoint-{max(steps)}" if steps else None
