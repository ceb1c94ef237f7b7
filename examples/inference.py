"""Runs a student on a picture and draws what it finds: classes, boxes or masks; needs transformers, but not hf_bcd.

    python examples/inference.py me/segformer-b0-bcd picture.jpg
    python examples/inference.py runs/x picture.jpg --onnx --output overlay.png

`--onnx` runs the file that `hf-bcd export` has made, with onnxruntime. `--trust_remote_code` lets a student on a timm
backbone, or an ESPNet, run the code beside its weights.
"""

import argparse
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.utils.hub import cached_file


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("student", help="Hub id or folder")
parser.add_argument("image", help="picture to look at")
parser.add_argument("--output", default="overlay.png", help="picture to write")
parser.add_argument("--threshold", type=float, default=0.5, help="score from which an object is drawn")
parser.add_argument(
    "--instances", action="store_true", help="objects of a model that serves both, such as Mask2Former"
)
parser.add_argument("--onnx", action="store_true", help="run onnx/model.onnx instead of the weights")
parser.add_argument("--trust_remote_code", action="store_true", help="run the student's own code")
args = parser.parse_args()

trust = {"trust_remote_code": args.trust_remote_code}
config = AutoConfig.from_pretrained(args.student, **trust)
processor = AutoImageProcessor.from_pretrained(args.student, **trust)
image = Image.open(args.image).convert("RGB")
if args.onnx:
    import onnxruntime

    session = onnxruntime.InferenceSession(cached_file(args.student, "onnx/model.onnx"))
    height, width = session.get_inputs()[0].shape[2:]  # numbers where the file takes one size only, else names
    resize = {"do_resize": True, "size": {"height": height, "width": width}} if isinstance(height, int) else {}
    pixel_values = processor(image, return_tensors="np", **resize)["pixel_values"]
    found = session.run(None, {"pixel_values": pixel_values})
    names = [output.name for output in session.get_outputs()]
    outputs = SimpleNamespace(**dict(zip(names, map(torch.from_numpy, found), strict=True)))
else:
    name = (config.architectures or [""])[0]
    if config.model_type in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES and "Detection" not in name:
        kind = "UniversalSegmentation"
    else:
        kinds = {"Detection": "ObjectDetection", "ForInstance": "InstanceSegmentation"}
        kind = next((kind for part, kind in kinds.items() if part in name), "SemanticSegmentation")
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(args.student, **trust).eval()
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))

colours = np.random.default_rng(0).integers(64, 256, (len(config.id2label), 3), dtype=np.uint8)
options = {"threshold": args.threshold, "target_sizes": [image.size[::-1]]}
if getattr(outputs, "pred_masks", None) is not None or args.instances:
    (found,) = processor.post_process_instance_segmentation(outputs, **options)
    segments, pixels = found["segmentation"].numpy(), np.asarray(image).astype(float)
    for one in found["segments_info"]:
        print(f"{config.id2label[one['label_id']]}: {one['score']:.2f}, {(segments == one['id']).mean():.1%}")
        pixels[segments == one["id"]] = (pixels[segments == one["id"]] + colours[one["label_id"]]) / 2
    image = Image.fromarray(pixels.astype(np.uint8))
elif getattr(outputs, "pred_boxes", None) is not None:
    (found,) = processor.post_process_object_detection(outputs, **options)
    draw = ImageDraw.Draw(image)
    for score, label, box in zip(*(found[key].tolist() for key in ("scores", "labels", "boxes")), strict=True):
        print(f"{config.id2label[label]}: {score:.2f}, {' '.join(f'{side:.0f}' for side in box)}")
        draw.rectangle(box, outline=tuple(colours[label].tolist()), width=2)
else:
    (classes,) = processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])
    for index, count in zip(*np.unique(classes, return_counts=True), strict=True):
        print(f"{config.id2label[index]}: {count / classes.numel():.1%}")
    image = Image.blend(image, Image.fromarray(colours[classes]), 0.5)
image.save(args.output)
