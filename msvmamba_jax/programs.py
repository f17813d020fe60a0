"""Compiled programs: where they are kept between processes, and how many of them a process may hold."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache


def keep_compiled_programs() -> None:
    """Keeps compiled programs for later processes in `~/.cache/msvmamba_jax`.

    Does nothing where JAX has been told about its compilation cache already: by `JAX_COMPILATION_CACHE_DIR` (empty:
    keep none) or by `jax.config`.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    compilation_cache.reset_cache()  # JAX looks at the setting only once, before the first compilation


def cache_folder() -> Path:
    """The folder for programs that this machine's processor can run, as home directories are shared by machines."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "msvmamba_jax" / hashlib.sha256(_processor().encode()).hexdigest()[:12]


def _processor() -> str:
    """The instruction sets of the processor, on Linux; elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


class ManyShapes:
    """A compiled function, called as such; JAX forgets all programs before the process has no place for more.

    A program for a CPU takes hundreds of memory maps, of which Linux gives a process 65530 (vm.max_map_count): after
    some ninety shapes of images the compiler would fail with "Cannot allocate memory".
    """

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
