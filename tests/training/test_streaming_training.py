"""Training on a stream: exact resuming, calibration, recipes and what BCDTrainer refuses."""

import itertools
from pathlib import Path

import datasets
import pytest
import tiny
import torch

from hf_bcd import BCDTrainer
from hf_bcd.adapters.specs import ModelSpec
from hf_bcd.data import DenseDatasets
from hf_bcd.runs.arguments import DataArguments, parse_arguments
from hf_bcd.runs.baseline import recipe_of, train_or_reuse
from hf_bcd.runs.experiment import load_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def streamed(folder: Path, **options) -> DenseDatasets:
    return load_data(DataArguments(dataset_name=str(folder), streaming=True, shuffle_buffer=3, **options))


def parameters(run: BCDTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.distiller.state_dict().items()}


@pytest.mark.slow
def test_resuming_continues_the_stream_bit_for_bit(tmp_path: Path) -> None:
    data = streamed(tiny.parquet_scenes(tmp_path / "d", [3, 2]))
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 3}
    whole = tiny.trainer(tmp_path / "whole", data=data, **options)
    whole.train()
    resumed = tiny.trainer(tmp_path / "resumed", model=tiny.tiny_timm(seed=5), data=data, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert tiny.history(resumed)[-2:] == tiny.history(whole)[-2:]
    expected = parameters(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters(resumed).items())


def test_calibration_takes_the_first_images_whatever_the_rank(tmp_path: Path) -> None:
    data = streamed(tiny.parquet_scenes(tmp_path / "d", [3, 2]))
    run = tiny.trainer(tmp_path / "run", data=data)
    stream, calls = run.train_dataset, []
    run.distiller.criterion.calibrate = lambda batches, progress: calls.extend(batches)
    run.calibrate()
    labels = torch.cat([targets.ids for _, targets in calls])
    first = stream.for_rank(1, 2, 0).first(4)
    assert torch.equal(labels, torch.stack([sample["labels"] for sample in first]))


def test_a_model_trained_on_a_stream_is_reused_for_the_same_data(tmp_path: Path) -> None:
    folder = tiny.parquet_scenes(tmp_path / "d", [3, 2])
    spec = ModelSpec(backbone="resnet10t", head="fpn", options={"head_channels": 8})
    data, config = streamed(folder), tiny.config(tmp_path / "run" / "_baseline", max_steps=1)
    assert recipe_of(spec, config, data)["data.images"] is None
    train_or_reuse("baseline", spec, config, data)
    train_or_reuse("baseline", spec, config, streamed(folder))
    other = streamed(tiny.parquet_scenes(tmp_path / "other" / "d", [3, 2], seed=9))
    with pytest.raises(ValueError, match="data.first_image"):
        train_or_reuse("baseline", spec, config, other)


def test_sample_limits_cut_the_stream(tmp_path: Path) -> None:
    data = streamed(tiny.parquet_scenes(tmp_path / "d", [3, 2], validation=3), max_train_samples=2, max_eval_samples=1)
    assert len(list(data["train"])) == 2 and len(data["validation"]) == 1


def test_accelerate_divides_nothing_a_second_time(tmp_path: Path) -> None:
    data = streamed(tiny.parquet_scenes(tmp_path / "d", [3, 2]))
    loader = tiny.trainer(tmp_path / "run", data=data).get_train_dataloader()
    assert type(loader).__name__ == "DataLoaderShard"
    indices = [batch["index"].tolist() for batch in itertools.islice(loader, 4)]
    assert indices == [[0, 1], [2, 3], [4, 0], [1, 2]], "the next epoch begins within a batch"


def test_streams_without_an_end_need_max_steps_and_cannot_be_evaluated(tmp_path: Path) -> None:
    arguments = ["--dataset_name", "no/such", "--streaming", "--max_steps", "-1", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="max_steps is -1, but a stream has no end"):
        parse_arguments(arguments)
    data = streamed(tiny.parquet_scenes(tmp_path / "d", [3, 2]))
    with pytest.raises(ValueError, match="max_steps"):
        tiny.trainer(tmp_path / "run", data=data, max_steps=-1, num_train_epochs=1)
    with pytest.raises(ValueError, match="eval_dataset is a stream of d"):
        BCDTrainer(model=tiny.tiny_timm(), args=tiny.config(tmp_path / "run"), eval_dataset=data["train"])
