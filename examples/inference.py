"""Segments an image with a student and saves it with the classes over it; needs transformers, but not hf_bcd.

    python examples/inference.py me/segformer-b0-bcd picture.jpg
    python examples/inference.py runs/x picture.jpg --onnx --output overlay.png

`--onnx` runs the file that `hf-bcd export` has made, with onnxruntime. `--trust_remote_code` lets a student on a timm
backbone, or an ESPNet, run the code beside its weights.
"""

import argparse

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
)
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES
from transformers.utils.hub import cached_file


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("student", help="Hub id or folder")
parser.add_argument("image", help="picture to segment")
parser.add_argument("--output", default="overlay.png", help="picture to write")
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
    outputs = SemanticSegmenterOutput(
        logits=torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values})[0])
    )
else:
    universal = config.model_type in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES  # such as Mask2Former
    loader = AutoModelForUniversalSegmentation if universal else AutoModelForSemanticSegmentation
    model = loader.from_pretrained(args.student, **trust).eval()
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
(classes,) = processor.post_process_semantic_segmentation(outputs, [image.size[::-1]])
for index, pixels in zip(*np.unique(classes, return_counts=True), strict=True):
    print(f"{config.id2label[index]}: {pixels / classes.numel():.1%}")
colours = np.random.default_rng(0).integers(0, 256, (len(config.id2label), 3), dtype=np.uint8)
Image.blend(image, Image.fromarray(colours[classes]), 0.5).save(args.output)
