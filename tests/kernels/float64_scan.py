"""The selective scan with its gradients in NumPy float64, random problems, and the comparison of a backend with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msvmamba_jax.kernels.selective_scan.routes import ROUTES, Route, ScanInputs, visiting_order

SHARED = ("A", "D", "delta_bias")  # by all images
HALF: tuple[Route, ...] = ("row_reversed", "column", "column_reversed")

# float32: largest error of an element over its sum of magnitudes. Softplus, decay and products each round to 2^-24, and
# the exponent of a decay, up to 40 where it still matters, multiplies the error of the step size.
# bfloat16: relative L2 error. Results, and in Triton the parts of several routes, are rounded to 8 bits.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2.0**-8}
_NEGLIGIBLE = 1e-20  # magnitudes that float32 may flush to zero on the way


class Scan(NamedTuple):
    """The shape of a problem."""

    h: int
    w: int
    n: int
    routes: tuple[Route, ...]
    dtype: str = "float32"
    b: int = 3
    d: int = 5

    def __str__(self) -> str:
        return f"{self.b}x{self.h}x{self.w}x{self.d}-{self.n}-{'+'.join(self.routes)}-{self.dtype}"


def random_scan(seed: int, channels: Sequence[int] = (5,), longest: int = 40) -> Scan:
    """Half of all sides are 1, 2 or 3."""
    rng = np.random.default_rng(seed)
    h, w = (int(rng.integers(1, 4) if rng.random() < 0.5 else rng.integers(1, longest + 1)) for _ in range(2))
    chains = (HALF, tuple(rng.permutation(ROUTES)), ("column", "row"), *((route,) for route in ROUTES))
    return Scan(
        h=h,
        w=w,
        n=int(rng.choice([1, 1, 2, 3, 4, 8, 16, 32])),
        routes=tuple(map(str, chains[rng.integers(len(chains))])),
        dtype=("float32", "bfloat16")[rng.integers(2)],
        d=int(rng.choice(channels)),
    )


VALUES = ("ordinary", "neither skip nor bias", "steps of all sizes", "tiny steps", "huge steps", "inputs of all sizes")


def random_values(scan: Scan, kind: str, seed: int = 0) -> tuple[ScanInputs, jax.Array]:
    """Inputs and dy. Ordinary step sizes are 0.02 to 0.3; tiny ones about 2e-8; huge ones 0 to 150."""
    rng = np.random.default_rng(seed)
    b, h, w, d, n = scan.b, scan.h, scan.w, scan.d, scan.n
    u, delta = rng.standard_normal((2, b, h, w, d))
    B, C = rng.standard_normal((2, b, h, w, n))
    dy = rng.standard_normal((b, len(scan.routes), h, w, d))
    A, D, bias = -np.exp(0.5 * rng.standard_normal((d, n))), rng.standard_normal(d), rng.uniform(-4.0, -2.0, d)
    if kind in ("neither skip nor bias", "tiny steps"):  # a skip would hide what tiny steps add
        D, bias = np.zeros((2, d))
    if kind == "steps of all sizes":
        delta, bias = rng.uniform(-18.0, 5.0, delta.shape), np.zeros(d)
    elif kind == "tiny steps":
        delta = delta / 4 - 18.0
    elif kind == "huge steps":
        delta, A = delta * 50, A * 16
    elif kind == "inputs of all sizes":
        u, B, C, dy = (
            x * 10.0 ** rng.integers(-3, 4, (b, h, w, 1) if x.ndim == 4 else (b, 1, h, w, 1)) for x in (u, B, C, dy)
        )
    inputs = ScanInputs(u=u, delta=delta, A=A, B=B, C=C, D=D, delta_bias=bias)
    dtypes = {name: "float32" if name in SHARED else scan.dtype for name in inputs._fields}
    typed = {name: jnp.asarray(x, dtypes[name]) for name, x in inputs._asdict().items()}
    return ScanInputs(**typed), jnp.asarray(dy, scan.dtype)


def scan_and_gradients(
    inputs: ScanInputs, dy: jax.Array, routes: Sequence[Route], *, magnitudes: bool = False
) -> tuple[np.ndarray, ScanInputs]:
    """y and the gradients of all inputs; with `magnitudes`, each sum over the absolute values of its terms."""
    u, delta, A, B, C, D, bias, dy = (np.asarray(x, np.float64) for x in (*inputs, dy))
    slope, step = np.exp(-np.logaddexp(-delta - bias, 0.0)), np.logaddexp(delta + bias, 0.0)
    rate = A
    if magnitudes:
        u, B, C, D, dy, rate = map(np.abs, (u, B, C, D, dy, rate))
    b, h, w, d = u.shape
    orders = [visiting_order(route, h, w) for route in routes]
    along = lambda x: np.moveaxis(x.reshape(b, h * w, -1)[:, np.concatenate(orders)], 1, 0)  # noqa: E731
    on_the_map = lambda x: np.moveaxis(  # noqa: E731
        [part[np.argsort(order)] for part, order in zip(np.split(x, len(orders)), orders, strict=True)], 2, 0
    ).reshape(b, len(orders), h, w, -1)

    us, steps, Bs, Cs = map(along, (u, step, B, C))
    dys = np.concatenate([dy[:, i].reshape(b, h * w, d)[:, order] for i, order in enumerate(orders)], 1).swapaxes(0, 1)
    decays = np.exp(steps[..., None] * A)
    states = (steps * us)[..., None] * Bs[:, :, None]
    for t in range(1, len(states)):
        states[t] += decays[t] * states[t - 1]
    dstates = dys[..., None] * Cs[:, :, None]
    for t in range(len(states) - 2, -1, -1):
        dstates[t] += decays[t + 1] * dstates[t + 1]

    dexponents = dstates * decays
    dexponents[1:] *= states[:-1]
    dexponents[0] = 0.0
    ddrives = np.einsum("tbdn,tbn->tbd", dstates, Bs)
    dsteps = ddrives * us + np.einsum("tbdn,dn->tbd", dexponents, rate)
    gradients = ScanInputs(
        u=on_the_map(ddrives * steps + D * dys).sum(1),
        delta=on_the_map(dsteps).sum(1) * slope,
        A=np.einsum("tbdn,tbd->dn", dexponents, steps),
        B=on_the_map(np.einsum("tbdn,tbd->tbn", dstates, steps * us)).sum(1),
        C=on_the_map(np.einsum("tbdn,tbd->tbn", states, dys)).sum(1),
        D=np.einsum("tbd,tbd->d", dys, us),
        delta_bias=np.sum(on_the_map(dsteps).sum(1) * slope, (0, 1, 2)),
    )
    return on_the_map(np.einsum("tbdn,tbn->tbd", states, Cs) + D * us), gradients


Compute = Callable[[ScanInputs, jax.Array, Sequence[Route]], tuple[Sequence[jax.Array], ScanInputs]]
"""From inputs, dy and routes to y, perhaps computed in several ways, and the gradients."""


def compare(compute: Compute, scan: Scan, kinds: Sequence[str] = VALUES, tolerance: float | None = None) -> None:
    """Holds a backend to the recurrence, on values of several kinds."""
    for seed, kind in enumerate(kinds):
        inputs, dy = random_values(scan, kind, seed)
        assert_matches(compute, inputs, dy, scan.routes, tolerance, label=kind)


def assert_matches(
    compute: Compute,
    inputs: ScanInputs,
    dy: jax.Array,
    routes: Sequence[Route],
    tolerance: float | None = None,
    label: str = "scan",
) -> None:
    """Compares y and the gradients of all inputs with the recurrence."""
    ys, gradients = compute(inputs, dy, routes)
    y, expected = scan_and_gradients(inputs, dy, routes)
    y_magnitude, magnitudes = scan_and_gradients(inputs, dy, routes, magnitudes=True)
    compared = [("y", inputs.u, found, y, y_magnitude) for found in ys]
    compared += zip(inputs._fields, inputs, gradients, expected, magnitudes, strict=True)
    for name, given, found, reference, magnitude in compared:
        assert found.dtype == given.dtype, f"{label}, {name}"
        assert found.shape == reference.shape, f"{label}, {name}"
        difference = np.asarray(found, np.float64) - reference
        if inputs.u.dtype == jnp.float32:
            error = np.max(np.abs(difference) / (magnitude + _NEGLIGIBLE))
        else:
            error = np.linalg.norm(difference) / (np.linalg.norm(reference) + _NEGLIGIBLE)
        assert error <= (tolerance or TOLERANCE[inputs.u.dtype.name]), f"{label}, {name}: error {error:.1e}"


def assert_nan_stays_in_its_image(compute: Compute, scan: Scan) -> None:
    """A NaN in the second image of a batch, in one input after the other."""
    inputs, dy = random_values(scan, "ordinary")
    others = np.arange(scan.b) != 1
    for name in ("u", "delta", "B", "C"):
        broken = inputs._replace(**{name: getattr(inputs, name).at[1, 0, 0, 0].set(jnp.nan)})
        ys, gradients = compute(broken, dy, scan.routes)
        for found in (*ys, gradients.u, gradients.delta, gradients.B, gradients.C):
            assert np.isfinite(np.asarray(found, np.float32)[others]).all(), f"NaN in {name}"
        assert np.isnan(np.asarray(ys[0][1], np.float32)).any(), f"NaN in {name}"
