"""Whether predictions keep true regions whole: completeness, connectivity, fragments and missed regions."""

import torch
from torch import Tensor

from .components import label_components


MIN_REGION_PIXELS = 64
# Ratios are summed as fixed-point integers: exact, and independent of the order of images.
FIXED_POINT_BITS = 32


def connectivity_counts(truth: Tensor, prediction: Tensor, num_labels: int) -> dict[str, Tensor]:
    """Sums over the true regions of each image and class.

    A region R is an 8-connected component of one true class with at least 64 pixels, P its pixels predicted as that
    class, and the pieces of R the 8-connected components of P. Maps are `[B, H, W]`, -1 at ignored pixels.

    Returns:
        int64 `[B, C]` each: `regions`, their number; `missed`, how many have an empty P; `fragments`, pieces of at least 1 %
        of |R|; `completeness` and `connectivity`, sums of |largest piece| / |R| and |largest piece| / |P| in units of
        2**-32.
    """
    batch, height, width = truth.shape
    regions = label_components(truth)
    # Touching pixels of one true class lie in one region, so the components of the correct pixels are the pieces.
    pieces = label_components(truth.masked_fill(truth != prediction, -1))
    region_of_piece = regions.at(pieces.first)

    none = torch.zeros_like(regions.sizes)
    found = none.index_add(0, region_of_piece, pieces.sizes)
    largest = none.scatter_reduce(0, region_of_piece, pieces.sizes, "amax")
    is_fragment = 100 * pieces.sizes >= regions.sizes[region_of_piece]
    values = {
        "regions": torch.ones_like(none),
        "missed": (found == 0).long(),
        "fragments": none.index_add(0, region_of_piece, is_fragment.long()),
        "completeness": _fixed_point_ratio(largest, regions.sizes),
        "connectivity": _fixed_point_ratio(largest, found.clamp(min=1)),
    }
    slot = regions.first // (height * width) * num_labels + truth.flatten()[regions.first]
    # Regions that are too small go to a slot that is dropped.
    slot = torch.where(regions.sizes >= MIN_REGION_PIXELS, slot, batch * num_labels)
    return {
        name: none.new_zeros(batch * num_labels + 1).index_add_(0, slot, value)[:-1].view(batch, num_labels)
        for name, value in values.items()
    }


def connectivity_scores(totals: dict[str, Tensor]) -> dict[str, float]:
    """Means over the regions of a class, then over the classes that have regions, of counts summed over images.

    Returns:
        `completeness`, `connectivity` (over regions with non-empty P) and `missed` in [0, 1]; `fragments` per region.
    """
    regions, missed = totals["regions"].double(), totals["missed"].double()
    unit = 2.0**-FIXED_POINT_BITS
    per_class = {
        "completeness": totals["completeness"].double() * unit / regions,
        "connectivity": totals["connectivity"].double() * unit / (regions - missed),
        "fragments": totals["fragments"].double() / regions,
        "missed": missed / regions,
    }
    return {name: values.nanmean().item() for name, values in per_class.items()}


def _fixed_point_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return (numerator << FIXED_POINT_BITS) // denominator
