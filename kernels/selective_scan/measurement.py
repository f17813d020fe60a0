"""How the scripts measure a scan: which ones, random inputs, the time of a call, the difference of results.

See `docs/selective_scan.md` for the reasons.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from msvmamba_jax.kernels.selective_scan.api import selective_scan_2d
from msvmamba_jax.kernels.selective_scan.config import local_device
from msvmamba_jax.kernels.selective_scan.costs import SPECIAL_FUNCTIONS_PER_CLOCK, Direction
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs
from msvmamba_jax.kernels.selective_scan.shapes import BATCHES, STAGES, TASKS, VARIANTS, ScanShape, shapes

Function = Callable[..., Any]
Arguments = tuple[Any, ...]

DTYPES = ("bfloat16", "float32")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")

TOLERANCE = {"float32": 1e-4, "bfloat16": 2.0**-7}
"""Relative L2 difference between two implementations, each of which rounds its results to that dtype."""

_CACHE_BYTES = 200e6  # four times the L2 cache of an H100
_MOST_SETS = 1024
_REPEAT_SECONDS = 0.02


class Example(NamedTuple):
    """One set of inputs, and the gradient of the output."""

    inputs: ScanInputs
    dy: jax.Array  # (b, routes, h, w, d)


class Measurement(NamedTuple):
    """What `measure` found.

    Attributes:
        milliseconds: of one call.
        first_call_seconds: of the very first one, which compiles.
        programs: that a call runs on the GPU, copies included; None on a CPU.
        sets: of arguments, used in turn.
        result: of the first set.
    """

    milliseconds: float
    first_call_seconds: float
    programs: float | None
    sets: int
    result: Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what is measured, and how often."""
    several: dict[str, tuple[Sequence[Any], type]] = {
        "tasks": (list(TASKS), str),
        "variants": (VARIANTS, str),
        "batches": (BATCHES, int),
        "stages": (STAGES, int),
        "dtypes": (DTYPES, str),
        "directions": (DIRECTIONS, str),
    }
    for name, (choices, kind) in several.items():
        parser.add_argument(
            f"--{name}", type=kind, choices=choices, default=list(choices), nargs="+",
            metavar="N" if kind is int else "NAME", help="some of %(choices)s (default: all)",
        )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts (default: 5)")


def selected_shapes(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[ScanShape]:
    """The shapes that the options of `add_options` select; a mistake in these ends the program with a message."""
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    selected = shapes(
        tasks=arguments.tasks, variants=arguments.variants, batches=arguments.batches, stages=arguments.stages
    )
    if not selected:
        parser.error("no shape has such a task, variant and batch; see kernels/selective_scan/shapes.py")
    return selected


def examples(shape: ScanShape, dtype: str, bytes_per_call: int) -> list[Example]:
    """Random inputs of a scan, so many that a GPU's cache does not hold them from one use to the next.

    Step sizes (0.02 to 0.3) let a state live for tens of positions. All sets share A, D and delta_bias.
    """
    count = 1
    if jax.devices()[0].platform == "gpu":
        count = min(_MOST_SETS, math.ceil(_CACHE_BYTES / bytes_per_call))
    maps = (shape.batch, shape.height, shape.width)
    channels, states = shape.channels, shape.states

    @jax.jit
    def draw_parameters(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = jax.random.split(key, 3)
        A = -jnp.exp(0.5 * jax.random.normal(keys[0], (channels, states), jnp.float32))
        D = jax.random.normal(keys[1], (channels,), jnp.float32)
        return A, D, jax.random.uniform(keys[2], (channels,), jnp.float32, -4.0, -2.0)

    @jax.jit
    def draw_maps(key: jax.Array) -> list[jax.Array]:
        of_channels, of_states = (*maps, channels), (*maps, states)
        dy = (shape.batch, len(shape.routes), *maps[1:], channels)
        parts = [of_channels, of_channels, of_states, of_states, dy]
        keys = jax.random.split(key, len(parts))
        return [jax.random.normal(key, part, dtype) for key, part in zip(keys, parts, strict=True)]

    A, D, delta_bias = draw_parameters(jax.random.key(0))
    sets = []
    for index in range(count):
        u, delta, B, C, dy = draw_maps(jax.random.key(1 + index))
        sets.append(Example(ScanInputs(u, delta, A, B, C, D, delta_bias), dy))
    return sets


def workload(
    direction: Literal["forward", "saving", "backward"],
    shape: ScanShape,
    implementation: str,
    sets: Sequence[Example],
) -> tuple[Function, list[Arguments]]:
    """What to measure: a function to be jitted, and sets of arguments for it.

    `forward` is the call as inference makes it; `saving` the forward of training, which also returns what it keeps
    for the backward beside its inputs; `backward` the function that `jax.vjp` returns, alone. That function is a tree
    of arrays (what the forward kept), so it can be the result of one jitted function and an argument of another.
    """

    def scan(inputs: ScanInputs) -> jax.Array:
        return selective_scan_2d(*inputs, routes=shape.routes, implementation=implementation)

    def save(inputs: ScanInputs) -> list[jax.Array]:
        y, pull_back = jax.vjp(scan, inputs)
        # Inputs that are kept are there already; returned from a jitted function they would be copied.
        return [y, *(kept for kept in jax.tree.leaves(pull_back) if not any(kept is x for x in inputs))]

    if direction == "backward":
        keep = jax.jit(lambda inputs: jax.vjp(scan, inputs)[1])
        return lambda pull_back, dy: pull_back(dy)[0], [(keep(inputs), dy) for inputs, dy in sets]
    return scan if direction == "forward" else save, [(inputs,) for inputs, _ in sets]


def measure(function: Function, sets: Sequence[Arguments], repeats: int) -> Measurement:
    """Times a function that is to be jitted, on sets of arguments in turn: see `busy` and `median_seconds`."""
    one = jax.jit(function)
    began = time.perf_counter()
    result = jax.block_until_ready(one(*sets[0]))
    first_call_seconds = time.perf_counter() - began
    turn: Iterator[Arguments] = itertools.cycle(sets)
    seconds, programs = busy(lambda: one(*next(turn)), repeats)
    return Measurement(1e3 * seconds, first_call_seconds, programs, len(sets), result)


def busy(execute: Callable[[], Any], repeats: int) -> tuple[float, float | None]:
    """Seconds that one `execute()`, compiled already, keeps the device busy, and the programs that it runs there.

    On a GPU from the profiler: the time in which at least one program or copy is under way, without the gaps in which
    the GPU waits for the host. The median of repeats, each of many executions. On a CPU the time that passes.
    """
    if jax.devices()[0].platform != "gpu":
        return median_seconds(execute, repeats), None
    count = math.ceil(_REPEAT_SECONDS / median_seconds(execute, 1))
    found = []
    for _ in range(repeats):
        programs = profiled(execute, count)
        spans = ((program.start, program.end) for program in programs)
        found.append((1e-9 * covered(spans) / count, len(programs) / count))
    return statistics.median(seconds for seconds, _ in found), found[-1][1]


class Program(NamedTuple):
    """A program or copy that ran on a GPU.

    Attributes:
        start, end: nanoseconds.
        operation: name of the instruction in the compiled HLO, or of the command buffer that it was part of.
    """

    start: float
    end: float
    operation: str


def profiled(execute: Callable[[], Any], count: int) -> list[Program]:
    """What runs on the GPU's streams while `execute()`, compiled already, is called `count` times.

    Raises:
        RuntimeError: if the profiler sees nothing.
    """
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(count):
                result = execute()
            jax.block_until_ready(result)
        programs = [program for file in Path(folder).rglob("*.xplane.pb") for program in _on_the_gpu(file)]
    if not programs:
        raise RuntimeError("the profiler saw nothing on the GPU: is CUPTI installed, and may this user profile?")
    return programs


def _on_the_gpu(file: Path) -> Iterator[Program]:
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if plane.name.startswith("/device:GPU"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        operation = str(dict(event.stats).get("hlo_op", ""))
                        yield Program(event.start_ns, event.start_ns + event.duration_ns, operation)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (start, end)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def median_seconds(execute: Callable[[], Any], repeats: int) -> float:
    """Seconds of `execute()`, compiled already: the median of repeats, each of many executions in a row.

    On a GPU executions are started without waiting in between, and waited for once, at the end. Nothing is subtracted.
    """
    # A CPU may work on several executions at once.
    wait = jax.block_until_ready if jax.devices()[0].platform == "cpu" else lambda result: result

    def elapsed(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            result = wait(execute())
        jax.block_until_ready(result)
        return time.perf_counter() - began

    count = 1
    while (seconds := elapsed(count)) < _REPEAT_SECONDS:
        count = math.ceil(count * min(10.0, max(1.5, 1.1 * _REPEAT_SECONDS / seconds)))
    return statistics.median(elapsed(count) / count for _ in range(repeats))


@jax.jit
def relative_error(found: Any, expected: Any) -> jax.Array:
    """The largest relative L2 difference among the arrays of two trees; NaN if there is one."""

    def error(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return jnp.sqrt(jnp.sum(jnp.square(x - y)) / jnp.sum(jnp.square(y)))

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(error, found, expected))))


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second, read and written, of x + 1 on a large array: what this device's memory can do."""
    size = 2**30 if jax.devices()[0].platform == "gpu" else 2**27
    x = jnp.arange(size // 4, dtype=jnp.float32)
    add_one = jax.jit(lambda x: x + 1.0)
    jax.block_until_ready(add_one(x))
    return 2 * size / busy(functools.partial(add_one, x), repeats)[0]


def special_function_rate() -> float | None:
    """Exponentials per second at the GPU's highest clock; None where there is no NVIDIA GPU to ask."""
    if jax.devices()[0].platform != "gpu":
        return None
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        megahertz = float(output.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return 1e6 * megahertz * SPECIAL_FUNCTIONS_PER_CLOCK * local_device().multiprocessors
