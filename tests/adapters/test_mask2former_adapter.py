"""Semantic logits and the set-prediction loss of Mask2Former."""

from types import SimpleNamespace

import pytest
import torch
from adapter_tiny_models import images, tiny_model
from transformers import Mask2FormerImageProcessor

from hf_bcd.adapters import build_adapter
from hf_bcd.adapters.mask2former import query_labels, semantic_logits
from hf_bcd.outputs import LabelMaps


@pytest.fixture
def label_map() -> torch.Tensor:
    labels = torch.zeros(2, 64, 96, dtype=torch.long)
    labels[0, :, 40:] = 3
    labels[1, 20:, :] = 1
    labels[1, :, 80:] = 255
    return labels


def random_queries(height: int, width: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        class_queries_logits=3 * torch.randn(2, 7, 5, generator=generator),
        masks_queries_logits=3 * torch.randn(2, 7, height, width, generator=generator),
    )


def test_same_classes_as_the_image_processor():
    """At 384x384 the processor's detour over that size is an identity."""
    queries = random_queries(384, 384)
    expected = torch.stack(Mask2FormerImageProcessor().post_process_semantic_segmentation(queries))
    assert len(expected.unique()) == 4
    logits = semantic_logits(queries.class_queries_logits, queries.masks_queries_logits)
    assert torch.equal(logits.argmax(1), expected)


def test_softmax_gives_each_class_its_share_of_the_scores():
    queries = random_queries(6, 8)
    logits = semantic_logits(queries.class_queries_logits, queries.masks_queries_logits)
    scores = torch.zeros(2, 4, 6, 8)
    for query in range(7):
        probabilities = queries.class_queries_logits[:, query].softmax(-1)[:, :4]
        scores += probabilities[..., None, None] * queries.masks_queries_logits[:, query, None].sigmoid()
    torch.testing.assert_close(logits.softmax(1), scores / scores.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_logits_and_gradient_are_finite_where_no_query_claims_a_class():
    classes = torch.tensor([[[200.0, -200.0, -200.0]]], requires_grad=True)
    masks = torch.full((1, 1, 2, 2), -200.0, requires_grad=True)
    logits = semantic_logits(classes, masks)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert classes.grad is not None and classes.grad.isfinite().all()


@torch.no_grad()
def test_adapter_gives_the_log_scores_at_stride_4():
    adapter = build_adapter(tiny_model("mask2former"))
    outputs = adapter.model(adapter.normalize(images()))
    expected = semantic_logits(outputs.class_queries_logits, outputs.masks_queries_logits)
    output = adapter(images())
    assert output.logits.shape == (2, 5, 16, 24) and output.task_losses == {}
    assert torch.equal(output.logits, expected)


def test_task_loss_is_the_models_own(label_map):
    adapter = build_adapter(tiny_model("mask2former")).train()
    # drop path and the points at which masks are compared are random
    torch.manual_seed(0)
    loss = adapter(images(), LabelMaps(label_map, 5)).task_losses["loss_task"]
    masks = [torch.stack([label_map[0] == 0, label_map[0] == 3]), torch.stack([label_map[1] == 0, label_map[1] == 1])]
    torch.manual_seed(0)
    expected = adapter.model(
        adapter.normalize(images()),
        mask_labels=[mask.float() for mask in masks],
        class_labels=[torch.tensor([0, 3]), torch.tensor([0, 1])],
    ).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in adapter.model.class_predictor.parameters())


def test_training_under_bfloat16_autocast(label_map):
    adapter = build_adapter(tiny_model("mask2former")).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = adapter(images(), LabelMaps(label_map, 5))
    assert output.logits.dtype == torch.float32
    output.task_losses["loss_task"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in adapter.parameters())


def test_query_labels_leave_ignored_pixels_out_of_every_mask(label_map):
    masks, classes = query_labels(label_map, num_labels=5)
    assert [c.tolist() for c in classes] == [[0, 3], [0, 1]]
    assert torch.equal(masks[1].sum(0), (label_map[1] != 255).float())
    assert torch.equal(masks[0][1], (label_map[0] == 3).float())
    label_map[1, 0, 0] = 7
    with pytest.raises(ValueError, match=r"labels\[1\] holds classes \[0, 1, 7\], but the model has 5 labels"):
        query_labels(label_map, num_labels=5)


def test_images_without_any_label():
    adapter = build_adapter(tiny_model("mask2former"))
    loss = adapter(images(), LabelMaps(torch.full((2, 64, 96), 255), 5)).task_losses["loss_task"]
    loss.backward()
    assert loss.isfinite()


def test_pictures_without_labels_teach_nothing(label_map):
    adapter = build_adapter(tiny_model("mask2former")).eval()
    label_map[1] = 255
    seen = torch.ones(2, 64, 96, dtype=torch.bool)

    def loss(last: int, **options: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return adapter(images()[:last], LabelMaps(label_map[:last], 4, **options)).task_losses["loss_task"]

    torch.testing.assert_close(loss(2, seen=seen), loss(1))
    label_map[0] = 255  # nobody's
    nothing = loss(2, seen=seen)
    nothing.backward()
    assert nothing == 0 and all(p.grad is None or not p.grad.any() for p in adapter.parameters())
