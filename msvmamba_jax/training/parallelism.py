"""How a run is laid out over devices: what is split, what is replicated, and how the steps are compiled for it.

Both layouts hold the same state, a plain dictionary of whole arrays, so a checkpoint written under one resumes under
any other, on any number of devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from msvmamba_jax.errors import InputError
from msvmamba_jax.programs import ManyShapes

_SMALL = 4096  # elements; exchanging less than this costs more in latency than it saves in memory


class Layout(Protocol):
    """What the loop knows of the devices."""

    @property
    def axis(self) -> str | None:
        """The name over which `train_step` averages and counts; None where it sees the whole batch."""

    @property
    def processes(self) -> int:
        """How many processes there are, each of which puts its rows of a batch."""

    def create(self, init: Callable[[Any], Any], weights: Any) -> Any:
        """The state `init(weights)` on the devices; `init` must be traceable."""

    def abstract(self, init: Callable[[Any], Any], weights: Any) -> Any:
        """Shapes, dtypes and shardings of that state, for a restore straight into place."""

    def compile_train(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`train_step`'s function, compiled; it takes what `put` gives and consumes the state."""

    def compile_predict(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`predict_step`'s function, compiled; it takes what `put` gives and returns arrays with the leading axis b.

        It may be called with any number of shapes, one after the other.
        """

    def place(self, params: Any) -> Any:
        """Parameters, wherever they are, as `create` lays out those of a state."""

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """This process's rows of a batch, leading axis b / processes, as the compiled functions take them."""


@dataclasses.dataclass(frozen=True)
class JitLayout:
    """`jax.jit` over a mesh (data, fsdp): batches are split over both axes, the state over `fsdp` by `state_spec`."""

    mesh: Mesh
    axis: None = None

    @property
    def processes(self) -> int:
        """See `Layout`."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def batch(self) -> NamedSharding:
        """The leading axis split over all devices."""
        return NamedSharding(self.mesh, P(("data", "fsdp")))

    def shardings(self, tree: Any) -> Any:
        """The sharding of every leaf of a state, or of parameters alone."""
        fsdp = self.mesh.shape["fsdp"]
        return jax.tree.map(lambda x: NamedSharding(self.mesh, state_spec(np.shape(x), fsdp)), tree)

    def create(self, init: Callable[[Any], Any], weights: Any) -> Any:
        """See `Layout`."""
        return jax.jit(init, out_shardings=self.shardings(jax.eval_shape(init, weights)))(self.place(weights))

    def abstract(self, init: Callable[[Any], Any], weights: Any) -> Any:
        """See `Layout`."""
        shapes = jax.eval_shape(init, weights)
        return jax.tree.map(_abstract, shapes, self.shardings(shapes))

    def compile_train(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """See `Layout`."""

        everywhere = NamedSharding(self.mesh, P())

        def sharded(state: Any, batch: Any) -> Any:
            # Weights are gathered before they are used, or XLA would split activations along channels to match them.
            params = jax.lax.with_sharding_constraint(state["params"], everywhere)
            new, metrics = step({**state, "params": params}, batch)
            new = jax.lax.with_sharding_constraint(new, self.shardings(new))
            return new, jax.lax.with_sharding_constraint(metrics, everywhere)

        return jax.jit(sharded, in_shardings=(None, self.batch), donate_argnums=0)

    def compile_predict(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """See `Layout`."""
        everywhere = NamedSharding(self.mesh, P())

        def gathered(params: Any, batch: Any) -> Any:
            return step(jax.lax.with_sharding_constraint(params, everywhere), batch)

        # Several processes each need all predictions; within one they are read from where they are.
        out = everywhere if self.processes > 1 else self.batch
        return ManyShapes(jax.jit(gathered, in_shardings=(None, self.batch), out_shardings=out))

    def place(self, params: Any) -> Any:
        """See `Layout`."""
        return jax.device_put(params, self.shardings(params))

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """See `Layout`."""
        return {name: jax.make_array_from_process_local_data(self.batch, array) for name, array in batch.items()}


@dataclasses.dataclass(frozen=True)
class PmapLayout:
    """`jax.pmap`: data parallel, the state replicated. The state has no leading axis for the devices."""

    mesh: Mesh
    axis: str = "data"
    processes: int = 1

    def _replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    def create(self, init: Callable[[Any], Any], weights: Any) -> Any:
        """See `Layout`."""
        return jax.jit(init, out_shardings=self._replicated())(self.place(weights))

    def abstract(self, init: Callable[[Any], Any], weights: Any) -> Any:
        """See `Layout`."""
        return jax.tree.map(lambda x: _abstract(x, self._replicated()), jax.eval_shape(init, weights))

    def compile_train(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """See `Layout`."""
        compiled: Callable[..., Any] = jax.pmap(
            step, axis_name=self.axis, in_axes=(None, 0), out_axes=(None, None), donate_argnums=0
        )
        return compiled

    def compile_predict(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """See `Layout`."""
        compiled = ManyShapes(jax.pmap(step, axis_name=self.axis, in_axes=(None, 0)))

        def predict(params: Any, batch: Any) -> Any:
            # On the host: there an array of all devices is joined without a program of its own.
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(compiled(params, batch)))

        return predict

    def place(self, params: Any) -> Any:
        """See `Layout`."""
        return jax.device_put(params, self._replicated())

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """See `Layout`."""
        devices = self.mesh.size
        return {name: array.reshape(devices, -1, *array.shape[1:]) for name, array in batch.items()}


def state_spec(shape: tuple[int, ...], fsdp: int) -> P:
    """How an array of the state is split over `fsdp` devices.

    The largest axis that `fsdp` divides is split, the last one of several; arrays of fewer than 4096 elements, or with
    no such axis, are replicated. A function of the shape alone: a parameter, its average and its moments are split
    alike.
    """
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not axes or int(np.prod(shape)) < _SMALL:
        return P()
    chosen = max(axes, key=lambda axis: (shape[axis], axis))
    return P(*("fsdp" if axis == chosen else None for axis in range(chosen + 1)))


def make_layout(parallelism: str, *, fsdp: int, batch_size: int) -> Layout:
    """The layout over all devices.

    Args:
        parallelism: "jit" or "pmap".
        fsdp: devices over which the state is split; the other factor of their number only splits the batch.
        batch_size: the global batch.

    Raises:
        InputError: an unknown layout, or a number that does not divide among the devices.
    """
    devices = jax.device_count()
    if parallelism not in ("jit", "pmap"):
        raise InputError(f"unknown config.parallelism {parallelism!r}; there are 'jit' and 'pmap'")
    if batch_size < 1 or batch_size % devices:
        raise InputError(f"batch_size {batch_size} does not divide among {devices} devices: choose a multiple")
    if fsdp < 1 or devices % fsdp:
        raise InputError(f"config.fsdp is {fsdp}, which does not divide the {devices} devices")
    if parallelism == "pmap":
        if jax.process_count() > 1:
            raise InputError("parallelism 'pmap' runs in one process; use 'jit' for several")
        if fsdp > 1:
            raise InputError(
                f"parallelism 'pmap' replicates the state, so config.fsdp must be 1, not {fsdp}: use 'jit'"
            )
        return PmapLayout(jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,)))
    return JitLayout(jax.make_mesh((devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2))


def _abstract(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
