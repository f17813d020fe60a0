"""Make a segmentation data set of twenty classes of textures and shapes, in folders as ADE20K lies.

Textured ground with objects that hide one another (see data/scenes.py), with a true label for every pixel: a PNG holds
0 for no class and 1.. for the classes in classes.txt, so reduce_zero_label must be on. The sizes differ. An image is a
function of the seed, the split and its number alone: the same command makes the same files, with any number of
processes.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from msvmamba_jax.data import making
from msvmamba_jax.data.scenes import CLASSES, Scene, draw_scene
from msvmamba_jax.data.segmentation import CLASSES_FILE, EVALUATION, TRAIN
from msvmamba_jax.errors import InputError
from msvmamba_jax.pictures_segmentation import class_palette, segmentation_overlay

_QUALITY = 90
_SPLITS = (TRAIN, EVALUATION)


def scene(split: int, number: int, *, seed: int, low: int, high: int) -> Scene:
    """Draws a scene; each side has `low` to `high` pixels."""
    rng = np.random.default_rng([seed, split, number])
    height, width = (int(side) for side in rng.integers(low, high + 1, 2))
    return draw_scene(rng, height, width)


def _path(root: Path, kind: str, split: int, number: int) -> Path:
    return root / kind / _SPLITS[split] / f"scene_{number:06}.{'jpg' if kind == 'images' else 'png'}"


def _write(job: tuple[int, int], *, root: Path, seed: int, low: int, high: int) -> None:
    """Draws and writes one scene: (the split's number, its own)."""
    drawn = scene(*job, seed=seed, low=low, high=high)
    Image.fromarray(drawn.image).save(_path(root, "images", *job), quality=_QUALITY)
    # Stored from 1 on; what is no class, 255, comes to 0.
    Image.fromarray(drawn.labels + np.uint8(1)).save(_path(root, "annotations", *job))


def make(root: Path, *, train: int, val: int, seed: int, low: int, high: int, processes: int) -> None:
    """Writes the data set.

    Raises:
        InputError: `root` exists and is not empty, or cannot be written.
    """
    jobs = [(split, number) for split, count in enumerate((train, val)) for number in range(count)]
    with making.new_folder(root):
        for kind in ("images", "annotations"):
            for split in _SPLITS:
                (root / kind / split).mkdir(parents=True)
        (root / CLASSES_FILE).write_text("".join(f"{name}\n" for name in CLASSES))
        making.run(functools.partial(_write, root=root, seed=seed, low=low, high=high), jobs, processes=processes)


def preview(*, seed: int, low: int, high: int, rows: int = 3, columns: int = 2) -> Image.Image:
    """The first training scenes, each beside its labels in colour and their names."""
    tiles = []
    for number in range(rows * columns):
        drawn = scene(0, number, seed=seed, low=low, high=high)
        labelled = segmentation_overlay(drawn.image, drawn.labels, CLASSES, class_palette(CLASSES))
        enlarged = max(1, 512 // max(drawn.image.shape[:2]))
        plain = Image.fromarray(drawn.image.repeat(enlarged, axis=0).repeat(enlarged, axis=1))
        tile = Image.new("RGB", (16 + plain.width + labelled.width, labelled.height), "white")
        tile.paste(plain, (16, 16))
        tile.paste(labelled, (16 + plain.width, 0))
        tiles.append(tile)
    width, height = (max(size) for size in zip(*(tile.size for tile in tiles), strict=True))
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width, number // columns * height))
    return sheet


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/make_scenes_dataset.py datasets/scenes --preview scenes.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", type=Path, help="folder to make, with images/, annotations/ and classes.txt")
    parser.add_argument("--train", type=int, default=600, help="training images (default: %(default)s)")
    parser.add_argument("--val", type=int, default=100, help="evaluation images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--low", type=int, default=96, help="least side, in pixels (default: %(default)s)")
    parser.add_argument("--high", type=int, default=200, help="greatest side, in pixels (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: as many as CPUs")
    parser.add_argument("--preview", type=Path, help="a PNG file to draw the first scenes into")
    arguments = parser.parse_args()
    if min(arguments.train, arguments.val, arguments.processes) < 1 or arguments.seed < 0:
        parser.error("--train, --val and --processes must be at least 1, --seed not negative")
    if not 32 <= arguments.low <= arguments.high:
        parser.error("--low must be at least 32, and --high at least --low")
    look = {"seed": arguments.seed, "low": arguments.low, "high": arguments.high}
    try:
        make(arguments.root, train=arguments.train, val=arguments.val, processes=arguments.processes, **look)
    except InputError as error:
        sys.exit(f"error: {error}")
    if arguments.preview:
        try:
            preview(**look).save(arguments.preview)
        except (OSError, ValueError) as error:  # ValueError: no image format has this extension
            sys.exit(f"error: cannot write {arguments.preview}: {error}")
    print(f"{arguments.root}: {arguments.train + arguments.val} images of {len(CLASSES)} classes")


if __name__ == "__main__":
    main()
