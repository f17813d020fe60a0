"""The classes of ADE20K: known ones at their places, and checksums of what the sources say."""

from __future__ import annotations

import hashlib

import numpy as np

from msvmamba_jax.data.ade20k import ade20k_class_names, ade20k_palette


def test_names() -> None:
    names = ade20k_class_names()
    assert len(names) == len(set(names)) == 150
    assert all(name == name.strip() and name for name in names)
    known = {0: "wall", 2: "sky", 7: "bed", 12: "person", 20: "car", 89: "television receiver", 149: "flag"}
    assert {index: names[index] for index in known} == known
    # Of the names in mmsegmentation 1.2.2, without the blank after "bed", joined by line breaks.
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == "f9dbd8a75a0722c9"


def test_palette() -> None:
    palette = ade20k_palette()
    assert (palette.dtype, palette.shape) == (np.uint8, (150, 3))
    known = {0: [120, 120, 120], 2: [6, 230, 230], 12: [150, 5, 61], 20: [0, 102, 200], 149: [92, 0, 255]}
    assert {index: palette[index].tolist() for index in known} == known
    assert hashlib.sha256(palette.tobytes()).hexdigest()[:16] == "ce475c9151035eff"  # of color150.mat's array
