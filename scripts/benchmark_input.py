"""Measure the training input: images per second for each number of workers, beside a plain Pillow loop.

The plain loop opens, crops, resizes, flips and augments the same kind of images in one process, with nothing around it;
`workers` 1 does so in one worker process. All variants take turns, several times, and the medians are compared: on a
machine that does other things too, trust the ratios. The stages are timed one by one in this process. What workers cost
beyond them is the share of batching and transport.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from msvmamba_jax import command
from msvmamba_jax.data.augment import random_crop
from msvmamba_jax.data.datasets import load_dataset
from msvmamba_jax.data.folder import load_folder
from msvmamba_jax.data.images import decode_image
from msvmamba_jax.data.pipeline import train_batches
from msvmamba_jax.data.randaugment import OPERATIONS, RandAugment, operation_argument
from msvmamba_jax.errors import InputError

_POLICY = "rand-m9-mstd0.5-inc1"


def write_images(root: Path, count: int) -> None:
    """Writes `count` training and one evaluation JPEGs of 500 x 375 pixels, about as large as ImageNet's files."""
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 1)):
        (root / split / "all").mkdir(parents=True)
        for index in range(number):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), 3)
            pixels = np.asarray(coarse) + rng.normal(0, 12, (375, 500, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / split / "all" / f"{index}.JPEG", quality=90)


def plain_loop(paths: list[str], size: int) -> Callable[[int], float]:
    """The recipe by hand, Pillow images from file to batch: a function from a count of images to seconds."""
    policy = RandAugment.from_string(_POLICY)
    rng = np.random.default_rng(0)
    resampling = Image.Resampling.BICUBIC

    def image(path: str) -> Image.Image:
        with Image.open(path) as file:
            picture = file if file.mode == "RGB" else file.convert("RGB")
            top, left, height, width = random_crop(picture.height, picture.width, rng)
            crop = picture.crop((left, top, left + width, top + height)).resize((size, size), resampling)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for name, magnitude, sign in policy.draw(rng):
            argument = operation_argument(name, magnitude, sign=sign)
            crop = OPERATIONS[name][1](crop, argument, resampling, policy.fill)
        return crop

    def run(count: int) -> float:
        order = rng.integers(len(paths), size=count)
        begin = time.perf_counter()
        for first in range(0, count, 32):
            np.stack([np.asarray(image(paths[index])) for index in order[first : first + 32]])
        return time.perf_counter() - begin

    return run


def time_pipeline(dataset: Any, *, batch_size: int, images: int, workers: int, seed: int) -> float:
    """Seconds for an image, once the workers have started and their buffers are drained."""
    drained = 4 * workers + 2 if workers else min(8, os.cpu_count() or 1) + 2
    steps = -(-images // batch_size)
    with contextlib.closing(
        train_batches(dataset, batch_size=batch_size, seed=seed, start_step=0, workers=workers)
    ) as batches:
        for _ in range(drained):
            next(batches)
        begin = time.perf_counter()
        for _ in range(steps):
            next(batches)
        return (time.perf_counter() - begin) / (steps * batch_size)


def time_stages(source: Any, size: int, count: int) -> dict[str, float]:
    """Seconds for an image of each stage, by the steps of `Augmentation` in this process."""
    policy = RandAugment.from_string(_POLICY)
    rng = np.random.default_rng(0)
    seconds = dict.fromkeys(("reading", "decoding", "crop and resize", "flip", "RandAugment"), 0.0)
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name] += now - clock
        clock = time.perf_counter()

    for index in rng.integers(len(source), size=count):
        content, _, name = source.encoded(int(index))
        lap("reading")
        image = decode_image(content, name=name)
        lap("decoding")
        top, left, height, width = random_crop(*image.shape[:2], rng)
        picture = Image.fromarray(image[top : top + height, left : left + width])
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        lap("crop and resize")
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        lap("flip")
        np.array(policy.apply(picture, rng))
        lap("RandAugment")
    return {name: value / count for name, value in seconds.items()}


@contextlib.contextmanager
def _folder(root: Path | None, images: int) -> Iterator[Path]:
    if root is not None:
        yield root
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), images)
        yield Path(folder)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of a run; see the module."""
    with _folder(arguments.root, max(arguments.batch_size, 128)) as root:
        dataset = load_dataset({"source": "folder", "root": str(root), "size": arguments.size})
        source, _, _ = load_folder(root)
        plain = plain_loop([source.path(index) for index in range(len(source))], arguments.size)
        plain(arguments.batch_size)
        times: dict[str, list[float]] = {"plain": []} | {str(workers): [] for workers in arguments.workers}
        stages: list[dict[str, float]] = []
        for repeat in range(arguments.repeats):
            times["plain"].append(plain(arguments.images) / arguments.images)
            stages.append(time_stages(source, arguments.size, arguments.images))
            for workers in arguments.workers:
                spent = time_pipeline(
                    dataset,
                    batch_size=arguments.batch_size,
                    images=arguments.images,
                    workers=workers,
                    seed=repeat,
                )
                times[str(workers)].append(spent)
    median = {name: statistics.median(values) for name, values in times.items()}
    ratio = {
        name: statistics.median(a / b for a, b in zip(times["plain"], values, strict=True))
        for name, values in times.items()
    }
    stage = {name: statistics.median(part[name] for part in stages) for name in stages[0]}
    if "1" in median:
        stage["batching and transport"] = max(median["1"] - sum(stage.values()), 0.0)
    whole = sum(stage.values())
    return {
        "cpus": os.cpu_count(),
        "images": len(source),
        "size": arguments.size,
        "batch_size": arguments.batch_size,
        "repeats": arguments.repeats,
        "images_per_second": {name: 1 / value for name, value in median.items()},
        "times_plain": ratio,
        "stages": {name: {"milliseconds": 1e3 * value, "share": value / whole} for name, value in stage.items()},
    }


def _print(report: dict[str, Any]) -> None:
    print(f"{report['images']} files, {report['size']} pixels, {report['cpus']} CPUs, {report['repeats']} repeats")
    print(f"\n{'':<26}{'images/s':>10}{'of plain':>10}")
    for name, rate in report["images_per_second"].items():
        label = {"plain": "plain Pillow loop", "0": "pipeline, threads"}.get(name, f"pipeline, workers {name}")
        print(f"{label:<26}{rate:>10.1f}{report['times_plain'][name]:>10.2f}")
    print(f"\n{'stage':<26}{'ms/image':>10}{'share':>10}")
    for name, stage in report["stages"].items():
        print(f"{name:<26}{stage['milliseconds']:>10.3f}{stage['share']:>10.1%}")


def main() -> int | None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/benchmark_input.py --root /datasets/imagenet --workers 0 1 8 16 --images 4096",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, help="folder with train/ and val/ (default: a small one is made up)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="0: threads (default: 0 1 2)")
    parser.add_argument("--size", type=int, default=224, help="side of the images, pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=512, help="for each measurement (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON, too")
    arguments = parser.parse_args()
    if min(arguments.size, arguments.batch_size, arguments.images, arguments.repeats) < 1 or min(arguments.workers) < 0:
        parser.error("--size, --batch-size, --images and --repeats must be at least 1, --workers at least 0")
    try:
        report = measure(arguments)
        _print(report)
        if arguments.output:
            command.write_json(arguments.output, report)
    except InputError as error:
        sys.exit(f"error: {error}")
    return None


if __name__ == "__main__":
    main()
