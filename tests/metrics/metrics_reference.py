"""The metrics once more, slowly: NumPy and SciPy, with loops over images, classes and regions."""

import math

import numpy as np
from scipy import ndimage


EIGHT = np.ones((3, 3), dtype=int)
NAN = float("nan")


def mean(values):
    return sum(values) / len(values) if values else NAN


def reference_metrics(predictions, labels, num_labels, ignore_index=255):
    """All metrics over lists of `[H, W]` maps, which may differ in size."""
    pairs = [
        (np.where(label == ignore_index, -1, label), np.where(label == ignore_index, -1, prediction))
        for prediction, label in zip(predictions, labels, strict=True)
    ]
    results = reference_regions(pairs, num_labels)
    for distance in (1, 3, 5):
        results[f"boundary_f@{distance}"] = reference_boundary_f(pairs, num_labels, distance)
    results["boundary_iou"] = reference_boundary_iou(pairs, num_labels)
    results.update(reference_connectivity(pairs, num_labels))
    return results


def reference_regions(pairs, num_labels):
    per_class_iou, accuracies = [], []
    for c in range(num_labels):
        intersection = sum(((truth == c) & (prediction == c)).sum() for truth, prediction in pairs)
        union = sum(((truth == c) | (prediction == c)).sum() for truth, prediction in pairs)
        true = sum((truth == c).sum() for truth, _ in pairs)
        per_class_iou.append(intersection / union if union else NAN)
        accuracies += [intersection / true] if true else []
    averaged = [iou for iou in per_class_iou if not math.isnan(iou)]
    valid = sum((truth >= 0).sum() for truth, _ in pairs)
    correct = sum(((truth >= 0) & (truth == prediction)).sum() for truth, prediction in pairs)
    return {
        "mean_iou": mean(averaged),
        "mean_accuracy": mean(accuracies),
        "overall_accuracy": correct / valid if valid else NAN,
        "per_class_iou": per_class_iou,
        "classes_averaged": len(averaged),
    }


def reference_contour(class_map, c):
    padded = np.pad(class_map, 1, constant_values=-1)
    height, width = class_map.shape
    other_neighbour = np.zeros(class_map.shape, dtype=bool)
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        neighbour = padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        other_neighbour |= (neighbour >= 0) & (neighbour != c)
    return (class_map == c) & other_neighbour


def near(contour, distance):
    if not contour.any():
        return np.zeros_like(contour)
    return ndimage.distance_transform_edt(~contour) <= distance


def reference_boundary_f(pairs, num_labels, distance):
    scores = []
    for c in range(num_labels):
        true_total = true_hits = predicted_total = predicted_hits = 0
        for truth, prediction in pairs:
            true, predicted = reference_contour(truth, c), reference_contour(prediction, c)
            true_total += true.sum()
            true_hits += (true & near(predicted, distance)).sum()
            predicted_total += predicted.sum()
            predicted_hits += (predicted & near(true, distance)).sum()
        if true_total + predicted_total == 0:
            continue
        recall = true_hits / true_total if true_total else 0
        precision = predicted_hits / predicted_total if predicted_total else 0
        scores.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return mean(scores)


def reference_band(class_map, c, iterations):
    mask = class_map == c
    eroded = ndimage.binary_erosion(mask | (class_map < 0), EIGHT, iterations=iterations, border_value=0)
    return mask & ~eroded


def reference_boundary_iou(pairs, num_labels):
    scores = []
    for c in range(num_labels):
        intersection = union = 0
        for truth, prediction in pairs:
            iterations = max(1, round(0.02 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)))
            true, predicted = reference_band(truth, c, iterations), reference_band(prediction, c, iterations)
            intersection += (true & predicted).sum()
            union += (true | predicted).sum()
        scores += [intersection / union] if union else []
    return mean(scores)


def reference_connectivity(pairs, num_labels):
    per_class = {"completeness": [], "connectivity": [], "fragments": [], "missed": []}
    for c in range(num_labels):
        regions = {name: [] for name in per_class}
        for truth, prediction in pairs:
            ids, count = ndimage.label(truth == c, EIGHT)
            for region_id in range(1, count + 1):
                region = ids == region_id
                if region.sum() < 64:
                    continue
                pieces, _ = ndimage.label(region & (prediction == c), EIGHT)
                sizes = np.bincount(pieces.ravel())[1:]
                regions["missed"].append(len(sizes) == 0)
                regions["completeness"].append(sizes.max(initial=0) / region.sum())
                regions["fragments"].append((sizes * 100 >= region.sum()).sum())
                regions["connectivity"] += [sizes.max() / sizes.sum()] if len(sizes) else []
        for name, values in regions.items():
            per_class[name] += [mean(values)] if values else []
    return {name: mean(values) for name, values in per_class.items()}


def blobs(rng, height, width, num_labels, scale=4.0, ignored=0.1):
    """A random map with smooth regions; void areas cover about the share `ignored`."""
    noise = rng.standard_normal((num_labels, height, width))
    label = ndimage.gaussian_filter(noise, (0, scale, scale)).argmax(0)
    void = ndimage.gaussian_filter(rng.standard_normal((height, width)), scale / 2)
    return np.where(void > np.quantile(void, 1 - ignored), 255, label) if ignored else label


def perturbed(rng, label, num_labels, scale=2.0, share=0.3):
    """A prediction for `label`: moved by a pixel, wrong in blobs, a class everywhere (void included)."""
    prediction = np.roll(np.where(label == 255, 0, label), (1, -1), (0, 1))
    noise = ndimage.gaussian_filter(rng.standard_normal(label.shape), scale)
    wrong = blobs(rng, *label.shape, num_labels, ignored=0)
    return np.where(noise > np.quantile(noise, 1 - share), wrong, prediction)
