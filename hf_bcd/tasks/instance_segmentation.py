"""Instance segmentation: a mask, a box and a class for every object."""

from collections.abc import Mapping
from typing import Any

from ..data.detection import INSTANCES, check_box_sample
from ..metrics import InstanceMetrics
from .base import Score
from .object_detection import ObjectDetection


CALL = """pipeline("image-segmentation", {{ model }}{{ trust }})({{ picture }}, subtask="instance", threshold=0.5)"""
PIPELINE = """\
from transformers import pipeline

segment = pipeline("image-segmentation", model={{ model }}{{ trust }})
for found in segment({{ picture }}, subtask="instance", threshold=0.5):  # a path, an address or a PIL image
    print(found["label"], f"{found['score']:.2f}", found["mask"].getbbox())  # left, top, right, bottom in pixels
"""
TENSORS = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelFor{{ "Universal" if universal else "Instance" }}Segmentation

processor = AutoImageProcessor.from_pretrained({{ model }}{{ trust }})
model = AutoModelFor{{ "Universal" if universal else "Instance" }}Segmentation.from_pretrained({{ model }}{{ trust }}).eval()
image = Image.open({{ picture }}).convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
(found,) = processor.post_process_instance_segmentation(outputs, threshold=0.5, target_sizes=[image.size[::-1]])
names = [model.config.id2label[segment["label_id"]] for segment in found["segments_info"]]
print(found["segmentation"].shape, names)  # which object each pixel belongs to, -1 for none
"""


class InstanceSegmentation(ObjectDetection):
    """Masks: as detection, and samples and predictions have `masks` too."""

    name = INSTANCES
    title = "instance segmentation"
    pipeline_tag = "image-segmentation"
    scores = (
        Score("mask_ap", "mask AP", paired=True, plotted=True),
        Score("mask_ap50", "mask AP50"),
        Score("mask_ap75", "mask AP75"),
        Score("boundary_ap", "boundary AP", paired=True, plotted=True),
        Score("connectivity", "connectivity", paired=True),
        Score("mask_ap_small", "mask AP small", headline=False),
        Score("mask_ap_medium", "mask AP medium", headline=False),
        Score("mask_ap_large", "mask AP large", headline=False),
        Score("mask_ar", "mask AR", headline=False),
        Score("boundary_ap50", "boundary AP50", headline=False),
        Score("boundary_ap75", "boundary AP75", headline=False),
        Score("completeness", "completeness", headline=False, paired=True),
        Score("fragments", "fragments", percent=False, higher_is_better=False, headline=False, paired=True),
        Score("missed", "missed", higher_is_better=False, headline=False, paired=True),
        *(
            score._replace(title=f"box {score.title}", headline=score.key in ("box_ap", "box_ap50"))
            if score.key.startswith("box_")
            else score
            for score in ObjectDetection.scores
        ),
    )
    per_class = Score("per_class_mask_ap", "mask AP")
    answer = "masks, boxes and classes of objects of {} classes"
    caption = (
        "the input, its true objects, as many of each model's best masks as all these pictures have objects, and the errors of "
        "the student: dashed is what it misses. Found is an object that a mask of its class overlaps by at least a half."
    )
    protocol = {
        **ObjectDetection.protocol,
        "ap": "AP is COCO's mean over IoU 0.50 to 0.95 of at most 100 detections an image, or "
        "max_detections of the model if that is more (faster-coco-eval), of masks and of "
        "boxes; crowds are ignored. Boundary AP takes the smaller one of the IoU of masks and of their boundaries (Cheng et al. "
        "2021), 2 % of the picture's diagonal wide.",
        "connectivity": "A true object is matched to the mask that overlaps it by at least a half. Of its 8-connected pieces of "
        "at least 64 pixels, completeness is the largest covered piece over the whole, connectivity over all that is covered; "
        "fragments are covered pieces of at least 1 %, and missed is what nothing covers.",
    }
    call = CALL
    snippets = (PIPELINE, TENSORS)

    def check_sample(self, sample: Any, num_labels: int, name: str, evaluated: bool) -> None:
        check_box_sample(sample, num_labels, name, evaluated, masks=True)

    def metric(self, num_labels: int) -> InstanceMetrics:
        return InstanceMetrics(num_labels)

    def truths(self, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [truth | {"masks": masks} for truth, masks in zip(super().truths(batch), batch["masks"], strict=True)]
