"""Without labels a store is compared with its teacher: whatever was moved, sorted or computed otherwise is refused."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tiny import scenes, tiny_segformer, tiny_timm

from hf_bcd import BCDConfig, BCDTrainer
from hf_bcd.adapters import DenseAdapter, adapt
from hf_bcd.hub.errors import HubError
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.runs.reinforce import build_reinforcer, make_store
from hf_bcd.stores import Store
from hf_bcd.training import agreement
from hf_bcd.utils.messages import UserError


LOSSES = {"bcd": {"channels": 16, "reduced_channels": 8, "stride": 4}, "kd": {}, "fitnet": {}}
COMMIT = 40 * "a"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def data() -> Any:
    return scenes()["train"].without_labels()


def config(folder: Path) -> BCDConfig:
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "crop_size": 64, "calibration_images": 4}
    options |= {"dataloader_num_workers": 0, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return BCDConfig(str(folder), losses=LOSSES, eval_strategy="no", save_strategy="no", **options)


def teacher(statistics: Any = IMAGENET, seed: int = 0) -> DenseAdapter:
    """One that is sure of its classes, as trained ones are, and came from the Hub."""
    model = tiny_segformer(seed)
    model.decode_head.classifier.weight.data *= 1e4
    model.config._name_or_path, model.config._commit_hash = "someone/teacher", COMMIT
    return adapt(model) if statistics is None else type(adapt(model))(model, *statistics)


def made(folder: Path, by: DenseAdapter) -> Path:
    make_store(folder, build_reinforcer(ModelArguments(), config(folder), {"train": data()}, teacher=by), 2)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("stores") / "good", teacher())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is loaded from the Hub."""
    specs = []

    def load(spec: Any, **options: Any) -> DenseAdapter:
        specs.append(spec)
        return teacher()

    monkeypatch.setattr(agreement, "load_adapter", load)
    return specs


def train(folder: Path, store: Path) -> BCDTrainer:
    run = BCDTrainer(tiny_timm(), Store(store), config(folder), train_dataset=data())
    run.train()
    return run


def test_a_good_store_agrees_with_its_teacher(stored: Path, asked: Any, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "hf_bcd"):
        assert train(tmp_path, stored).state.global_step == 1
    assert [(spec.name_or_path, spec.revision) for spec in asked] == [("someone/teacher", COMMIT)]
    assert "not compared" not in caplog.text


def _sorted_otherwise(store: Store, name: str, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    return rows[1:] + rows[:1]


def _moved(store: Store, name: str, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """By four pixels, or a position of a coarser map."""
    return [x.roll(max(1, 4 * x.shape[-1] // 64), -1) for x in rows]


@pytest.mark.parametrize(("column", "change"), [
    ("logits", _sorted_otherwise), ("logits", _moved), ("bcd/levels/stride_8", _moved), ("bcd/boundary", _moved),
    ("features/stride_32", _sorted_otherwise),
])  # fmt: skip
def test_columns_that_lie_beside_their_views_are_refused(
    column: str, change: Callable[..., Any], stored: Path, asked: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "copy"))
    store, (path,) = Store(folder), (folder / "data").glob("*.parquet")
    kept, table = store.columns[column], pyarrow.parquet.read_table(path)
    parts = [kept.unpack(value) for value in table[column].to_pylist()]
    rows = [kept.restore({name: x[None] for name, x in one.items()})[0] for one in parts]
    packed = [kept.pack(x) for x in change(store, column, rows)]
    place = table.column_names.index(column)
    pyarrow.parquet.write_table(table.set_column(place, column, pa.array(packed, pa.binary())), path)
    with pytest.raises(UserError, match=f"not what its teacher someone/teacher says of 4 .* {column} differs by"):
        train(tmp_path / "run", folder)


def test_another_normalisation_is_refused(asked: Any, tmp_path: Path) -> None:
    other = teacher(((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    with pytest.raises(UserError, match="logits differs by"):
        train(tmp_path / "run", made(tmp_path / "s", other))


def test_other_weights_are_named(asked: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="The weights there are not those that made the store"):
        train(tmp_path / "run", made(tmp_path / "s", teacher(seed=1)))


def test_a_teacher_that_is_gone_is_named_and_training_goes_on(
    stored: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    def gone(*args: Any, **options: Any) -> DenseAdapter:
        raise HubError("model someone/teacher: there is no such repository.")

    monkeypatch.setattr(agreement, "load_adapter", gone)
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path, stored).state.global_step == 1
    said = [record.getMessage() for record in caplog.records if "not compared" in record.getMessage()]
    assert len(said) == 1
    assert "there is no such repository" in said[0]


def test_with_labels_the_teacher_is_not_loaded(asked: Any, tmp_path: Path) -> None:
    labelled = scenes()["train"]
    made_of = build_reinforcer(ModelArguments(), config(tmp_path), {"train": labelled}, teacher=teacher())
    make_store(tmp_path / "s", made_of, 2)
    BCDTrainer(tiny_timm(), Store(tmp_path / "s"), config(tmp_path / "r"), train_dataset=labelled).train()
    assert asked == []
