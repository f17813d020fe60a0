"""Time the selective scan on the shapes of the models: every implementation that runs here, in one run.

python scripts/benchmark_scan.py --tasks classification --variants msvmamba_tiny --batches 128 --output scan.json

For every shape, dtype and direction a row for each implementation: milliseconds; bytes that the problem itself moves
per second, and that as a fraction of a plain copy in the same run; time of the reference implementation over this
one's; the least time that this device's memory and special-function units allow; and the relative L2 difference from
the reference. A row that differs too much is marked WRONG, and the exit status is 1. An implementation that fails on a
shape is reported, and the run goes on. `docs/selective_scan.md` says how all this is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax

from msvmamba_jax import command
from msvmamba_jax.kernels.selective_scan import available_implementations, implementations
from msvmamba_jax.kernels.selective_scan.costs import Direction, special_functions, traffic
from msvmamba_jax.kernels.selective_scan.measurement import (
    TOLERANCE,
    Example,
    add_options,
    copy_bandwidth,
    examples,
    measure,
    relative_error,
    selected_shapes,
    special_function_rate,
    workload,
)
from msvmamba_jax.kernels.selective_scan.shapes import ScanShape

NO_REFERENCE = "none"
QUICK = ScanShape("quick", 1, 4, 5, 64, 1, ("row_reversed", "column", "column_reversed"))


@dataclasses.dataclass
class Row:
    """One line of the table; what could not be found out is None.

    Attributes:
        shape: the problem.
        dtype: of u, delta, B and C.
        direction: "forward" or "backward".
        implementation: which.
        status: "ok", "WRONG", "unchecked" (there is nothing to compare with) or "failed".
        message: why it failed.
        milliseconds: of one call, on the device.
        first_call_seconds: of the first one, which compiles.
        programs: that a call runs on the GPU, copies included.
        input_sets: that were used in turn.
        bytes: each input read once, each output written once.
        gigabytes_per_second: those bytes in that time.
        fraction_of_copy: of the bandwidth of a plain copy.
        speedup: time of the reference implementation over this one's.
        special_functions: exponentials and the like.
        floor_milliseconds: the least time in which those bytes and special functions can be worked off.
        relative_error: L2, against the reference implementation; of the worst of several outputs.
    """

    shape: ScanShape
    dtype: str
    direction: Direction
    implementation: str
    bytes: int
    special_functions: int
    floor_milliseconds: float
    status: Literal["ok", "WRONG", "unchecked", "failed"] = "unchecked"
    message: str | None = None
    milliseconds: float | None = None
    first_call_seconds: float | None = None
    programs: float | None = None
    input_sets: int | None = None
    gigabytes_per_second: float | None = None
    fraction_of_copy: float | None = None
    speedup: float | None = None
    relative_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this device can do: bytes per second of a copy, special functions per second (None: unknown)."""

    copy_bytes_per_second: float
    special_functions_per_second: float | None

    def floor_milliseconds(self, moved: int, operations: int) -> float:
        """The least time for that many bytes and special functions."""
        seconds = moved / self.copy_bytes_per_second
        if self.special_functions_per_second:
            seconds = max(seconds, operations / self.special_functions_per_second)
        return 1e3 * seconds


def benchmark(
    shape: ScanShape,
    dtype: str,
    direction: Direction,
    implementations: Sequence[str],
    reference: str | None,
    sets: Sequence[Example],
    ceilings: Ceilings,
    repeats: int,
) -> list[Row]:
    """The rows of one problem, the reference's first."""
    rows: list[Row] = []
    expected: Any = None
    reference_row: Row | None = None
    moved, operations = traffic(shape, dtype, direction), special_functions(shape, direction)
    floor = ceilings.floor_milliseconds(moved, operations)
    for name in dict.fromkeys([*filter(None, [reference]), *implementations]):
        row = Row(shape, dtype, direction, name, moved, operations, floor)
        rows.append(row)
        try:
            found = measure(*workload(direction, shape, name, sets), repeats)
            error = float(relative_error(found.result, expected)) if reference_row else None
        except Exception as problem:  # compilers raise anything
            row.status, row.message = "failed", next(iter(str(problem).splitlines()), "") or repr(problem)
            continue
        row.milliseconds = found.milliseconds
        row.first_call_seconds = found.first_call_seconds
        row.programs = found.programs
        row.input_sets = found.sets
        row.gigabytes_per_second = moved / found.milliseconds / 1e6
        row.fraction_of_copy = 1e3 * moved / found.milliseconds / ceilings.copy_bytes_per_second
        if name == reference:
            expected, reference_row = found.result, row
            row.status = "ok"
        if reference_row and reference_row.milliseconds:
            row.speedup = reference_row.milliseconds / found.milliseconds
        if error is not None:
            row.status = "ok" if error <= TOLERANCE[dtype] else "WRONG"  # a NaN is WRONG, too
            row.relative_error = error if math.isfinite(error) else None
    return rows


HEADER = (
    f"{'problem':<46} {'dtype':<8} {'direction':<9} {'implementation':<14} "
    f"{'ms':>9} {'GB/s':>7} {'of copy':>7} {'speedup':>8} {'floor ms':>9} {'error':>8} "
)


def line(row: Row) -> str:
    """The row as it is printed."""
    start = f"{row.shape.name:<46} {row.dtype:<8} {row.direction:<9} {row.implementation:<14} "
    if row.status == "failed":
        return f"{start}failed: {row.message}"
    speedup = "-" if row.speedup is None else f"{row.speedup:.2f}"
    error = "-" if row.relative_error is None else f"{row.relative_error:.1e}"
    return (
        f"{start}{row.milliseconds:>9.4f} {row.gigabytes_per_second:>7.1f} {row.fraction_of_copy:>7.1%} {speedup:>8} "
        f"{row.floor_milliseconds:>9.4f} {error:>8} {row.status if row.status != 'ok' else ''}"
    ).rstrip()


def _parse() -> tuple[argparse.Namespace, list[ScanShape]]:
    """The arguments, and the shapes that they select."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument(
        "--implementations",
        choices=implementations(),
        nargs="+",
        metavar="NAME",
        help="default: all that run here",
    )
    parser.add_argument(
        "--reference-implementation",
        choices=[*implementations(), NO_REFERENCE],
        default="xla",
        metavar="NAME",
        help="measured as well, first; the others are checked against it and compared with it (default: xla); "
        "'none': neither",
    )
    parser.add_argument("--quick", action="store_true", help="one small shape, once")
    parser.add_argument("--output", metavar="FILE", help="write everything to this JSON file as well")
    arguments = parser.parse_args()
    available = available_implementations()
    if arguments.implementations is None:
        arguments.implementations = [name for name, reason in available.items() if reason is None]
    for name in {*arguments.implementations, arguments.reference_implementation} - {NO_REFERENCE}:
        if available[name] is not None:
            parser.error(f"the implementation {name!r} cannot run here: {available[name]}")
    selected = selected_shapes(parser, arguments)
    return arguments, [QUICK] if arguments.quick else selected


def main() -> int:
    """The command."""
    arguments, selected = _parse()
    repeats = 1 if arguments.quick else arguments.repeats
    reference = arguments.reference_implementation
    reference = None if reference == NO_REFERENCE else reference
    ceilings = Ceilings(copy_bandwidth(repeats), special_function_rate())
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arguments": vars(arguments),
        **dataclasses.asdict(ceilings),
        "tolerance": TOLERANCE,
        "finished": False,
        "rows": [],
    }
    print(
        f"{report['device']}, jax {report['jax']}, copy {ceilings.copy_bytes_per_second / 1e9:.1f} GB/s, "
        f"reference {reference or 'none'}"
    )
    print(HEADER.rstrip(), flush=True)
    wrong = 0
    for shape in selected:
        for dtype in arguments.dtypes:
            sets = examples(shape, dtype, traffic(shape, dtype, "forward"))
            for direction in arguments.directions:
                rows = benchmark(shape, dtype, direction, arguments.implementations, reference, sets, ceilings, repeats)
                print("\n".join(map(line, rows)), flush=True)
                wrong += sum(row.status == "WRONG" for row in rows)
                report["rows"] += map(dataclasses.asdict, rows)
                if arguments.output:  # a run that is cut off leaves what it has found out
                    command.write_json(arguments.output, report)
    report["finished"] = True
    if arguments.output:
        command.write_json(arguments.output, report)
    if wrong:
        print(f"{wrong} rows are WRONG", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(command.run(main))
