"""Connected-component labelling in pure torch."""

from typing import NamedTuple

import torch
from torch import Tensor


class Components(NamedTuple):
    """The K components of a batch of maps, numbered in the order of their first pixels."""

    run_of_pixel: Tensor  # horizontal run of each pixel, `[B, H, W]`
    component_of_run: Tensor  # in [0, K); -1 where the map is negative
    sizes: Tensor  # pixels of each component, `[K]`
    first: Tensor  # row-major index of each component's first pixel into the flattened batch, `[K]`

    @property
    def ids(self) -> Tensor:
        """Component of each pixel, `[B, H, W]`."""
        return self.component_of_run[self.run_of_pixel]

    def at(self, pixels: Tensor) -> Tensor:
        """Component of the pixels at row-major indices into the flattened batch."""
        return self.component_of_run[self.run_of_pixel.flatten()[pixels]]


def label_components(classes: Tensor) -> Components:
    """Labels the 8-connected components of equal class in integer maps `[B, H, W]`; negative pixels belong to none.

    Works on the graph of horizontal runs, which has far fewer nodes than pixels. It takes one device sync per round of
    merging, and rounds grow about with the logarithm of the number of runs, also for long snakes.
    """
    starts = torch.ones_like(classes, dtype=torch.bool)
    starts[..., 1:] = classes[..., 1:] != classes[..., :-1]
    run_of_pixel = starts.flatten().cumsum(0, dtype=torch.int32) - 1
    run_first = starts.flatten().nonzero().squeeze(1)
    run_sizes = run_first.diff(append=run_first.new_tensor([classes.numel()]))

    root = _merge(len(run_first), *_touching_runs(classes, starts, run_of_pixel))
    foreground = classes.flatten()[run_first] >= 0
    # A root is the lowest run of its component, so it holds the first pixel. The background has roots as well.
    is_component = foreground & (root == torch.arange(len(root), device=root.device))
    first = run_first[is_component]
    component_of_run = torch.where(foreground, (is_component.cumsum(0) - 1)[root], -1)
    # Slot 0 takes the runs of the background.
    sizes = run_sizes.new_zeros(len(first) + 1).index_add_(0, component_of_run + 1, run_sizes)[1:]
    return Components(run_of_pixel.view_as(classes), component_of_run, sizes, first)


def _touching_runs(classes: Tensor, starts: Tensor, run_of_pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of runs of one class that touch across two rows, each pair once or a few times."""
    width = classes.shape[2]
    lower, upper = classes[:, 1:], classes[:, :-1]
    # Joined to the pixel above, above left, above right: only where the same runs are not joined further left.
    joined = torch.zeros((3, *classes.shape), dtype=torch.bool, device=classes.device)
    joined[0, :, 1:] = (lower == upper) & (starts[:, 1:] | starts[:, :-1])
    crossing = starts[:, 1:, 1:] & starts[:, :-1, 1:]
    joined[1, :, 1:, 1:] = (lower[..., 1:] == upper[..., :-1]) & crossing
    joined[2, :, 1:, :-1] = (lower[..., :-1] == upper[..., 1:]) & crossing
    direction, pixel = joined.flatten(1).nonzero().unbind(1)
    steps = torch.tensor([width, width + 1, width - 1], device=classes.device)
    return run_of_pixel[pixel].long(), run_of_pixel[pixel - steps[direction]].long()


def _merge(num_nodes: int, a: Tensor, b: Tensor) -> Tensor:
    """Lowest node of each node's component in the graph with the edges a-b.

    Every round hooks roots onto lower neighbouring roots and then jumps all pointers up to the new roots, so that
    even a chain through all nodes takes one round of logarithmically many jumps.
    """
    parent = torch.arange(num_nodes, device=a.device)
    while len(a):
        parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        # At most len(a) roots were hooked, so paths have at most len(a) + 1 steps: no test for the end is needed.
        for _ in range(len(a).bit_length()):
            parent = parent[parent]
        a, b = parent[a], parent[b]
        apart = (a != b).nonzero().squeeze(1)
        a, b = a[apart], b[apart]
    return parent
