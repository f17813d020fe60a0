"""The scans that the models run, as problems for the benchmark and for the choice of launch configurations."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from msvmamba_jax.kernels.selective_scan.routes import Route


@dataclasses.dataclass(frozen=True)
class ScanShape:
    """One call of `selective_scan_2d`, without its dtype."""

    name: str
    batch: int
    height: int
    width: int
    channels: int
    states: int
    routes: tuple[Route, ...]

    @property
    def positions(self) -> int:
        """Of all maps of the batch."""
        return self.batch * self.height * self.width

    @property
    def elements(self) -> int:
        """Of `u`, and of y along each route."""
        return self.positions * self.channels

    @property
    def visits(self) -> int:
        """Steps of all channels' recurrences: every element, once along each route."""
        return self.elements * len(self.routes)


@dataclasses.dataclass(frozen=True)
class Task:
    """Images that a model is run on: their size, and the numbers of them at once."""

    height: int
    width: int
    batches: tuple[int, ...]


TASKS: Mapping[str, Task] = {
    "classification": Task(224, 224, (1, 16, 128)),
    "segmentation": Task(512, 512, (2, 8)),
    "detection": Task(800, 1344, (1, 2)),
}
STAGES = (0, 1, 2, 3)


class _Branch(NamedTuple):
    name: str
    routes: tuple[Route, ...]
    halved: bool  # scans the output of a convolution of stride 2


class _Variant(NamedTuple):
    width: int  # features of stage 0, doubled by every stage; a mixer scans twice as many channels
    depths: tuple[int, ...]  # blocks of each stage
    states: int
    branches: tuple[_Branch, ...]  # the scans of one block
    batches: Mapping[str, tuple[int, ...]]  # that are benchmarked, for each task


_MULTI_SCALE = (
    _Branch("full", ("row",), halved=False),
    _Branch("half", ("row_reversed", "column", "column_reversed"), halved=True),
)
_CROSS: tuple[Route, ...] = ("row", "column", "row_reversed", "column_reversed")
_CROSS_SCAN = tuple(_Branch(route, (route,), halved=False) for route in _CROSS)
_ALL_BATCHES = {name: task.batches for name, task in TASKS.items()}

# The models' geometry once more, since kernels import nothing of the models; a test holds the two together.
_VARIANTS: Mapping[str, _Variant] = {
    "msvmamba_nano": _Variant(48, (1, 2, 5, 2), 1, _MULTI_SCALE, _ALL_BATCHES),
    "msvmamba_micro": _Variant(64, (1, 2, 5, 2), 1, _MULTI_SCALE, _ALL_BATCHES),
    "msvmamba_tiny": _Variant(96, (1, 2, 9, 2), 1, _MULTI_SCALE, _ALL_BATCHES),
    "vssm_tiny": _Variant(96, (2, 2, 9, 2), 16, _CROSS_SCAN, {"classification": (128,)}),
}
VARIANTS = tuple(_VARIANTS)
BATCHES = tuple(sorted({batch for task in TASKS.values() for batch in task.batches}))


def shapes(
    *,
    tasks: Collection[str] = tuple(TASKS),
    variants: Collection[str] = VARIANTS,
    batches: Collection[int] = BATCHES,
    stages: Collection[int] = STAGES,
) -> list[ScanShape]:
    """The benchmark's problems: each scan of each stage, once, for the tasks, variants, batches and stages given."""
    found = []
    for variant in variants:
        for name in tasks:
            task = TASKS[name]
            for batch in _VARIANTS[variant].batches.get(name, ()):
                if batch in batches:
                    scans = _scans(variant, batch, task.height, task.width)
                    found += [shape for stage, shape in scans if stage in stages]
    return found


def model_scans(variant: str, batch: int, height: int, width: int) -> list[tuple[ScanShape, int]]:
    """Every scan of a variant on images of height x width pixels, and how many blocks run it."""
    depths = _VARIANTS[variant].depths
    return [(shape, depths[stage]) for stage, shape in _scans(variant, batch, height, width)]


def _scans(variant: str, batch: int, height: int, width: int) -> Iterator[tuple[int, ScanShape]]:
    """(stage, scan) of a block of each stage."""
    geometry = _VARIANTS[variant]
    h, w = height // 4, width // 4  # the patch embedding cuts off partial patches
    for stage in STAGES:
        if stage:
            h, w = _half(h), _half(w)
        for branch in geometry.branches:
            yield (
                stage,
                ScanShape(
                    name=f"{variant} {height}x{width} b{batch} stage {stage} {branch.name}",
                    batch=batch,
                    height=_half(h) if branch.halved else h,
                    width=_half(w) if branch.halved else w,
                    channels=2 * geometry.width * 2**stage,
                    states=geometry.states,
                    routes=branch.routes,
                ),
            )


def _half(size: int) -> int:
    """Outputs of the convolutions of stride 2, and of the merging of neighbours: an odd size is filled up."""
    return -(-size // 2)
