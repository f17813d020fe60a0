"""Every backend on random problems, and on problems that one once got wrong, against the recurrence in float64.

A program is compiled once and given values of many sizes. On a GPU (-m gpu) the problems are many, and such that every
kernel meets lines of 1, 2 and 3 positions, odd sizes, all routes and both dtypes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_scan import (
    HALF,
    TOLERANCE,
    Scan,
    assert_matches,
    assert_nan_stays_in_its_image,
    compare,
    random_scan,
    random_values,
    scan_and_gradients,
)

from msvmamba_jax.kernels.selective_scan import available_implementations, selective_scan_2d
from msvmamba_jax.kernels.selective_scan.reference import selective_scan_2d_reference
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs, visiting_order

ON_GPU = jax.default_backend() == "gpu"
KERNELS = ("mosaic", "triton")
# Compiled kernels have approximate functions of the hardware, and round the gradients of routes before they are summed.
KERNEL_TOLERANCE = {"float32": TOLERANCE["float32"], "bfloat16": 2.0**-7}
ALL = ("column", "row_reversed", "row", "column_reversed")

implementations = pytest.mark.parametrize("implementation", ["xla", *KERNELS])
gpu_kernels = pytest.mark.parametrize("implementation", KERNELS)


# What each Mosaic GPU kernel takes, on an H100 or H200. Triton has one kernel for all.
TILED = [
    Scan(1, 1, 2, ("row",)),
    Scan(2, 2, 16, HALF),
    Scan(3, 3, 8, ALL),
    Scan(65, 2, 16, ("row_reversed",)),
    Scan(2, 33, 8, ("column_reversed",)),
    Scan(3, 40, 16, ("column", "row")),
    Scan(9, 11, 2, HALF, d=130),
    Scan(2, 40, 1, HALF),  # lines too long for the other kernels
    Scan(33, 29, 1, HALF, b=17, d=130),  # blocks enough for the GPU, so that the path stays whole
    Scan(45, 41, 1, ("row",), b=1),  # the path is cut into segments
    Scan(41, 45, 2, ("column", "row_reversed"), b=1),
]
SMALL = [
    Scan(1, 2, 1, ("row",), b=65),
    Scan(3, 2, 1, ("column_reversed",), b=22),
    Scan(3, 3, 1, HALF, b=17),
    Scan(5, 7, 1, ALL, b=9, d=130),
    Scan(8, 8, 1, ("row_reversed",)),
]
RESIDENT = [
    Scan(5, 7, 1, HALF),
    Scan(8, 4, 1, HALF, d=8),  # a column has as many bytes as the channels of a block
    Scan(14, 14, 1, ALL, d=40),
    Scan(17, 19, 1, HALF, d=130),
    Scan(9, 5, 1, ("column",)),
    Scan(28, 28, 1, HALF, b=528, d=8),  # blocks enough to be started one after the other
]
RESIDENT_BACKWARD = [
    Scan(1, 1, 1, HALF),
    Scan(2, 2, 1, ALL),
    Scan(3, 1, 1, HALF),
    Scan(1, 31, 1, ("row", "row_reversed")),
    Scan(20, 17, 1, HALF, d=24),
]


@pytest.fixture
def computed(implementation, record_property):
    """A function from inputs, dy and routes to y, as computed with and without a derivative, and the gradients."""
    if implementation in KERNELS and not ON_GPU:
        pytest.skip("needs a GPU")
    if reason := available_implementations()[implementation]:
        pytest.skip(reason)
    record_property("compared", f"{implementation}:{'xla' if implementation == 'xla' else 'compiled'}")
    return functools.partial(run, implementation=implementation)


@functools.partial(jax.jit, static_argnames=("routes", "implementation"))
def run(inputs: ScanInputs, dy: jax.Array, routes, implementation) -> tuple[list[jax.Array], ScanInputs]:
    scan = functools.partial(selective_scan_2d, routes=routes, implementation=implementation)
    y, pull_back = jax.vjp(lambda inputs: scan(*inputs), inputs)
    ys = [y] if implementation == "xla" else [y, scan(*inputs)]
    return ys, pull_back(dy)[0]


def test_the_recurrence():
    """y is that of the definition, and the gradients are its slopes, by central differences."""
    scan, size = Scan(3, 4, 2, HALF, "float32", b=2, d=3), 1e-6
    inputs, dy = random_values(scan, "ordinary")
    y, gradients = scan_and_gradients(inputs, dy, HALF)
    np.testing.assert_allclose(y, selective_scan_2d_reference(*inputs, routes=HALF), rtol=1e-12, atol=1e-12)
    rng = np.random.default_rng(0)
    exact = ScanInputs(*(np.asarray(x, np.float64) for x in inputs))
    for name, gradient in gradients._asdict().items():
        direction = size * rng.standard_normal(gradient.shape)
        ahead, behind = (
            selective_scan_2d_reference(*exact._replace(**{name: getattr(exact, name) + x}), routes=HALF)
            for x in (direction, -direction)
        )
        slope = np.sum(np.asarray(dy, np.float64) * (ahead - behind)) / 2
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6, err_msg=name)


@pytest.mark.gpu
@implementations
@pytest.mark.parametrize("scan", [random_scan(seed, longest=20) for seed in range(12)], ids=str)
def test_random(computed, scan, implementation):
    compare(computed, scan, tolerance=(TOLERANCE if implementation == "xla" else KERNEL_TOLERANCE)[scan.dtype])
    assert_nan_stays_in_its_image(computed, scan)


@pytest.mark.parametrize(
    ("scan", "kinds"),
    [
        (Scan(3, 4, 1, HALF, b=2, d=8), ("steps of all sizes", "inputs of all sizes")),
        (Scan(5, 4, 1, ("column", "row"), "bfloat16", b=1, d=12), ("neither skip nor bias", "huge steps")),
        (Scan(9, 10, 3, ("column_reversed",), b=1, d=8), ("steps of all sizes",)),
    ],
    ids=str,
)
def test_interpreted(interpreted_scan, scan, kinds):
    compare(interpreted_scan, scan, kinds)


def test_nan_in_the_interpreter(interpreted_scan):
    assert_nan_stays_in_its_image(interpreted_scan, Scan(2, 3, 1, ("row",), b=2, d=8))


@pytest.mark.gpu
@gpu_kernels
@pytest.mark.parametrize("scan", [random_scan(seed, (3, 8, 40), longest=34) for seed in range(100, 108)], ids=str)
def test_random_on_a_gpu(computed, scan):
    compare(computed, scan, tolerance=KERNEL_TOLERANCE[scan.dtype])
    assert_nan_stays_in_its_image(computed, scan)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("scan", "implementation"),
    [
        *((scan, "mosaic") for scan in (*TILED, *SMALL, *RESIDENT, *RESIDENT_BACKWARD)),
        *((scan, "triton") for scan in TILED if scan.d < 100 and scan.h < 45),  # others take minutes to compile
    ],
    ids=str,
)
def test_every_kernel(computed, scan, dtype):
    compare(computed, scan._replace(dtype=dtype), tolerance=KERNEL_TOLERANCE[dtype])
    if scan.b > 1:
        assert_nan_stays_in_its_image(computed, scan._replace(dtype=dtype))


@pytest.mark.gpu
@gpu_kernels
@pytest.mark.parametrize("in_float32", [("delta",), ("B", "C"), ("delta", "B", "C")], ids="+".join)
@pytest.mark.parametrize("scan", [Scan(5, 7, 1, HALF, "bfloat16"), Scan(9, 11, 2, ("column",), "bfloat16")], ids=str)
def test_dtypes_that_differ(computed, scan, in_float32):
    inputs, dy = random_values(scan, "ordinary")
    inputs = inputs._replace(**{name: getattr(inputs, name).astype("float32") for name in in_float32})
    assert_matches(computed, inputs, dy, scan.routes, KERNEL_TOLERANCE["bfloat16"])


# What was wrong once


@pytest.mark.gpu
@gpu_kernels
@pytest.mark.parametrize(
    "scan",
    [
        *(Scan(2, w, 16, ("column",)) for w in (2, 16, 33, 65, 130)),
        Scan(2, 65, 8, ("column",)),
        Scan(2, 33, 16, ("column",), "bfloat16"),
        Scan(3, 3, 16, ("column",)),
        Scan(3, 40, 16, ("column",)),
        Scan(2, 33, 16, ("column_reversed",)),
        Scan(33, 2, 16, ("row",)),
        Scan(40, 3, 16, ("row_reversed",)),
        Scan(2, 33, 4, ("column",)),
        Scan(3, 40, 32, ("column_reversed",)),
    ],
    ids=str,
)
def test_many_states_along_lines_of_two_or_three(computed, scan):
    """Gradients of C, delta and A were silently wrong."""
    compare(computed, scan._replace(b=1, d=8), ["ordinary"], KERNEL_TOLERANCE[scan.dtype])


@pytest.mark.gpu
@gpu_kernels
@pytest.mark.parametrize(
    "scan", [Scan(14, 14, 1, HALF, d=48), Scan(7, 7, 1, HALF, b=9, d=130), Scan(9, 11, 2, HALF)], ids=str
)
def test_small_steps_in_bfloat16(computed, scan):
    """Step sizes from 5e-5 down to 2e-8, which float16 cannot hold."""
    scan = scan._replace(dtype="bfloat16")
    inputs, dy = random_values(scan, "neither skip nor bias")
    for about in (-10, -12, -14, -16, -18):
        of_a_size = inputs._replace(delta=(inputs.delta.astype("float32") / 4 + about).astype("bfloat16"))
        assert_matches(computed, of_a_size, dy, scan.routes, label=f"delta about {about}")


@pytest.mark.gpu
@implementations
@pytest.mark.parametrize("routes", [("row",), ("column", "row_reversed")], ids="+".join)
def test_nothing_before_a_nan_changes(computed, routes):
    """Along a path that GPU kernels cut into segments, whose states pass through all later ones."""
    scan = Scan(41, 45, 2, routes, b=1)
    inputs, dy = random_values(scan, "ordinary")
    orders = [visiting_order(route, scan.h, scan.w) for route in routes]
    (y, *_), _ = computed(inputs, dy, routes)
    for at in (7, 900, 1800):
        row, column = divmod(int(orders[0][at]), scan.w)
        (y_broken, *_), _ = computed(inputs._replace(u=inputs.u.at[0, row, column].set(jnp.nan)), dy, routes)
        before, broken = (np.asarray(x[0, 0]).reshape(-1, scan.d)[orders[0]] for x in (y, y_broken))
        np.testing.assert_array_equal(broken[:at], before[:at])
        assert np.isnan(broken[at:]).all()
