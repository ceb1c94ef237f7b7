"""A Hugging Face Hub on 127.0.0.1: the calls that the real clients make, over HTTP, with faults on demand.

Not covered: Xet, multipart and redirected LFS transfers, pull requests, pages of more than one response.
"""

import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from hub.calls import Handler
from hub.exchange import Request
from hub.repositories import GITATTRIBUTES, Blobs, Repo, gitattributes


MARKER_TOKEN = "hf_MarkerTokenThatMustNeverBeSeenAnywhere"
OTHER_TOKEN = "hf_TokenOfAnotherUser"


@dataclass
class Fault:
    """What goes wrong for requests whose method and path match, `times` times or, without, for ever."""

    what: int | Literal["reset", "slow"]
    path: re.Pattern[str]
    method: str | None
    times: int | None
    seconds: float
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        used_up = self.times is not None and self.hits >= self.times
        return not used_up and self.method in (None, method) and self.path.search(path) is not None


class HubServer:
    """The server, its state and its faults; a context manager that runs it.

    Args:
        folder: where the contents of files go; a fresh one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.blobs = Blobs(folder / "blobs")
        self.users = {MARKER_TOKEN: "tester", OTHER_TOKEN: "stranger"}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.errors: list[str] = []
        self.uploads: set[str] = set()
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        self._faults: list[Fault] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self._http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *exception: object) -> None:
        """Stops the server; a call that it does not know or cannot answer is an error of the test.

        Raises:
            RuntimeError: the server itself failed, which a client may have taken for a fault that was asked for.
        """
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()
        if self.errors and exception_type is None:
            raise RuntimeError("the local Hub failed:\n" + "\n".join(self.errors))

    def environment(self, home: Path, token: str | None = MARKER_TOKEN) -> dict[str, str]:
        """Returns the environment of a process that uses this Hub and nothing else.

        Args:
            home: `HF_HOME`; a fresh folder for a fresh cache.
            token: `HF_TOKEN`; None for an anonymous user.

        No setting bounds the waits between a client's attempts (6 of them take 23 s), so `time.sleep` of that process is
        cut to 10 ms.
        """
        foreign = re.compile(r"HF_|HUGGING|TRANSFORMERS_|(https?|all)_proxy$", re.IGNORECASE)
        environment = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        environment |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }
        if token is not None:
            environment["HF_TOKEN"] = token
        folder = self.folder / "impatient"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(
            "import time\n_sleep = time.sleep\ntime.sleep = lambda seconds: _sleep(min(seconds, 0.01))\n"
        )
        paths = [str(folder), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        return environment

    def fail(
        self,
        what: int | Literal["reset", "slow"],
        path: str = "",
        *,
        method: str | None = None,
        times: int | None = None,
        seconds: float = 1.0,
    ) -> Fault:
        """Makes requests go wrong; the newest fault that matches counts.

        Args:
            what: an HTTP status; "reset": cut the connection half-way through the upload, or through the download if
                the request carries no body; "slow": answer late, but properly.
            path: regular expression looked for in the unquoted path.
            seconds: how late "slow" is, and the `Retry-After` of 429.
        """
        fault = Fault(what, re.compile(path), method, times, seconds)
        self._faults.insert(0, fault)
        return fault

    def clear_faults(self) -> None:
        """Makes everything work again."""
        self._faults.clear()

    def fault_for(self, method: str, path: str) -> Fault | None:
        """Returns the fault that strikes a request and counts it."""
        with self.lock:
            fault = next((fault for fault in self._faults if fault.strikes(method, path)), None)
            if fault is not None:
                fault.hits += 1
            return fault

    def add_repo(
        self,
        name: str,
        files: Mapping[str, bytes] | None = None,
        *,
        kind: str = "model",
        private: bool = False,
        gated: bool = False,
        members: tuple[str, ...] = (),
    ) -> Repo:
        """Creates a repository as the Hub does, with files on `main`; `members` are users let in."""
        repo = Repo(kind, name, private, gated, {name.split("/")[0], *members})
        first = {GITATTRIBUTES: self.blobs.file(gitattributes(), GITATTRIBUTES)}
        repo.commit("refs/heads/main", first, title="initial commit", author=repo.owner)
        self.repos[kind, name] = repo
        if files:
            self.add_files(name, files, kind=kind)
        return repo

    def add_files(self, name: str, files: Mapping[str, bytes], revision: str = "main", *, kind: str = "model") -> str:
        """Commits files and returns the commit; a revision such as `refs/convert/parquet` starts empty."""
        repo = self.repos[kind, name]
        ref = repo.ref(revision) or (revision if revision.startswith("refs/") else f"refs/heads/{revision}")
        present = repo.commits[repo.refs[ref]].files if ref in repo.refs else {}
        added = {path: self.blobs.file(content, path) for path, content in files.items()}
        return repo.commit(ref, {**present, **added}, title="Add files", author=repo.owner).sha

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Returns the contents of a revision by path, without the `.gitattributes` that the Hub adds."""
        commit = self.repos[kind, name].find(revision)
        if commit is None:
            raise KeyError(f"{name} has no revision {revision}")
        return {
            path: self.blobs.path(file.sha256).read_bytes()
            for path, file in commit.files.items()
            if path != GITATTRIBUTES
        }
