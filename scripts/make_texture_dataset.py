"""Make an image data set of twelve textures and shapes, in folders as ImageNet lies.

Every image has random colours, scale, rotation, lighting and clutter, so that colours tell nothing of the class. As in
ImageNet the sizes differ, a few JPEGs are grey or CMYK, and one file named .JPEG is a PNG. An image is a function of
the seed, the split and its number alone: the same command makes the same pixels, with any number of processes.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from msvmamba_jax.data import making
from msvmamba_jax.data.textures import TEXTURES, Rng
from msvmamba_jax.errors import InputError

_QUALITY = 88
_GREY, _CMYK = 0.02, 0.01  # parts of all images


def draw(name: str, rng: Rng, *, low: int = 200, high: int = 600) -> Image.Image:
    """Draws an image of a class.

    Args:
        name: a key of `TEXTURES`.
        rng: the only source of randomness.
        low: least side, in pixels.
        high: greatest side, in pixels.

    Returns:
        RGB, each side in low..high.
    """
    width, height = (int(side) for side in rng.integers(low, high + 1, 2))
    short = min(width, height)
    rows, columns = np.mgrid[:height, :width]
    angle, period = rng.uniform(0, 2 * np.pi), short / rng.uniform(4, 8)
    centre = rng.uniform(0.3, 0.7, 2) * (width, height)
    x, y = (columns - centre[0]) / period, (rows - centre[1]) / period
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    field = TEXTURES[name](x, y, rng)
    # The same random parts of figure and ground for all classes: else the amount of a colour would tell the class.
    field = (field - np.quantile(field, rng.uniform(0.3, 0.7))) * rng.choice((-1, 1))
    part = 1 / (1 + np.exp(-np.clip(6 * field, -30, 30)))
    while True:
        colours = rng.uniform(0, 255, (2, 3))
        if np.abs(colours[0] - colours[1]).sum() > 180:
            break
    pixels = colours[0] + part[..., None] * (colours[1] - colours[0])
    light = rng.uniform(-0.35, 0.35, 2)
    shade = 1 + light[0] * (columns / width - 0.5) + light[1] * (rows / height - 0.5)
    pixels = pixels * shade[..., None] + rng.normal(0, rng.uniform(2, 14), pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 6)):  # clutter
        left, top = rng.uniform(-0.1, 0.9, 2) * (width, height)
        box = (left, top, left + rng.uniform(0.08, 0.25) * short, top + rng.uniform(0.08, 0.25) * short)
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape(box, fill=tuple(int(value) for value in rng.integers(0, 256, 3)))
    return image


def _write(job: tuple[Path, str, int, int, int], *, seed: int) -> None:
    """Draws and writes one image: (path, class, split's number, class's number, image's number)."""
    path, name, *numbers = job
    rng = np.random.default_rng([seed, *numbers])
    image = draw(name, rng)
    kind = rng.random()
    if numbers == [0, 0, 0]:
        image.save(path, format="PNG")
        return
    if kind < _GREY or numbers == [0, 1, 0]:
        image = image.convert("L")
    elif kind < _GREY + _CMYK or numbers == [0, 2, 0]:
        image = image.convert("CMYK")
    image.save(path, format="JPEG", quality=_QUALITY)


def make(root: Path, *, train: int, val: int, seed: int, processes: int) -> int:
    """Writes the data set; `train` and `val` images of every class.

    Returns:
        How many images were written.

    Raises:
        InputError: `root` exists and is not empty, or cannot be written.
    """
    jobs: list[tuple[Path, str, int, int, int]] = []
    with making.new_folder(root):
        for split_number, (split, count) in enumerate((("train", train), ("val", val))):
            for label, name in enumerate(TEXTURES):
                folder = root / split / name
                folder.mkdir(parents=True)
                jobs += [(folder / f"{name}_{i:05}.JPEG", name, split_number, label, i) for i in range(count)]
        making.run(functools.partial(_write, seed=seed), jobs, processes=processes)
    return len(jobs)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/make_texture_dataset.py datasets/textures",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", type=Path, help="folder to make, with train/ and val/")
    parser.add_argument("--train", type=int, default=300, help="training images of a class (default: %(default)s)")
    parser.add_argument("--val", type=int, default=50, help="evaluation images of a class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: as many as CPUs")
    arguments = parser.parse_args()
    if min(arguments.train, arguments.val, arguments.processes) < 1 or arguments.seed < 0:
        parser.error("--train, --val and --processes must be at least 1, --seed not negative")
    try:
        count = make(
            arguments.root,
            train=arguments.train,
            val=arguments.val,
            seed=arguments.seed,
            processes=arguments.processes,
        )
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.root}: {count} images of {len(TEXTURES)} classes")


if __name__ == "__main__":
    main()
