"""What the scripts that make up data sets share: options, a new folder, processes that fill it, a preview."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from PIL import Image
from tqdm import tqdm

from msvmamba_jax.errors import InputError

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def new_folder(root: Path) -> Iterator[None]:
    """Makes a folder for a data set, to be filled inside the context.

    Raises:
        InputError: `root` exists and is not empty, or (also from inside) cannot be written.
    """
    try:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise InputError(f"{root} exists and is not empty: name another folder, or remove it first.")
        root.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"Cannot write {root}: {error.strerror or error}.") from error


def run(function: Callable[[T], R], jobs: Sequence[T], *, processes: int) -> list[R]:
    """Calls a function, which must be picklable, for every job, with a progress bar on a terminal.

    Returns:
        What it returned for each job, in their order.
    """
    # Spawned: forked children of a program with threads may hang.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        done = pool.imap(function, jobs, chunksize=8)
        return list(tqdm(done, total=len(jobs), unit="image", disable=not sys.stderr.isatty()))


def parse_scene_options(
    description: str | None, *, example: str, contents: str, train: int, val: int, low: int, high: int, least: int
) -> argparse.Namespace:
    """Reads the command line of a script that draws scenes; one that cannot be ends the program.

    Args:
        description: of the script, for --help.
        example: a call of the script, without `python`.
        contents: what its folder will hold.
        train, val, low, high: the defaults of how many images there are, and of their sides' bounds in pixels.
        least: the smallest side that can be drawn.

    Returns:
        root, train, val, seed, low, high, processes and preview.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example: python {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", type=Path, help=f"folder to make, with {contents}")
    parser.add_argument("--train", type=int, default=train, help="training images (default: %(default)s)")
    parser.add_argument("--val", type=int, default=val, help="evaluation images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--low", type=int, default=low, help="least side, in pixels (default: %(default)s)")
    parser.add_argument("--high", type=int, default=high, help="greatest side, in pixels (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: as many as CPUs")
    parser.add_argument("--preview", type=Path, help="a PNG file to draw the first scenes into")
    options = parser.parse_args()
    if min(options.train, options.val, options.processes) < 1 or options.seed < 0:
        parser.error("--train, --val and --processes must be at least 1, --seed not negative")
    if not least <= options.low <= options.high:
        parser.error(f"--low must be at least {least}, and --high at least --low")
    return options


def make_scenes(
    options: argparse.Namespace, make: Callable[..., None], preview: Callable[..., Image.Image], *, classes: int
) -> None:
    """Writes a data set and, if it was asked for, its preview; what goes wrong ends the program with one sentence.

    Args:
        options: of `parse_scene_options`.
        make: writes the data set into a folder; takes train, val, seed, low, high and processes.
        preview: draws the first scenes; takes seed, low and high.
        classes: how many there are, for the last line.
    """
    look = {"seed": options.seed, "low": options.low, "high": options.high}
    try:
        make(options.root, train=options.train, val=options.val, processes=options.processes, **look)
    except InputError as error:
        sys.exit(f"error: {error}")
    if options.preview:
        try:
            preview(**look).save(options.preview)
        except (OSError, ValueError) as error:  # ValueError: no image format has this extension
            sys.exit(f"error: cannot write {options.preview}: {error}")
    print(f"{options.root}: {options.train + options.val} images of {classes} classes")


def contact_sheet(tiles: Sequence[Image.Image], *, columns: int, gap: int = 0) -> Image.Image:
    """Pictures in rows on white, each in a cell of the largest one's size, with `gap` pixels around them."""
    width, height = (max(size) + gap for size in zip(*(tile.size for tile in tiles), strict=True))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * width + gap, rows * height + gap), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (number % columns * width + gap, number // columns * height + gap))
    return sheet
