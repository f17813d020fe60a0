"""Makes a kernel launch, which XLA sees as one opaque call, work over images under every transformation.

Left alone, an opaque call on a batch that is spread over devices would gather the whole batch on each of them, and
`jax.vmap` would not know what to do with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Launch = Callable[..., tuple[jax.Array, ...]]


def by_image(function: Launch, *, shared: Sequence[int]) -> Launch:
    """`function`, free to be run on some of the images at a time, on several devices, and under `jax.vmap`.

    Under `jax.jit` each device runs it on the images that it has, however many mesh axes they are split over; shared
    arguments are brought to every device. Inside `jax.shard_map` and `jax.pmap` it runs on what is local. `jax.vmap`
    runs it once, on more images, unless shared arguments are mapped: then once for each of their values.

    Args:
        function: takes arrays, returns a tuple of arrays. Every result, and every argument whose position is not in
            `shared`, has images as its leading axis; what it computes for an image depends on that image's slices and
            on the shared arguments only, and so do the shapes of the results behind that axis: not on the number of
            images. It is traced anew for each number of images, with 64-bit types off since kernels are written for 32
            bits, must not call back into Python, and has no derivative here: put a `jax.custom_vjp` around it.
        shared: positions of the arguments that belong to all images, such as parameters.

    Returns:
        A function of the same signature. Outside of `jax.jit` it caches what it compiled, so keep it.
    """
    return _Images(function, frozenset(shared)).launch(1)


def vary_alike(arrays: Iterable[jax.Array]) -> tuple[jax.Array, ...]:
    """The arrays, each marked as different between the shards of a `jax.shard_map` if one of them is.

    The derivative of the mark adds up the gradient of an array that was the same in all shards.
    """
    arrays = tuple(arrays)
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset[str]().union(*varying)
    return tuple(lax.pcast(x, tuple(union - own), to="varying") for x, own in zip(arrays, varying, strict=True))


class _Images:
    """`function` with its images numbered by one leading axis, or by several of which each may be split by itself.

    `jax.vmap` adds axes in front. They are folded into one only within a shard, since a fold of the whole arrays would
    move images between devices.
    """

    def __init__(self, function: Launch, shared: frozenset[int]) -> None:
        # `jax.jit` keeps captured constants to itself: `custom_partitioning` takes none.
        self.function = jax.jit(_in_32_bits(function))
        self.shared = shared
        self.launch = functools.cache(self._launch)

    def _launch(self, axes: int) -> Launch:
        """The public function, for `axes` leading axes."""
        partitioned = jax.jit(self._partitioned(axes))
        launch = custom_vmap(lambda *arrays: self._in_context(partitioned, axes, arrays))

        @launch.def_vmap
        def _(size: int, mapped: Sequence[bool], *arrays: jax.Array) -> tuple[tuple[jax.Array, ...], Any]:
            if any(mapped[position] for position in self.shared):
                return _one_by_one(launch, mapped, arrays)
            to_repeat = [not (position in self.shared or mapped[position]) for position in range(len(arrays))]
            repeated = (
                jnp.broadcast_to(x, (size, *x.shape)) if r else x for x, r in zip(arrays, to_repeat, strict=True)
            )
            results = self.launch(axes + 1)(*repeated)
            return results, (True,) * len(results)

        return launch

    def _in_context(self, partitioned: Launch, axes: int, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Leaves to `partitioned` only what it can do: a mesh whose axes are all automatic, or all manual."""
        mesh = max((jax.typeof(x).sharding.mesh for x in arrays), key=lambda mesh: mesh.size)
        if not mesh.explicit_axes and not (mesh.manual_axes and mesh.auto_axes):
            return partitioned(*arrays)
        # Explicit axes: the types tell how the images are split. Automatic axes beside manual ones: nothing tells.
        spec = _finest([jax.typeof(x).sharding for x in self._per_image(arrays)], axes)
        in_specs = tuple(PartitionSpec() if i in self.shared else spec for i in range(len(arrays)))
        if mesh.explicit_axes:
            arrays = tuple(jax.reshard(x, NamedSharding(mesh, s)) for x, s in zip(arrays, in_specs, strict=True))
        varying = any(jax.typeof(x).manual_axis_type.varying for x in arrays)
        run = jax.shard_map(partitioned, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=varying)
        return run(*arrays)

    def _partitioned(self, axes: int) -> Launch:
        """Tells XLA's partitioner that the leading axes may be split, and nothing else."""

        def folded(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            arrays = vary_alike(arrays)
            leading = self._per_image(arrays)[0].shape[:axes]
            fold = lambda x: x.reshape(math.prod(leading), *x.shape[axes:])  # noqa: E731
            results = self.function(*(x if i in self.shared else fold(x) for i, x in enumerate(arrays)))
            # A kernel's results come without the mark that they differ between the shards of a `jax.shard_map`.
            results = vary_alike((*results, *arrays))[: len(results)]
            return tuple(x.reshape(*leading, *x.shape[1:]) for x in results)

        def partition(mesh: Mesh, arguments: Sequence[Any], results: Sequence[Any]) -> tuple[Any, ...]:
            spec = _finest([x.sharding for x in (*self._per_image(arguments), *results)], axes)
            split, whole = NamedSharding(mesh, spec), NamedSharding(mesh, PartitionSpec())
            of_arguments = tuple(whole if i in self.shared else split for i in range(len(arguments)))
            return mesh, folded, (split,) * len(results), of_arguments

        def infer(mesh: Mesh, arguments: Sequence[Any], results: Sequence[Any]) -> tuple[NamedSharding, ...]:
            spec = _finest([x.sharding for x in self._per_image(arguments)], axes)
            return (NamedSharding(mesh, spec),) * len(results)

        def rule(mesh: Mesh, arguments: Sequence[Any], results: Sequence[Any]) -> tuple[str, dict[str, Any]]:
            """For each array the names of its axes; what shares a name is split alike."""
            whole: list[str] = []

            def names(array: Any, leading: int) -> str:
                own = [f"whole{len(whole) + i}" for i in range(len(array.shape) - leading)]
                whole.extend(own)
                return " ".join([*(f"images{i}" for i in range(leading)), *own])

            left = ", ".join(names(x, 0 if i in self.shared else axes) for i, x in enumerate(arguments))
            right = ", ".join(names(x, axes) for x in results)
            return f"{left} -> {right}", {"need_replication_factors": tuple(whole)}

        partitioned = custom_partitioning(folded)
        # Shardy asks `rule`; the older partitioner, where it is still chosen, asks `infer`.
        partitioned.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
        return partitioned

    def _per_image(self, arrays: Sequence[Any]) -> list[Any]:
        return [x for i, x in enumerate(arrays) if i not in self.shared]


def _in_32_bits(function: Launch) -> Launch:
    @functools.wraps(function)
    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        with jax.enable_x64(False):
            return function(*arrays)

    return run


def _one_by_one(
    launch: Launch, mapped: Sequence[bool], arrays: Sequence[jax.Array]
) -> tuple[tuple[jax.Array, ...], tuple[bool, ...]]:
    """`launch` for one index of the mapped axis after the other: its results, and that all of them are mapped."""

    def run(slices: list[jax.Array]) -> tuple[jax.Array, ...]:
        remaining = iter(slices)
        return launch(*(next(remaining) if m else x for x, m in zip(arrays, mapped, strict=True)))

    results = lax.map(run, [x for x, m in zip(arrays, mapped, strict=True) if m])
    return results, (True,) * len(results)


def _finest(shardings: Iterable[NamedSharding], axes: int) -> PartitionSpec:
    """How the first `axes` axes are split in that one of `shardings` which splits them into the most parts."""

    def parts(sharding: NamedSharding) -> int:
        entries = (entry if isinstance(entry, tuple) else (entry,) for entry in sharding.spec[:axes])
        return math.prod(sharding.mesh.shape[name] for entry in entries for name in entry if name is not None)

    return PartitionSpec(*max(shardings, key=parts).spec[:axes])
