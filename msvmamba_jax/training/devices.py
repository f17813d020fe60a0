"""How a run is laid out over devices: replicated state, batches split over all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from msvmamba_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh over all devices with the axis `data`."""

    mesh: Mesh

    @property
    def replicated(self) -> NamedSharding:
        """The same on every device: parameters, averages, optimiser state."""
        return NamedSharding(self.mesh, P())

    @property
    def batch(self) -> NamedSharding:
        """The leading axis split over the devices."""
        return NamedSharding(self.mesh, P("data"))

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """A host batch on the devices."""
        return {name: jax.device_put(array, self.batch) for name, array in batch.items()}


def make_layout(batch_size: int) -> Layout:
    """The layout over all devices.

    Raises:
        InputError: the batch does not divide among them.
    """
    devices = jax.device_count()
    if batch_size < 1 or batch_size % devices:
        raise InputError(f"batch_size {batch_size} does not divide among {devices} devices: choose a multiple")
    return Layout(jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,)))
