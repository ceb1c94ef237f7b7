"""The calls that the local Hub answers."""

import base64
import json
import re
import secrets
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub import card_rules
from hub.exchange import Exchange, Refused
from hub.repositories import Commit, File, Repo, is_lfs, tree


KINDS = {"models": "model", "datasets": "dataset"}
VERBS = {"auth-check", "branch", "commit", "preupload", "revision", "tree"}


class Handler(Exchange):
    """Answers as huggingface.co does."""

    def route(self) -> None:
        if self.token is not None and self.token not in self.hub.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        if self.raw_path == "/api/repos/create":
            return self.create_repo()
        if self.raw_path == "/api/validate-yaml":
            return self.validate_yaml()
        if match := re.fullmatch(r"/lfs-storage/(\w+)/(\w+)", self.raw_path):
            return self.store(*match.groups())
        if match := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/(.+)", self.raw_path):
            kind, name, call = match.groups()
            self.writable(self.repo(kind or "models", name))
            return self.lfs_batch(name) if call == "objects/batch" else self.lfs_verify()
        if match := re.fullmatch(r"/(?:(datasets)/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", self.raw_path):
            kind, name, revision, path = match.groups()
            return self.resolve(self.repo(kind or "models", name), unquote(revision), unquote(path))
        if match := re.fullmatch(r"/api/(models|datasets)/(.+)", self.raw_path):
            parts = match[2].split("/")
            size = 1 if len(parts) == 1 or parts[1] in VERBS else 2
            return self.repo_call(
                self.repo(match[1], "/".join(parts[:size])), [unquote(part) for part in parts[size:]]
            )
        self.hub.errors.append(f"unknown call: {self.command} {self.path}")
        raise Refused(501, f"the local Hub does not know {self.command} {self.raw_path}")

    def details_of(self, status: int) -> dict[str, str]:
        # the client takes the address of the repository from a conflict
        conflict = status == 409 and self.raw_path == "/api/repos/create"
        return {"url": self.wanted_repo()[2]} if conflict else {}

    @property
    def user(self) -> str | None:
        return self.hub.users.get(self.token or "")

    def signed_in(self) -> str:
        if self.user is None:
            raise Refused(401, "Invalid username or password.")
        return self.user

    def repo(self, plural: str, quoted_name: str) -> Repo:
        name = unquote(quoted_name)
        repo = self.hub.repos.get((KINDS[plural], name))
        if repo is None or (repo.private and self.user not in repo.members):
            anonymous = self.user is None
            message = "Invalid username or password." if anonymous else "Repository not found"
            raise Refused(401 if anonymous else 404, message, "RepoNotFound")
        return repo

    def writable(self, repo: Repo) -> None:
        if self.signed_in() != repo.owner:
            raise Refused(403, f"You don't have the rights to write to {repo.kind} {repo.name}")

    def readable(self, repo: Repo) -> None:
        if repo.gated and self.user not in repo.members:
            restricted = f"Access to {repo.kind} {repo.name} is restricted"
            if self.user is None:
                message = f"{restricted}. You must have access to it and be authenticated to access it. Please log in."
                raise Refused(401, message, "GatedRepo")
            message = f"{restricted} and you are not in the authorized list. Visit {self.hub.url}/{repo.name} to ask for access."
            raise Refused(403, message, "GatedRepo")

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Calls about no repository

    def wanted_repo(self) -> tuple[str, str, str]:
        """Returns kind, name and address of the repository that a client wants created."""
        wanted = self.json()
        kind, owner = wanted.get("type") or "model", wanted.get("organization") or self.signed_in()
        name = f"{owner}/{wanted['name']}"
        return kind, name, f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"

    def create_repo(self) -> None:
        kind, name, url = self.wanted_repo()
        owner = name.split("/")[0]
        if owner != self.signed_in():
            raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        with self.hub.lock:
            if (kind, name) in self.hub.repos:
                raise Refused(409, f"You already created this {kind} repo", url=url)
            self.hub.add_repo(name, kind=kind, private=self.json().get("visibility") == "private")
        self.reply({"url": url, "name": name, "id": name})

    def validate_yaml(self) -> None:
        wanted = self.json()
        errors, warnings = card_rules.check(wanted["content"], wanted.get("repoType") or "model")
        answer = {
            name: [{"message": text} for text in texts] for name, texts in (("errors", errors), ("warnings", warnings))
        }
        self.reply(answer, 400 if errors else 200)

    # Large files

    def lfs_batch(self, name: str) -> None:
        objects = []
        for wanted in self.json()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if not self.hub.blobs.has(wanted["oid"]):
                signature = secrets.token_hex(8)  # as storage links, it opens without a token
                self.hub.uploads.add(signature)
                upload = {"href": f"{self.hub.url}/lfs-storage/{signature}/{wanted['oid']}", "header": {}}
                prefix = self.raw_path.removesuffix("/objects/batch")
                answer["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.hub.url}{prefix}/verify", "header": {}},
                }
            objects.append(answer)
        self.reply({"transfer": "basic", "objects": objects})

    def store(self, signature: str, oid: str) -> None:
        if signature not in self.hub.uploads:
            raise Refused(403, "Request has expired")
        if self.hub.blobs.add(self.body) != oid:
            raise Refused(400, "the content does not have the announced SHA-256")
        self.send(200, b"", {"ETag": f'"{oid}"'})

    def lfs_verify(self) -> None:
        wanted = self.json()
        if not self.hub.blobs.has(wanted["oid"]):
            raise Refused(404, f"{wanted['oid']} has not been uploaded")
        self.reply({})

    # Downloads

    def resolve(self, repo: Repo, revision: str, path: str) -> None:
        self.readable(repo)
        commit = self.commit_at(repo, revision)
        headers = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", headers=headers)
        headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        content = b"" if self.command == "HEAD" else self.hub.blobs.path(file.sha256).read_bytes()
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted or self.command == "HEAD":
            return self.send(200, content, headers, length=file.size)
        first = int(wanted[1]) if wanted[1] else max(file.size - int(wanted[2]), 0)
        last = min(int(wanted[2]), file.size - 1) if wanted[1] and wanted[2] else file.size - 1
        if first > last:
            raise Refused(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{file.size}"})
        self.send(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{file.size}"})

    # Calls about a repository

    def repo_call(self, repo: Repo, parts: list[str]) -> None:
        verb = parts[0] if parts else "revision"
        revision = parts[1] if len(parts) > 1 else "main"
        match verb:
            case "revision":
                self.reply(self.info(repo, self.commit_at(repo, revision)))
            case "auth-check":
                (self.writable if revision == "write" else self.readable)(repo)
                self.reply({})
            case "tree":
                self.list_tree(self.commit_at(repo, revision), "/".join(parts[2:]))
            case "preupload":
                self.preupload(repo, revision)
            case "commit":
                self.commit(repo, revision)
            case "branch":
                self.create_ref(repo, f"refs/heads/{revision}", self.json().get("startingPoint") or "main")

    def info(self, repo: Repo, commit: Commit) -> dict:
        files = commit.files.items()
        siblings = [{"rfilename": path, "size": file.size, "blobId": file.git_oid} for path, file in files]
        return {
            "id": repo.name,
            "author": repo.owner,
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": repo.created,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
            "cardData": self.card_data(commit),
        }

    def card_data(self, commit: Commit) -> dict | None:
        readme = commit.files.get("README.md")
        try:
            return card_rules.metadata(self.hub.blobs.path(readme.sha256).read_text("utf8")) if readme else None
        except yaml.YAMLError:
            return None

    def list_tree(self, commit: Commit, folder: str) -> None:
        query = parse_qs(urlsplit(self.path).query)
        entries = tree(commit.files, folder, recursive=query.get("recursive", ["false"])[0].lower() in ("true", "1"))
        if entries is None:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound", headers={"X-Repo-Commit": commit.sha})
        self.reply(entries)

    def preupload(self, repo: Repo, revision: str) -> None:
        self.writable(repo)
        present = self.commit_at(repo, revision).files
        answers = []
        for file in self.json()["files"]:
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            oid = present[file["path"]].etag if file["path"] in present else None
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": answers})

    def commit(self, repo: Repo, revision: str) -> None:
        self.writable(repo)
        with self.hub.lock:
            head = self.commit_at(repo, revision)
            ref = repo.ref(revision)
            if ref is None:
                raise Refused(400, f"{revision} is a commit; commit to a branch")
            header, *operations = map(json.loads, self.body.splitlines())
            header = header["value"]
            if header.get("parentCommit", head.sha) != head.sha:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for operation in operations:
                self.apply(operation["key"], operation["value"], files)
            user = self.user or ""
            new = repo.commit(ref, files, title=header["summary"], message=header.get("description", ""), author=user)
        url = f"{self.hub.url}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.name}/commit/{new.sha}"
        self.reply({"success": True, "commitOid": new.sha, "commitUrl": url, "hookOutput": ""})

    def apply(self, key: str, value: dict, files: dict[str, File]) -> None:
        path = value["path"]
        if key == "file":
            sha256 = self.hub.blobs.add(base64.b64decode(value["content"]))
            files[path] = self.hub.blobs.described(sha256, lfs=False)
        elif key == "lfsFile":
            if not self.hub.blobs.has(value["oid"]):
                raise Refused(400, f"the LFS object of {path} has not been uploaded")
            files[path] = self.hub.blobs.described(value["oid"], lfs=True)
        else:
            raise Refused(400, f"cannot apply {key} to {path}")

    def create_ref(self, repo: Repo, ref: str, start: str) -> None:
        self.writable(repo)
        with self.hub.lock:
            if ref in repo.refs:
                raise Refused(409, f"Reference already exists: {ref}")
            repo.refs[ref] = self.commit_at(repo, start).sha
        self.reply({})
