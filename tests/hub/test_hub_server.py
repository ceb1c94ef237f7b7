"""The local Hub as the real clients see it: nothing of huggingface_hub, transformers or datasets is replaced."""

import json
import socket
from urllib.parse import urlsplit

import pytest
from hub import card_rules
from hub.server import MARKER_TOKEN, OTHER_TOKEN, HubServer


RESULT = {"task": {"type": "image-segmentation"}, "dataset": {"type": "me/d", "name": "d"}}
METRICS = [{"type": "mean_iou", "value": 0.5}]

# what a fault becomes: the classes of an exception and of its causes, and a status where one has it
CHAIN = """
def chain(error):
    parts = []
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        parts.append(type(error).__name__ + (f" {status}" if status else ""))
        error = error.__cause__ or error.__context__
    return parts

def attempt(call):
    try:
        call()
    except Exception as error:  # whichever it is: the chain of types is what the tests compare
        return chain(error)
    return ["OK"]
"""


def card(metadata: object) -> str:
    return f"---\n{json.dumps(metadata)}\n---\n# Title\n"


class TestCardRules:
    def test_good_card(self) -> None:
        index = [{"name": "x", "results": [{**RESULT, "metrics": METRICS}]}]
        good = {"license": "mit", "base_model": "me/x", "tags": ["a"], "datasets": ["me/d"], "model-index": index}
        assert card_rules.check(card(good)) == ([], [])

    def test_no_metadata_is_a_warning(self) -> None:
        assert card_rules.check("# Title") == ([], ["empty or missing yaml metadata in repo card"])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("---\na: b: c\n---\n", "mapping values"),
            ("---\na: 1\na: 2\n---\n", "duplicated mapping key a"),
            ("---\n- a\n---\n", "must be a mapping"),
            (card({"license": "my own"}), '"license" must be one of'),
            (card({"base_model": "/home/me/runs/x"}), '"base_model" with value "/home/me/runs/x" is not valid'),
            (card({"datasets": ["me/d", "a b"]}), '"datasets[1]" with value "a b" is not valid'),
            (card({"tags": "one"}), '"tags" must be an array of strings'),
            (card({"model-index": [{"results": []}]}), '"model-index[0].name" is required'),
            (card({"model-index": [{"name": "x"}]}), '"model-index[0].results" is required'),
            (card({"model-index": [{"name": "x", "results": [RESULT]}]}), "results[0].metrics"),
            (card({"model-index": [{"name": "x", "results": [{"metrics": METRICS}]}]}), "results[0].task.type"),
        ],
    )
    def test_bad_card(self, content: str, message: str) -> None:
        errors, _ = card_rules.check(content)
        assert any(message in error for error in errors), errors


class TestServer:
    def test_a_call_it_does_not_know_is_an_error_of_the_test(self, tmp_path) -> None:
        with pytest.raises(RuntimeError, match="unknown call: GET /api/nonsense"), HubServer(tmp_path) as hub:
            with socket.create_connection(("127.0.0.1", urlsplit(hub.url).port)) as connection:
                connection.sendall(b"GET /api/nonsense HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"501" in connection.recv(100)

    def test_reset_comes_half_way_and_only_as_often_as_asked(self, hub) -> None:
        hub.fail("reset", "/lfs-storage/", method="PUT", times=1)
        with socket.create_connection(("127.0.0.1", urlsplit(hub.url).port)) as connection:
            connection.sendall(b"PUT /lfs-storage/a/b HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n" + b"x" * 50)
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        assert [request.status for request in hub.requests] == ["reset"]
        assert hub.fault_for("PUT", "/lfs-storage/a/b") is None

    def test_faults_match_method_and_path(self, hub) -> None:
        fault = hub.fail(500, r"commit/main$", method="POST")
        assert hub.fault_for("GET", "/api/models/a/b/commit/main") is None
        assert hub.fault_for("POST", "/api/models/a/b/commit/dev") is None
        assert hub.fault_for("POST", "/api/models/a/b/commit/main") is fault
        hub.clear_faults()
        assert hub.fault_for("POST", "/api/models/a/b/commit/main") is None

    def test_environment_names_this_hub_alone(self, hub, tmp_path, monkeypatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setenv("HTTP_PROXY", "http://elsewhere")
        anonymous = hub.environment(tmp_path, None)
        assert anonymous["HF_ENDPOINT"] == hub.url and anonymous["HF_HOME"] == str(tmp_path)
        assert not {"HF_HUB_OFFLINE", "HTTP_PROXY", "HF_TOKEN"} & set(anonymous)
        assert hub.environment(tmp_path)["HF_TOKEN"] == MARKER_TOKEN


@pytest.mark.slow
def test_huggingface_hub_round_trip(hub, run_python, tmp_path) -> None:
    folder = tmp_path / "student"
    (folder / "sub").mkdir(parents=True)
    contents = {
        "README.md": card({"license": "mit"}).encode(),
        "model.safetensors": bytes(range(256)) * 4000,
        "sub/empty.txt": b"",
        "config.json": b"{}",
    }
    for path, content in contents.items():
        (folder / path).write_bytes(content)
    cut = hub.fail("reset", "/resolve/main/model.safetensors", method="GET", times=1)  # half-way through a download
    run_python(
        """
        import os, sys
        from pathlib import Path
        from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
        from huggingface_hub.utils import httpx

        api, folder = HfApi(), sys.argv[1]
        assert api.whoami()["name"] == "tester"
        first = api.create_repo("tester/student", exist_ok=True)
        assert api.create_repo("tester/student", exist_ok=True) == first and first.repo_id == "tester/student"
        commit = api.upload_folder(repo_id="tester/student", folder_path=folder)
        assert api.upload_folder(repo_id="tester/student", folder_path=folder).oid == commit.oid  # nothing has changed
        assert api.model_info("tester/student").sha == commit.oid
        snapshot = Path(snapshot_download("tester/student"))
        for name in api.list_repo_files("tester/student"):
            if name != ".gitattributes":
                assert (snapshot / name).read_bytes() == Path(folder, name).read_bytes(), name
        assert [commit.title for commit in api.list_repo_commits("tester/student")][-1] == "initial commit"
        try:
            hf_hub_download("tester/student", "model.safetensors", cache_dir="fresh")
        except httpx.ReadError:
            again = hf_hub_download("tester/student", "model.safetensors", cache_dir="fresh")
        assert Path(again).read_bytes() == Path(folder, "model.safetensors").read_bytes()
        assert api.get_paths_info("tester/student", ["model.safetensors"])[0].lfs.size == 256 * 4000

        api.create_branch("tester/student", branch="dev")
        api.upload_file(path_or_fileobj=b"dev", path_in_repo="x.txt", repo_id="tester/student", revision="dev")
        assert Path(hf_hub_download("tester/student", "x.txt", revision="dev")).read_bytes() == b"dev"
        assert not api.file_exists("tester/student", "x.txt")
        api.create_tag("tester/student", tag="v1")
        assert {branch.name for branch in api.list_repo_refs("tester/student").branches} == {"main", "dev"}
        assert api.model_info("tester/student", revision="v1").sha == commit.oid
        api.delete_folder("sub", "tester/student")
        api.delete_file("config.json", "tester/student")

        ModelCard(Path(folder, "README.md").read_text()).validate()
        try:
            ModelCard("---\\nlicense: mine\\n---\\n").validate()
        except ValueError as error:
            assert '\\\\"license\\\\" must be one of' in str(error)
        else:
            raise AssertionError("a wrong licence passed")
        Path(folder, "README.md").write_text("---\\na: b: c\\n---\\n")
        try:
            api.upload_folder(repo_id="tester/student", folder_path=folder)
        except ValueError as error:
            assert "Invalid metadata in README.md" in str(error)
        else:
            raise AssertionError("a broken card was uploaded")

        api.create_repo("tester/space", repo_type="space", space_sdk="static")
        api.upload_file(path_or_fileobj=b"s", path_in_repo="s.txt", repo_id="tester/space", repo_type="space")
        """,
        folder,
    )
    assert hub.files("tester/student", "v1") == contents
    downloads = [r.status for r in hub.requests if r.method == "GET" and "main/model.safetensors" in r.path]
    assert cut.hits == 1 and downloads == ["reset", 200]
    assert set(hub.files("tester/student")) == {"README.md", "model.safetensors"}
    assert set(hub.files("tester/student", "dev")) == {*contents, "x.txt"}
    assert hub.files("tester/space", kind="space") == {"s.txt": b"s"}
    uploads = [request for request in hub.requests if request.method == "PUT"]
    assert len(uploads) == 1 and not uploads[0].authorised  # storage is elsewhere and gets no token
    assert not any(MARKER_TOKEN in request.path for request in hub.requests)


@pytest.mark.slow
def test_who_may_read_and_write(hub, run_python, tmp_path) -> None:
    hub.add_repo("tester/private", {"a.txt": b"a"}, private=True)
    hub.add_repo("tester/gated", {"a.txt": b"a"}, gated=True)
    code = (
        CHAIN
        + """
import json
from huggingface_hub import HfApi, hf_hub_download
api = HfApi()
results = {
    "private": attempt(lambda: hf_hub_download("tester/private", "a.txt")),
    "gated": attempt(lambda: hf_hub_download("tester/gated", "a.txt")),
    "gated card": attempt(lambda: api.model_info("tester/gated")),
    "check": attempt(lambda: api.auth_check("tester/gated")),
    "missing": attempt(lambda: api.model_info("tester/nothing")),
    "file": attempt(lambda: hf_hub_download("tester/open", "nothing.txt")),
    "revision": attempt(lambda: hf_hub_download("tester/open", "a.txt", revision="nothing")),
    "write": attempt(lambda: api.upload_file(path_or_fileobj=b"b", path_in_repo="b", repo_id="tester/open")),
    "create": attempt(lambda: api.create_repo("tester/new")),
}
print(json.dumps({name: parts[0] for name, parts in results.items()}))
"""
    )
    hub.add_repo("tester/open", {"a.txt": b"a"})
    seen = {}
    for name, token in {"owner": MARKER_TOKEN, "other": OTHER_TOKEN, "nobody": None, "wrong": "hf_wrong"}.items():
        seen[name] = json.loads(run_python(code, token=token, home=tmp_path / name).stdout)
    nowhere = {"file": "RemoteEntryNotFoundError 404", "revision": "RevisionNotFoundError 404"}
    ok = dict.fromkeys(("private", "gated", "gated card", "check", "write", "create"), "OK")
    assert seen["owner"] == {**ok, **nowhere, "missing": "RepositoryNotFoundError 404"}
    assert seen["other"] == {
        **nowhere,
        "private": "RepositoryNotFoundError 404",
        "gated": "GatedRepoError 403",
        "gated card": "OK",
        "check": "GatedRepoError 403",
        "missing": "RepositoryNotFoundError 404",
        "write": "HfHubHTTPError 403",
        "create": "HfHubHTTPError 403",
    }
    assert seen["nobody"] == {
        **nowhere,
        "private": "RepositoryNotFoundError 401",
        "gated": "GatedRepoError 401",
        "gated card": "OK",
        "check": "GatedRepoError 401",
        "missing": "RepositoryNotFoundError 401",
        "write": "HfHubHTTPError 401",
        "create": "HfHubHTTPError 401",
    }
    assert set(seen["wrong"].values()) == {"HfHubHTTPError 401"}


# a reset shows in whatever the client is doing just then;
# how often the client itself tries: http_backoff makes 6 attempts, other calls 1
@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "storage", "commit"),
    [
        (401, (1, ["RuntimeError", "HfHubHTTPError 401"]), (1, ["HfHubHTTPError 401"])),
        (404, (1, ["RuntimeError", "HfHubHTTPError 404"]), (1, ["HfHubHTTPError 404"])),
        (409, (1, ["RuntimeError", "HfHubHTTPError 409"]), (1, ["HfHubHTTPError 409"])),
        (429, (6, ["RuntimeError", "HfHubHTTPError 429"]), (1, ["HfHubHTTPError 429"])),
        (500, (6, ["RuntimeError", "HfHubHTTPError 500"]), (1, ["HfHubHTTPError 500"])),
        (
            "reset",
            (6, ["RuntimeError", "ReadError|WriteError|RemoteProtocolError"]),
            (1, ["ReadError|WriteError|RemoteProtocolError"]),
        ),
        ("slow", (1, ["OK"]), (1, ["OK"])),
    ],
)
def test_faults_during_an_upload_and_the_next_attempt(hub, run_python, tmp_path, what, storage, commit) -> None:
    hub.add_repo("tester/student")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_bytes(bytes(2_000_000))
    faults = [
        hub.fail(what, path, times=times, seconds=0.2)
        for path, (times, _) in (("/lfs-storage/", storage), ("/commit/", commit))
    ]
    code = """
import json, sys
from huggingface_hub import HfApi
upload = lambda: HfApi().upload_folder(repo_id="tester/student", folder_path=sys.argv[1])
print(json.dumps([attempt(upload) for _ in range(3)]))
"""
    attempts = json.loads(run_python(CHAIN + code, tmp_path / "student").stdout)
    assert [fault.hits for fault in faults] == [storage[0], commit[0]]
    for seen, (_, expected) in zip(attempts, (storage, commit), strict=False):
        assert all(part in wanted.split("|") for part, wanted in zip(seen, expected, strict=False)), attempts
    assert attempts[2] == ["OK"]
    assert hub.files("tester/student") == {"model.safetensors": bytes(2_000_000)}
    assert [commit.title for commit in hub.repos["model", "tester/student"].commits.values()][1:] == [
        "Upload folder using huggingface_hub"
    ]


@pytest.mark.slow
def test_faults_while_creating_a_repository(hub, run_python) -> None:
    for what in (409, 401, 429, "reset", 500):  # the newest counts first
        hub.fail(what, "repos/create", times=1)
    code = """
import json
from huggingface_hub import HfApi
print(json.dumps([attempt(lambda: HfApi().create_repo("tester/new", exist_ok=True)) for _ in range(7)]))
"""
    attempts = json.loads(run_python(CHAIN + code).stdout)
    # a conflict means that the repository exists, so exist_ok is content with it
    expected = ["HfHubHTTPError 500", "ReadError", "HfHubHTTPError 429", "HfHubHTTPError 401", "OK", "OK", "OK"]
    assert [parts[0] for parts in attempts] == expected
    assert list(hub.repos) == [("model", "tester/new")]
    assert [r.status for r in hub.requests if "create" in r.path] == [500, "reset", 429, 401, 409, 200, 409]


@pytest.mark.slow
def test_transformers_and_datasets_round_trip_and_faults(hub, run_python) -> None:
    # how often each is asked for: at once, then patiently (6 attempts) before the client gives up
    download_faults = {"401": (401, 1), "429": (429, 7), "500": (500, 7), "reset": ("reset", 2)}
    for name, (what, times) in download_faults.items():
        hub.add_repo(f"tester/m{name}", {"config.json": b'{"model_type": "segformer"}'})
        hub.add_repo(f"tester/d{name}", {"train.csv": b"x\n1\n2\n"}, kind="dataset")
        hub.fail(what, f"tester/m{name}/resolve/.*/config.json", times=times)
        hub.fail(what, f"datasets/tester/d{name}/resolve/.*train.csv", times=times)
    code = """
import json, sys
import datasets, numpy as np, torch
from datasets import Dataset, DatasetDict, load_dataset
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
sizes = dict(hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8)
model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=3, **sizes)).eval()
model.push_to_hub("tester/teacher")
SegformerImageProcessor(size=32).push_to_hub("tester/teacher")
loaded = AutoModelForSemanticSegmentation.from_pretrained("tester/teacher").eval()
pixels = torch.rand(1, 3, 32, 32)
assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
# equal weights at other addresses may take other kernels
torch.testing.assert_close(model(pixels).logits, loaded(pixels).logits, rtol=1e-4, atol=1e-4)
assert AutoImageProcessor.from_pretrained("tester/teacher").size["height"] == 32

def rows(count, seed):
    random = np.random.default_rng(seed)
    images = [Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
    masks = [Image.fromarray(random.integers(0, 3, (16, 16), dtype=np.uint8)) for _ in range(count)]
    return Dataset.from_dict({"image": images, "label": masks})

pushed = DatasetDict(train=rows(6, 0), validation=rows(4, 1))
pushed.push_to_hub("tester/scenes", num_shards={"train": 2, "validation": 2})
found = load_dataset("tester/scenes")
for split in pushed:
    assert np.array_equal(*(np.stack([np.array(row["label"]) for row in data[split]]) for data in (pushed, found)))
stream = load_dataset("tester/scenes", split="train", streaming=True)
assert stream.num_shards == 2
assert np.array_equal(np.stack([row["label"] for row in stream]), np.stack([row["label"] for row in pushed["train"]]))
converted = load_dataset("tester/converted", revision="refs/convert/parquet", data_files={"val": "default/val/*.parquet"})
assert converted["val"]["x"][:] == [1, 2, 3]

def twice(call):
    return [attempt(call), attempt(call)]

faults = sys.argv[1:]
print(json.dumps({
    "model": {name: twice(lambda: AutoConfig.from_pretrained(f"tester/m{name}")) for name in faults},
    "data": {name: twice(lambda: load_dataset(f"tester/d{name}")) for name in faults},
}))
"""
    hub.add_repo("tester/converted", {"script.py": b""}, kind="dataset")
    hub.add_files(
        "tester/converted", {"default/val/0000.parquet": parquet([1, 2, 3])}, "refs/convert/parquet", kind="dataset"
    )
    seen = json.loads(run_python(CHAIN + code, *download_faults).stdout.splitlines()[-1])
    shards = {f"data/{split}-0000{i}-of-00002.parquet" for split in ("train", "validation") for i in (0, 1)}
    assert set(hub.files("tester/scenes", kind="dataset")) == {*shards, "README.md"}
    assert any(request.status == 206 for request in hub.requests)  # a stream asks for ranges
    assert all(second == ["OK"] for part in seen.values() for _, second in part.values()), seen
    first = {part: {name: parts[0] for name, parts in faults.items()} for part, faults in seen.items()}
    cached = "LocalEntryNotFoundError"  # the client looks into its cache before it gives up
    assert first["model"]["401"][:2] == ["OSError", "HfHubHTTPError 401"]
    assert first["model"]["429"][:3] == ["OSError", cached, "HfHubHTTPError 429"]
    assert first["model"]["500"][:3] == ["OSError", cached, "HfHubHTTPError 500"]
    assert first["model"]["reset"][0] == "OSError" and "ConnectionResetError" in first["model"]["reset"]
    assert first["data"]["401"][0] == "HfHubHTTPError 401"
    assert {"FileNotFoundError", cached, "HfHubHTTPError 429"} <= set(first["data"]["429"])
    assert {"FileNotFoundError", cached, "HfHubHTTPError 500"} <= set(first["data"]["500"])
    assert "ReadError" in first["data"]["reset"]


def parquet(values: list[int]) -> bytes:
    """Returns a Parquet file with one column x."""
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"x": values}), sink)
    return sink.getvalue().to_pybytes()
