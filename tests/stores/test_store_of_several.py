"""One store of several teachers: rows are shared, columns are each one's own, and a difference names the teacher."""

import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from hf_bcd import BCDTrainer
from hf_bcd.adapters import adapt
from hf_bcd.card import licences
from hf_bcd.data.dataset import TransformedDataset
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.runs.baseline import with_stored_teachers
from hf_bcd.runs.reinforce import Reinforcer, build_reinforcer, make_store
from hf_bcd.runs.store_report import describe_store, summary
from hf_bcd.stores import Store, StoredTeacher, writing
from hf_bcd.tasks import task_of
from hf_bcd.utils.messages import UserError


# what a fitted head stores, tests of single stores say
BCD = {"bcd": {"channels": 16, "reduced_channels": 8, "stride": 4, "teacher_head": "orthogonal"}}
LOSSES: dict[str, Any] = {"seg": {"cwd": {}, **BCD}, "timm": {**BCD, "fitnet": {}}}
VIEWS = 2


def models() -> dict[str, Any]:
    return {"seg": tiny.tiny_segformer(), "timm": tiny.tiny_timm((8, 16, 16, 32), seed=1)}


def reinforcers(folder: Path, losses: Mapping[str, Any] = LOSSES, **changes: Any) -> dict[str, Reinforcer]:
    return {
        name: build_reinforcer(
            ModelArguments(),
            tiny.config(folder, losses=own, crop_size=32, **changes),
            tiny.scenes(),
            teacher=adapt(models()[name]),
        )
        for name, own in losses.items()
    }


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "s"
    make_store(folder, reinforcers(folder), VIEWS)
    return folder


def trainer(folder: Path, teacher: Any, losses: Any = LOSSES, **changes: Any) -> BCDTrainer:
    return tiny.trainer(folder, teacher=teacher, losses=losses, max_steps=2, **{"crop_size": 32, **changes})


def test_lossless_targets_of_both_teachers_are_theirs_bit_for_bit(tmp_path: Path) -> None:
    made = reinforcers(tmp_path)
    make_store(tmp_path / "s", made, VIEWS, "exact")
    store = Store(tmp_path / "s")
    run = trainer(tmp_path / "r", store)
    dataset = made["seg"].dataset
    for view in range(VIEWS):
        dataset.set_epoch(view)
        run.train_dataset.set_epoch(view)
        pair = range(2)  # the batch that was stored: kernels may round otherwise for another number of pictures
        live = task_of(dataset).collate([dataset[index] for index in pair])
        batch = run.data_collator([run.train_dataset[index] for index in pair])
        assert torch.equal(batch["pixel_values"], live["pixel_values"])
        for name, part in made.items():
            expected = part.tensors(live)
            found = StoredTeacher(store.parts[name], name).tensors(batch)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], x.float()) for key, x in expected.items()), name
    assert not torch.equal(made["seg"].tensors(live)["logits"], made["timm"].tensors(live, ["logits"])["logits"])


def test_rows_are_written_once_with_columns_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = reinforcers(tmp_path), list[tuple[int, int]]()
    plain = TransformedDataset.view
    monkeypatch.setattr(
        TransformedDataset,
        "view",
        lambda self, index, number: seen.append((number, index)) or plain(self, index, number),
    )
    make_store(tmp_path / "s", made, VIEWS)
    rows = [(view, index) for view in range(VIEWS) for index in range(8)]
    assert seen[-len(rows) :] == rows
    assert len(seen) <= len(rows) + 2 * 8, "beside them only those by which the codecs of each are chosen"
    (path,) = (tmp_path / "s" / "data").iterdir()
    names = pyarrow.parquet.read_schema(path).names
    shared = ["index", "view", "image", "checksum", "thumbnail"]
    assert names[:5] == shared and {name.partition("/")[0] for name in names[5:]} == {"seg", "timm"}
    assert {"seg/logits", "seg/bcd/boundary", "timm/bcd/boundary", "timm/features/stride_32"} <= set(names)
    for name, part in made.items():
        make_store(tmp_path / name, part, VIEWS)
        alone, grouped = Store(tmp_path / name), Store(tmp_path / "s", teacher=name)
        assert alone.content["format"] == 1 and "teachers" not in json.loads(
            (tmp_path / name / "store.json").read_text()
        )
        assert grouped.content["columns"] == alone.content["columns"]
        for one, other in zip(alone.table, grouped.table, strict=True):
            assert one == {key.removeprefix(f"{name}/"): x for key, x in other.items()}


def test_a_store_gives_all_its_teachers_or_one(stored: Path, tmp_path: Path) -> None:
    both = trainer(tmp_path / "both", Store.open(stored))
    both.train()
    terms = {"seg/cwd/cwd", "seg/bcd/boundary", "timm/bcd/boundary", "timm/fitnet/fitnet"}
    assert terms <= set(both.state.log_history[0])
    one = trainer(tmp_path / "one", Store.open(stored / "timm"), LOSSES["timm"])
    assert set(one.train_dataset[0]["stored"]) == {""}
    one.train()
    assert tiny.history(one, "fitnet/fitnet")[0] > 0
    named = trainer(tmp_path / "named", {"other": Store.open(stored / "timm")}, {"other": LOSSES["timm"]})
    assert set(named.train_dataset[0]["stored"]) == {"other"}
    with pytest.raises(UserError, match=r"the store has no teacher 'dino', only seg, timm"):
        Store.open(stored / "dino")
    with pytest.raises(UserError, match=r"has the teachers seg, timm; choose one of its `parts`"):
        trainer(tmp_path / "wrong", {"x": Store.open(stored), "seg": models()["seg"]}, {"cwd": {}})


def test_losses_of_stored_teachers_equal_those_of_live_ones(tmp_path: Path) -> None:
    make_store(tmp_path / "s", reinforcers(tmp_path), VIEWS, "exact")
    runs = [trainer(tmp_path / "a", Store(tmp_path / "s")), trainer(tmp_path / "b", models())]
    runs[1].calibrate()
    runs[1].distiller.load_state_dict(runs[0].distiller.state_dict())
    values = []
    for run in runs:
        run.current_gradient_accumulation_steps = 1
        batch = run.data_collator([run.train_dataset[index] for index in range(4)])
        values.append(run.compute_loss(run.distiller.eval(), batch).item())
    assert values[0] == values[1]


def test_each_teachers_losses_get_what_is_kept_for_them(stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "s"))
    state = load_file(folder / "losses.safetensors")
    assert {name.partition(".")[0] for name in state} == {"seg/bcd", "timm/bcd"}
    changed = {name: x + 1 if name.startswith("timm/") and x.is_floating_point() else x for name, x in state.items()}
    save_file(changed, folder / "losses.safetensors")
    losses = trainer(tmp_path / "r", Store(folder)).distiller.criterion.by_name()
    alone = trainer(tmp_path / "a", Store.open(folder / "timm"), LOSSES["timm"]).distiller.criterion.by_name()
    for key, x in changed.items():
        name, _, part = key.partition(".")
        assert torch.equal(losses[name].state_dict()[part].cpu(), x), key
        if name == "timm/bcd":
            assert torch.equal(alone["bcd"].state_dict()[part].cpu(), x), key


def test_an_interrupted_store_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "ROWS_PER_SHARD", 3)
    made, folder = reinforcers(tmp_path), tmp_path / "s"
    make_store(folder, made, VIEWS)
    whole = list(Store(folder).table)
    paths = sorted((folder / "data").iterdir())
    paths[1].unlink()
    paths[3].write_bytes(b"half of a shard")
    before = {path: path.stat().st_mtime_ns for path in paths if path not in (paths[1], paths[3])}
    make_store(folder, made, VIEWS)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(Store(folder).table) == whole
    assert [(row["view"], row["index"]) for row in whole] == [(v, i) for v in range(VIEWS) for i in range(8)]


def _write(folder: Path, made: dict[str, Reinforcer]) -> None:
    torch.set_num_threads(1)
    make_store(folder, made, 6)


@pytest.mark.slow
def test_a_store_of_two_killed_at_ten_random_moments_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "ROWS_PER_SHARD", 4)
    made = reinforcers(tmp_path)
    make_store(tmp_path / "whole", made, 6)
    fork, moments, found = multiprocessing.get_context("fork"), random.Random(0), set[int]()
    for files in range(1, 11):  # of 12: a moment after so many are there, whatever the machine takes for them
        process = fork.Process(target=_write, args=(tmp_path / "killed", made))
        process.start()
        while process.is_alive() and len(list((tmp_path / "killed").glob("data/*.parquet"))) < files:
            time.sleep(0.001)
        process.join(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        found.add(len(list((tmp_path / "killed").glob("data/*.parquet"))))
    assert len(found) > 1, "no kill came while it wrote"
    make_store(tmp_path / "killed", made, 6)
    assert list(Store(tmp_path / "whole").table) == list(Store(tmp_path / "killed").table)
    assert not list((tmp_path / "killed" / "data").glob("*.part"))


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (
            {**LOSSES, "timm": {"bcd": {**BCD["bcd"], "radius": 2}}},
            r"with teachers\.timm\.losses .* where this one has",
        ),
        ({**LOSSES, "seg": {"cwd": {}}}, r"with teachers\.seg\.losses "),
        ({**LOSSES, "timm": BCD}, r"with teachers\.timm\.columns "),
        ({"seg": LOSSES["seg"]}, r"with teachers seg, timm, where this one has seg\. Choose another"),
    ],
)
def test_a_folder_of_other_teachers_or_losses_is_not_continued(
    stored: Path, tmp_path: Path, losses: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        make_store(stored, reinforcers(tmp_path, losses), VIEWS)


def test_a_store_without_names_is_not_continued_with_some(tmp_path: Path) -> None:
    losses = {"seg": {"cwd": {}}}
    make_store(tmp_path / "s", reinforcers(tmp_path, losses)["seg"], 1)
    with pytest.raises(UserError, match="with teachers one, where this one has seg"):
        make_store(tmp_path / "s", reinforcers(tmp_path, losses), 1)
    with pytest.raises(UserError, match="the store has no teacher 'seg', only one without a name"):
        Store.open(tmp_path / "s" / "seg")


def test_a_mismatch_names_the_teacher(stored: Path, tmp_path: Path) -> None:
    radius = {**LOSSES, "timm": {"bcd": {**BCD["bcd"], "radius": 2}}}
    with pytest.raises(
        UserError, match=r"teacher 'timm': loss 'bcd' has the options .*stored teacher \S*/s/timm has it"
    ):
        trainer(tmp_path, Store(stored), radius)
    with pytest.raises(
        UserError, match=r"stored teacher \S*/s/seg is of other views.*crop_size is 32 there and 48 here"
    ):
        trainer(tmp_path, Store(stored), crop_size=48)
    with pytest.raises(UserError, match=r"teacher 'seg': the stored teacher \S*/s/seg has no level 'stride_8'"):
        level = {"seg": {"fitnet": {"level": "stride_8"}}, "timm": LOSSES["timm"]}
        trainer(tmp_path, Store(stored), level).train()
    with pytest.raises(UserError, match="losses says nothing of the teacher 'timm'"):
        trainer(tmp_path, Store(stored), {"seg": LOSSES["seg"]})
    with pytest.raises(UserError, match=r"\S*/s/seg: view 0 of picture 0 .* is another one than the teacher saw"):
        data = tiny.scenes()["train"]
        turned = data.select([*range(1, 8), 0])
        BCDTrainer(
            tiny.tiny_timm(), Store(stored), tiny.config(tmp_path, losses=LOSSES, crop_size=32), train_dataset=turned
        )


def test_further_columns_name_their_teacher(tmp_path: Path) -> None:
    made = reinforcers(tmp_path, {"seg": {"cwd": {}}, "timm": {"cwd": {}}})
    make_store(tmp_path / "s", made, 1, columns=["timm/features/stride_8"])
    assert set(Store(tmp_path / "s").columns) == {"seg/logits", "timm/logits", "timm/features/stride_8"}
    with pytest.raises(UserError, match="--columns names 'logits'; write the teacher first, as in seg/logits"):
        make_store(tmp_path / "t", made, 1, columns=["logits"])
    with pytest.raises(UserError, match="teacher 'timm': --columns names 'features/x'"):
        make_store(tmp_path / "t", made, 1, columns=["timm/features/x"])


def test_the_card_names_every_teacher(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads((stored / "store.json").read_text())
    given = {"seg": ("nvidia/segformer-b0", "a" * 40), "timm": ("me/timm", "b" * 40)}
    for name, (repo_id, revision) in given.items():
        content["teachers"][name]["teacher"] |= {"repo_id": repo_id, "revision": revision}
    (tmp_path / "store.json").write_text(json.dumps(content))
    (tmp_path / "data").symlink_to(stored / "data")
    (tmp_path / "scores-timm.json").write_text(
        json.dumps({"split": "test", "image_size": None, "scores": {"mean_iou": 0.5}})
    )
    known = {
        "nvidia/segformer-b0": licences.KNOWN["nvidia/segformer-", "nvidia/mit-"],
        "me/timm": licences.Licence("mit", "MIT"),
    }
    monkeypatch.setattr("hf_bcd.card.store_card.licence_of", known.__getitem__)
    describe_store(tmp_path, "me/d")
    text = (tmp_path / "README.md").read_text()
    assert "teacher:nvidia/segformer-b0" in text and "teacher:me/timm" in text and "license: other" in text
    assert "What 2 teachers (" in text and "The teacher seg comes under the terms" in text
    assert (
        "- **Teacher** seg: [nvidia/segformer-b0](https://huggingface.co/nvidia/segformer-b0) @ aaaaaaaaaaaa, in"
        in text
    )
    assert (
        "- **Teacher** timm: [me/timm](https://huggingface.co/me/timm) @ bbbbbbbbbbbb, in float32; terms: MIT." in text
    )
    assert text.count("- **Its score**: ") == 1 and "50.00 on the split test" in text
    assert "of seg: bcd (" in text and "of timm: bcd (" in text
    assert "`seg/logits`" in text and "`timm/features/stride_32`" in text
    assert "seg/bcd/boundary" in summary(stored)
    assert Store(tmp_path, teacher="timm").scores("test", None) == {"mean_iou": 0.5}
    assert Store(tmp_path, teacher="seg").scores("test", None) == {}


@pytest.mark.parametrize(
    ("teacher", "given", "live", "stores"),
    [
        (None, "{s}", None, ["{s}/seg", "{s}/timm"]),
        ("me/x", "{s}", None, ["{s}/seg", "{s}/timm"]),
        (["me/seg", "me/x"], "{s}", ["me/x"], ["{s}/seg", "{s}/timm"]),
        (["me/seg", {"name_or_path": "you/timm"}], "{s}", None, ["{s}/seg", "{s}/timm"]),
        ("me/x", ["{s}", "other"], "me/x", ["{s}/seg", "{s}/timm", "other"]),
        ("me/x", "{s}/timm", "me/x", "{s}/timm"),
        ("me/x", None, "me/x", None),
    ],
)
def test_arguments_name_each_teacher_of_a_store(
    stored: Path, teacher: Any, given: Any, live: Any, stores: Any
) -> None:
    def placed(value: Any) -> Any:
        return [placed(one) for one in value] if isinstance(value, list) else value and value.format(s=stored)

    found = with_stored_teachers(ModelArguments(teacher=teacher, teacher_store=placed(given)))
    assert (found.teacher, found.teacher_store) == (live, placed(stores))
