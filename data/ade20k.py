"""The 150 classes of ADE20K's scene parsing benchmark (ADEChallengeData2016), their names and colours.

``ade20k_classes.txt`` holds one class a line in the order of the label indices: red, green, blue, name. The names are
the first of the synonyms in ``objectInfo150.txt`` and the colours those of ``color150.mat``, both from the benchmark's
repository (github.com/CSAILVision/sceneparsing); mmsegmentation has the same ones but for "television receiver", which
is taken here. Road (6) and skyscraper (48) share a colour.
"""

from __future__ import annotations

import functools
import importlib.resources

import numpy as np


@functools.cache
def ade20k_class_names() -> tuple[str, ...]:
    """The names of the 150 classes; the position is the class index, and no name occurs twice."""
    return tuple(name for *_, name in _rows())


def ade20k_palette() -> np.ndarray:
    """The colours of the 150 classes: uint8 (150, 3), RGB."""
    return np.array([list(map(int, colour)) for *colour, _ in _rows()], np.uint8)


def _rows() -> list[list[str]]:
    # The path starts at the package that is installed under this name, however this module was reached.
    text = importlib.resources.files("msvmamba_jax.data").joinpath("ade20k_classes.txt").read_text(encoding="utf-8")
    return [line.split(maxsplit=3) for line in text.splitlines()]
