"""Functions that meet one shape after the other, each of which is compiled for.

A program for a CPU takes hundreds of memory maps, of which Linux gives a process 65530 (vm.max_map_count): after some
ninety shapes of images the compiler would fail with "Cannot allocate memory".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np


class ManyShapes:
    """A compiled function, called as such; JAX forgets all programs before the process has no place for more."""

    def __init__(self, function: Callable[..., Any], crowded: Callable[[], bool] | None = None) -> None:
        """Wraps a function.

        Args:
            function: compiles for new shapes of its last argument; those of the others stay the same.
            crowded: says whether to forget before a new shape; by default `half_of_the_memory_maps_are_taken`.
        """
        self._function, self._crowded = function, crowded or half_of_the_memory_maps_are_taken
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(arguments[-1]))
        if shapes not in self._shapes:
            if self._crowded():
                jax.clear_caches()
                self._shapes.clear()
            self._shapes.add(shapes)
        return self._function(*arguments)


def half_of_the_memory_maps_are_taken(system: Path = Path("/proc")) -> bool:
    """Whether this process has half as many as Linux allows it; False on other systems.

    Half, since a single program with six sizes of an image takes some thousands.
    """
    try:
        limit = int((system / "sys/vm/max_map_count").read_text())
        with (system / "self/maps").open("rb") as maps:
            return 2 * sum(1 for _ in maps) > limit
    except (OSError, ValueError):
        return False
