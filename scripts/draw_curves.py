"""Draw the curves of one or more runs: loss, accuracy, learning rate, gradient norm and images per second.

Each run is a colour. Evaluations of the raw weights are dashed, those of the averaged ones solid. Runs that still go on
can be drawn, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from msvmamba_jax.errors import InputError

# Each panel: its title and the metrics in it with their line style.
PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("loss", (("train/loss", ":"), ("eval/loss", "--"), ("eval_ema/loss", "-"))),
    (
        "top-1 accuracy",
        (("train/accuracy_top1", ":"), ("eval/accuracy_top1", "--"), ("eval_ema/accuracy_top1", "-")),
    ),
    ("learning rate", (("train/learning_rate", "-"),)),
    ("gradient norm", (("train/gradient_norm", "-"),)),
    ("images per second", (("train/images_per_second", "-"),)),
)

Curves = dict[str, tuple[list[int], list[float]]]


def read_curves(workdir: Path) -> Curves:
    """Reads `workdir/metrics.jsonl`; a last line that is still being written is left out.

    Returns:
        For every metric the steps and the values.

    Raises:
        InputError: there is no such file, or it holds no metrics or something else.
    """
    path = workdir / "metrics.jsonl"
    try:
        *lines, last = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"Cannot read {path}: {reason}; name the --workdir of a run.") from error
    curves: Curves = {}
    for number, line in enumerate([*lines, last], 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number > len(lines):
                continue
            raise InputError(f"Line {number} of {path} is not one of metrics.") from error
        for name, value in values.items():
            steps, series = curves.setdefault(name, ([], []))
            steps.append(step)
            series.append(value)
    if not curves:
        raise InputError(f"{path} holds no metrics yet.")
    return curves


def draw(runs: dict[str, Curves], output: Path) -> None:
    """Draws the panels, one below and beside the other, into an image file.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("Curves are drawn with matplotlib: pip install 'msvmamba_jax[plot]'.") from error
    figure: Any = Figure(figsize=(15, 8), layout="constrained")
    axes = list(figure.subplots(2, 3).flat)
    for axis, (title, metrics) in zip(axes, PANELS, strict=False):
        for number, curves in enumerate(runs.values()):
            for name, style in metrics:
                if name in curves:
                    steps, values = curves[name]
                    marker = "." if len(steps) == 1 else ""
                    axis.plot(steps, values, style, marker=marker, color=f"C{number}", linewidth=1.2)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    legend = axes[len(PANELS)]
    legend.axis("off")
    for number, name in enumerate(runs):
        legend.plot([], [], color=f"C{number}", linewidth=3, label=name)
    for style, name in ((":", "training"), ("--", "evaluation, raw weights"), ("-", "evaluation, averaged weights")):
        legend.plot([], [], style, color="black", label=name)
    legend.legend(loc="upper left", frameon=False)
    try:
        figure.savefig(output, dpi=100)
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot write {output}: {error}.") from error


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python scripts/draw_curves.py runs/digits runs/digits_again --output curves.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdirs", nargs="+", type=Path, metavar="WORKDIR", help="of a run; holds metrics.jsonl")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        runs = {str(workdir): read_curves(workdir) for workdir in arguments.workdirs}
        draw(runs, arguments.output)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.output}: {len(runs)} run{'s' if len(runs) > 1 else ''}")


if __name__ == "__main__":
    main()
