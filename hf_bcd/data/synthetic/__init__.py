"""Generated street scenes: a data set that needs no download."""

from .scenes import SyntheticScenes


__all__ = ["SyntheticScenes"]
