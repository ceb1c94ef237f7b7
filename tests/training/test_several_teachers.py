"""Several teachers: sums of their terms, what each teaches, resuming, and every refusal."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from hf_bcd import BCDTrainer
from hf_bcd.adapters import FrozenTeacher, adapt
from hf_bcd.losses.criterion import join_teachers
from hf_bcd.runs.arguments import ModelArguments
from hf_bcd.runs.reinforce import build_reinforcer, make_store
from hf_bcd.stores import Store
from hf_bcd.training.teaching import build_losses
from hf_bcd.utils.messages import UserError


BCD = {"bcd": {"channels": 16, "reduced_channels": 8, "stride": 4}}
OWN = {"seg": {"cwd": {}}, "timm": {**BCD, "pkd": {"weight": 2}}}


def teachers() -> dict[str, Any]:
    return {"seg": tiny.tiny_segformer(), "timm": tiny.tiny_timm((8, 16, 16, 32), seed=1)}


def trainer(folder: Path, teacher: Any, losses: Any, **changes: Any) -> BCDTrainer:
    return tiny.trainer(folder, teacher=teacher, losses=losses, max_steps=2, crop_size=32, **changes)


def store(folder: Path, model: Any, losses: Any, views: int = 2, **changes: Any) -> Store:
    config = tiny.config(folder, losses=losses, crop_size=32, **changes)
    make_store(folder, build_reinforcer(ModelArguments(), config, tiny.scenes(), teacher=adapt(model)), views)
    return Store(folder)


# ---- The criterion -------------------------------------------------------------------------------------------------


def test_the_joined_criterion_is_the_sum_of_those_of_each_teacher(tmp_path: Path) -> None:
    student = adapt(tiny.tiny_timm())
    losses = {"cwd": {"weight": 3}, "pkd": {}, "dist": {"decay": True}}
    args = tiny.config(tmp_path, losses=losses)
    frozen = {name: FrozenTeacher(adapt(model), tiny.ID2LABEL) for name, model in teachers().items()}
    criteria = {name: build_losses(student, teacher.adapter, args) for name, teacher in frozen.items()}
    joined = join_teachers(criteria)
    images, labels = torch.randint(0, 256, (2, 3, 32, 32)), torch.randint(0, 8, (2, 32, 32))
    output = student(images)
    seen = {name: teacher(images) for name, teacher in frozen.items()}
    task = {"loss_ce": torch.tensor(0.25)}
    for one in (joined, *criteria.values()):
        one.set_decay(2, 4)
    total, terms = joined(task, output, seen, labels)
    single = {name: criterion(task, output, seen[name], labels) for name, criterion in criteria.items()}
    expected = {f"{name}/{key}": x for name, (_, own) in single.items() for key, x in own.items() if key not in task}
    assert {k: x.item() for k, x in terms.items()} == {"loss_ce": 0.25} | {k: x.item() for k, x in expected.items()}
    assert joined.weights == {f"{name}/{key}": x for name, one in criteria.items() for key, x in one.weights.items()}
    assert joined.decays == {"seg/dist", "timm/dist"}
    torch.testing.assert_close(total, sum(one for one, _ in single.values()) - 0.25)


def test_measured_weights_of_both_teachers_are_joined(tmp_path: Path) -> None:
    args = tiny.config(tmp_path, losses={"bcd": {**BCD["bcd"], "weight": "auto"}})
    student = adapt(tiny.tiny_timm())
    joined = join_teachers({name: build_losses(student, adapt(model), args) for name, model in teachers().items()})
    assert joined.balance is not None
    assert joined.balance.terms == [f"{name}/bcd/{term}" for name in teachers() for term in ("boundary", "context")]
    assert joined.fixed_weights == {} and (joined.balance.shares > 0).all()


# ---- Training ------------------------------------------------------------------------------------------------------


def test_each_teacher_teaches_by_its_own_losses(tmp_path: Path) -> None:
    run = trainer(tmp_path, teachers(), OWN)
    run.train()
    keys = {key for key in run.state.log_history[0] if "/" in key}
    assert keys == {"seg/cwd/cwd", "timm/bcd/boundary", "timm/bcd/context", "timm/pkd/pkd"}
    assert run.distiller.criterion.weights["timm/pkd/pkd"] == 2


def test_equal_losses_hold_for_both_teachers(tmp_path: Path) -> None:
    run = trainer(tmp_path, teachers(), {"cwd": {}, **BCD})
    run.train()
    assert set(run.distiller.criterion.losses) == {"seg/cwd", "seg/bcd", "timm/cwd", "timm/bcd"}
    assert not run.distiller.criterion.needs_calibration


def test_a_run_of_one_named_teacher_is_that_of_the_teacher(tmp_path: Path) -> None:
    runs = []
    for number, teacher in enumerate((tiny.tiny_segformer(), {"seg": tiny.tiny_segformer()})):
        runs.append(trainer(tmp_path / str(number), teacher, {"cwd": {}, **BCD}))
        runs[-1].train()
    assert tiny.history(runs[0]) == tiny.history(runs[1])
    assert tiny.history(runs[0], "bcd/boundary") == tiny.history(runs[1], "seg/bcd/boundary")


def test_live_beside_stored(tmp_path: Path) -> None:
    losses = {"seg": {"cwd": {}}, "timm": {**BCD, "cwd": {}}}
    stored = store(tmp_path / "s", teachers()["timm"], losses["timm"])
    live = trainer(tmp_path / "live", teachers(), losses)
    live.train()
    mixed = trainer(tmp_path / "mixed", {"seg": teachers()["seg"], "timm": stored}, losses)
    mixed.train()
    for key in ("seg/cwd/cwd", "timm/cwd/cwd", "timm/bcd/boundary"):
        assert tiny.history(mixed, key) == pytest.approx(tiny.history(live, key), rel=0.02), key
    assert tiny.history(mixed, "seg/cwd/cwd")[0] == tiny.history(live, "seg/cwd/cwd")[0]


def test_two_stores(tmp_path: Path) -> None:
    stored = {name: store(tmp_path / name, model, OWN[name]) for name, model in teachers().items()}
    run = trainer(tmp_path / "run", stored, OWN)
    run.train()
    samples: Any = run.train_dataset
    assert set(samples[0]["stored"]) == {"seg", "timm"}
    assert {"seg/cwd/cwd", "timm/bcd/boundary"} <= set(run.state.log_history[0])


def test_a_resumed_run_is_exactly_that_without_interruption(tmp_path: Path) -> None:
    losses = {"seg": {"cwd": {}}, "timm": {**BCD, "cirkd": {}}}
    options = {"max_steps": 4, "crop_size": 32, "losses": losses, "save_strategy": "no"}
    whole = tiny.trainer(tmp_path / "whole", teacher=teachers(), **options)
    whole.train()
    cut = tiny.trainer(tmp_path / "cut", teacher=teachers(), **options)
    cut.add_callback(tiny.StopAt(2))
    cut.train()
    resumed = tiny.trainer(tmp_path / "cut", teacher=teachers(), **options)
    resumed.train(resume_from_checkpoint=True)
    states = [run.distiller.state_dict() for run in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


def test_a_checkpoint_of_another_teacher_is_refused_by_its_name(tmp_path: Path) -> None:
    run = trainer(tmp_path, teachers(), OWN, save_strategy="steps", save_steps=1)
    run.train()
    other = teachers() | {"seg": tiny.tiny_segformer(seed=5)}
    with pytest.raises(UserError, match=r"teacher\.seg\.weights is \d+ there and \d+ here"):
        tiny.trainer(tmp_path, teacher=other, losses=OWN, max_steps=4, crop_size=32).train(resume_from_checkpoint=True)


# ---- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({"segg": {"cwd": {}}, "timm": {"cwd": {}}}, "unknown teacher in losses 'segg'. Did you mean 'seg'?"),
        ({"seg": {"cwd": {}}}, "losses says nothing of the teacher 'timm'"),
        ({"seg": {"cwd": {}}, "cwd": {}}, "losses has cwd for all teachers beside the parts of seg"),
        ({"seg": {"cwd": {}}, "timm": {}}, "losses of the teacher 'timm' are {}; give it some"),
        ({"seg": {"cwdd": {}}, "timm": {"cwd": {}}}, "teacher 'seg': unknown loss 'cwdd'. Did you mean 'cwd'?"),
        ({"seg": {"cwd": {"weight": 0}}, "timm": {"cwd": {}}}, "teacher 'seg': losses is"),
        ({"cwdd": {}}, "unknown loss 'cwdd'. Did you mean 'cwd'?"),
        ({"bcdd": {"weight": {"boundary": 3}}}, "unknown loss 'bcdd'. Did you mean 'bcd'?"),
        ({"org/a": {"cwd": {}}, "you/a": {"cwd": {}}}, "the teachers org/a and you/a would both be called 'a'"),
    ],
)
def test_losses_that_fit_no_teachers(tmp_path: Path, losses: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        trainer(tmp_path, teachers(), losses)
    assert words in str(error.value)


def test_losses_with_parts_need_named_teachers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="parts for the teachers seg, timm, but there is one teacher"):
        trainer(tmp_path, tiny.tiny_segformer(), OWN)


@pytest.mark.parametrize("name", ["a/b", "a.b", "", "cwd"])
def test_names_that_losses_could_not_carry(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"a teacher is called '{name}'"):
        trainer(tmp_path, {name: tiny.tiny_segformer()}, {"cwd": {}})


def test_a_loss_that_one_teacher_cannot_serve_names_that_teacher(tmp_path: Path) -> None:
    other = tiny.tiny_timm((8, 16, 16, 32), seed=1)
    other.config.id2label = {index: f"class {index}" for index in range(8)}
    with pytest.raises(
        UserError, match="teacher 'timm': the teacher has no class for sky.*but the losses cwd compare"
    ):
        trainer(tmp_path, teachers() | {"timm": other}, {"cwd": {"on": "logits"}})


def test_inherit_needs_one_teacher(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="inherit takes weights from the teacher, but there are seg, timm"):
        trainer(tmp_path, teachers(), OWN, inherit=["head"])


@pytest.mark.parametrize(
    ("changes", "what"), [({"views": 1}, "views is 2 there and 1 here"), ({"seed": 7}, "seed is 42 there and 7 here")]
)
def test_stores_of_different_views_are_refused_with_both_named(tmp_path: Path, changes: Any, what: str) -> None:
    seg = store(tmp_path / "seg", teachers()["seg"], OWN["seg"])
    other = store(tmp_path / "timm", teachers()["timm"], OWN["timm"], **changes)
    with pytest.raises(UserError, match=f"the stored teachers .*/seg and .*/timm are of different views: {what}"):
        trainer(tmp_path / "run", {"seg": seg, "timm": other}, OWN)


def test_a_teacher_beside_the_labels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(teacher: Any, *_: Any) -> None:
        if teacher.adapter.model.config.model_type == "segformer":
            raise UserError("shifted")

    monkeypatch.setattr("hf_bcd.training.alignment.check_alignment", refuse)
    with pytest.raises(UserError, match="teacher 'seg': shifted"):
        trainer(tmp_path, teachers(), OWN).train()


def test_a_store_that_lacks_a_level_is_named(tmp_path: Path) -> None:
    stored = store(tmp_path / "s", teachers()["timm"], {"pkd": {}})
    losses = {"seg": {"cwd": {}}, "timm": {"fitnet": {"level": "stride_4"}}}
    with pytest.raises(UserError, match="teacher 'timm': the stored teacher .* has no level 'stride_4'"):
        trainer(tmp_path / "run", {"seg": teachers()["seg"], "timm": stored}, losses).train()
