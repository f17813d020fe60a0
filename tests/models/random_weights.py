"""Random weights for small models: fresh ones have zeros, through which no gradient flows."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from flax import nnx

from msvmamba_jax.models.parameters import bind, flatten, get_weights, unflatten

Model = TypeVar("Model", bound=nnx.Module)


def randomised(model: Model) -> Model:
    """`model`, which may be abstract, with weights that keep activations in a healthy range."""
    rng = np.random.default_rng(0)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape)
        match path.rsplit(".", 1)[-1]:
            case "kernel" | "delta_kernel":
                value = noise / np.sqrt(np.prod(shape[:-1]))
            case "delta_bias":
                value = noise - 3
            case "scale" | "D":
                value = 1 + 0.1 * noise
            case "A_log":
                value = np.log(np.arange(1, shape[1] + 1)) + 0.1 * noise
            case "bias" | "mean":
                value = 0.1 * noise
            case "var":
                value = np.exp(0.1 * noise)
            case _:
                raise AssertionError(path)
        return value.astype(np.float32)

    return bind(model, unflatten({path: draw(path, x.shape) for path, x in flatten(get_weights(model))}))
