"""Colours that are easy to tell apart."""

from __future__ import annotations

import functools

import numpy as np


@functools.cache
def distinct_colours() -> np.ndarray:
    """256 colours, each as far from those before it as can be, by the distances of the OKLab space: uint8 (256, 3)."""
    levels = np.linspace(0, 255, 12).round()
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(colours)
    # Neither so dark nor so pale that they look like the image's own shades.
    fit = (lab[:, 0] > 0.4) & (lab[:, 0] < 0.93) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.04)
    colours, lab = colours[fit], lab[fit]
    lab[:, 0] /= 2  # over an image of any brightness this tells less
    chosen = [int(np.argmax(np.hypot(lab[:, 1], lab[:, 2])))]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < 256:
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(np.argmax(distance)))
    return colours[chosen].astype(np.uint8)


def _oklab(colours: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 as lightness and two axes of colour (Ottosson, "A perceptual color space", 2020): (n, 3)."""
    value = colours / 255
    linear = np.where(value > 0.04045, ((value + 0.055) / 1.055) ** 2.4, value / 12.92)
    cones = np.cbrt(
        linear
        @ np.array(
            [
                [0.4122214708, 0.2119034982, 0.0883024619],
                [0.5363325363, 0.6806995451, 0.2817188376],
                [0.0514459929, 0.1073969566, 0.6299787005],
            ]
        )
    )
    return cones @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
