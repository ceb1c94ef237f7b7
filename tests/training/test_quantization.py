"""Quantised steps: the arithmetic of int8, hooks that leave the student as it is, and the end of a run."""

import os
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from processes import run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from hf_bcd import BCDConfig, BCDTrainer
from hf_bcd.export import onnx
from hf_bcd.runs.baseline import derive_config
from hf_bcd.training.quantization import FOLDER, FakeQuantizer, fake_input, fake_weight, restarted, steps_before
from hf_bcd.training.recording import quantization_words
from hf_bcd.utils.messages import UserError


# ---- Arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [64, 127])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_has_even_steps_for_each_output_channel(axis: int, largest: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 4, 5, 5)
    found = fake_weight(weight, axis, largest)
    for channel in range(weight.shape[axis]):
        own, got = weight.select(axis, channel), found.select(axis, channel)
        scale = own.abs().max() / largest
        torch.testing.assert_close(got, (own / scale).round() * scale)
        assert 20 < len(got.unique()) <= 2 * largest + 1


def test_batchnorm_s_factor_may_come_before_or_after() -> None:
    weight, factor = torch.randn(6, 3, 3, 3), torch.tensor([1.0, -2.0, 0.1, 7.0, -0.3, 1.5])[:, None, None, None]
    torch.testing.assert_close(fake_weight(weight, 0, 64) * factor, fake_weight(weight * factor, 0, 64))


def test_a_weight_of_zeros_stays_and_gradients_pass_unchanged() -> None:
    weight = torch.cat([torch.zeros(1, 4), torch.randn(1, 4)]).requires_grad_()
    given = torch.randn(2, 4)
    (fake_weight(weight, 0, 127) * given).sum().backward()
    torch.testing.assert_close(weight.grad, given)
    assert not fake_weight(weight, 0, 127)[0].any()


def test_an_input_keeps_zero_and_is_cut_at_its_range() -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 0.004, 1.0, 2.0, 9.0], requires_grad=True)
    found = fake_input(values, torch.tensor(-1.0), torch.tensor(2.0))
    scale = 3 / 255
    expected = torch.tensor([-1.0, -1.0, 0.0, 0.0, round(1 / scale) * scale, 2.0, 2.0])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    found.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert fake_input(values.bfloat16(), torch.tensor(-1.0), torch.tensor(2.0)).dtype == torch.bfloat16


# ---- Hooks -----------------------------------------------------------------------------------------------------------


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(2 * 49, 3)
    return nn.Sequential(*layers)


def test_only_an_active_student_that_trains_is_quantised() -> None:
    student, images = model(), torch.randn(4, 3, 8, 8)
    names, plain = list(student.state_dict()), student.train()(images)
    quantizer = FakeQuantizer(student)
    torch.testing.assert_close(student(images), plain, rtol=0, atol=0)
    quantizer.active = True
    quantised = student(images)
    assert 1e-4 < float((quantised - plain).detach().abs().max()) < 0.2
    ranges = quantizer.high.clone()
    assert quantizer.low[0] == images.min() and ranges[0] == images.max() and ranges.all()
    student(images / 2)
    torch.testing.assert_close(quantizer.high[0], ranges[0])
    student(3 * images)
    torch.testing.assert_close(quantizer.high[0], 3 * images.max())
    at_rest = [student.eval()(images)]
    quantizer.active = False
    torch.testing.assert_close(student(images), at_rest[0], rtol=0, atol=0)
    assert list(student.state_dict()) == names and isinstance(student[0].weight, nn.Parameter)


@pytest.mark.parametrize(("groups", "largest"), [(1, 64), (2, 64), (4, 127)])
def test_depthwise_weights_keep_their_eighth_bit(groups: int, largest: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 3, groups=groups, bias=False).train()
    FakeQuantizer(layer).active = True
    shown = torch.zeros(1, 4, 3, 3)
    shown[:, :, 1, 1] = 1.0  # one weight a channel
    expected = fake_weight(layer.weight, 0, largest)[:, :, 1, 1].sum(1)
    torch.testing.assert_close(layer(shown).flatten(), expected, atol=1e-6, rtol=0)


def test_parameters_get_gradients_and_come_back_after_an_error() -> None:
    student = model().train()
    FakeQuantizer(student).active = True
    student(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in student[0].parameters())
    with pytest.raises(RuntimeError):
        student(torch.randn(2, 5, 8, 8))
    assert "weight" not in student[0].__dict__ and isinstance(student[0].weight, nn.Parameter)


def ranges_of_a_rank() -> list[Tensor]:
    dist.init_process_group("gloo")
    rank, student = int(os.environ["RANK"]), nn.Linear(2, 2).train()
    quantizer = FakeQuantizer(student)
    quantizer.active = True
    student(torch.tensor([[-1.0 - rank, 5.0 - rank]]))
    quantizer.after_step()
    return [quantizer.low, quantizer.high]


@pytest.mark.slow
def test_all_processes_have_the_ranges_of_all(tmp_path: Path) -> None:
    for found in run_ranks(tmp_path, ranges_of_a_rank):
        assert [float(one) for one in found] == [-2, 5]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter and the quantiser
def test_the_student_computes_as_its_int8_file_will(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the extra `onnx` is not installed")
    torch.manual_seed(0)
    # ReLU6 gives student and file the same ranges: others differ by a little, and so does what rounding does then
    blocks = [(nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU6()) for i in range(6)]
    student = nn.Sequential(*(layer for block in blocks for layer in block), nn.Conv2d(8, 4, 1))
    pictures = torch.randn(8, 3, 16, 16).split(1)
    for layer in student:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.constant_(layer.weight, 4.0)
    for _ in range(20):
        student(torch.cat(pictures))  # statistics of BatchNorm
    student.eval()
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    torch.onnx.export(
        student, (pictures[0],), tmp_path / "model.onnx", dynamo=True, external_data=False, verbose=False, **names
    )
    onnx.write(tmp_path / "model_int8.onnx", tmp_path / "model.onnx", "int8", pictures)
    file, quantizer = onnx.open_file(tmp_path / "model_int8.onnx"), FakeQuantizer(student)
    for layer in student:
        layer.train(isinstance(layer, nn.Conv2d))
    with torch.no_grad():
        plain = student(torch.cat(pictures))
        quantizer.active = True
        for _ in range(2):  # the first time finds the ranges
            fake = student(torch.cat(pictures))
    stored = torch.cat([file(picture)["logits"] for picture in pictures])
    error, without = (float((one - stored).square().mean()) for one in (fake, plain))
    assert 0 < error < 0.25 * without


# ---- A run -----------------------------------------------------------------------------------------------------------


def test_a_tenth_of_the_steps_is_quantised_and_the_schedule_begins_again() -> None:
    assert [steps_before(total) for total in (2, 10, 20, 300, 40_000)] == [1, 9, 18, 270, 36_000]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 18))
    restarted(schedule, 18, 20)
    rates = []
    for _ in range(21):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates[:18] == pytest.approx([1 - step / 18 for step in range(18)])
    assert rates[18:] == pytest.approx([0.01, 0.005, 0.0])


OPTIONS = {"max_steps": 4, "quantize": "int8", "losses": {"bcd": {}, "kd": {}}, "gradient_accumulation_steps": 2}


def test_a_run_keeps_the_student_before_and_ends_with_a_plain_one(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, **OPTIONS)
    run.add_callback(tiny.StopAt(3))
    run.train()
    weights = {name: tensor.clone() for name, tensor in run.student.state_dict().items()}
    assert not (tmp_path / FOLDER).exists()
    run = tiny.trainer(tmp_path / "whole", **OPTIONS)
    run.train()
    quantizer = run.distiller.quantizer
    assert quantizer is not None and not quantizer.active and quantizer.high.all()
    before = load_file(tmp_path / "whole" / FOLDER / "model.safetensors")
    assert (tmp_path / "whole" / FOLDER / "preprocessor_config.json").is_file() and before.keys() == weights.keys()
    assert all(torch.equal(before[name], weights[name]) for name in weights)  # step 3 is the last one before
    changed = {name for name, tensor in run.student.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed and not {name for name in changed if "running" in name or "num_batches" in name}
    assert quantization_words(run) == "the last 1 steps with fake int8, from 0.0001 to 0"


def test_quantised_steps_resume_bit_for_bit(tmp_path: Path) -> None:
    options = OPTIONS | {"max_steps": 20, "save_strategy": "steps", "save_steps": 19, "gradient_accumulation_steps": 1}
    whole, resumed = tiny.trainer(tmp_path, **options), tiny.trainer(tmp_path / "resumed", **options)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-19"))
    for (name, one), other in zip(
        whole.student.state_dict().items(), resumed.student.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    one, other = whole.distiller.quantizer, resumed.distiller.quantizer
    assert one is not None and other is not None and torch.equal(one.high, other.high)
    assert not (tmp_path / "resumed" / FOLDER).exists()  # it was saved by the first run


REFUSED = {
    "quantize.*int4": {"quantize": "int4"},
    "quantize and ema_decay exclude each other": {"ema_decay": 0.9},
    "quantize and load_best_model_at_end": {"load_best_model_at_end": True, "eval_strategy": "steps"},
    "quantize and torch_compile": {"torch_compile": True},
    "max_steps is 1": {"max_steps": 1},
    r"warmup_steps 3 takes 3 of 4 max_steps \(1 of them are quantised\)": {"warmup_steps": 3},
    "which reduce_lr_on_plateau does not": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused(message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        BCDConfig(
            output_dir=str(tmp_path), **{"quantize": "int8", "max_steps": 4, "report_to": "none"} | REFUSED[message]
        )


def test_detectors_are_refused_and_baselines_are_plain(tmp_path: Path) -> None:
    args = tiny.config(tmp_path, quantize="int8")
    with pytest.raises(
        UserError, match="int8 files hold label maps only, and TimmDetectionModel is for object detection"
    ):
        BCDTrainer(tiny.tiny_detector(), args=args, train_dataset=tiny.boxes()["train"])
    assert derive_config(args, "baseline", {}).quantize is None
