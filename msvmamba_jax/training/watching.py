"""What a run measures of itself: averages, rate, waiting for data, damaged images, memory; a profile of steps."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from msvmamba_jax.errors import InputError
from msvmamba_jax.training.processes import total

_LAST = ("train/learning_rate",)  # a schedule is shown as it stands, not as it was on average


class Interval:
    """What happened since the last line of metrics.

    Metrics are averaged over all steps since that line (a resumed run starts a new average); the learning rate is the
    last step's. Rate and waiting leave out what `restart_clock` and `paused` take away, such as compilation and saving.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._steps = 0
        self._corrupt: int | None = None
        self.restart_clock()

    def next_batch(self, batches: Iterator[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Takes a batch and the time that it was waited for; `corrupt` (b,), which no model sees, is counted here."""
        begin = time.perf_counter()
        batch = dict(next(batches))
        self._waited += time.perf_counter() - begin
        if (corrupt := batch.pop("corrupt", None)) is not None:
            self._corrupt = (self._corrupt or 0) + int(np.sum(corrupt))
        return batch

    def add(self, metrics: Mapping[str, float]) -> None:
        """Adds the metrics of a step that is done."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._last = dict(metrics)
        self._steps += 1
        self._timed += 1

    def restart_clock(self) -> None:
        """Time, waiting and the steps so far count no more for the rate; the averages keep them."""
        self._began = time.perf_counter()
        self._waited = 0.0
        self._timed = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of what is not training."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - begin

    def finish(self, batch_size: int) -> dict[str, float]:
        """The metrics of the interval; a new one begins. All processes must call it.

        Returns:
            The averages, and `train/images_per_second`; `train/waiting_share`, the part of the time, 0..1, in which
            the loop had no batch; `train/memory_gib`, see `peak_memory`; and where the data tell it
            `train/corrupt_images`, the damaged images of this interval that another one stood in for, on all processes.
        """
        seconds = max(time.perf_counter() - self._began, 1e-9)
        metrics = {name: self._last[name] if name in _LAST else s / self._steps for name, s in self._sums.items()}
        metrics["train/images_per_second"] = self._timed * batch_size / seconds
        metrics["train/waiting_share"] = min(self._waited / seconds, 1.0)
        metrics["train/memory_gib"] = peak_memory() / 2**30
        if self._corrupt is not None:
            metrics["train/corrupt_images"] = float(total(self._corrupt))
        self._reset()
        return metrics


def peak_memory() -> int:
    """Most bytes ever in use: of the fullest local device where it tells, otherwise of this process on the host."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peaks := [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]:
        return int(max(peaks))
    import resource  # here, since Windows lacks it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Profile:
    """Traces the steps after START up to STOP into `workdir/profile`, as `config.profile` "START:STOP" says.

    Raises:
        InputError: on construction, when the text is neither empty nor two rising step numbers.
    """

    def __init__(self, text: str, workdir: Path):
        self._folder = workdir / "profile"
        self._began: int | None = None  # the number of steps that were done when the trace began, while it goes on
        self._range: tuple[int, int] | None = None
        if text:
            match = re.fullmatch(r"(\d+):(\d+)", text)
            if match is None or not int(match[1]) < int(match[2]):
                raise InputError(f"config.profile must be START:STOP, steps such as 20:25, or empty; got {text!r}")
            self._range = int(match[1]), int(match[2])

    def due(self, step: int) -> bool:
        """Whether `at` has something to do where `step` steps are done: have them end before, and none under way."""
        return self._range is not None and step >= self._range[self._began is not None]

    def at(self, step: int) -> str | None:
        """Starts or stops where `step` steps are done; a sentence for the person who watches, where there is one."""
        if self._range is None or not self.due(step):
            return None
        start, stop = self._range
        if self._began is not None:
            return self.finish(step)
        if step >= stop:  # of a run that went on later
            self._range = None
            return f"no profile: the steps {start + 1} to {stop} of config.profile are past"
        jax.profiler.start_trace(str(self._folder))
        self._began = step
        return None

    def finish(self, step: int) -> str | None:
        """Ends a trace that is going on after `step` steps; a sentence that tells where it is."""
        if self._began is None:
            return None
        first = self._began + 1
        self.close()
        return (
            f"profile of the steps {first} to {step} in {self._folder}: look at it with "
            f"`xprof --logdir {self._folder}` (pip install xprof), or open its .trace.json.gz in ui.perfetto.dev"
        )

    def close(self) -> None:
        """Ends a trace that is still going on."""
        if self._began is not None:
            jax.profiler.stop_trace()
            self._began = self._range = None
