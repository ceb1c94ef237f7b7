"""Mask R-CNN and Cascade Mask R-CNN against plain loops."""

import json
import math
from dataclasses import fields

import pytest
import torch
from host_sync import no_host_synchronisation
from tiny_detectors import HEADS, MASK_HEADS, confident, square_masks, tiny
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_iou, roi_align
from transformers import AutoModelForImageSegmentation, AutoModelForInstanceSegmentation, AutoModelForObjectDetection

from hf_bcd.models import TimmDetectionConfig, TimmDetectionModel, roi_heads
from hf_bcd.models.detection_boxes import (
    BACKGROUND,
    IGNORED,
    anchor_boxes,
    assign_max_iou,
    box_overlaps,
    decode_deltas,
    draw,
    encode_deltas,
)
from hf_bcd.models.regions import delta_errors, mask_targets, paste_masks, region_levels
from hf_bcd.models.roi_heads import STAGES
from hf_bcd.utils.masks import pack


masked = pytest.mark.parametrize("head", MASK_HEADS)


def random_boxes(count, width, height, seed=0, least=2.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.6
    extent = least + torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.35
    return torch.cat([corner, corner + extent], dim=1)


def labels_of(*counts, width=96, height=64, packed=False):
    labels = []
    for index, count in enumerate(counts):
        boxes = random_boxes(count, width, height, seed=index + 1) / torch.tensor([width, height] * 2)
        relative = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
        masks = square_masks(relative, height, width)
        classes = torch.arange(count) % 5
        labels.append({"class_labels": classes, "boxes": relative, "masks": pack(masks) if packed else masks})
    return labels


# ---- Parameters --------------------------------------------------------------------------------------------------------

PARAMETERS = {
    # head, backbone: all, trainable (which the paper's Table V counts), pyramid, proposals, box heads, mask heads
    ("mask_rcnn", "resnet50"): (44_396_336, 44_170_992, 3_344_384, 593_935, 14_306_705, 2_643_280),
    ("cascade_mask_rcnn", "resnet50"): (77_324_606, 77_099_262, 3_344_384, 593_935, 41_948_415, 7_929_840),
    ("cascade_mask_rcnn", "resnet101"): (96_316_734, 96_091_390, 3_344_384, 593_935, 41_948_415, 7_929_840),
}


@pytest.mark.parametrize("head, backbone", PARAMETERS)
def test_parameter_count(head, backbone):
    with torch.device("meta"):
        model = TimmDetectionModel(TimmDetectionConfig(head=head, backbone=backbone, num_labels=80, frozen_stages=1))
    parts = (model, model.neck, model.rpn_head, model.roi_head.bbox_head, model.roi_head.mask_head)
    total, *others = (sum(p.numel() for p in part.parameters()) for part in parts)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (total, trainable, *others) == PARAMETERS[head, backbone]


@masked
def test_first_weights_are_mmdetections(head):
    model = tiny(head, fc_channels=128, neck_channels=64, head_channels=64)
    box = model.roi_head.bbox_head if head == "mask_rcnn" else model.roi_head.bbox_head[1]
    mask = model.roi_head.mask_head if head == "mask_rcnn" else model.roi_head.mask_head[1]
    deviations = {
        model.rpn_head.rpn_conv: 0.01,
        model.rpn_head.rpn_reg: 0.01,
        box.fc_cls: 0.01,
        box.fc_reg: 0.001,
        box.shared_fcs[0]: math.sqrt(2 / (64 * 49 + 128)),
        mask.convs[0].conv: math.sqrt(2 / (64 * 9)),
    }
    for layer, deviation in deviations.items():
        assert layer.weight.std().item() == pytest.approx(deviation, rel=0.15)
        assert (layer.bias == 0).all()


# ---- Numbers of mmdetection --------------------------------------------------------------------------------------------


def test_levels_by_size():
    sides = torch.tensor([50.0, 112, 223, 224, 448, 1000])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    assert region_levels(boxes, [4, 8, 16, 32]).tolist() == [0, 1, 1, 2, 3, 3]
    # the smallest box of all, and one without any extent
    assert region_levels(torch.tensor([[3.0, 3, 4, 4], [3, 3, 3, 3]]), [4, 8, 16, 32]).tolist() == [0, 0]


def test_deltas_of_a_cascade():
    box, truth = torch.tensor([10.0, 10, 50, 90]), torch.tensor([12.0, 8, 56, 80])
    expected = [
        (1, -0.75, 0.476551, -0.526803),
        (2, -1.5, 0.953102, -1.053605),
        (3.030303, -2.272727, 1.422540, -1.572545),
    ]
    for (_, stds, _), numbers in zip(STAGES, expected, strict=True):
        deltas = encode_deltas(box, truth) / torch.tensor(stds)
        torch.testing.assert_close(deltas, torch.tensor(numbers), rtol=0, atol=1e-5)
        torch.testing.assert_close(decode_deltas(box, deltas * torch.tensor(stds)), truth)
    assert box_overlaps(box, truth)[0].item() == pytest.approx(0.717368, abs=1e-6)


def test_smooth_l1_error_of_deltas():
    unit = torch.tensor([[0.0, 0, 1, 1]]).expand(2, 4)
    deltas = torch.tensor([[0.2, 0, 0, 0.05], [9.0, 9, 9, 9]])
    positive = torch.tensor([True, False])
    assert delta_errors(deltas, unit, unit, positive, 1 / 9).item() == pytest.approx(0.144444 + 0.01125, abs=1e-5)
    assert delta_errors(deltas, unit, unit, positive, 0.0).item() == pytest.approx(0.25)
    # regions without extent have no deltas, and no gradient
    deltas.requires_grad_(True)
    delta_errors(deltas, unit * 0, unit * 0, torch.zeros(2, dtype=torch.bool), 1.0).backward()
    assert (deltas.grad == 0).all()


def test_three_anchors_a_cell():
    anchors = anchor_boxes(2, 3, 4, torch.device("cpu"), scale=8, octave=1)
    assert anchors.shape == (2 * 3 * 3, 4)
    size = anchors[:3, 2:] - anchors[:3, :2]
    root = 2**0.5
    torch.testing.assert_close(size, torch.tensor([[32 * root, 32 / root], [32, 32], [32 / root, 32 * root]]))
    assert ((anchors[12:15, :2] + anchors[12:15, 2:]) / 2).tolist() == [[4, 4]] * 3


# ---- Assignment and samples --------------------------------------------------------------------------------------------


def assigned_by_loops(anchors, truths, positive, negative, least, usable):
    overlaps = [
        [box_iou(t[None], a[None]).item() if u else 0.0 for a, u in zip(anchors, usable, strict=True)] for t in truths
    ]
    result = []
    for index, use in enumerate(usable.tolist()):
        own = [row[index] for row in overlaps]
        best = max(own, default=0.0)
        found = own.index(best) if best >= positive else BACKGROUND if best < negative else IGNORED
        for truth, row in enumerate(overlaps):
            if least is not None and row[index] == max(row) > 0 and max(row) >= least:
                found = truth
        result.append(found if use else IGNORED)
    return result


@pytest.mark.parametrize("count", [0, 1, 3, 70])  # more than are looked at together
@pytest.mark.parametrize("least", [0.3, None])
def test_assignment_of_anchors_equals_a_loop(count, least):
    anchors = anchor_boxes(6, 8, 8, torch.device("cpu"), scale=2, octave=1)
    truths = random_boxes(count, 64, 48)
    truths[1:2] = truths[:1]  # a duplicate: the later one wins where being best decides
    size = torch.tensor([60.0, 44])
    inside = ((anchors[:, :2] >= 0) & (anchors[:, 2:] < size)).all(dim=1)
    assert 0 < inside.sum() < len(inside)
    found = assign_max_iou(anchors, truths, 0.7, 0.3, least=least, usable=inside)
    expected = assigned_by_loops(anchors, truths, 0.7, 0.3, least, inside)
    assert found.tolist() == expected
    if count == 70:
        assert least is None or max(expected) > 32


@pytest.mark.parametrize("positives, backgrounds", [(0, 50), (3, 50), (30, 50), (30, 4), (3, 4), (0, 0)])
def test_a_sample_is_what_a_loop_draws(positives, backgrounds):
    generator = torch.Generator().manual_seed(positives)
    kinds = [*range(positives), *[BACKGROUND] * backgrounds]
    kinds += [IGNORED] * (80 - len(kinds))
    assigned = torch.tensor(kinds)[torch.randperm(80, generator=generator)]
    keys = torch.rand(80, generator=generator)
    order = keys.argsort(descending=True).tolist()
    chosen = [i for i in order if assigned[i] >= 0][:8]
    others = [i for i in order if assigned[i] == BACKGROUND][: 16 - len(chosen)]
    index, positive, drawn = draw(assigned, keys, 16, 8)
    assert index.shape == positive.shape == drawn.shape == (16,)
    assert index[positive].tolist() == chosen and positive.tolist() == sorted(positive.tolist(), reverse=True)
    assert index[drawn & ~positive].tolist() == others


def test_samples_are_fair():
    assigned = torch.full((1000, 10), BACKGROUND)
    keys = torch.rand(1000, 10, generator=torch.Generator().manual_seed(0))
    index, _, _ = draw(assigned, keys, 3, 1)
    assert index.flatten().bincount(minlength=10).float().std() < 30  # of 300 each; by chance about 14


@masked
def test_equal_seeds_draw_equal_regions(head, monkeypatch):
    drawn = []
    original = roi_heads.sample_regions

    def sample(*arguments):
        drawn.append(original(*arguments))
        return drawn[-1]

    monkeypatch.setattr(roi_heads, "sample_regions", sample)
    model, pixel_values = tiny(head), torch.randn(2, 3, 64, 96)

    def step(*key):
        drawn.clear()
        model.seed_sampling(*key)
        with torch.no_grad():  # two accumulated batches
            losses = [model(pixel_values, labels=labels_of(3, 1)).loss for _ in range(2)]
        return losses, [regions.boxes.clone() for regions in drawn]

    model.backbone.eval()
    first, again = step(1, 7, 0), step(1, 7, 0)
    assert all(torch.equal(a, b) for part in zip(first, again, strict=True) for a, b in zip(*part, strict=True))
    assert not torch.equal(first[1][0], first[1][len(first[1]) // 2])  # the second batch draws others
    for other in ((2, 7, 0), (1, 8, 0), (1, 7, 1)):
        assert not torch.equal(step(*other)[1][0], first[1][0])


# ---- Masks -------------------------------------------------------------------------------------------------------------


def sampled(mask, x, y):
    """Bilinear value of a mask between its pixels' centres, by RoIAlign's rules."""
    height, width = mask.shape
    if not (-1 <= x <= width and -1 <= y <= height):
        return 0.0
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    x0, y0 = int(x), int(y)
    x1, y1 = min(x0 + 1, width - 1), min(y0 + 1, height - 1)
    fx, fy = x - x0, y - y0
    top = (1 - fx) * mask[y0, x0] + fx * mask[y0, x1]
    return float((1 - fy) * top + fy * ((1 - fx) * mask[y1, x0] + fx * mask[y1, x1]))


def target_by_loops(mask, box, size):
    x0, y0, x1, y1 = (side - 0.5 for side in box.tolist())
    cell_w, cell_h = (x1 - x0) / size, (y1 - y0) / size
    nx, ny = max(math.ceil(cell_w), 1), max(math.ceil(cell_h), 1)
    rows = []
    for i in range(size):
        ys = [y0 + (i + (k + 0.5) / ny) * cell_h for k in range(ny)]
        row = []
        for j in range(size):
            xs = [x0 + (j + (k + 0.5) / nx) * cell_w for k in range(nx)]
            row.append(sum(sampled(mask, x, y) for y in ys for x in xs) / (nx * ny))
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("packed", [False, True])
def test_mask_targets_equal_a_loop(packed, monkeypatch):
    monkeypatch.setattr("hf_bcd.models.regions.MASKS_AT_ONCE", 2)
    generator = torch.Generator().manual_seed(0)
    masks = F.interpolate(torch.rand(5, 1, 5, 6, generator=generator), size=(30, 37), mode="bilinear")[:, 0] > 0.5
    masks[3] = False
    masks[3, 11, 17] = True  # one pixel
    boxes = random_boxes(9, 37, 30, seed=3)
    boxes[0] = torch.tensor([17.0, 11, 18, 12])
    boxes[1] = torch.tensor([0.0, 0, 37, 30])
    truth = torch.tensor([3, 0, 4, -1, 0, 2, 1, -1, 4])
    found = mask_targets(pack(masks) if packed else masks, boxes, truth, 37, 7)
    kept = [index for index in range(9) if truth[index] >= 0]
    assert found.shape == (7, 7, 7) and found[0].any()
    for target, index in zip(found, kept, strict=True):
        expected = target_by_loops(masks[truth[index]].float(), boxes[index], 7)
        clear = (expected - 0.5).abs() > 1e-4  # sums in another order
        assert torch.equal(target[clear] > 0, expected[clear] >= 0.5) and clear.float().mean() > 0.9


def test_pasted_masks_equal_a_loop():
    masks = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])
    found = paste_masks(masks, boxes, (9, 13))
    assert found.shape == (1, 3, 9, 13)
    for mask, box, pasted in zip(masks[0], boxes[0].tolist(), found[0], strict=True):
        padded = F.pad(mask, (1, 1, 1, 1))  # zero outside
        for row in range(9):
            for column in range(13):
                expected = 0.0
                if box[2] > 0:
                    x = ((column + 0.5) / 13 - box[0]) / (box[2] - box[0]) * 4 + 0.5
                    y = ((row + 0.5) / 9 - box[1]) / (box[3] - box[1]) * 4 + 0.5
                    expected = sampled(padded, x, y) if 0 <= x <= 5 and 0 <= y <= 5 else 0.0
                assert pasted[row, column].item() == pytest.approx(expected, abs=1e-5)


# ---- The loss ----------------------------------------------------------------------------------------------------------


@masked
@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_equals_a_loop_over_regions(head, packed, monkeypatch):
    drawn, original = [], roi_heads.sample_regions
    monkeypatch.setattr(roi_heads, "sample_regions", lambda *a: drawn.append(original(*a)) or drawn[-1])
    model, labels = confident(tiny(head)), labels_of(3, 2, packed=packed)
    plain = labels_of(3, 2)
    with torch.no_grad():
        output = model(torch.randn(2, 3, 64, 96), labels=labels, output_hidden_states=True, output_detections=False)
    levels, size = output.pyramid, torch.tensor([96.0, 64, 96, 64])
    stages = list(model.roi_head.stages())
    expected = [("s0.", 0.5, 1), ("s1.", 0.6, 0.5), ("s2.", 0.7, 0.25)] if head != "mask_rcnn" else [("", 0.5, 1)]
    assert [(prefix, overlap, weight) for prefix, _, _, overlap, weight in stages] == expected
    assert len(drawn) == len(stages)
    refined = None
    for (prefix, boxes, masks, overlap, weight), regions in zip(stages, drawn, strict=True):
        classification = box_term = mask_term = 0.0
        positives = 0
        after = []
        for image, label in enumerate(plain):
            truths = (model_corners(label["boxes"]) * size).float()
            rows = []
            for slot in range(regions.boxes.shape[1]):
                box = regions.boxes[image, slot]
                level = int(region_levels(box[None], [4, 8, 16, 32]))
                where, x = torch.cat([torch.tensor([float(image)]), box])[None], levels[level]
                with torch.no_grad():
                    logits, deltas = boxes(
                        roi_align(x, where, 7, 1 / (4 * 2**level), 0, aligned=True), torch.tensor([0])
                    )
                overlaps = box_iou(box[None], truths)[0]
                own = int(overlaps.argmax())
                positive = bool(regions.positive[image, slot])
                added = bool(regions.added[image, slot])
                assert positive == bool(overlaps[own] >= overlap) and regions.drawn[image, slot]
                assert not added or overlaps[own] == 1
                label_of = int(label["class_labels"][own])
                classification += F.cross_entropy(logits, torch.tensor([label_of if positive else 5]))
                deltas = deltas[0, 0 if head != "mask_rcnn" else label_of]
                if positive:
                    wanted = encode_deltas(box, truths[own]) / torch.tensor(boxes.stds)
                    error = F.l1_loss if head == "mask_rcnn" else F.smooth_l1_loss
                    box_term += error(deltas, wanted, reduction="sum")
                    with torch.no_grad():
                        shape = masks.upsample(
                            masks_before(masks, roi_align(x, where, 14, 1 / (4 * 2**level), 0, aligned=True))
                        )
                        shape = masks.conv_logits(F.relu(shape))[0, label_of]
                    whole = label["masks"][own].float()[None, None]
                    target = roi_align(whole, F.pad(box, (1, 0))[None], 28, 1.0, 0, aligned=True)[0, 0] >= 0.5
                    mask_term += F.binary_cross_entropy_with_logits(shape, target.float())
                    positives += 1
                if not added:
                    rows.append(decode_deltas(box, deltas * torch.tensor(boxes.stds)).clamp(min=0).minimum(size))
            after.append(torch.stack(rows))
            if refined is not None:  # each candidate is a truth, or a moved region of the stage before
                pool = torch.cat([truths, refined[image]])
                distance = torch.cdist(regions.boxes[image], pool, compute_mode="donot_use_mm_for_euclid_dist")
                assert distance.amin(dim=1).max() < 1e-2
        refined, number = after, regions.drawn.sum()
        terms = {name: output.loss_dict[f"{prefix}{name}"] / weight for name in ("loss_cls", "loss_bbox", "loss_mask")}
        assert positives > 2
        torch.testing.assert_close(terms["loss_cls"], classification / number, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(terms["loss_bbox"], box_term / number, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(terms["loss_mask"], mask_term / positives, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.loss, sum(output.loss_dict.values()))


def masks_before(head, x):
    for conv in head.convs:
        x = F.relu(conv.conv(x))
    return x


def model_corners(boxes):
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)


def test_the_loss_of_proposals_equals_a_loop(monkeypatch):
    drawn = []
    monkeypatch.setattr(roi_heads, "draw", lambda *a: drawn.append((a[0], draw(*a))) or drawn[-1][1])
    model, labels = confident(tiny("mask_rcnn")), labels_of(3, 2)
    mask = torch.ones(2, 64, 96)
    mask[1, 50:], mask[1, :, 70:] = 0, 0
    with torch.no_grad():
        output = model(
            torch.randn(2, 3, 64, 96),
            pixel_mask=mask,
            labels=labels,
            output_hidden_states=True,
            output_detections=False,
        )
        regions = model.rpn_head(output.pyramid)
    classification = box_term = number = 0.0
    for image, (size, label) in enumerate(zip(([96.0, 64], [70.0, 50]), labels, strict=True)):
        size = torch.tensor(size)
        truths = model_corners(label["boxes"]) * size.repeat(2)
        inside = ((regions.anchors[:, :2] >= 0) & (regions.anchors[:, 2:] < size)).all(dim=1)
        assigned, (index, positive, kept) = drawn[image]
        assert assigned.tolist() == assigned_by_loops(regions.anchors, truths, 0.7, 0.3, 0.3, inside)
        assert positive.any() and positive.sum() <= 128 and kept.sum() <= 256
        for anchor, is_object in zip(index[kept].tolist(), positive[kept].tolist(), strict=True):
            logit = regions.logits[image, anchor]
            classification += F.softplus(-logit if is_object else logit)
            number += 1
            if is_object:
                wanted = encode_deltas(regions.anchors[anchor], truths[assigned[anchor]])
                box_term += F.smooth_l1_loss(regions.deltas[image, anchor], wanted, beta=1 / 9, reduction="sum")
    torch.testing.assert_close(output.loss_dict["loss_rpn_cls"], classification / number, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.loss_dict["loss_rpn_bbox"], box_term / number, rtol=1e-4, atol=1e-5)


@masked
@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (3, 1)])
def test_any_number_of_objects_has_a_finite_connected_loss(head, counts):
    model = tiny(head, frozen_stages=1, norm_eval=True)
    output = model(torch.randn(2, 3, 67, 93), labels=labels_of(*counts, width=93, height=67))
    output.loss.backward()
    assert output.loss.isfinite() and (any(counts) or output.loss_dict["loss_rpn_bbox"] == 0)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert output.logits is None and output.pred_masks is None


@masked
def test_hundreds_of_touching_objects_and_single_pixels(head):
    model = tiny(head)
    rows = torch.arange(20.0)
    centres = torch.stack([rows.repeat(20), rows.repeat_interleave(20)], dim=1) / 20 + 0.025
    boxes = torch.cat([centres, torch.full_like(centres, 1 / 20)], dim=1)
    boxes[:5, 2:] = 1 / 80  # one pixel
    label = {"class_labels": torch.zeros(400, dtype=torch.long), "boxes": boxes, "masks": square_masks(boxes, 80, 80)}
    output = model(torch.randn(1, 3, 80, 80), labels=[label])
    output.loss.backward()
    assert output.loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


@masked
def test_two_pictures_wait_for_the_device_once_a_stage_and_once_each(head, monkeypatch):
    model = tiny(head)
    waits = {"nms": 0, "cpu": 0}
    nms, cpu = torch.ops.torchvision.nms, torch.Tensor.cpu

    def count(name, function):
        def call(*arguments, **options):
            waits[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr("torchvision.ops.nms", count("nms", nms))
    monkeypatch.setattr(torch.Tensor, "cpu", count("cpu", cpu))
    model(torch.randn(2, 3, 64, 96), labels=labels_of(3, 1)).loss.backward()
    assert waits == {"nms": 2, "cpu": 1 if head == "mask_rcnn" else 3}


@masked
def test_a_teacher_in_a_training_step_never_waits_for_the_device(head):
    model = tiny(head).eval()
    with torch.no_grad(), no_host_synchronisation():
        output = model(
            torch.randn(1, 3, 64, 64), output_hidden_states=True, output_dense=True, output_detections=False
        )
    assert output.logits is None and output.dense is None and len(output.pyramid) == 5


@pytest.mark.gpu
@masked
def test_training_step_on_a_gpu_is_close_to_the_cpus(head):
    model, labels, pixel_values = tiny(head), labels_of(3, 0, packed=True), torch.randn(2, 3, 64, 96)
    model.backbone.eval()
    expected = model(pixel_values, labels=labels).loss
    model.cuda().seed_sampling(0)
    labels = [{key: value.cuda() for key, value in label.items()} for label in labels]
    loss = model(pixel_values.cuda(), labels=labels).loss
    loss.backward()
    # rounding may change which of two proposals comes first, and so what is drawn
    torch.testing.assert_close(loss.cpu(), expected, rtol=0.1, atol=0)
    found = model.eval()(pixel_values.cuda())
    assert found.pred_masks.is_cuda and found.pred_masks.isfinite().all()


# ---- Detections --------------------------------------------------------------------------------------------------------


@masked
def test_detections_equal_mmdetections_steps_one_by_one(head):
    model = confident(tiny(head))
    pixel_values = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        output = model(pixel_values, output_hidden_states=True)
        levels = output.pyramid
        found = model.rpn_head(levels)
    size = torch.tensor([160.0, 96, 160, 96])

    proposals, scores, groups = [], [], []
    parts = zip(found.logits[0].split(found.level_sizes), found.deltas[0].split(found.level_sizes),
                found.anchors.split(found.level_sizes), strict=True)  # fmt: skip
    for level, (z, deltas, anchors) in enumerate(parts):
        best = z.topk(min(200, len(z))).indices
        boxes = decode_deltas(anchors[best], deltas[best]).clamp(min=0).minimum(size)
        solid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        proposals.append(boxes[solid])
        scores.append(z[best][solid].sigmoid())
        groups += [level] * int(solid.sum())
    proposals, scores = torch.cat(proposals), torch.cat(scores)
    boxes = proposals[batched_nms(proposals, scores, torch.tensor(groups), 0.7)[:200]]

    def pooled(boxes, side):
        features = []
        for box, level in zip(boxes, region_levels(boxes, [4, 8, 16, 32]).tolist(), strict=True):
            where = F.pad(box, (1, 0))[None]
            features.append(roi_align(levels[level], where, side, 1 / (4 * 2**level), 0, aligned=True))
        return torch.cat(features)

    total, stages = 0.0, list(model.roi_head.stages())
    with torch.no_grad():
        for index, (_, box_head, _, _, _) in enumerate(stages):
            logits, deltas = box_head(pooled(boxes, 7), torch.arange(len(boxes)))
            total = total + logits / len(stages)
            if index + 1 < len(stages):
                boxes = decode_deltas(boxes, deltas[:, 0] * torch.tensor(box_head.stds)).clamp(min=0).minimum(size)
        rows, classes = (total.softmax(dim=1)[:, :5] > 0.05).nonzero().unbind(1)
        scores = total.softmax(dim=1)[rows, classes]
        deltas = deltas[rows, classes if head == "mask_rcnn" else 0]
        boxes = decode_deltas(boxes[rows], deltas * torch.tensor(box_head.stds)).clamp(min=0).minimum(size)
        keep = batched_nms(boxes, scores, classes, 0.5)[:100]
        assert len(keep) > 20
        boxes, scores, classes = boxes[keep], scores[keep], classes[keep]
        features, masks = pooled(boxes, 14), 0.0
        for _, _, mask_head, _, _ in stages:
            logits = mask_head.conv_logits(F.relu(mask_head.upsample(masks_before(mask_head, features))))
            masks = masks + logits.sigmoid()[torch.arange(len(keep)), classes] / len(stages)
    pasted = paste_masks(masks[None], boxes[None] / size, (24, 40))[0]

    assert output.pred_masks.shape == (1, 100, 24, 40)
    ours = output.logits[0].amax(dim=1).sigmoid()[: len(keep)]
    torch.testing.assert_close(ours, scores, rtol=1e-4, atol=1e-5)
    found_boxes = model_corners(output.pred_boxes[0]) * size
    for row in range(len(keep)):  # scores may be equal up to rounding, so in another order
        apart = (found_boxes - boxes[row]).abs().amax(dim=1) + 1e3 * (output.logits[0].argmax(dim=1) != classes[row])
        assert apart.min() < 1e-2
        wanted, own = pasted[row], output.pred_masks[0, apart.argmin()] > 0
        clear = (wanted - 0.5).abs() > 1e-3
        assert torch.equal(own[clear], wanted[clear] > 0.5)
    empty = output.logits[0].amax(dim=1) < -100
    assert empty.sum() == 100 - len(keep) and (output.pred_masks[0, empty] < 0).all()


@masked
def test_masks_span_the_image_without_its_padding(head):
    model = confident(tiny(head, mask_stride=1))
    for parameter in (p for name, p in model.named_parameters() if "conv_logits" in name):
        parameter.data.zero_()
        parameter.data[:] = 1.0 if parameter.ndim == 1 else 0.0  # a mask is its whole box
    mask = torch.zeros(1, 96, 160)
    mask[:, :64, :96] = 1
    with torch.no_grad():
        output = model(torch.randn(1, 3, 96, 160), pixel_mask=mask)
    assert output.pred_masks.shape == (1, 100, 96, 160)
    found = output.logits[0].amax(dim=1) > -100
    boxes = model_corners(output.pred_boxes[0, found]) * torch.tensor([160.0, 96, 160, 96])
    assert len(boxes) > 10
    for box, logits in zip(boxes.tolist(), output.pred_masks[0, found], strict=True):
        rows, columns = (logits > 0).nonzero().unbind(1)
        cell = max((box[2] - box[0]) / 28, (box[3] - box[1]) / 28)
        ends = columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1
        assert ends == pytest.approx(box, abs=1 + cell)


def test_small_pictures_without_coarse_levels():
    model = confident(tiny("mask_rcnn", strides=[4, 8, 16, 32], mask_stride=1, max_detections=20))
    with torch.no_grad():
        output = model(torch.randn(2, 3, 96, 128), output_hidden_states=True)
    assert len(output.pyramid) == 4 and output.pred_masks.shape == (2, 20, 96, 128)
    assert output.pred_boxes.shape == (2, 20, 4) and (output.logits > -100).any()
    with torch.no_grad():  # fewer candidates than rows
        assert confident(tiny("mask_rcnn", strides=[16, 32]))(torch.randn(1, 3, 32, 32)).logits.shape == (1, 100, 5)


def test_nothing_found():
    model = tiny("mask_rcnn", score_threshold=0.99).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 64))
    assert (output.logits.sigmoid() == 0).all() and (output.pred_masks < 0).all()


@masked
def test_autocast_computes_boxes_and_losses_in_float32(head):
    model = tiny(head)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(2, 3, 64, 96), labels=labels_of(2, 1))
        assert output.loss.dtype == torch.float32
        output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_keeps_boxes_and_losses_exact():
    model = tiny("cascade_mask_rcnn").to(torch.bfloat16)
    output = model(torch.randn(1, 3, 64, 96).bfloat16(), labels=labels_of(2))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 96).bfloat16()).pred_boxes.dtype == torch.float32


# ---- Files and errors --------------------------------------------------------------------------------------------------


@masked
def test_folder_is_found_by_the_auto_classes(tmp_path, head):
    model = confident(tiny(head))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["auto_map"].values()) == {
        "configuration_timm_detection.TimmDetectionConfig",
        "modeling_timm_detection.TimmDetectionModel",
    }
    kinds = ("ObjectDetection", "InstanceSegmentation", "ImageSegmentation", "SemanticSegmentation")
    assert config["auto_map"].keys() == {"AutoConfig", *(f"AutoModelFor{kind}" for kind in kinds)}
    pixel_values = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(pixel_values)
    for auto_class in (AutoModelForObjectDetection, AutoModelForInstanceSegmentation, AutoModelForImageSegmentation):
        reloaded = auto_class.from_pretrained(tmp_path)
        assert type(reloaded) is TimmDetectionModel
        with torch.no_grad():
            torch.testing.assert_close(reloaded(pixel_values).pred_boxes, expected.pred_boxes)


@pytest.mark.parametrize("head", HEADS)
def test_models_of_boxes_say_nothing_of_masks(tmp_path, head):
    tiny(head).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModelForObjectDetection"}
    names = {field.name for field in fields(TimmDetectionConfig)}
    absent = {"fc_channels", "anchor_scale", "proposals", "rois_per_image", "mask_stride"}
    assert absent <= names and not absent & config.keys()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_stride": 0}, "mask_stride is 0; it must be at least 1"),
        ({"head_convs": 0}, "head_convs is 0; it must be at least 1"),
        ({"backbone": "vgg11", "strides": [4, 8, 16, 32, 64, 128], "rois_per_image": -1}, "rois_per_image is -1"),
        ({"backbone": "mambaout_femto", "strides": [2, 4, 8]}, r"need feature maps of the strides \[2, 4, 8\]"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        tiny("mask_rcnn", **({"backbone_kwargs": {}} if "backbone" in options else {}) | options)


def test_refuses_labels_without_masks():
    label = labels_of(2)[0]
    model, pixel_values = tiny("mask_rcnn"), torch.randn(1, 3, 64, 96)
    with pytest.raises(ValueError, match="labels of image 0 have no masks for 2 boxes"):
        model(pixel_values, labels=[{key: value for key, value in label.items() if key != "masks"}])
    with pytest.raises(ValueError, match="labels of image 0 have 1 masks for 2 boxes"):
        model(pixel_values, labels=[label | {"masks": label["masks"][:1]}])
