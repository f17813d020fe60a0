"""Make a segmentation data set of twenty classes of textures and shapes, in folders as ADE20K lies.

Textured ground with objects that hide one another (see data/scenes.py), with a true label for every pixel: a PNG holds
0 for no class and 1.. for the classes in classes.txt, so reduce_zero_label must be on. There are nine sizes: each side
is --low, --high or half way between. An image is a function of the seed, the split and its number alone: the same
command makes the same files, with any number of processes.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image

from msvmamba_jax.data import making
from msvmamba_jax.data.scenes import CLASSES, Scene, draw_scene
from msvmamba_jax.data.segmentation import CLASSES_FILE, EVALUATION, TRAIN
from msvmamba_jax.pictures_segmentation import class_palette, segmentation_overlay

_QUALITY = 90
_SPLITS = (TRAIN, EVALUATION)


def scene(split: int, number: int, *, seed: int, low: int, high: int) -> Scene:
    """Draws a scene; each side has `low` or `high` pixels, or half way between."""
    rng = np.random.default_rng([seed, split, number])
    # Few sizes, since an exact evaluation compiles for each.
    height, width = (int(side) for side in rng.choice((low, (low + high) // 2, high), 2))
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
    return making.contact_sheet(tiles, columns=columns)


def main() -> None:
    """The command."""
    options = making.parse_scene_options(
        __doc__, example="scripts/make_scenes_dataset.py datasets/scenes --preview scenes.png",
        contents="images/, annotations/ and classes.txt", train=600, val=100, low=96, high=192, least=32,
    )  # fmt: skip
    making.make_scenes(options, make, preview, classes=len(CLASSES))


if __name__ == "__main__":
    main()
