"""The 2D scan modules: MSVMamba's multi-scale scan and VMamba's cross-scan."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from msvmamba_jax.kernels.selective_scan import Route, selective_scan_2d
from msvmamba_jax.models.depthwise import accumulator_dtype
from msvmamba_jax.models.initializers import constant, step_bias, uniform_fan_in
from msvmamba_jax.models.layers import DepthwiseConv, LayerNorm, linear
from msvmamba_jax.models.resize import resize_bilinear

FULL_ROUTES: tuple[Route, ...] = ("row",)
HALF_ROUTES: tuple[Route, ...] = ("row_reversed", "column", "column_reversed")
CROSS_ROUTES: tuple[Route, ...] = ("row", "column", "row_reversed", "column_reversed")
MIN_STEP, MAX_STEP = 1e-3, 1e-1


def delta_rank(features: int) -> int:
    """Rank of the step-size projection in a mixer on `features` channels."""
    return math.ceil(features / 16)


class SelectiveSSM(nnx.Module):
    """A selective state-space model along given routes: the projections of every position and the scan.

    Parameters: `projection` (d, r + 2 n) gives the low-rank step size, B and C; `delta_kernel` (r, d) and `delta_bias`
    (d,) the step size; `A_log` (d, n); `D` (d,).
    """

    def __init__(
        self,
        features: int,
        *,
        routes: tuple[Route, ...],
        states: int,
        rank: int,
        dtype: DTypeLike,
        scan_implementation: str | None,
        rngs: nnx.Rngs,
    ):
        self.projection = nnx.Linear(
            features, rank + 2 * states, use_bias=False, kernel_init=uniform_fan_in(features), dtype=dtype, rngs=rngs
        )
        self.delta_kernel = nnx.Param(uniform_fan_in(rank)(rngs.params(), (rank, features)))
        self.delta_bias = nnx.Param(step_bias(MIN_STEP, MAX_STEP)(rngs.params(), (features,)))
        self.A_log = nnx.Param(constant(np.tile(np.log(np.arange(1, states + 1)), (features, 1))))
        self.D = nnx.Param(constant(np.ones(features)))
        self.routes = routes
        self.states = states
        self.rank = rank
        self.dtype = dtype
        self.scan_implementation = scan_implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, d) -> (b, routes, h, w, d): one output map for each route."""
        low_rank, B, C = jnp.split(self.projection(x), [self.rank, self.rank + self.states], axis=-1)
        delta = low_rank @ self.delta_kernel[...].astype(self.dtype)
        return selective_scan_2d(
            x,
            delta,
            -jnp.exp(self.A_log[...]),
            B,
            C,
            self.D[...],
            self.delta_bias[...],
            routes=self.routes,
            implementation=self.scan_implementation,
        )


class SqueezeExcitation(nnx.Module):
    """Channel gates from the mean over positions (Hu et al., arXiv:1709.01507), ratio 8, no biases."""

    RATIO = 8

    def __init__(self, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.reduce = linear(features, features // self.RATIO, bias=False, dtype=dtype, rngs=rngs)
        self.expand = linear(features // self.RATIO, features, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, d) -> the same shape."""
        gate = jax.nn.sigmoid(self.expand(jax.nn.relu(self.reduce(_mean_over_positions(x)))))
        return x * gate[:, None, None]


class MultiScaleMixer(nnx.Module):
    """MSVMamba's multi-scale 2D scan (arXiv:2405.14174, section 3.3).

    One row-major scan of the full map; the three other directions, as one recurrence, on a map of half the resolution.
    """

    def __init__(
        self, features: int, *, states: int, dtype: DTypeLike, scan_implementation: str | None, rngs: nnx.Rngs
    ):
        inner = 2 * features
        ssm: dict[str, Any] = {
            "states": states,
            "rank": delta_rank(features),
            "dtype": dtype,
            "scan_implementation": scan_implementation,
            "rngs": rngs,
        }
        self.in_projection = linear(features, 2 * inner, bias=False, dtype=dtype, rngs=rngs)
        self.full_conv = DepthwiseConv(inner, 3, dtype=dtype, rngs=rngs)
        self.half_conv = DepthwiseConv(inner, 7, stride=2, dtype=dtype, rngs=rngs)
        self.full_ssm = SelectiveSSM(inner, routes=FULL_ROUTES, **ssm)
        self.half_ssm = SelectiveSSM(inner, routes=HALF_ROUTES, **ssm)
        self.out_norm = LayerNorm(inner, dtype=dtype)
        self.squeeze_excitation = SqueezeExcitation(inner, dtype=dtype, rngs=rngs)
        self.out_projection = linear(inner, features, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) -> the same shape."""
        x, z = jnp.split(self.in_projection(x), 2, axis=-1)
        full = self.full_ssm(jax.nn.silu(self.full_conv(x)))
        half = self.half_ssm(jax.nn.silu(self.half_conv(x)))
        # One LayerNorm serves every position of every route, before the routes are summed.
        y = self.out_norm(full)[:, 0]
        half = jnp.sum(self.out_norm(half), axis=1)
        y = y + resize_bilinear(half, *x.shape[1:3])
        y = self.squeeze_excitation(y)
        return self.out_projection(y * jax.nn.silu(z))


class CrossScanMixer(nnx.Module):
    """VMamba's SS2D (arXiv:2401.10166): four independent scans of the full map, summed, then normalised."""

    def __init__(
        self, features: int, *, states: int, dtype: DTypeLike, scan_implementation: str | None, rngs: nnx.Rngs
    ):
        inner = 2 * features
        self.in_projection = linear(features, 2 * inner, bias=False, dtype=dtype, rngs=rngs)
        self.conv = DepthwiseConv(inner, 3, dtype=dtype, rngs=rngs)
        self.ssms = nnx.List(
            SelectiveSSM(
                inner,
                routes=(route,),
                states=states,
                rank=delta_rank(features),
                dtype=dtype,
                scan_implementation=scan_implementation,
                rngs=rngs,
            )
            for route in CROSS_ROUTES
        )
        self.out_norm = LayerNorm(inner, dtype=dtype)
        self.out_projection = linear(inner, features, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, h, w, c) -> the same shape."""
        x, z = jnp.split(self.in_projection(x), 2, axis=-1)
        x = jax.nn.silu(self.conv(x))
        outputs = [ssm(x)[:, 0] for ssm in self.ssms]
        y = self.out_norm(sum(outputs[1:], outputs[0]))
        return self.out_projection(y * jax.nn.silu(z))


def _mean_over_positions(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=(1, 2), dtype=accumulator_dtype(x.dtype)).astype(x.dtype)
