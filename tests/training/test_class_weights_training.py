"""Weights of classes and crops around classes, from the arguments to the loss."""

import pytest
import tiny
import torch
from adapters.adapter_tiny_models import mask2former
from torch.nn import functional as F

from hf_bcd import BCDConfig, BCDTrainer
from hf_bcd.losses import KDLoss
from hf_bcd.losses.base import Pair
from hf_bcd.losses.ops.segmentation import segmentation_loss
from hf_bcd.outputs import DenseOutput, LabelMaps
from hf_bcd.training.recording import schedule_words
from hf_bcd.utils.messages import UserError


WEIGHTS = {name: 1.0 + index for index, name in tiny.ID2LABEL.items()}


def config(tmp_path, **options):
    usual = {
        "max_steps": 2,
        "crop_size": 32,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "logging_steps": 1,
    }
    return BCDConfig(output_dir=str(tmp_path), eval_strategy="no", save_strategy="no", **usual | options)


def test_the_loss_is_torch_s_weighted_mean():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[0, 0] = 255
    weights = torch.tensor([1.0, 5.0, 0.5])
    found = segmentation_loss(logits, labels, class_weights=weights)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, weights, ignore_index=255))
    assert segmentation_loss(logits, torch.full_like(labels, 255), class_weights=weights) == 0


@pytest.mark.parametrize("given", [WEIGHTS, "auto"])
def test_a_step_weighs_the_classes_over_accumulated_batches(tmp_path, given):
    data = tiny.scenes()
    args = config(tmp_path, class_weights=given, gradient_accumulation_steps=2)
    trainer = BCDTrainer(model=tiny.tiny_timm(), args=args, train_dataset=data["train"])
    weights = trainer.class_weights
    if given == "auto":
        assert weights.max() > 1.5 * weights.min()
    batches = list(trainer.get_train_dataloader())[:2]
    number = trainer._get_num_items_in_batch(batches, args.device)
    trainer.current_gradient_accumulation_steps = 2
    # running statistics and dropout apart, the same student answers twice
    student = trainer.distiller.eval()
    with torch.no_grad():
        found = sum(float(trainer.compute_loss(student, batch, num_items_in_batch=number)) for batch in batches)
        logits = [student.student(batch["pixel_values"]).logits for batch in batches]
    logits = torch.cat([F.interpolate(one, (32, 32), mode="bilinear") for one in logits])
    labels = torch.cat([batch["labels"] for batch in batches]).long()
    expected = F.cross_entropy(logits, labels, weights, ignore_index=255)
    assert found / 2 == pytest.approx(float(expected), rel=1e-5)


def test_a_file_is_read_once_and_its_content_decides(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in WEIGHTS.items()), encoding="utf-8")
    assert config(tmp_path, class_weights=str(path)).class_weights == WEIGHTS
    with pytest.raises(UserError, match=r"class_weights \S*none.json: cannot be read"):
        config(tmp_path, class_weights=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="weight of class 'pole' is -1"):
        config(tmp_path, class_weights="{pole: -1}")


def test_the_card_says_what_was_weighed(tmp_path):
    train = tiny.scenes()["train"]
    for given, words in ((WEIGHTS, "8 (as given)"), ("auto", "root of the median frequency"), (None, "")):
        run = BCDTrainer(
            model=tiny.tiny_timm(), args=config(tmp_path, max_steps=1, class_weights=given), train_dataset=train
        )
        run.train()
        said = schedule_words(run).get("weights of classes", "")
        assert words in said and (given is None) == (said == "")
        weights = {} if given is None else dict(zip(tiny.ID2LABEL.values(), run.class_weights.tolist(), strict=True))
        assert all(f"{name} {weight:.3g}" in said for name, weight in weights.items())


def test_who_cannot_weigh_classes_says_so(tmp_path):
    with pytest.raises(UserError, match="class_weights: Mask2Former.* has a loss of its own"):
        BCDTrainer(
            model=mask2former(**tiny.labels()),
            args=config(tmp_path, class_weights="auto"),
            train_dataset=tiny.scenes()["train"],
        )
    with pytest.raises(UserError, match="class_weights is for label maps"):
        BCDTrainer(
            model=tiny.tiny_detector(),
            args=config(tmp_path, class_weights="auto", crop_size=512),
            train_dataset=tiny.boxes()["train"],
        )


def test_kd_weighs_pixels_as_the_task_does() -> None:
    logits, labels = torch.randn(2, 2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    labels[0, 0] = 255
    weights = torch.tensor([1.0, 5.0, 0.5])
    student, teacher = (DenseOutput({}, one) for one in logits)
    loss = KDLoss(Pair({}, {}, 3, ()))
    found = loss(student, teacher, LabelMaps(labels, 3, class_weights=weights))["kd"]
    kept = weights[labels.masked_fill(labels == 255, 0)] * (labels != 255)
    pixels = F.kl_div(logits[0].log_softmax(1), logits[1].softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(found, ((pixels * kept).sum((1, 2)) / kept.sum((1, 2))).mean())
