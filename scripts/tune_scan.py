"""Find the fastest launch configurations of a GPU scan on the shapes of the models, and keep them for everybody.

python scripts/tune_scan.py mosaic --variants msvmamba_tiny --tasks classification

Measures the configurations that the backend proposes for each problem as `benchmark_scan.py` does, checks the result of
each against that of the heuristic's, and rewrites `kernels/selective_scan/measured.json` after every problem. The
fastest is kept if, measured once more beside the heuristic's choice, it takes at least 3 % less time; otherwise the
heuristic stays in charge. The entries of other problems, backends and devices stay as they are.

The forward is tuned as inference runs it, and before the backward of the same shape: that one starts from what the
forward, with its new configuration, kept.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from msvmamba_jax import command
from msvmamba_jax.kernels import selective_scan
from msvmamba_jax.kernels.selective_scan import available_implementations, implementations
from msvmamba_jax.kernels.selective_scan.config import Device, Problem, forced, local_device, measured
from msvmamba_jax.kernels.selective_scan.costs import traffic
from msvmamba_jax.kernels.selective_scan.measurement import (
    DIRECTIONS,
    TOLERANCE,
    Arguments,
    Function,
    add_options,
    examples,
    measure,
    relative_error,
    selected_shapes,
    workload,
)
from msvmamba_jax.kernels.selective_scan.shapes import ScanShape

FILE = Path(selective_scan.__file__).parent / "measured.json"
LEAST_GAIN = 0.03  # of the heuristic's time; less is within the noise, or gone with the next driver

Config = TypeVar("Config")
Contents = dict[str, dict[str, dict[str, dict[str, Any]]]]


def best(milliseconds: Mapping[Config, float], heuristic: Config) -> Config | None:
    """The fastest configuration, or None if the heuristic's, which is among them, is as good."""
    fastest = min(milliseconds, key=lambda config: milliseconds[config])
    return fastest if milliseconds[fastest] <= (1.0 - LEAST_GAIN) * milliseconds[heuristic] else None


def merged(
    contents: Contents, device: str, implementation: str, problem: str, fields: Mapping[str, Any] | None
) -> Contents:
    """`contents` with the configuration of one problem; None takes out what was there. Nothing empty is left."""
    result = copy.deepcopy(contents)
    problems = result.setdefault(device, {}).setdefault(implementation, {})
    problems.pop(problem, None)
    if fields is not None:
        problems[problem] = dict(fields)
    of_device = {name: entries for name, entries in result[device].items() if entries}
    return {name: entries for name, entries in {**result, device: of_device}.items() if entries}


def write(path: Path, contents: Contents) -> None:
    """Replaces the file in one step: whoever reads it finds the old or the new contents. Keys are sorted."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def try_configurations(
    implementation: str,
    problem: Problem,
    function: Function,
    arguments: Sequence[Arguments],
    repeats: int,
    configurations: Sequence[Any],
) -> dict[Any, float]:
    """Milliseconds of each configuration that works and computes what the first one does; none if that one fails."""
    milliseconds: dict[Any, float] = {}
    expected: Any = None
    for config in configurations:
        jax.clear_caches()  # functions inside the implementation may have been traced with another configuration
        try:
            with forced(implementation, problem, config):
                found = measure(lambda *x: function(*x), arguments, repeats)
            error = 0.0 if expected is None else float(relative_error(found.result, expected))
        except Exception as failure:  # compilers raise anything
            _report(f"{config}: {failure!r}")
            if expected is None:
                break
            continue
        expected = found.result if expected is None else expected
        if error <= TOLERANCE[problem.dtype]:
            milliseconds[config] = found.milliseconds
        _report(f"{config}: {found.milliseconds:.4f} ms{'' if config in milliseconds else f', WRONG by {error:.1e}'}")
    return milliseconds


def tune(implementation: str, shape: ScanShape, problem: Problem, device: Device, repeats: int) -> None:
    """Measures one problem, and rewrites the file."""
    backend: Any = importlib.import_module(f"{selective_scan.__name__}.{implementation}")
    heuristic = backend.heuristic(problem, device)
    configurations = list(dict.fromkeys([heuristic, *backend.candidates(problem, device)]))
    print(f"{problem.key}: {len(configurations)} configurations", flush=True)
    sets = examples(shape, problem.dtype, traffic(shape, problem.dtype, "forward"))
    try:
        function, arguments = workload(problem.direction, shape, implementation, sets)
    except Exception as failure:  # of the forward, whose results the backward takes
        _report(f"left as it is: {failure!r}")
        return
    attempt = functools.partial(try_configurations, implementation, problem, function, arguments, repeats)
    milliseconds = attempt(configurations)
    if not milliseconds:
        _report("left as it is: the heuristic's configuration failed")
        return
    chosen = best(milliseconds, heuristic)
    if chosen is not None:  # one of many is easily the fastest by chance
        again = attempt([heuristic, chosen])
        chosen = best(again, heuristic) if again else None
    _report(f"chosen: {'the heuristic' if chosen is None else chosen}")
    fields = None if chosen is None else dataclasses.asdict(chosen)
    contents = json.loads(FILE.read_text(encoding="utf-8"))
    write(FILE, merged(contents, device.kind, implementation, problem.key, fields))
    measured.cache_clear()
    jax.clear_caches()  # what was traced with another configuration


def _report(sentence: str) -> None:
    print(f"  {' '.join(sentence.split())[:300]}", flush=True)


def _parse() -> tuple[argparse.Namespace, list[ScanShape]]:
    """The arguments, and the shapes that they select."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("implementation", choices=[name for name in implementations() if name != "xla"])
    add_options(parser)
    arguments = parser.parse_args()
    reason = available_implementations()[arguments.implementation]
    if reason is not None:
        parser.error(f"the implementation {arguments.implementation!r} cannot run here: {reason}")
    return arguments, selected_shapes(parser, arguments)


def main() -> None:
    """The command."""
    arguments, selected = _parse()
    device = local_device()
    done: set[Problem] = set()  # routes that differ in their direction alone are one problem
    for shape in selected:
        for dtype in arguments.dtypes:
            for direction in (name for name in DIRECTIONS if name in arguments.directions):
                problem = Problem(
                    direction=direction,
                    batch=shape.batch,
                    height=shape.height,
                    width=shape.width,
                    channels=shape.channels,
                    states=shape.states,
                    routes=len(shape.routes),
                    dtype=dtype,
                )
                if problem not in done:
                    tune(arguments.implementation, shape, problem, device, arguments.repeats)
                    done.add(problem)


if __name__ == "__main__":
    sys.exit(command.run(main))
