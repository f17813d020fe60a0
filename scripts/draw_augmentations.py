"""Draw a sheet of augmented training images, to look at before a long run.

Every row is an image: on the left the whole of it, then as the network sees it in training, each time augmented anew.
A column is a batch: its images are erased, and mixed with each other, as on the device.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageOps

from msvmamba_jax.checkpoint import Description
from msvmamba_jax.data.augment import Augmentation
from msvmamba_jax.data.images import find_images, read_image
from msvmamba_jax.data.preprocessing import INTERPOLATIONS, Preprocessing
from msvmamba_jax.errors import InputError
from msvmamba_jax.tasks.classification import Classification
from msvmamba_jax.tasks.mixing import Mixing

_GAP = 4  # pixels between the images
_HEADER = 20


def sheet(
    images: list[np.ndarray], augment: Augmentation, on_device: Classification, *, variants: int, seed: int
) -> Image.Image:
    """Draws the sheet; image i's variant j has a random generator of its own, seeded by (seed, i, j)."""
    preprocessing = on_device.description.preprocessing
    prepare = jax.jit(lambda batch, keys, key: on_device.prepare(batch, keys, key, lambda x: x[::-1])["image"])
    cell = augment.size + _GAP
    page = Image.new("RGB", ((variants + 1) * cell + _GAP, len(images) * cell + _HEADER + _GAP), "white")
    draw = ImageDraw.Draw(page)
    for column in range(variants + 1):
        draw.text((_GAP + column * cell, _GAP), f"variant {column}" if column else "original", fill="black")
    for row, image in enumerate(images):
        top = _HEADER + row * cell
        page.paste(ImageOps.contain(Image.fromarray(image), (augment.size, augment.size)), (_GAP, top))
    for variant in range(variants):
        batch = np.stack(
            [augment({"image": x}, np.random.default_rng([seed, i, variant]))["image"] for i, x in enumerate(images)]
        )
        key = jax.random.fold_in(jax.random.key(seed), variant)
        labels = np.zeros(len(batch), np.int32)
        normalised = prepare({"image": batch, "label": labels}, jax.random.split(key, len(batch)), key)
        pixels = (np.asarray(normalised) * preprocessing.std + preprocessing.mean) * 255
        for row, image in enumerate(np.rint(pixels.clip(0, 255)).astype(np.uint8)):
            page.paste(Image.fromarray(image), (_GAP + (variant + 1) * cell, _HEADER + row * cell))
    return page


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/draw_augmentations.py /datasets/imagenet/val --output sheet.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Augmentation()
    parser.add_argument("paths", nargs="+", type=Path, help="image files, or folders that are searched for images")
    parser.add_argument("--output", type=Path, default=Path("augmentations.png"), help="default: %(default)s")
    parser.add_argument("--images", type=int, default=6, help="rows, spread over what is found (default: %(default)s)")
    parser.add_argument("--variants", type=int, default=8, help="augmented images in a row (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other variants (default: %(default)s)")
    options = parser.add_argument_group("as in config.data")
    options.add_argument("--size", type=int, default=default.size, help="default: %(default)s")
    options.add_argument("--interpolation", choices=INTERPOLATIONS, default="bicubic", help="default: %(default)s")
    options.add_argument("--randaugment", default=default.randaugment, help="'' for none; default: %(default)s")
    options.add_argument("--scale", nargs=2, type=float, default=default.scale, help="default: %(default)s")
    options.add_argument("--ratio", nargs=2, type=float, default=default.ratio, help="default: 3/4 to 4/3")
    options.add_argument("--flip", type=float, default=default.flip, help="default: %(default)s")
    device = parser.add_argument_group("as in config, on the device")
    device.add_argument("--erase_probability", type=float, default=0.25, help="default: %(default)s")
    device.add_argument("--mixup", type=float, default=0.8, help="config.mix.mixup; 0 for none; default: %(default)s")
    device.add_argument("--cutmix", type=float, default=1.0, help="config.mix.cutmix; 0 for none; default: %(default)s")
    arguments = parser.parse_args()
    if arguments.images < 1 or arguments.variants < 1:
        parser.error("--images and --variants must be at least 1")
    try:
        augment = Augmentation(
            size=arguments.size,
            interpolation=arguments.interpolation,
            randaugment=arguments.randaugment or None,
            scale=arguments.scale,
            ratio=arguments.ratio,
            flip=arguments.flip,
        )
        on_device = Classification(
            description=Description(
                model={"name": "msvmamba_nano", "num_classes": 1}, class_names=("any",), preprocessing=Preprocessing()
            ),
            erase_probability=arguments.erase_probability,
            mixing=Mixing(mixup=arguments.mixup, cutmix=arguments.cutmix),
        )
        found = find_images(arguments.paths)
        count = min(arguments.images, len(found))
        images = [read_image(found[row * len(found) // count]) for row in range(count)]
        page = sheet(images, augment, on_device, variants=arguments.variants, seed=arguments.seed)
        try:
            page.save(arguments.output)
        except (OSError, ValueError) as error:
            raise InputError(f"Cannot write {arguments.output}: {error}.") from error
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.output}: {count} of {len(found)} images, {arguments.variants} variants of each")


if __name__ == "__main__":
    main()
