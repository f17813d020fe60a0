"""What a run tells: metrics.jsonl, TensorBoard events, and lines or a progress bar on the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from msvmamba_jax.errors import InputError


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, with `step` and scalars."""

    def __init__(self, path: Path, resume_step: int):
        """Opens the file for appending; lines past `resume_step`, which the run will write again, are dropped.

        Raises:
            InputError: a line is damaged.
        """
        kept = [line for line in _lines(path) if _step_of(path, line) <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line and flushes it."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoard:
    """TensorBoard events through tensorboardX; says once where it is not installed."""

    def __init__(self, folder: Path, resume_step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            print("no TensorBoard events: pip install 'msvmamba_jax[tensorboard]'", file=sys.stderr)
            self._writer: Any = None
            return
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds scalars."""
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Adds an image."""
        if self._writer is not None:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes."""
        if self._writer is not None:
            self._writer.close()


class Progress:
    """A progress bar on a terminal; elsewhere a line for each call of `show`."""

    def __init__(self, total: int, initial: int):
        self._bar = tqdm.tqdm(
            total=total, initial=initial, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self._total = total
        self._start = (time.perf_counter(), initial)

    def advance(self) -> None:
        """One step done."""
        self._bar.update(1)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the latest training metrics."""
        text = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in metrics.items())
        if self._bar.disable:
            began, initial = self._start
            left = (time.perf_counter() - began) / max(step - initial, 1) * (self._total - step)
            print(f"step {step}/{self._total}: {text}, {left:.0f} s left", flush=True)
        else:
            self._bar.set_postfix_str(text)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


class Report(Progress):
    """All of the above for one run."""

    def __init__(self, workdir: Path, total: int, start: int):
        self._pictures = workdir / "pictures"
        self._file = MetricsFile(workdir / "metrics.jsonl", start)
        self._tensorboard = TensorBoard(workdir / "tensorboard", start)
        super().__init__(total, start)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics for the file and TensorBoard."""
        self._file.write(step, metrics)
        self._tensorboard.write(step, metrics)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """A picture for TensorBoard, and as a file of its own in `pictures`."""
        self._pictures.mkdir(exist_ok=True)
        image.save(self._pictures / f"{name}_{step:08d}.png")
        self._tensorboard.picture(step, name, image)

    def close(self) -> None:
        """Closes everything."""
        super().close()
        self._file.close()
        self._tensorboard.close()


class SilentReport:
    """What the other processes of a run have in the place of a `Report`."""

    def advance(self) -> None:
        """Nothing."""

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _lines(path: Path) -> list[str]:
    """Whole lines; a last one that a killed run left unfinished is dropped."""
    if not path.is_file():
        return []
    *lines, _ = path.read_text(errors="replace").split("\n")
    return [line for line in lines if line]


def _step_of(path: Path, line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} has a damaged line, {line[:60]!r}: remove it, then start again") from error
