"""Pushing a finished student, or a checkpoint to resume from, to the Hub: which files, and what if it fails."""

import json
import logging
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.utils import filter_repo_objects, get_session, hf_raise_for_status
from transformers.dynamic_module_utils import get_relative_import_files

from ..utils.text import redacted, shortened
from .errors import HubError, cause_of, explained
from .exports import read_exports


logger = logging.getLogger(__name__)

STARTS_AS_PATH = re.compile(r"^(/|~|\.{1,2}/|[A-Za-z]:\\)")
# seconds: a connection that stays silent for longer is dead, and nobody waits longer in silence for a rate limit
SILENCE, RATE_LIMIT_WAIT = 120, 30
STATE = "trainer_state.json"
KINDS = {"model": "model", "dataset": "data set"}  # of repositories, in messages
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors"]
STUDENT_FILES = [
    "config.json", "preprocessor_config.json", "README.md", "results.json", "model.safetensors.index.json", "figures/*",
]  # fmt: skip
PYTHON_BLOCK = re.compile(r"^```python\n.*?^```$", re.DOTALL | re.MULTILINE)
LOADED_NAME = re.compile(
    r'(\bmodel=|\.from_pretrained\(|\bcached_file\(|\bhf_hub_download\()"[^"\n]*"(, revision="[^"\n]*")?'
)


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

    Raises:
        HubError: if the folder holds no finished student, or the push fails; names the command to try again.
    """
    folder = Path(folder)
    files = student_files(folder, token)
    again = ["hf-bcd", "push", str(folder), repo_id, *(["--private"] if private else [])]
    again += ["--revision", revision] if revision else []
    try:
        repo_id = prepare_repository(repo_id, private=private, revision=revision, token=token)
        card = name_in_examples(files["README.md"].read_text(encoding="utf-8"), repo_id, revision)
        sent = {**files, "README.md": card.encode()}
        commit = commit_files(sent, repo_id, revision=revision, token=token, commit_message=commit_message)
        files["README.md"].write_text(card, encoding="utf-8")
        return commit
    except Exception as error:  # whatever it is, the user must learn where the student lies
        cause = str(error) if isinstance(error, HubError) else cause_of(error, "model", repo_id, revision)
        cause = cause or f"model {repo_id}: the push failed ({type(error).__name__}: {shortened(error)})."
        message = f"{cause} The student lies in {folder}; try again with: {shlex.join(again)}"
        raise HubError(redacted(message, token=token)) from None


def name_in_examples(card: str, repo_id: str, revision: str | None = None) -> str:
    """The card with examples that load the student from the repository and branch of a push, known only then."""
    loaded = json.dumps(repo_id) + (f", revision={json.dumps(revision)}" if revision not in (None, "main") else "")
    return PYTHON_BLOCK.sub(lambda block: LOADED_NAME.sub(lambda name: name[1] + loaded, block[0]), card)


def push_store(
    folder: Path, repo_id: str, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> CommitInfo:
    """Pushes a stored teacher as a data set in one commit.

    Args:
        folder: with a card.
        repo_id: `user/name`, as `prepare_repository` gives it.
        private: as in `push_folder`.
        revision: branch to push to.
        token: access token; the stored one by default.

    Raises:
        HubError: a text holds a token or a path of this machine, or the push fails; the store stays in the folder.
    """
    patterns = ["README.md", "*.json", "losses.safetensors", "data/*.parquet", "pictures/*.parquet"]
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = {
        name: folder / name
        for name in sorted(filter_repo_objects(found, allow_patterns=patterns, ignore_patterns="_*"))
    }
    try:
        for name, file in files.items():
            if not name.endswith(".parquet"):
                check_private(file, folder, token)
        message = "Upload stored teacher"
        return commit_files(files, repo_id, revision=revision, token=token, commit_message=message, kind="dataset")
    except Exception as error:  # whatever it is, the user must learn where the store lies
        cause = str(error) if isinstance(error, HubError) else cause_of(error, "data set", repo_id, revision)
        cause = cause or f"data set {repo_id}: the push failed ({type(error).__name__}: {shortened(error)})."
        raise HubError(
            redacted(f"{cause} The store lies in {folder}; the same command tries again.", token=token)
        ) from None


def prepare_repository(
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    kind: str = "model",
) -> str:
    """Creates the repository and the branch where missing, and checks that they may be written; returns the full id.

    Raises:
        HubError: if that is not possible, or `private` is true and the repository is public.
    """
    name = KINDS[kind]
    if constants.is_offline_mode():
        raise HubError(f"{name} {repo_id}: nothing can be pushed while HF_HUB_OFFLINE is set; unset it.")
    api = HfApi(token=token)
    with explained(name, repo_id, revision=revision), _bounded_waiting():
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind).repo_id
        # `create_repo` is content with one that exists, even for a reader
        api.auth_check(repo_id, write=True, repo_type=kind)
        if private and not api.repo_info(repo_id, repo_type=kind).private:
            raise HubError(
                f"{name} {repo_id} exists and is public, which --private does not change; make it private on "
                f"{constants.ENDPOINT}/{repo_id}/settings, or choose another name."
            )
        if revision not in (None, "main") and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=kind)
    return repo_id


def commit_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    revision: str | None,
    token: str | None,
    commit_message: str,
    kind: str = "model",
) -> CommitInfo:
    """Uploads files or contents, by path in the repository, in one commit; unchanged ones are not sent again."""
    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files.items()]
    with explained(KINDS[kind], repo_id, revision=revision), _bounded_waiting():
        # not `upload_folder`, which may split one push into several commits
        options: Any = {"commit_message": commit_message, "revision": revision, "num_threads": 2, "repo_type": kind}
        return HfApi(token=token).create_commit(repo_id, operations, **options)


@contextmanager
def _bounded_waiting() -> Iterator[None]:
    """Keeps the client from waiting for ever on a dead connection, and from obeying a long Retry-After in silence."""

    def refuse_long_waits(response: Any) -> None:
        wait = response.headers.get("Retry-After", "")
        if response.status_code == 429 and wait.isdigit() and int(wait) > RATE_LIMIT_WAIT:
            response.read()
            hf_raise_for_status(response)

    client = get_session()
    timeout, hooks = client.timeout, client.event_hooks
    client.timeout = SILENCE
    client.event_hooks = {**hooks, "response": [*hooks["response"], refuse_long_waits]}
    try:
        yield
    finally:
        client.timeout, client.event_hooks = timeout, hooks


# ---- What is pushed --------------------------------------------------------------------------------------------------


def student_files(folder: Path, token: str | None = None, *, finished: bool = True) -> dict[str, Path]:
    """Files of a student by path in the repository: model, processor, code, card, results, figures, exports.

    Checkpoints, optimizer states and logs are left out. In a `finished` run's folder there must be a card.

    Raises:
        HubError: if there is no model or card, config.json names a local path, a file is a link out of the folder, any text
            holds an access token or a path of this machine, or the card's YAML is not valid: nothing is pushed that
            belongs to this machine alone, or that the Hub cannot read.
    """
    if not folder.is_dir():
        raise HubError(f"{folder} is no folder; name the output folder of a finished run.")
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    weights = list(filter_repo_objects(found, allow_patterns=WEIGHTS))
    if not weights or "config.json" not in found:
        missing = "config.json" if weights else "model.safetensors"
        raise HubError(f"{folder} holds no finished student: {missing} is missing.")
    if finished and "README.md" not in found:
        raise HubError(f"{folder} has no card README.md; a finished run of hf_bcd writes one.")
    try:
        config = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise HubError(f"{folder / 'config.json'} holds no mapping: {error}") from error
    for key, value in _local_paths(config):
        raise HubError(f"{folder / 'config.json'}: {key} is the local path {value!r}; remove it, nobody else has it.")
    classes = [str(value) for value in config.get("auto_map", {}).values()]
    modules = {f"{name.split('.')[0]}.py" for name in classes if "--" not in name}
    modules |= {Path(file).name for name in modules & {*found} for file in get_relative_import_files(folder / name)}
    exports = [name for report in read_exports(folder) for name in report["files"]]
    wanted = [*weights, *STUDENT_FILES, *modules, *exports]
    names = filter_repo_objects(found, allow_patterns=wanted, ignore_patterns="*.part")
    files = {name: folder / name for name in sorted(names)}
    for file in files.values():
        check_private(file, folder, token)
    if "README.md" in files:
        try:
            ModelCard(files["README.md"].read_text(encoding="utf-8"))
        except Exception as error:  # whatever the YAML parser raises
            raise HubError(f"{files['README.md']}: the card's YAML is not valid: {shortened(error)}") from None
    return files


def check_private(file: Path, folder: Path, token: str | None, content: bytes | None = None) -> None:
    """Looks at a file of `folder` before it is pushed; `content` is pushed instead of its own if given.

    Raises:
        HubError: if it is a link to something outside of the folder, or a text that holds an access token or a path that
            only this machine has: of the folder or of the user's home.
    """
    if not file.resolve().is_relative_to(folder.resolve()):
        raise HubError(f"{file} is a link that leads out of {folder}; put the file itself there, or remove the link.")
    if content is None:
        with file.open("rb") as opened:
            if b"\0" in opened.read(8192):  # no text
                return
        content = file.read_bytes()
    text = content.decode(errors="replace")
    if redacted(text, token=token) != text:
        raise HubError(f"{file} holds an access token; remove it before the folder is pushed.")
    for place in {folder.resolve(), Path.home()} - {Path("/")}:
        if found := re.search(rf"(?<![\w./-]){re.escape(str(place))}(?![\w.-])[^\s\"'`]*", text):
            raise HubError(f"{file} holds the local path {shortened(found[0])!r}; remove it, nobody else has it.")


def _local_paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Local paths in a JSON value, each behind the keys that lead to it; class names may look like one."""
    if isinstance(value, str) and STARTS_AS_PATH.match(value):
        yield key, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        if name != "id2label":
            yield from _local_paths(inner, f"{key}.{name}".lstrip("."))


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def push_checkpoint(
    checkpoint: Path, path_in_repo: str | None, repo_id: str, *, revision: str | None, token: str | None, step: int
) -> CommitInfo:
    """Pushes a checkpoint's student and, in the same commit, the files to resume from it.

    These go to a folder `path_in_repo`; where that is None, only the student is pushed.

    Raises:
        HubError: if a file is refused, see `student_files`, or the Hub does not take it.
    """
    files: dict[str, Path | bytes] = {**student_files(checkpoint, token, finished=False)}
    for file in sorted(checkpoint.rglob("*")) if path_in_repo is not None else ():
        if file.is_file() and file.name != "training_args.bin":  # pickled
            content = portable_state(file.read_bytes()) if file.name == STATE else None
            check_private(file, checkpoint, token, content)
            files[f"{path_in_repo}/{file.relative_to(checkpoint).as_posix()}"] = file if content is None else content
    message = f"Training in progress, step {step}"
    return commit_files(files, repo_id, revision=revision, token=token, commit_message=message)


def fetch_checkpoint(source: str, folder: Path, *, token: str | None = None) -> str:
    """Downloads the last checkpoint that a run has pushed, to `folder/checkpoint-N`, and returns that path.

    `source` is `user/name`, or `user/name@revision`.

    Raises:
        HubError: if the repository cannot be read, holds no checkpoint or one whose step is no number, or `folder` holds
            another checkpoint of that step.
    """
    repo_id, _, given = source.partition("@")
    api, revision = HfApi(token=token), given or None
    with explained("model", repo_id, revision=revision):
        name = pushed_checkpoint(api.list_repo_files(repo_id, revision=revision))
        if name is None:
            raise HubError(
                f"model {repo_id} holds no checkpoint, neither last-checkpoint/ nor checkpoint-N/; "
                "--hub_strategy checkpoint pushes them."
            )
        fetched = Path(api.snapshot_download(repo_id, revision=revision, allow_patterns=f"{name}/*")) / name
    state = (fetched / STATE).read_bytes()
    target = folder / f"checkpoint-{_step(state, f'model {repo_id}: {name}/{STATE}')}"
    part = folder / f"_{target.name}.part"
    if not target.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(fetched, part)  # follows the links of the cache
        part.rename(target)
    elif portable_state((target / STATE).read_bytes()) != portable_state(state):
        raise HubError(
            f"{target} is a checkpoint of another run than {source}; choose another --output_dir, or continue it with "
            "--resume_from_checkpoint true."
        )
    return str(target)


def _step(state: bytes, name: str) -> int:
    """The step of a trainer's state from outside, which becomes part of a path."""
    try:
        step = json.loads(state)["global_step"]
    except (KeyError, TypeError, ValueError) as error:
        raise HubError(f"{name} is no state of a trainer: it has no global_step.") from error
    if type(step) is not int or step < 0:
        raise HubError(f"{name}: global_step is {shortened(repr(step))}, which is no number of steps.")
    return step


def portable_state(state: bytes) -> bytes:
    """A trainer's state with the best checkpoint's name instead of its path on this machine."""
    try:
        content = json.loads(state)
    except ValueError:
        return state
    if not isinstance(content, dict) or not isinstance(best := content.get("best_model_checkpoint"), str):
        return state
    content["best_model_checkpoint"] = PurePath(best).name
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def pushed_checkpoint(paths: Iterable[str]) -> str | None:
    """The folder of the newest checkpoint among a repository's files."""
    folders = {path.split("/")[0] for path in paths if path.endswith("/trainer_state.json")}
    numbered = [name for name in folders if re.fullmatch(r"checkpoint-\d+", name)]
    newest = max(numbered, key=lambda name: int(name.partition("-")[2]), default=None)
    return "last-checkpoint" if "last-checkpoint" in folders else newest
