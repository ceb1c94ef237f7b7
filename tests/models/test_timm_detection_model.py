import math
import warnings

import pytest
import torch
import torchvision
from host_sync import no_host_synchronisation
from tiny_detectors import HEADS, TINY, confident, tiny
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForObjectDetection, DeformableDetrImageProcessor, Trainer, TrainingArguments

from hf_bcd.models import TimmDetectionConfig, TimmDetectionModel
from hf_bcd.models.detection_boxes import assign_atss, assign_max_iou, box_overlaps, decode_deltas, decode_distances


def labels_of(*counts):
    generator = torch.Generator().manual_seed(1)
    labels = []
    for count in counts:
        size = 0.15 + 0.4 * torch.rand(count, 2, generator=generator)
        centre = size / 2 + (1 - size) * torch.rand(count, 2, generator=generator)
        classes = torch.randint(0, 5, (count,), generator=generator)
        labels.append({"class_labels": classes, "boxes": torch.cat([centre, size], dim=1)})
    return labels


PARAMETERS = {
    # head, backbone: all, trainable (the paper's Table V counts these), pyramid, head
    ("retinanet", "resnet50"): (37_968_692, 37_743_348, 7_997_440, 6_463_220),
    ("retinanet", "resnet101"): (56_960_820, 56_735_476, 7_997_440, 6_463_220),
    ("retinanet", "resnet18"): (21_410_100, 21_252_596, 3_770_368, 6_463_220),
    ("gfl", "resnet50"): (32_440_537, 32_215_193, 3_868_672, 5_063_833),
    ("gfl", "resnet18"): (19_420_889, 19_263_385, 3_180_544, 5_063_833),
}


@pytest.mark.parametrize("head, backbone", PARAMETERS)
def test_parameter_count(head, backbone):
    with torch.device("meta"):
        config = TimmDetectionConfig(head=head, backbone=backbone, num_labels=80, frozen_stages=1, norm_eval=True)
        model = TimmDetectionModel(config)
    counts = [sum(p.numel() for p in module.parameters()) for module in (model, model.neck, model.bbox_head)]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (counts[0], trainable, counts[1], counts[2]) == PARAMETERS[head, backbone]


def test_retinanet_with_crosskds_pyramid():
    with torch.device("meta"):
        config = TimmDetectionConfig(
            head="retinanet", backbone="resnet50", num_labels=80, frozen_stages=1, extra_levels="on_output"
        )
        model = TimmDetectionModel(config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 33_614_580


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", ["resnet10t", "convnext_atto", "mambaout_femto"])
def test_trains_at_odd_sizes(backbone, head):
    kwargs = TINY if backbone == "resnet10t" else {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}
    model = tiny(head, backbone=backbone, backbone_kwargs=kwargs)
    output = model(torch.randn(2, 3, 131, 167), labels=labels_of(3, 0), output_hidden_states=True)
    output.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert output.logits is None and output.pred_boxes is None
    assert tuple(x.shape[1] for x in output.hidden_states) == model.feature_channels
    levels = [tuple(x.shape[-2:]) for x in output.pyramid]
    assert levels[:3] == [tuple(x.shape[-2:]) for x in output.hidden_states[-3:]]
    # a convolution of stride 2 rounds up
    assert levels[3:] == [(-(-levels[2][0] // n), -(-levels[2][1] // n)) for n in (2, 4)]


@pytest.mark.parametrize("head", HEADS)
def test_images_without_objects_have_a_connected_loss(head):
    model = tiny(head, frozen_stages=1)
    output = model(torch.randn(2, 3, 64, 96), labels=labels_of(0, 0))
    output.loss.backward()
    assert output.loss.isfinite() and output.loss > 0
    assert output.loss_dict["loss_bbox"] == 0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_first_scores_are_one_in_a_hundred():
    # at the first step, hundreds of thousands of priors must not drown the few positives
    for head in HEADS:
        dense = tiny(head)(torch.randn(1, 3, 64, 64), output_dense=True).dense
        assert dense.class_logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.2)


def as_pixels(labels, width, height):
    for label in labels:
        cx, cy, w, h = (label["boxes"] * torch.tensor([width, height, width, height])).unbind(1)
        yield torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=1), label["class_labels"]


def test_retinanets_loss_equals_a_loop_over_priors():
    model, labels = tiny("retinanet"), labels_of(2, 3)
    output = model(torch.randn(2, 3, 64, 96), labels=labels, output_dense=True)
    dense, classification, regression, positives = output.dense, 0.0, 0.0, 0
    for image, (boxes, classes) in enumerate(as_pixels(labels, 96, 64)):
        assigned = assign_max_iou(dense.priors, boxes)
        assert torch.equal(dense.assigned[image], assigned)
        kept = assigned != -2
        target = torch.zeros_like(dense.class_logits[image])
        target[assigned >= 0, classes[assigned[assigned >= 0]]] = 1
        logits = dense.class_logits[image]
        classification += torchvision.ops.sigmoid_focal_loss(logits[kept], target[kept], reduction="sum")
        for prior in (assigned >= 0).nonzero().flatten().tolist():
            x0, y0, x1, y1 = dense.priors[prior].tolist()
            a, b, c, d = boxes[assigned[prior]].tolist()
            deltas = [((a + c) - (x0 + x1)) / 2 / (x1 - x0), ((b + d) - (y0 + y1)) / 2 / (y1 - y0)]
            deltas += [math.log((c - a) / (x1 - x0)), math.log((d - b) / (y1 - y0))]
            regression += F.l1_loss(dense.box_outputs[image, prior], torch.tensor(deltas), reduction="sum")
            positives += 1
    torch.testing.assert_close(output.loss_dict["loss_cls"], classification / positives)
    torch.testing.assert_close(output.loss_dict["loss_bbox"], regression / positives, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss, sum(output.loss_dict.values()))


def test_gfls_loss_equals_a_loop_over_priors():
    model, labels = tiny("gfl"), labels_of(2, 3)
    output = model(torch.randn(2, 3, 64, 96), labels=labels, output_dense=True)
    dense, quality, boxes_term, distribution, positives, total = output.dense, 0.0, 0.0, 0.0, 0, 0.0
    for image, (boxes, classes) in enumerate(as_pixels(labels, 96, 64)):
        assigned = assign_atss(dense.priors, dense.level_sizes, boxes)
        assert torch.equal(dense.assigned[image], assigned)
        target = torch.zeros_like(dense.class_logits[image])
        for prior in (assigned >= 0).nonzero().flatten().tolist():
            stride, box = dense.strides[prior], boxes[assigned[prior]]
            centre = (dense.priors[prior, :2] + dense.priors[prior, 2:]) / 2
            rows = dense.box_outputs[image, prior].view(4, 17)
            distances = (rows.softmax(dim=1) * torch.arange(17)).sum(dim=1) * stride
            overlap, generalised = box_overlaps(decode_distances(centre, distances), box)
            target[prior, classes[assigned[prior]]] = overlap.detach()
            weight = dense.class_logits[image, prior].detach().sigmoid().max()
            wanted = (torch.cat([centre - box[:2], box[2:] - centre]) / stride).clamp(0, 15.9)
            left, share = wanted.floor().long(), wanted - wanted.floor()
            dfl = (1 - share) * F.cross_entropy(rows, left, reduction="none")
            dfl += share * F.cross_entropy(rows, left + 1, reduction="none")
            boxes_term += 2 * weight * (1 - generalised)
            distribution += 0.25 * weight * dfl.mean()
            positives, total = positives + 1, total + weight
        logits = dense.class_logits[image]
        error = (logits.sigmoid() - target).abs() ** 2
        quality += (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * error).sum()
    assert positives > 3
    total = max(total, 1)
    torch.testing.assert_close(output.loss_dict["loss_cls"], quality / positives)
    torch.testing.assert_close(output.loss_dict["loss_bbox"], boxes_term / total)
    torch.testing.assert_close(output.loss_dict["loss_dfl"], distribution / total)


@pytest.mark.parametrize("head", HEADS)
def test_detections_equal_mmdetections_steps_one_by_one(head):
    model = confident(tiny(head))
    with torch.no_grad():
        output = model(torch.randn(2, 3, 96, 160), output_dense=True)
    dense, boxes = output.dense, output.dense.boxes()
    assert boxes.shape == (*dense.class_logits.shape[:2], 4)
    for image in range(2):
        chosen, scores, classes = [], [], []
        for z, box in zip(
            dense.class_logits[image].split(dense.level_sizes), boxes[image].split(dense.level_sizes), strict=True
        ):
            prior, label = (z.sigmoid() > 0.05).nonzero().unbind(1)
            order = z[prior, label].sigmoid().argsort(descending=True)[:1000]
            box = box.clamp(min=0).minimum(torch.tensor([160, 96, 160, 96]))
            chosen.append(box[prior[order]])
            scores.append(z[prior, label].sigmoid()[order])
            classes.append(label[order])
        chosen, scores, classes = torch.cat(chosen), torch.cat(scores), torch.cat(classes)
        solid = (chosen[:, 2:] > chosen[:, :2]).all(dim=1)
        chosen, scores, classes = chosen[solid], scores[solid], classes[solid]
        keep = torchvision.ops.batched_nms(chosen, scores, classes, 0.5 if head == "retinanet" else 0.6)[:100]
        assert len(keep) > 20

        found = DeformableDetrImageProcessor().post_process_object_detection(
            output, threshold=0.0, target_sizes=[(96, 160)] * 2
        )[image]
        assert found["scores"].tolist() == pytest.approx(scores[keep].tolist(), abs=1e-6)
        # scores may be equal up to rounding, so in another order
        rows = torch.cat([found["labels"][:, None] * 1000, found["boxes"]], dim=1)
        expected = torch.cat([classes[keep][:, None] * 1000, chosen[keep]], dim=1)
        distance = torch.cdist(rows, expected, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.amin(dim=0).max() < 1e-3 and distance.amin(dim=1).max() < 1e-3


def test_rows_without_detection_score_nothing():
    model = tiny().eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 32, 32))
    assert output.logits.shape == (1, 100, 5) and output.pred_boxes.shape == (1, 100, 4)
    assert (output.logits.sigmoid() == 0).all() and (output.pred_boxes == 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_a_teacher_in_a_training_step_never_waits_for_the_device(head):
    model = tiny(head).eval()
    with torch.no_grad(), no_host_synchronisation():
        output = model(torch.randn(1, 3, 64, 64), output_dense=True, output_detections=False)
        output.dense.cross(output.dense.tower).boxes()
    assert output.logits is None and output.pred_boxes is None
    assert model.train()(torch.randn(2, 3, 64, 64), output_detections=True).logits.shape == (2, 100, 5)


def test_fewer_candidates_than_rows():
    model = confident(tiny(strides=[32, 64]))
    with torch.no_grad():
        output = model(torch.randn(1, 3, 32, 32))
    assert output.logits.shape == (1, 100, 5) and (output.logits > -100).any()


@pytest.mark.parametrize("head", HEADS)
def test_boxes_are_relative_to_the_image_without_its_padding(head):
    model = confident(tiny(head))
    image, mask = torch.randn(1, 3, 64, 96), torch.zeros(1, 96, 160)
    mask[:, :64, :96] = 1
    padded = torch.full((1, 3, 96, 160), 7.0)
    padded[..., :64, :96] = image
    with torch.no_grad():
        output = model(padded, pixel_mask=mask, output_dense=True)
        zeroed = model(padded * mask, output_dense=True)
        # the padding is zero whatever the image processor writes there
        torch.testing.assert_close(output.dense.class_logits, zeroed.dense.class_logits)
    cx, cy, w, h = output.pred_boxes[output.logits.amax(dim=-1) > -100].unbind(-1)
    assert len(cx) and (cx - w / 2 >= -1e-5).all() and (cx + w / 2 <= 1 + 1e-5).all()
    assert (cy - h / 2 >= -1e-5).all() and (cy + h / 2 <= 1 + 1e-5).all()

    # a truth, relative to the image, belongs to the same priors as its pixels do
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.5]])}
    dense = model(padded, pixel_mask=mask, labels=[label], output_dense=True).dense
    box = torch.tensor([[24.0, 16, 72, 48]])
    assert torch.equal(dense.assigned[0], model.bbox_head.assign(dense.priors, dense.level_sizes, box))


def test_frozen_stages_and_norms_stay_so_in_training():
    model = tiny(frozen_stages=1, norm_eval=True)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    model.eval()
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 3, 64, 64), labels=labels_of(2, 1)).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("layer2", "layer3", "layer4")) for name in changed)
    assert not any("running" in name or "batches" in name for name in changed)
    assert not any(m.training for m in model.backbone.layer1.modules())
    assert model.backbone.layer2.training

    free = tiny()
    before = {name: value.clone() for name, value in free.backbone.state_dict().items()}
    free(torch.randn(2, 3, 64, 64))
    changed = {name for name, value in free.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in changed) and all(p.requires_grad for p in free.parameters())


@pytest.mark.parametrize(
    "backbone, first, kwargs",
    [
        ("convnext_atto", "stages_1", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}),
        ("mobilenetv2_050", "blocks.2", {}),
    ],
)
def test_frozen_stages_of_other_backbones(backbone, first, kwargs):
    model = tiny(backbone=backbone, backbone_kwargs=kwargs, frozen_stages=1)
    names = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    assert names[0].startswith(first)
    assert names == [name for name, _ in model.backbone.named_parameters()][-len(names) :]


@pytest.mark.parametrize("head", HEADS)
def test_folder_restores_weights_initialisation_and_freezing(tmp_path, head):
    model = confident(tiny(head, frozen_stages=1))
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert type(reloaded) is TimmDetectionModel
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(pixel_values).logits, model(pixel_values).logits)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and frozen == [name for name, p in reloaded.named_parameters() if not p.requires_grad]

    other = AutoModelForObjectDetection.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    state = other.state_dict()
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, state[key])]
    name = "bbox_head.retina_cls" if head == "retinanet" else "bbox_head.gfl_cls"
    assert changed == [f"{name}.weight", f"{name}.bias"]
    torch.testing.assert_close(state[f"{name}.bias"], torch.full_like(state[f"{name}.bias"], -math.log(99)))
    assert state[f"{name}.weight"].std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("head", HEADS)
def test_cross_runs_the_rest_of_the_head(head):
    model, pixel_values = tiny(head).eval(), torch.randn(1, 3, 64, 96)
    dense = model(pixel_values, output_dense=True).dense
    again = dense.cross(dense.tower)
    assert torch.equal(again.class_logits, dense.class_logits) and torch.equal(again.box_outputs, dense.box_outputs)

    # the tower is what the last convolution reads, before the activation
    seen = []
    last = model.bbox_head.cls_convs[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(pixel_values)
    last.remove()
    assert all(torch.equal(F.relu(x), y) for x, y in zip(dense.tower["class"], seen, strict=True))
    assert any((x < 0).any() for x in dense.tower["class"])


def test_outputs_per_prior_are_in_the_order_of_the_priors():
    model = tiny("retinanet").eval()
    with torch.no_grad():
        # the same output at each position, another for each anchor and class
        model.bbox_head.retina_cls.weight.zero_()
        model.bbox_head.retina_cls.bias.copy_(torch.arange(45.0))
        model.bbox_head.retina_reg.weight.zero_()
        model.bbox_head.retina_reg.bias.copy_(torch.arange(36.0) / 36)
        dense = model(torch.randn(1, 3, 64, 96), output_dense=True).dense
    assert dense.level_sizes == (864, 216, 54, 18, 9)
    assert torch.equal(dense.class_logits[0].view(-1, 9, 5), torch.arange(45.0).view(9, 5).expand(129, 9, 5))
    assert torch.equal(dense.box_outputs[0].view(-1, 9, 4), (torch.arange(36.0) / 36).view(9, 4).expand(129, 9, 4))
    torch.testing.assert_close(dense.boxes()[0], decode_deltas(dense.priors, dense.box_outputs[0]))
    assert dense.strides.unique_consecutive().tolist() == [8, 16, 32, 64, 128]


def test_stock_trainer_trains_it(tmp_path):
    data = [{"pixel_values": torch.randn(3, 64, 64), "labels": label} for label in labels_of(2, 1, 0, 3)]

    def collate(samples):
        pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
        return {"pixel_values": pixel_values, "labels": [sample["labels"] for sample in samples]}

    args = TrainingArguments(tmp_path, max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[])
    trainer = Trainer(tiny(), args, data_collator=collate, train_dataset=data)
    assert not trainer.model_accepts_loss_kwargs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert math.isfinite(trainer.train().training_loss)


def test_bfloat16_keeps_sizes_and_losses_exact():
    model = tiny().to(torch.bfloat16)
    output = model(torch.randn(1, 3, 64, 96).bfloat16(), labels=labels_of(2), output_dense=True)
    assert output.loss.dtype == torch.float32 and output.dense.priors.dtype == torch.float32
    assert output.dense.boxes().dtype == torch.float32


def test_backbone_weights(tmp_path):
    from safetensors.torch import save_file
    from timm import create_model

    state = {
        key: torch.randn_like(value.float()) for key, value in create_model("resnet10t", **TINY).state_dict().items()
    }
    save_file(state, tmp_path / "model.safetensors")
    fields = {"backbone_kwargs": TINY, "num_labels": 5, "neck_channels": 16}
    model = TimmDetectionModel.from_backbone("resnet10t", weights=tmp_path / "model.safetensors", **fields)
    assert torch.equal(model.backbone.layer4[0].conv1.weight, state["layer4.0.conv1.weight"])
    with pytest.raises(ValueError, match=r"no such fields in TimmDetectionConfig: \['heads'\]"):
        TimmDetectionModel.from_backbone("resnet10t", heads="gfl")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"head": "yolo"}, "'yolo' is unknown; choose one of .*gfl"),
        ({"extra_levels": "on_top"}, "'on_top' is unknown"),
        ({"strides": [8, 32]}, r"strides are \[8, 32\]; give at least two, each twice"),
        ({"head_convs": 1}, "at least 2"),
        ({"head_channels": 18}, "18 is not divisible by norm_groups 4"),
        ({"strides": [64, 128]}, "need feature maps of the strides up to 32"),
        ({"strides": [1, 2, 4]}, r"need feature maps of the strides \[1, 2, 4\], but backbone 'resnet10t' has"),
        ({"frozen_stages": 7}, "frozen_stages=7 is not possible"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


def test_refuses_labels_of_another_batch():
    with pytest.raises(ValueError, match="1 labels for 2 images"):
        tiny()(torch.randn(2, 3, 64, 64), labels=labels_of(1))


def test_module_names_are_mmdetections():
    keys = {key for head in HEADS for key in tiny(head).state_dict() if not key.startswith("backbone.")}
    expected = {"neck.lateral_convs.0.conv.bias", "neck.fpn_convs.4.conv.weight", "bbox_head.cls_convs.3.gn.weight"}
    expected |= {"bbox_head.reg_convs.0.conv.weight", "bbox_head.scales.4.scale", "bbox_head.gfl_reg.bias"}
    assert expected | {"bbox_head.retina_cls.weight", "bbox_head.retina_reg.bias"} <= keys
    assert not any(isinstance(m, nn.BatchNorm2d) for m in tiny().bbox_head.modules())


@pytest.mark.parametrize("head", HEADS)
def test_training_step_never_waits_for_the_device(head):
    model = tiny(head, frozen_stages=1, norm_eval=True)
    mask = torch.ones(2, 64, 96)
    mask[1, 50:] = 0
    with no_host_synchronisation():
        output = model(torch.randn(2, 3, 64, 96), pixel_mask=mask, labels=labels_of(3, 0), output_dense=True)
        output.dense.boxes().sum()
        output.loss.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("head", HEADS)
def test_training_step_on_a_gpu_equals_the_cpu_and_never_waits(head):
    model, labels, pixel_values = tiny(head), labels_of(3, 0), torch.randn(2, 3, 64, 96)
    expected = model(pixel_values, labels=labels).loss
    model.cuda()
    labels = [{key: value.cuda() for key, value in label.items()} for label in labels]
    pixel_values = pixel_values.cuda()
    model(pixel_values, labels=labels).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = model(pixel_values, labels=labels).loss
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-2, atol=1e-3)
