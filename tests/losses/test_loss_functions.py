"""Promises of every public function that a recipe's losses are made of. Values are tested in a file for each."""

import pytest
import torch
import torch.nn.functional as F
from loss_references import masks_of, randn, random_labels, random_mask
from torch import Tensor

from hf_bcd import losses
from hf_bcd.losses.fam import FrequencyAttention
from hf_bcd.losses.fgd import attention_losses
from hf_bcd.losses.ops.functional import on_teacher_grid, resize


CLASSES, _ = masks_of(random_labels(2, 8, 8, num_labels=4), 4)
EDGES = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
MASK = random_mask(2, 8, 8)
MEMORY = F.normalize(randn(6, 4, dtype=torch.float32))
twice = torch.nn.Conv2d(4, 4, 1, bias=False)
adversary = losses.Adversary(4, channels=2)
with torch.random.fork_rng():
    attention = FrequencyAttention(4, 4, 5, 0.1)

# of student and teacher `[2, 4, h, w]`; those of the first group resize the student to the teacher's grid
RESIZING = {
    "bpkd": lambda s, t: losses.bpkd_loss(s, t, EDGES, mask=MASK),
    "bglsseg": lambda s, t: losses.bglsseg_loss(s[:, :1], CLASSES, mask=MASK),
    "c2vkd": lambda s, t: losses.c2vkd_feature_loss(s, t, mask=MASK),
    "category": lambda s, t: losses.category_similarity_loss(s, t, mask=MASK),
    "cirkd": lambda s, t: losses.cirkd_loss(s, t, mask=MASK),
    "crosskd": lambda s, t: losses.crosskd_loss(s, t, mask=MASK),
    "cwd": lambda s, t: losses.cwd_loss(s, t, mask=MASK),
    "dist": lambda s, t: losses.dist_loss(s, t, mask=MASK),
    "dkd": lambda s, t: losses.dkd_loss(s, t, CLASSES, mask=MASK),
    "fam": lambda s, t: losses.fam_loss(s, t, attention, mask=MASK),
    "fgd": lambda s, t: losses.fgd_loss(s, t, CLASSES, mask=MASK),
    "fgd attention": lambda s, t: attention_losses(s, t, mask=MASK),
    "fitnet": lambda s, t: losses.fitnet_loss(s, t, mask=MASK),
    "holistic": lambda s, t: adversary(s, t, MASK),
    "ifvd": lambda s, t: losses.ifvd_loss(s, t, CLASSES),
    "kd": lambda s, t: losses.kd_loss(s, t, mask=MASK),
    "mgd": lambda s, t: losses.mgd_loss(s, t, twice, keep=MASK, mask=MASK),
    "pkd": lambda s, t: losses.pkd_loss(s, t, mask=MASK),
    "segmentation": lambda s, t: losses.segmentation_loss(s, CLASSES.byte().argmax(dim=1)),
    "skd": lambda s, t: losses.skd_loss(s, t, mask=MASK),
    "slimseg": lambda s, t: losses.slimseg_loss(s, CLASSES, mask=MASK),
    "sstkd": lambda s, t: losses.sstkd_loss(s, t, mask=MASK),
}
OTHERS = {
    "at": lambda s, t: losses.at_loss(s, t, mask=MASK),
    "boundary": lambda s, t: losses.boundary_distillation_loss(t[:, 1], t[:, 0], theta=2.0, mask=MASK),
    "context": lambda s, t: losses.context_distillation_loss(s, t[..., ::2, ::2]),
    "cwt": lambda s, t: losses.cwt_loss(s, t, twice, mask=MASK),
    "gate": lambda s, t: losses.sckd_gate(s, t[..., ::2, ::2]),
    "ifd": lambda s, t: losses.ifd_loss(s[:, None], t, mask=MASK),
    "memory": lambda s, t: losses.cirkd_memory_loss(s, t[..., ::2, ::2], MEMORY),
    "pixel": lambda s, t: losses.pixel_similarity_loss([s, t], [t, s], mask=MASK),
    "tat": lambda s, t: losses.tat_loss(*[s] * 3, t[..., ::2, ::2]),
    "boundary of the paper": lambda s, t: losses.boundary_distillation_loss(t[:, 1], t[:, 0], theta=2, mode="paper"),
    "context of the paper": lambda s, t: losses.context_distillation_loss(s, t[..., ::2, ::2], mode="paper"),
}
FUNCTIONS = RESIZING | OTHERS


def inputs() -> tuple[Tensor, Tensor]:
    return randn(2, 4, 4, 4, dtype=torch.float32), randn(2, 4, 8, 8, seed=1, dtype=torch.float32)


def values(found) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found.values() if isinstance(found, dict) else found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_changes_nothing_and_half_precision_is_computed_in_float32(name):
    function, given = FUNCTIONS[name], inputs()
    expected = values(function(*given))
    with torch.autocast("cpu", torch.bfloat16):
        found = values(function(*given))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    half = [x.bfloat16() for x in given]
    found, rounded = values(function(*half)), values(function(*(x.float() for x in half)))
    torch.testing.assert_close(found, rounded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", RESIZING)
def test_the_student_comes_to_the_teachers_grid(name):
    student, teacher = inputs()
    found, expected = (values(RESIZING[name](s, teacher)) for s in (student, resize(student, (8, 8))))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_maps_that_do_not_fit_are_named():
    student, teacher = inputs()
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\).*\(2, 4, 8, 8\).*must agree in batch and channels"):
        on_teacher_grid(student[:, :3], teacher, None)
    with pytest.raises(ValueError, match=r"mask is \(2, 4, 8\); it must be \(2, 8, 8\)"):
        on_teacher_grid(student, teacher, MASK[:, :4])
    with pytest.raises(ValueError, match=r"classes are \(2, 4, 4, 8\) for a teacher of \(2, 4, 8, 8\)"):
        losses.ifvd_loss(student, teacher, CLASSES[:, :, :4])
