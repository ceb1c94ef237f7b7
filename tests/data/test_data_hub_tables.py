import shutil

import datasets
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from pictures import refused
from PIL import Image

from hf_bcd.data import load_dense_dataset
from hf_bcd.data.sources.tables import hub_names, load_hub
from hf_bcd.hub.errors import HubError
from hf_bcd.runs.arguments import DataArguments
from hf_bcd.runs.experiment import load_data


LABEL = np.array([[0, 1, 2, 255]] * 2, dtype=np.uint8)
CONFIGS = "---\nconfigs:\n" + "".join(
    f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("small", "large")
)


def scenes(rows):
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    columns = {"image": [Image.new("RGB", (4, 2))] * rows, "mask": [Image.fromarray(LABEL)] * rows}
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture
def repo(tmp_path):
    root = tmp_path / "repo"
    for config, rows in (("small", 1), ("large", 2)):
        (root / config).mkdir(parents=True)
        scenes(rows).to_parquet(root / config / "train-0.parquet")
    return root


def test_one_of_several_configurations(repo):
    (repo / "README.md").write_text(CONFIGS + "---\n")
    (repo / "id2label.json").write_text('["sky", "road", "car"]')
    for config, rows in (("small", 1), ("large", 2)):
        data = load_data(DataArguments(dataset_name=str(repo), dataset_config=config))
        assert len(data["train"]) == rows and data["train"].id2label[2] == "car"
    assert len(load_dense_dataset(repo, data_dir="small")["train"]) == 1
    refused(r"repo: Config name is missing.*\['small', 'large'\]. Choose .*--dataset_config", repo)
    refused(r"'medium' not found. Available: \['small', 'large'\].*--dataset_config", repo, config="medium")


def test_repositories_that_are_no_table(repo):
    datasets.Dataset.from_dict({"number": [1]}).to_parquet(repo / "large/train-0.parquet")
    refused("repo: its files cannot be read as one table .*--dataset_config.*--data_dir", repo)
    assert len(load_dense_dataset(repo, data_dir="small")["train"]) == 1
    shutil.rmtree(repo / "large")
    info = "dataset_info:\n  splits:\n  - name: train\n    num_examples: 7\n"  # which contradicts the files
    (repo / "README.md").write_text(f"---\n{info}---\n")
    refused("repo: its files cannot be read as one table .NonMatchingSplitsSizesError: .*7", repo)
    (repo / "repo.py").write_text("raise SystemExit('this was run')\n")
    refused("repo: the data set is a loading script.*refs/convert/parquet", repo)


def test_nothing_to_read(tmp_path):
    for files, where in ((None, "found"), ({"train": "train/*.parquet"}, r"found in train/\*\.parquet")):
        with pytest.raises(
            ValueError, match=rf"no data {where}\. Expected folders {{train,val,test}}/{{images,masks}}"
        ):
            load_hub(str(tmp_path), data_files=files)
    with pytest.raises(HubError, match="data set nobody/nothing is not in the cache, and HF_HUB_OFFLINE is set"):
        load_dense_dataset("nobody/nothing")


@pytest.mark.parametrize("limits", [{"max_train_samples": 0}, {"max_eval_samples": 0}, {"max_eval_samples": -1}])
def test_limits_that_leave_nothing(limits):
    with pytest.raises(ValueError, match=r"--max_\w+ is (0|-1); take at least one image"):
        load_data(DataArguments(dataset_name="synthetic", **limits))


def test_a_part_of_a_repository_is_fetched_before_it_is_read(tmp_path, monkeypatch):
    """`datasets` would not find it again offline: the folder of the snapshot is the same, online and offline."""
    folder, asked = tmp_path / "snapshots/0a1b", []
    for split, rows in (("train", 2), ("validation", 1)):
        (folder / "part" / split).mkdir(parents=True)
        scenes(rows).to_parquet(folder / "part" / split / "0000.parquet")

    def snapshot(repo, **options):
        asked.append((repo, options))
        return str(folder)

    monkeypatch.setattr("hf_bcd.data.sources.tables.snapshot_download", snapshot)
    monkeypatch.setattr("hf_bcd.data.loading.hub_names", lambda *repo: None)
    assert load_hub("me/scenes", revision="v2", data_files={"train": "part/train/*.parquet"}).keys() == {"train"}
    data = load_dense_dataset("me/scenes", revision="v2", data_dir="part")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 2, "validation": 1}
    for patterns, call in zip((["part/train/*.parquet"], ["part/*"]), asked, strict=True):
        assert call == ("me/scenes", {"repo_type": "dataset", "revision": "v2", "allow_patterns": patterns})
    refused("me/scenes: no data found in absent. Expected", "me/scenes", data_dir="absent")


@pytest.fixture
def hub_id(monkeypatch):
    """A repository of one configuration, whose file of class names `names` holds."""
    names = {}

    def download(repo, file, **options):
        if isinstance(names["file"], Exception):
            raise names["file"]
        assert (repo, file, options) == ("me/scenes", "id2label.json", {"repo_type": "dataset", "revision": "v2"})
        return str(names["file"])

    monkeypatch.setattr("hf_bcd.data.sources.tables.hf_hub_download", download)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: scenes(2))
    return names


def test_class_names_of_the_repository(hub_id, tmp_path):
    hub_id["file"] = tmp_path / "id2label.json"
    hub_id["file"].write_text('{"0": "sky", "1": "road", "2": "car"}')
    train = load_dense_dataset("me/scenes", revision="v2")["train"]
    assert train.id2label == {0: "sky", 1: "road", 2: "car"}
    assert (train.source, train.revision) == ("me/scenes", "v2")
    given = load_dense_dataset("me/scenes", revision="v2", id2label=list("abc"))["train"]
    assert given.id2label == {0: "a", 1: "b", 2: "c"}
    hub_id["file"].write_text('["sky", "road"]')
    refused(r"me/scenes/train, row 0, column 'mask'.*ids \[2\].*num_labels=2", "me/scenes", revision="v2")


def test_class_names_that_are_not_there(hub_id, monkeypatch):
    for error in (EntryNotFoundError("none"), LocalEntryNotFoundError("offline")):
        hub_id["file"] = error
        assert load_dense_dataset("me/scenes", revision="v2")["train"].id2label[2] == "class_2"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # a connection that failed
    with pytest.raises(HubError, match="data set me/scenes: .*http"):
        hub_names("me/scenes", "v2")
