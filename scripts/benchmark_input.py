"""Measure the training input: images per second for each number of workers, beside plain Pillow loops.

A plain loop opens, crops, resizes, flips, augments and stacks images in one process with nothing around it: the very
images, crops and operations that the pipeline's workers get. N workers are compared with N plain loops that run in N
processes at once, since cores that share caches, memory and clock do not give N times as much. All variants take turns
several times, and medians are compared. On a machine that does other things too, trust the ratios, and most of all that
of CPU times, which counts the processors' work alone.

Rates are those of the steady state. Until the first batch workers start and import, once a run: that time stands apart.
The stages are timed one by one in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
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
from msvmamba_jax.data.folder import ImageFolder, load_folder
from msvmamba_jax.data.images import decode_picture
from msvmamba_jax.data.pipeline import Dataset, Record, train_batches
from msvmamba_jax.data.randaugment import OPERATIONS, RandAugment, operation_argument
from msvmamba_jax.errors import InputError

_POLICY = "rand-m9-mstd0.5-inc1"
_DRAWN, _NAMES = 128, 8192  # different images and files that are made up: a shuffle of few files takes longer


def write_images(root: Path, count: int, names: int) -> None:
    """Writes `count` training JPEGs of 500 x 375 pixels, about as large as ImageNet's files, and one for evaluation.

    The training images have `names` names in all.
    """
    rng = np.random.default_rng(0)
    for split, number in (("train", count), ("val", 1)):
        folder = root / split / "all"
        folder.mkdir(parents=True)
        for index in range(number):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), 3)
            pixels = np.asarray(coarse) + rng.normal(0, 12, (375, 500, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / f"{index}.JPEG", quality=90)
    for index in range(count, names):
        os.link(root / "train" / "all" / f"{index % count}.JPEG", root / "train" / "all" / f"{index}.JPEG")


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """Records that are their own number."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        return {"index": int(index)}


def _note(record: Record, rng: np.random.Generator) -> Record:
    state = rng.bit_generator.state["state"]
    return {**record, "counter": state["counter"], "key": state["key"]}


class Stamped:
    """An augmentation with the CPU time of its process on every example."""

    def __init__(self, augment: Callable[[Record, np.random.Generator], Record]) -> None:
        self._augment = augment

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """The example with ``"cpu"``, in seconds."""
        return {**self._augment(record, rng), "cpu": np.float64(time.process_time())}


@dataclasses.dataclass(frozen=True)
class Work:
    """What `train_batches` makes of a data set from one step on: for each image its number and its random generator."""

    numbers: list[int]
    counters: np.ndarray
    keys: np.ndarray

    def first(self, images: int) -> Work:
        """A part of it."""
        return Work(self.numbers[:images], self.counters[:images], self.keys[:images])

    def generators(self) -> list[np.random.Generator]:
        """The generators as they were before the augmentation."""
        return [
            np.random.Generator(np.random.Philox(counter=counter, key=key))
            for counter, key in zip(self.counters, self.keys, strict=True)
        ]


def find_work(dataset: Dataset, *, batch_size: int, seed: int, step: int, images: int) -> Work:
    """The work of the first `images` images from `step` on."""
    noting = dataclasses.replace(dataset, train=_Numbers(len(dataset.train)), augment=_note)
    with contextlib.closing(train_batches(noting, batch_size=batch_size, seed=seed, start_step=step)) as batches:
        parts = [next(batches) for _ in range(-(-images // batch_size))]
    index, counters, keys = (
        np.concatenate([part[name] for part in parts])[:images] for name in ("index", "counter", "key")
    )
    return Work(index.tolist(), counters, keys)


def plain_loop(folder: ImageFolder, work: Work, size: int, batch_size: int) -> tuple[float, float, list[np.ndarray]]:
    """The recipe by hand, Pillow images from file to batch: seconds, seconds of CPU time, and the last batch."""
    policy = RandAugment.from_string(_POLICY)
    resampling = Image.Resampling.BICUBIC

    def image(path: str, rng: np.random.Generator) -> Image.Image:
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

    paths, generators = [folder.path(number) for number in work.numbers], work.generators()
    begin, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(paths), batch_size):
        part = slice(first, first + batch_size)
        batch = np.stack(
            [np.asarray(image(path, rng)) for path, rng in zip(paths[part], generators[part], strict=True)]
        )
    return time.perf_counter() - begin, time.process_time() - cpu, batch


def _one_of_many(folder: ImageFolder, work: Work, size: int, batch_size: int, barrier: Any, results: Any) -> None:
    plain_loop(folder, work.first(batch_size), size, batch_size)  # imports, first uses
    barrier.wait()
    results.put(plain_loop(folder, work, size, batch_size)[:2])


def plain_loops(folder: ImageFolder, work: Work, size: int, batch_size: int, processes: int) -> tuple[float, float]:
    """That many loops at once, all on the same work: images per second, and seconds of CPU time for an image."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    arguments = (folder, work, size, batch_size, barrier, results)
    loops = [context.Process(target=_one_of_many, args=arguments, daemon=True) for _ in range(processes)]
    for loop in loops:
        loop.start()
    times = [results.get(timeout=600) for _ in loops]
    for loop in loops:
        loop.join()
    count = len(work.numbers)
    return sum(count / wall for wall, _ in times), statistics.mean(cpu for _, cpu in times) / count


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one run of the pipeline: seconds until the first batch, images per second, seconds of CPU time for an image.

    `workers_cpu` is that of the workers and `cpu` that of this process.
    """

    start: float
    rate: float
    workers_cpu: float
    cpu: float


def first_timed_step(workers: int) -> int:
    """Where the steady state begins: what workers have made ahead while others were still starting has been used."""
    return 10 * workers if workers else min(8, os.cpu_count() or 1) + 2


def time_pipeline(dataset: Dataset, *, batch_size: int, images: int, workers: int, seed: int) -> Timing:
    """Times `images` images for each worker, once the workers run steadily."""
    stamped = dataclasses.replace(dataset, augment=Stamped(dataset.augment))
    steps = max(-(-images // batch_size), 2) * max(workers, 1)
    begin = time.perf_counter()
    with contextlib.closing(
        train_batches(stamped, batch_size=batch_size, seed=seed, start_step=0, workers=workers)
    ) as batches:
        next(batches)
        start = time.perf_counter() - begin
        for _ in range(first_timed_step(workers) - 1):
            last = next(batches)
        stamps = []
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            last = next(batches)
            stamps.append(float(last["cpu"].max()))
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    # Worker w makes the batches w, w + workers, ...: the times between its first and its last one here.
    spans = [stamps[-workers + worker] - stamps[worker] for worker in range(workers)]
    workers_cpu = sum(spans) / ((steps - workers) * batch_size) if workers else 0.0
    return Timing(start, steps * batch_size / wall, workers_cpu, cpu / (steps * batch_size))


def time_stages(source: ImageFolder, work: Work, size: int) -> dict[str, float]:
    """Seconds of CPU time for an image of each stage, by the steps of `Augmentation` in this process."""
    policy = RandAugment.from_string(_POLICY)
    seconds = dict.fromkeys(("reading", "decoding", "crop and resize", "flip", "RandAugment"), 0.0)
    clock = time.process_time()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.process_time()
        seconds[name] += now - clock
        clock = time.process_time()

    for index, rng in zip(work.numbers, work.generators(), strict=True):
        content, _, name = source.encoded(index)
        lap("reading")
        picture = decode_picture(content, name=name)
        lap("decoding")
        top, left, height, width = random_crop(picture.height, picture.width, rng)
        picture = picture.crop((left, top, left + width, top + height))
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        lap("crop and resize")
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        lap("flip")
        np.array(policy.apply(picture, rng))
        lap("RandAugment")
    return {name: value / len(work.numbers) for name, value in seconds.items()}


@contextlib.contextmanager
def _folder(root: Path | None) -> Iterator[Path]:
    if root is not None:
        yield root
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), _DRAWN, _NAMES)
        yield Path(folder)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report of a run; see the module."""
    size, batch_size, images = arguments.size, arguments.batch_size, arguments.images
    rows: dict[str, list[dict[str, float]]] = {str(workers): [] for workers in arguments.workers}
    stages: list[dict[str, float]] = []
    with _folder(arguments.root) as root:
        dataset = load_dataset({"source": "folder", "root": str(root), "size": size})
        source, _, _ = load_folder(root)
        for repeat in range(arguments.repeats):
            for workers in arguments.workers:
                work = find_work(
                    dataset, batch_size=batch_size, seed=repeat, step=first_timed_step(workers), images=images
                )
                rate, cpu = plain_loops(source, work, size, batch_size, max(workers, 1))
                timing = time_pipeline(dataset, batch_size=batch_size, images=images, workers=workers, seed=repeat)
                pipeline_cpu = timing.workers_cpu if workers else timing.cpu
                rows[str(workers)].append(
                    {
                        "plain_images_per_second": rate,
                        "images_per_second": timing.rate,
                        "of_plain": timing.rate / rate,
                        "plain_cpu_milliseconds": 1e3 * cpu,
                        "cpu_milliseconds": 1e3 * pipeline_cpu,
                        "cpu_of_plain": pipeline_cpu / cpu,
                        "reader_cpu_milliseconds": 1e3 * timing.cpu if workers else 0.0,
                        "seconds_to_first_batch": timing.start,
                    }
                )
            stages.append(time_stages(source, work, size))
    stage = {name: statistics.median(part[name] for part in stages) for name in stages[0]}
    whole = sum(stage.values())
    return {
        "cpus": os.cpu_count(),
        "images": len(source),
        "size": size,
        "batch_size": batch_size,
        "repeats": arguments.repeats,
        "workers": {
            workers: {name: _spread([row[name] for row in found]) for name in found[0]}
            for workers, found in rows.items()
        },
        "stages": {name: {"milliseconds": 1e3 * value, "share": value / whole} for name, value in stage.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _print(report: dict[str, Any]) -> None:
    print(f"{report['images']} files, {report['size']} pixels, {report['cpus']} CPUs, {report['repeats']} repeats")
    print(f"\n{'':<10}{'images/s':^40}{'CPU ms/image':^48}{'first':>9}")
    head = ("plain", "pipeline", "of plain"), ("plain", "worker", "of plain", "reader"), ("batch, s",)
    print(f"{'workers':<10}{head[0][0]:>9}{head[0][1]:>9}{head[0][2]:>22}", end="")
    print(f"{head[1][0]:>8}{head[1][1]:>8}{head[1][2]:>22}{head[1][3]:>10}{head[2][0]:>9}")
    for workers, row in report["workers"].items():
        middle = {name: spread["median"] for name, spread in row.items()}

        def ratio(name: str, row: Any = row) -> str:
            return "{median:.3f} ({least:.3f}-{most:.3f})".format(**row[name])

        print(
            f"{workers if workers != '0' else 'threads':<10}{middle['plain_images_per_second']:>9.1f}"
            f"{middle['images_per_second']:>9.1f}{ratio('of_plain'):>22}{middle['plain_cpu_milliseconds']:>8.3f}"
            f"{middle['cpu_milliseconds']:>8.3f}{ratio('cpu_of_plain'):>22}{middle['reader_cpu_milliseconds']:>10.3f}"
            f"{middle['seconds_to_first_batch']:>9.2f}"
        )
    print(f"\n{'stage':<26}{'ms/image':>10}{'share':>10}")
    for name, stage in report["stages"].items():
        print(f"{name:<26}{stage['milliseconds']:>10.3f}{stage['share']:>10.1%}")


def main() -> int | None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/benchmark_input.py --root /datasets/imagenet --workers 1 8 16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, help="folder with train/ and val/ (default: one is made up)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="0: threads (default: 0 1 2)")
    parser.add_argument("--size", type=int, default=224, help="side of the images, pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--images", type=int, default=512, help="for a worker and repeat (default: %(default)s)")
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
