import shutil

import datasets
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image

from hf_bcd.data import load_dense_dataset
from hf_bcd.data.sources.hub_tables import hub_names, load_hub
from hf_bcd.hub.errors import HubError
from hf_bcd.runs.arguments import DataArguments
from hf_bcd.runs.experiment import load_data


LABEL = np.array([[0, 1, 2, 255]] * 2, dtype=np.uint8)
CONFIGS = """\
---
configs:
- config_name: small
  data_files: small/*.parquet
- config_name: large
  data_files: large/*.parquet
---
"""


@pytest.fixture(autouse=True)
def table_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


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
    (repo / "README.md").write_text(CONFIGS)
    for config, rows in (("small", 1), ("large", 2)):
        assert len(load_dense_dataset(repo, config=config)["train"]) == rows
    assert len(load_dense_dataset(repo, data_dir="small")["train"]) == 1
    with pytest.raises(
        ValueError, match=r"repo: Config name is missing.*\['small', 'large'\]. Choose .*--dataset_config"
    ):
        load_dense_dataset(repo)
    with pytest.raises(ValueError, match=r"'medium' not found. Available: \['small', 'large'\].*--dataset_config"):
        load_dense_dataset(repo, config="medium")


def test_configurations_that_nothing_keeps_apart(repo):
    datasets.Dataset.from_dict({"number": [1]}).to_parquet(repo / "large/train-0.parquet")
    with pytest.raises(ValueError, match="repo: its files cannot be read as one table .*--dataset_config.*--data_dir"):
        load_dense_dataset(repo)
    assert len(load_dense_dataset(repo, data_dir="small")["train"]) == 1


def test_cards_that_contradict_their_files(repo):
    shutil.rmtree(repo / "large")
    info = "dataset_info:\n  splits:\n  - name: train\n    num_examples: 7\n"
    (repo / "README.md").write_text(f"---\n{info}---\n")
    with pytest.raises(
        ValueError, match="repo: its files cannot be read as one table .NonMatchingSplitsSizesError: .*7"
    ):
        load_dense_dataset(repo)


def test_loading_scripts(repo):
    (repo / "repo.py").write_text("raise SystemExit('this was run')\n")
    with pytest.raises(ValueError, match="repo: the data set is a loading script.*refs/convert/parquet"):
        load_dense_dataset(repo)


def test_nothing_to_read(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"empty: no data found\. Expected folders \{train,val,test\}/\{images,masks\}"
    ):
        load_hub(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"empty: no data found in train/\*\.parquet"):
        load_hub(str(tmp_path / "empty"), data_files={"train": "train/*.parquet"})


def test_repositories_that_are_not_in_the_cache():
    with pytest.raises(HubError, match="data set nobody/nothing is not in the cache, and HF_HUB_OFFLINE is set"):
        load_dense_dataset("nobody/nothing")


def test_arguments_of_a_run(repo):
    (repo / "README.md").write_text(CONFIGS)
    (repo / "id2label.json").write_text('["sky", "road", "car"]')
    data = load_data(DataArguments(dataset_name=str(repo), dataset_config="large"))
    assert len(data["train"]) == 2 and data["train"].id2label[2] == "car"


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

    monkeypatch.setattr("hf_bcd.data.sources.hub_tables.snapshot_download", snapshot)
    monkeypatch.setattr("hf_bcd.data.loading.hub_names", lambda *repo: None)
    assert load_hub("me/scenes", revision="v2", data_files={"train": "part/train/*.parquet"}).keys() == {"train"}
    data = load_dense_dataset("me/scenes", revision="v2", data_dir="part")
    assert {split: len(rows) for split, rows in data.items()} == {"train": 2, "validation": 1}
    for (repo, options), pattern in zip(asked, ("part/train/*.parquet", "part/*"), strict=True):
        assert repo == "me/scenes"
        assert options == {"repo_type": "dataset", "revision": "v2", "allow_patterns": [pattern]}
    with pytest.raises(ValueError, match="me/scenes: no data found in absent. Expected"):
        load_dense_dataset("me/scenes", data_dir="absent")


@pytest.fixture
def hub_id(monkeypatch):
    """A repository of one configuration, whose file of class names `names` holds."""
    names = {}

    def download(repo, file, **options):
        if isinstance(names["file"], Exception):
            raise names["file"]
        assert (repo, file, options) == ("me/scenes", "id2label.json", {"repo_type": "dataset", "revision": "v2"})
        return str(names["file"])

    monkeypatch.setattr("hf_bcd.data.sources.hub_tables.hf_hub_download", download)
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
    with pytest.raises(ValueError, match=r"me/scenes/train, row 0, column 'mask'.*ids \[2\].*num_labels=2"):
        load_dense_dataset("me/scenes", revision="v2")


@pytest.mark.parametrize("error", [EntryNotFoundError("none"), LocalEntryNotFoundError("offline")])
def test_class_names_that_the_repository_lacks(hub_id, error):
    hub_id["file"] = error
    assert load_dense_dataset("me/scenes", revision="v2")["train"].id2label[2] == "class_2"


def test_class_names_that_cannot_be_fetched(hub_id, monkeypatch):
    hub_id["file"] = LocalEntryNotFoundError("no connection")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match="data set me/scenes: .*http"):
        hub_names("me/scenes", "v2")
