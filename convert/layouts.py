"""How one array of the original is laid out here: pairs of functions that are exact inverses.

PyTorch's linear kernels are (out, in), ours (in, out); its convolutions are (out, in, rows, columns), ours channels
last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class Layout:
    """One original array as one or more of ours.

    Attributes:
        split: the original array to ours, given their number.
        join: ours to the original array.
    """

    split: Callable[[np.ndarray, int], Sequence[np.ndarray]]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]


def _einops(original: str, ours: str, **sizes: int) -> Layout:
    """A permutation of one array's elements."""
    return Layout(
        split=lambda x, _: [rearrange(x, f"{original} -> {ours}", **sizes)],
        join=lambda parts: rearrange(parts[0], f"{ours} -> {original}", **sizes),
    )


def stacked(original: str, ours: str) -> Layout:
    """An array whose leading axis enumerates routes; each route is a parameter of its own."""
    return Layout(
        split=lambda x, count: list(rearrange(x, f"{original} -> {ours}", k=count)),
        join=lambda parts: rearrange(np.stack(list(parts)), f"{ours} -> {original}"),
    )


SAME = _einops("...", "...")
LINEAR = _einops("o i", "i o")
POINTWISE = _einops("o i 1 1", "i o")
CONVOLUTION = _einops("o i p q", "p q i o")
DEPTHWISE = _einops("d 1 i j", "i j d")
DECONVOLUTION = _einops("i o p q", "i p q o")
REGIONS = _einops("o (c p q)", "(p q c) o", p=7, q=7)  # a linear layer on regions of 7 x 7 bins
PATCHES = _einops("o c p q", "(p q c) o", p=4, q=4, c=3)

# A regular expression for the whole name of an original tensor, the names of what is made of it, and how. Numbers in
# the expression are named groups, such as (?P<stage>\d+), and stand as {stage} in our names.
Rule = tuple[str, tuple[str, ...], Layout]
