"""What the local Hub stores: repositories with commits and refs in memory, file contents on disk."""

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path


GITATTRIBUTES = ".gitattributes"
LFS_PATTERNS = (
    "*.arrow *.bin *.jpeg *.jpg *.npy *.onnx *.parquet *.png *.pt *.safetensors *.tar.gz *.zip *tfevents*".split()
)


def now() -> str:
    """Returns the time in the notation of the Hub."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_lfs(path: str, size: int) -> bool:
    """Tells whether the Hub wants a file as LFS object: by name, or above 10 MB; never when empty."""
    by_name = any(fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern) for pattern in LFS_PATTERNS)
    return size > 0 and (by_name or size > 10 * 2**20)


@dataclass(frozen=True)
class File:
    """One file of a commit; `git_oid` is what git would call it."""

    sha256: str
    git_oid: str
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    sha: str
    title: str
    message: str
    author: str
    date: str
    parent: str | None
    files: Mapping[str, File]


@dataclass
class Repo:
    """A model, data set or space; `members` may read it when it is private or gated."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    members: set[str] = field(default_factory=set)
    created: str = field(default_factory=now)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    def ref(self, revision: str) -> str | None:
        """Returns the full name of a branch or tag, None where there is none."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def find(self, revision: str) -> Commit | None:
        """Returns the commit that a branch, tag, full ref or hash names."""
        ref = self.ref(revision)
        return self.commits.get(self.refs[ref] if ref else revision)

    def commit(
        self, ref: str, files: Mapping[str, File], *, title: str, message: str = "", author: str = ""
    ) -> Commit:
        """Puts a commit with exactly these files on top of a ref, which it creates if need be."""
        parent = self.refs.get(ref)
        date = now()
        content = repr((parent, sorted(files.items()), title, message, author, date, len(self.commits)))
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, message, author, date, parent, dict(files))
        self.refs[ref] = sha
        return self.commits[sha]


class Blobs:
    """Contents of files in a folder, each under its SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def add(self, content: bytes) -> str:
        """Stores a content and returns its SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.path(sha256).write_bytes(content)
        return sha256

    def file(self, content: bytes, path: str) -> File:
        """Stores a content and returns the `File` it is at `path` in a repository."""
        return self.described(self.add(content), lfs=is_lfs(path, len(content)))

    def described(self, sha256: str, *, lfs: bool) -> File:
        """Returns the `File` for a stored content; git stores a pointer in place of an LFS object."""
        content = self.path(sha256).read_bytes()
        git = pointer(sha256, len(content)) if lfs else content
        git_oid = hashlib.sha1(b"blob %d\0" % len(git) + git).hexdigest()
        return File(sha256=sha256, git_oid=git_oid, size=len(content), lfs=lfs)


def pointer(sha256: str, size: int) -> bytes:
    """Returns the small text that git keeps for an LFS object."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def gitattributes() -> bytes:
    """Returns the file that every new repository of the Hub starts with."""
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


def tree(files: Mapping[str, File], folder: str = "", *, recursive: bool = False) -> list[dict] | None:
    """Lists a folder as the Hub's tree call does; None where there is no such folder."""
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    inside = {path: file for path, file in files.items() if path.startswith(prefix)}
    if prefix and not inside:
        return None
    entries = [folder_entry(name) for name in sorted(folders(inside)) if name.startswith(prefix)]
    entries += [file_entry(path, file) for path, file in sorted(inside.items())]
    return [entry for entry in entries if recursive or "/" not in entry["path"][len(prefix) :]]


def folders(paths: Iterable[str]) -> set[str]:
    """Returns every folder on the way to some files."""
    parts = (path.split("/")[:-1] for path in paths)
    return {"/".join(part[:depth]) for part in parts for depth in range(1, len(part) + 1)}


def file_entry(path: str, file: File) -> dict:
    """Describes a file as tree and paths-info do."""
    entry = {"type": "file", "path": path, "size": file.size, "oid": file.git_oid}
    if file.lfs:
        size = len(pointer(file.sha256, file.size))
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": size}
    return entry


def folder_entry(path: str) -> dict:
    """Describes a folder as tree and paths-info do."""
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
