"""Stores: what they give is what the teacher would, and every other view, order or teacher is refused."""

import contextlib
import copy
import json
import multiprocessing
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tiny import boxes, scenes, tiny_detector, tiny_segformer, tiny_timm

from hf_bcd import BCDConfig, BCDTrainer
from hf_bcd.adapters import adapt
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.runs.reinforce import Reinforcer, build_reinforcer, make_store
from hf_bcd.stores import Store, StoredTeacher, writing
from hf_bcd.stores.codecs import filtered
from hf_bcd.stores.store import fingerprint
from hf_bcd.tasks import task_of
from hf_bcd.utils.messages import UserError


BCD = {"bcd": {"channels": 16, "reduced_channels": 8, "stride": 4}}
VIEWS = 2


def config(folder: Path, losses: Any, **changes: Any) -> BCDConfig:
    options = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "crop_size": 32,
        "dataloader_num_workers": 0,
        "report_to": "none",
    }
    options |= {
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "calibration_images": 4,
        "use_cpu": True,
    }
    return BCDConfig(output_dir=str(folder), losses=losses, **{**options, **changes})


def reinforcer(folder: Path, losses: Any, **changes: Any) -> Reinforcer:
    return build_reinforcer(
        ModelArguments(), config(folder, losses, **changes), scenes(), teacher=adapt(tiny_segformer())
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store for bcd, cwd and fitnet."""
    folder = tmp_path_factory.mktemp("stores") / "compact"
    make_store(folder, reinforcer(folder, {**BCD, "cwd": {}, "fitnet": {}}), VIEWS)
    return folder


def trainer(folder: Path, teacher: Any, losses: Any, **changes: Any) -> BCDTrainer:
    return BCDTrainer(tiny_timm(), teacher, config(folder, losses, **changes), train_dataset=scenes()["train"])


@pytest.fixture
def copied(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "copy"))


def test_a_lossless_store_gives_what_the_teacher_gives_bit_for_bit(tmp_path: Path) -> None:
    made = reinforcer(tmp_path, {**BCD, "cwd": {}, "fitnet": {}})
    make_store(tmp_path / "s", made, VIEWS, "exact")
    store = Store(tmp_path / "s")
    teacher, task = StoredTeacher(store), task_of(made.dataset)
    run = trainer(tmp_path / "r", store, {**BCD, "cwd": {}, "fitnet": {}})
    for epoch in range(3):
        made.dataset.set_epoch(epoch % VIEWS)
        run.train_dataset.set_epoch(epoch)
        batch = run.data_collator([run.train_dataset[index] for index in range(4)])
        live = task.collate([made.dataset[index] for index in range(4)])
        assert torch.equal(batch["pixel_values"], live["pixel_values"])
        assert torch.equal(batch["labels"], live["labels"])
        expected, found = made.tensors(live), teacher.for_batch(batch)
        level = next(iter(found.features))
        assert torch.equal(found.logits, expected["logits"])
        assert torch.equal(found.features[level], expected[f"features/{level}"])
        assert found.digest.keys() == {key for key in expected if key.startswith("bcd/")}
        for key, x in found.digest.items():
            assert torch.equal(x, expected[key].float()), key


@pytest.mark.parametrize(
    "losses", [{**BCD, "cwd": {}, "fitnet": {}}, {"bcd": {**BCD["bcd"], "teacher_head": "logits"}}]
)
def test_losses_of_a_lossless_store_equal_those_of_the_teacher(losses: dict[str, Any], tmp_path: Path) -> None:
    make_store(tmp_path / "s", reinforcer(tmp_path, losses), VIEWS, "exact")
    stored, live = (
        trainer(tmp_path / "a", Store(tmp_path / "s"), losses),
        trainer(tmp_path / "b", tiny_segformer(), losses),
    )
    live.calibrate()
    live.distiller.load_state_dict(stored.distiller.state_dict())
    values = []
    for run in (stored, live):
        batch = run.data_collator([run.train_dataset[index] for index in range(4)])
        run.current_gradient_accumulation_steps = 1
        values.append(run.compute_loss(run.distiller.eval(), batch))
    assert values[0].item() == values[1].item()


def test_a_compact_store_is_small_and_close(stored: Path, tmp_path: Path) -> None:
    store = Store(stored)
    codecs = {name: column.codec.partition(":")[0] for name, column in store.columns.items()}
    assert codecs == {
        "bcd/boundary": "bits", "logits": "scores", "features/stride_32": "int8",
        **{f"bcd/levels/stride_{stride}": "even" for stride in (4, 8, 16, 32)},
    }  # fmt: skip
    assert all(column["error"] < 0.02 for column in store.content["columns"].values())
    run = trainer(tmp_path, store, {**BCD, "cwd": {}})
    run.train()
    assert run.state.global_step == 4
    loader = run.get_train_dataloader()
    assert {"stored", "pixel_values", "labels"} <= set(next(iter(loader)))


def test_the_teacher_is_not_loaded(stored: Path) -> None:
    teacher = StoredTeacher(Store(stored))
    assert all(parameter.is_meta for parameter in teacher.adapter.parameters())
    assert teacher.adapter.feature_specs == adapt(tiny_segformer()).feature_specs
    assert teacher.label_map is not None
    assert teacher.label_map.is_identity


def test_epochs_show_the_views_in_turn(stored: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, Store(stored), BCD)
    views = []
    for epoch in range(2 * VIEWS):
        run.train_dataset.set_epoch(epoch)
        views.append(run.train_dataset[3]["pixel_values"])
    assert torch.equal(views[0], views[VIEWS])
    assert not torch.equal(views[0], views[1])


def rewritten(folder: Path, change: Any) -> None:
    """Changes the rows of a store's only shard."""
    (path,) = (folder / "data").glob("*.parquet")
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(change(table), path)


def test_rows_in_another_order_are_noticed(copied: Path, tmp_path: Path) -> None:
    rewritten(copied, lambda table: table.take(list(reversed(range(len(table))))))
    with pytest.raises(UserError, match="sorted otherwise"):
        trainer(tmp_path, Store(copied), BCD)


def test_another_picture_is_noticed(stored: Path) -> None:
    store, seen = Store(stored), trainer(stored, Store(stored), BCD).train_dataset[1]["pixel_values"]
    store.read(1, 0, fingerprint(seen))
    rounded = seen.clone()
    rounded[:, ::7, ::5] ^= 1  # what another decoder may do
    store.read(1, 0, fingerprint(rounded))
    for other in (seen.flip(2), seen.roll(4, 2), seen.roll(4, 1), seen // 2):
        with pytest.raises(UserError, match="is another one than the teacher saw"):
            store.read(1, 0, fingerprint(other))


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"crop_size": 48}, "crop_size is 32 there and 48 here"), ({"scale_max": 3.0}, "scale_max is 2.0 there and 3.0"),
     ({"color_jitter": 0.0}, "color_jitter"), ({"image_size": 40}, "image_size")],
)  # fmt: skip
def test_another_transform_is_named(stored: Path, tmp_path: Path, changes: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        trainer(tmp_path, Store(stored), BCD, **changes)


def test_views_of_other_code_are_named(copied: Path, tmp_path: Path) -> None:
    content = json.loads((copied / "store.json").read_text())
    assert content["transform"].pop("views_version") == 1
    (copied / "store.json").write_text(json.dumps(content))
    trainer(tmp_path, Store(copied), BCD)  # older than the number
    content["transform"]["views_version"] = 0
    (copied / "store.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="views_version is 0 there and 1 here"):
        trainer(tmp_path, Store(copied), BCD)


def test_other_pictures_and_classes_are_named(stored: Path, tmp_path: Path) -> None:
    data = scenes(train=6)["train"]
    with pytest.raises(UserError, match="unlabelled is 0 there and 8 here"):
        hidden = scenes()["train"].without_labels()
        BCDTrainer(tiny_timm(), Store(stored), config(tmp_path, BCD), train_dataset=hidden)
    with pytest.raises(UserError, match="images is 8 there and 6 here"):
        BCDTrainer(tiny_timm(), Store(stored), config(tmp_path, BCD), train_dataset=data)


def test_the_seed_of_a_run_does_not_change_the_views(stored: Path, tmp_path: Path) -> None:
    first, second = (trainer(tmp_path, Store(stored), BCD, seed=seed).train_dataset[0] for seed in (1, 2))
    assert torch.equal(first["pixel_values"], second["pixel_values"])


def test_losses_that_need_a_running_teacher_are_refused(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'crosskd' needs head of a teacher that runs"):
        trainer(tmp_path, Store(stored), {"crosskd": {}})
    with pytest.raises(UserError, match="'crosskd' needs head of a teacher that runs"):
        reinforcer(tmp_path, {"crosskd": {}})


def test_options_that_the_store_was_not_made_for_are_named(stored: Path, tmp_path: Path) -> None:
    for other in ({"radius": 2}, {"reduced_channels": 4}):
        ((key, value),) = other.items()
        with pytest.raises(UserError, match=f"loss 'bcd' has the options .*'{key}': {value}"):
            trainer(tmp_path, Store(stored), {"bcd": {**BCD["bcd"], **other}})
    trainer(
        tmp_path, Store(stored), {"bcd": {**BCD["bcd"], "kappa": 1.0, "weight": {"boundary": 1}}}
    )  # the student's side


def test_a_level_that_is_not_stored_is_named_before_training(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no level 'stride_8', only stride_32"):
        trainer(tmp_path, Store(stored), {"fitnet": {"level": "stride_8"}}).train()


def test_further_columns_are_stored_when_asked_for(tmp_path: Path) -> None:
    make_store(tmp_path / "s", reinforcer(tmp_path, {"cwd": {}}), 1, columns=["features/stride_8"])
    assert set(Store(tmp_path / "s").columns) == {"logits", "features/stride_8"}
    with pytest.raises(UserError, match=r"--columns names 'features/x'; this teacher has .*features/stride_4"):
        make_store(tmp_path / "t", reinforcer(tmp_path, {"cwd": {}}), 1, columns=["features/x"])


def test_an_interrupted_store_goes_on_without_a_torn_or_doubled_row(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(writing, "ROWS_PER_SHARD", 3)
    made, folder = reinforcer(tmp_path, {"cwd": {}}), tmp_path / "s"
    plain = writing.pyarrow.parquet.write_table
    written: list[Path] = []

    def fail_later(table: Any, path: Path, **options: Any) -> None:
        if len(written) == 2:
            path.write_bytes(b"half of a shard")
            raise KeyboardInterrupt
        plain(table, path, **options)
        written.append(path)

    monkeypatch.setattr(writing.pyarrow.parquet, "write_table", fail_later)
    with pytest.raises(KeyboardInterrupt):
        make_store(folder, made, VIEWS)
    with pytest.raises(UserError, match="4 of 6 files are missing.*goes on where it stopped"):
        Store(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("data/*.parquet")}
    monkeypatch.setattr(writing.pyarrow.parquet, "write_table", plain)
    make_store(folder, made, VIEWS)
    store = Store(folder)
    assert [(row["view"], row["index"]) for row in store.table] == [(v, i) for v in range(VIEWS) for i in range(8)]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    make_store(tmp_path / "whole", made, VIEWS)
    whole = Store(tmp_path / "whole")
    assert [row["logits"] for row in store.table] == [row["logits"] for row in whole.table]


def test_a_folder_of_another_store_is_not_continued(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds a store with views 2, where this one has 3"):
        make_store(copied, reinforcer(tmp_path, {**BCD, "cwd": {}, "fitnet": {}}), 3)


def test_what_is_no_store_is_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no stored teacher: store.json is missing"):
        Store(tmp_path)
    content = json.loads((copied / "store.json").read_text())
    (copied / "store.json").write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(UserError, match="format 99, but this version reads 1 and 2"):
        Store(copied)


def test_stores_that_keep_relation_features_are_read(tmp_path: Path) -> None:
    """As they were made before levels were kept: `principal:r` in steps of 1/16, and options without `reduced_channels`."""
    make_store(tmp_path / "s", reinforcer(tmp_path, BCD), VIEWS, "exact")
    new, old = Store(tmp_path / "s"), Path(shutil.copytree(tmp_path / "s", tmp_path / "old"))
    run = trainer(tmp_path / "a", new, BCD)
    bcd = run.distiller.criterion.by_name()["bcd"]
    packed = []
    for row in new.table:
        parts = {name: column.unpack(row[name]) for name, column in new.columns.items()}
        kept = {name: new.columns[name].restore({"x": one["x"][None]}) for name, one in parts.items()}
        levels = (bcd._relations(kept, kept["bcd/boundary"].shape[-2:])[0] * 16).round().to(torch.int8).numpy()
        packed.append(pyarrow.Codec("zstd").compress(filtered(levels).tobytes(), asbytes=True))
    names = [name for name in new.columns if name != "bcd/boundary"]

    def change(table: Any) -> Any:
        return table.drop_columns(names).append_column("bcd/relation", pyarrow.array(packed, pyarrow.binary()))

    rewritten(old, change)
    content = json.loads((old / "store.json").read_text())
    kept = {"codec": "principal:16", "shape": [16, *levels.shape[1:]], "error": 0.01, "measure": "KL"}
    content["columns"] = {"bcd/boundary": content["columns"]["bcd/boundary"], "bcd/relation": kept}
    del content["losses"]["bcd"]["reduced_channels"]
    (old / "store.json").write_text(json.dumps(content))
    values = []
    for each in (run, trainer(tmp_path / "b", Store(old), BCD)):
        each.distiller.load_state_dict(run.distiller.state_dict())
        batch = each.data_collator([each.train_dataset[index] for index in range(4)])
        each.current_gradient_accumulation_steps = 1
        values.append(each.compute_loss(each.distiller.eval(), batch).item())
    assert values[0] == pytest.approx(values[1], rel=1e-2)
    assert values[0] != values[1]


def test_a_run_goes_on_with_the_same_store_only(stored: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, Store(stored), BCD, save_strategy="steps", save_steps=2)
    run.train()
    key = copy.deepcopy(run._key())
    live = trainer(tmp_path, tiny_segformer(seed=1), BCD)
    assert live._key()["teacher.weights"] != key["teacher.weights"]


def padded_otherwise(dataset: Any, index: int, view: int, monkeypatch: Any) -> torch.Tensor:
    from torchvision import tv_tensors

    from hf_bcd.data import transforms

    monkeypatch.setitem(transforms.PADDING, tv_tensors.Image, [0, 0, 0])
    pixel_values = dataset.view(index, view)["pixel_values"]
    monkeypatch.undo()
    return pixel_values


def test_forty_injected_faults_are_all_caught(stored: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A shift of 4 pixels, a flip, a wrong normalisation, other padding and another order, for each of eight pictures."""
    store = Store(stored)
    dataset = trainer(tmp_path, store, BCD).train_dataset
    caught = 0
    for index in range(8):
        view = next(
            (v for v in range(VIEWS) if not torch.equal(padded_otherwise(dataset, index, v, monkeypatch), dataset.view(index, v)["pixel_values"])),
            None,
        )  # fmt: skip
        right = dataset.view(index, 0)["pixel_values"]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        wrong = [
            right.roll(4, 2 - index % 2), right.flip(2), ((right / 255 - 0.45) / std).clamp(0, 255).to(torch.uint8),
            dataset.view((index + 1) % 8, 0)["pixel_values"],
        ]  # fmt: skip
        seen = [(0, pixels) for pixels in wrong]
        if view is not None:
            seen.append((view, padded_otherwise(dataset, index, view, monkeypatch)))
        else:  # no view of it is padded, so that padding cannot be wrong
            caught += 1
        for number, pixels in seen:
            with pytest.raises(UserError, match="another one than the teacher saw"):
                store.read(index, number, fingerprint(pixels))
            caught += 1
    assert caught == 40


def _write(folder: Path, made: Reinforcer) -> None:
    torch.set_num_threads(1)
    make_store(folder, made, 6)


@pytest.mark.slow
def test_a_store_killed_at_ten_random_moments_is_the_same_as_one_that_was_not(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(writing, "ROWS_PER_SHARD", 4)
    made = reinforcer(tmp_path, {**BCD, "cwd": {}})
    make_store(tmp_path / "whole", made, 6)
    fork, moments = multiprocessing.get_context("fork"), random.Random(0)
    for _ in range(10):
        process = fork.Process(target=_write, args=(tmp_path / "killed", made))
        process.start()
        process.join(moments.uniform(0.05, 0.6))
        process.kill()
        process.join()
    make_store(tmp_path / "killed", made, 6)
    whole, killed = Store(tmp_path / "whole"), Store(tmp_path / "killed")
    assert list(whole.table) == list(killed.table)
    assert not list((tmp_path / "killed" / "data").glob("*.part"))


def test_processes_divide_a_store(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(writing, "ROWS_PER_SHARD", 4)
    made = reinforcer(tmp_path, {"cwd": {}})
    make_store(tmp_path / "alone", made, VIEWS)
    written: list[set[str]] = []
    for rank in range(3):
        monkeypatch.setattr(type(made.config), "process_index", property(lambda self, rank=rank: rank))
        monkeypatch.setattr(type(made.config), "world_size", property(lambda self: 3))
        monkeypatch.setattr(type(made.config), "main_process_first", lambda self, desc="": contextlib.nullcontext())
        before = {path.name for path in (tmp_path / "s" / "data").glob("*.parquet")}
        make_store(tmp_path / "s", made, VIEWS)
        written.append({path.name for path in (tmp_path / "s" / "data").glob("*.parquet")} - before)
    assert [len(names) for names in written] == [2, 1, 1]
    assert list(Store(tmp_path / "s").table) == list(Store(tmp_path / "alone").table)


def test_detectors_are_stored_too_where_pictures_have_one_size(tmp_path: Path) -> None:
    losses = {"pkd": {"features": "pyramid"}, "bcd": {**BCD["bcd"], "stride": 8, "features": "pyramid"}}
    data, teacher = boxes(), adapt(tiny_detector(seed=1))
    sizes = {"crop_size": 512, "max_steps": 2}
    square = config(tmp_path, losses, square_size=64, **sizes)
    make_store(tmp_path / "s", build_reinforcer(ModelArguments(), square, data, teacher=teacher), VIEWS)
    store = Store(tmp_path / "s")
    assert {name.partition("/")[0] for name in store.columns} == {"pyramid", "bcd"}
    run = BCDTrainer(tiny_detector(), store, square, train_dataset=data["train"])
    run.train()
    assert run.state.global_step == 2
    loose = config(tmp_path, losses, image_size=48, image_longest=64, train_shortest=[32, 48], **sizes)
    with pytest.raises(UserError, match="the views differ in size"):
        make_store(tmp_path / "t", build_reinforcer(ModelArguments(), loose, data, teacher=teacher), VIEWS)


def test_pictures_without_labels_are_stored_and_mixed_in(tmp_path: Path) -> None:
    data = scenes()["train"]
    mixed = data.select(range(4)).with_unlabelled(data.select(range(4, 8)).without_labels())
    made = build_reinforcer(
        ModelArguments(), config(tmp_path, {**BCD, "cwd": {}}), {"train": mixed}, teacher=adapt(tiny_segformer())
    )
    make_store(tmp_path / "s", made, VIEWS)
    run = BCDTrainer(tiny_timm(), Store(tmp_path / "s"), config(tmp_path, {**BCD, "cwd": {}}), train_dataset=mixed)
    batch = next(iter(run.get_train_dataloader()))
    assert sorted((batch["index"] >= 4).tolist()) == [False, False, True, True]
    run.train()
    assert run.state.global_step == 4
