"""Every implementation of the selective scan that runs here, and its derivative, against `reference.py`."""

from __future__ import annotations

import functools
import re

import float64_scan
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from msvmamba_jax.kernels.selective_scan import available_implementations, selective_scan, selective_scan_2d
from msvmamba_jax.kernels.selective_scan.reference import selective_scan_2d_reference
from msvmamba_jax.kernels.selective_scan.routes import ROUTES, ScanInputs, visiting_order

IMPLEMENTATIONS = ["xla"]
if jax.default_backend() == "gpu":
    IMPLEMENTATIONS = [name for name, reason in available_implementations().items() if reason is None]

HALF = ("row_reversed", "column", "column_reversed")  # MSVMamba's chained routes
ROUTE_SETS = [*((route,) for route in ROUTES), HALF]
SMALL_AND_LARGE = [(4, 6), (17, 19)]  # an implementation may walk short paths otherwise than long ones

# Relative L2 error. bfloat16 keeps 8 bits: rounding the result to the nearest costs at most 2^-9 of each number.
TOLERANCE = {"float32": 3e-6, "bfloat16": 2.0**-9}
GRADIENT_TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8}

dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
states = pytest.mark.parametrize("n", [1, 16])
maps = pytest.mark.parametrize(("h", "w"), SMALL_AND_LARGE)


def make_inputs(b=2, h=4, w=5, d=3, n=1, *, dtype="float32", seed=0) -> ScanInputs:
    """Random inputs whose step sizes (0.02 to 0.3) let a state live for tens of positions."""
    rng = np.random.default_rng(seed)
    inputs = ScanInputs(
        u=rng.standard_normal((b, h, w, d)),
        delta=rng.standard_normal((b, h, w, d)),
        A=-np.exp(0.5 * rng.standard_normal((d, n))),
        B=rng.standard_normal((b, h, w, n)),
        C=rng.standard_normal((b, h, w, n)),
        D=rng.standard_normal(d),
        delta_bias=rng.uniform(-4.0, -2.0, d),
    )
    per_position = ("u", "delta", "B", "C")
    return ScanInputs(
        **{k: jnp.asarray(x, dtype if k in per_position else "float32") for k, x in inputs._asdict().items()}
    )


def make_dy(inputs: ScanInputs, routes) -> jax.Array:
    b, *rest = inputs.u.shape
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((b, len(routes), *rest)), inputs.u.dtype)


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


@functools.partial(jax.jit, static_argnames=("routes", "implementation"))
def scan(inputs: ScanInputs, routes, implementation) -> jax.Array:
    return selective_scan_2d(*inputs, routes=routes, implementation=implementation)


def gradients(inputs: ScanInputs, dy: jax.Array, routes, implementation) -> ScanInputs:
    run = lambda inputs: selective_scan_2d(*inputs, routes=routes, implementation=implementation)  # noqa: E731
    return jax.vjp(run, inputs)[1](dy)[0]


jitted_gradients = jax.jit(gradients, static_argnames=("routes", "implementation"))


@functools.partial(jax.jit, static_argnames=("routes", "implementation"))
def scan_and_gradients(inputs: ScanInputs, dy: jax.Array, routes, implementation) -> tuple[jax.Array, ScanInputs]:
    run = lambda inputs: selective_scan_2d(*inputs, routes=routes, implementation=implementation)  # noqa: E731
    y, pull_back = jax.vjp(run, inputs)
    return y, pull_back(dy)[0]


def assert_close(found, reference, tolerance: float, name: str = "y") -> None:
    found, reference = np.asarray(found, np.float64), np.asarray(reference, np.float64)
    assert found.shape == reference.shape
    error = np.linalg.norm(found - reference) / np.linalg.norm(reference)
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_gradients_close(found: ScanInputs, reference: ScanInputs, tolerance: float) -> None:
    for name, x, y in zip(ScanInputs._fields, found, reference, strict=True):
        assert_close(x, y, tolerance, name)


@pytest.fixture
def compared(implementation, record_property):
    """For tests that compare numbers with a reference."""
    record_property("compared", f"{implementation}:{'xla' if implementation == 'xla' else 'compiled'}")


@pytest.mark.usefixtures("compared")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestNumbers:
    """y and gradients; `test_random_comparison.py` has many more cases."""

    def check_forward(self, inputs: ScanInputs, routes, implementation) -> None:
        y = scan(inputs, routes, implementation)
        assert y.dtype == inputs.u.dtype
        assert_close(y, selective_scan_2d_reference(*inputs, routes=routes), TOLERANCE[inputs.u.dtype.name])

    def check(self, inputs: ScanInputs, routes, implementation) -> None:
        dy = make_dy(inputs, routes)
        y, found = scan_and_gradients(inputs, dy, routes, implementation)
        expected_y, expected = float64_scan.scan_and_gradients(inputs, dy, routes)
        assert y.dtype == inputs.u.dtype
        assert [x.dtype for x in found] == [x.dtype for x in inputs]
        assert_close(y, expected_y, TOLERANCE[inputs.u.dtype.name])
        assert_gradients_close(found, expected, GRADIENT_TOLERANCE[inputs.u.dtype.name])

    @pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 7), (7, 1), (2, 2), (5, 3), (2, 65), (65, 3), (1, 300), (301, 1)])
    def test_shapes(self, implementation, h, w):
        self.check(make_inputs(h=h, w=w, n=2), HALF, implementation)

    @pytest.mark.parametrize("routes", ROUTE_SETS, ids="+".join)
    def test_routes(self, implementation, routes):
        self.check(make_inputs(h=17, w=19), routes, implementation)

    @dtypes
    @states
    def test_dtypes_and_states(self, implementation, dtype, n):
        self.check(make_inputs(h=9, w=11, n=n, dtype=dtype), HALF, implementation)

    @pytest.mark.gpu
    @dtypes
    def test_long_sequence(self, implementation, dtype):
        """The length of a detection image at stride 4; a bfloat16 state would be far outside the tolerance."""
        inputs = make_inputs(b=1, h=1, w=66_800, d=2, dtype=dtype)
        u, delta, A, B, C, D, bias = inputs
        run = functools.partial(selective_scan, implementation=implementation)
        y = jax.jit(run)(u[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], D, bias)
        assert_close(y, selective_scan_2d_reference(*inputs)[:, 0, 0], TOLERANCE[dtype])

    @pytest.mark.gpu
    def test_large_map(self, implementation):
        self.check_forward(make_inputs(b=1, h=200, w=334, d=2), ("column_reversed",), implementation)

    @pytest.mark.gpu
    @maps
    def test_chained_routes_are_one_sequence(self, implementation, h, w):
        inputs = make_inputs(h=h, w=w, n=2)
        orders = [visiting_order(route, h, w) for route in HALF]
        path = np.concatenate(orders)
        u, delta, B, C = (x.reshape(2, h * w, -1)[:, path] for x in (inputs.u, inputs.delta, inputs.B, inputs.C))
        sequence = selective_scan(u, delta, inputs.A, B, C, inputs.D, inputs.delta_bias, implementation=implementation)
        y = scan(inputs, HALF, implementation).reshape(2, 3, h * w, 3)
        in_order = jnp.concatenate([y[:, index, order] for index, order in enumerate(orders)], axis=1)
        assert_close(sequence, in_order, TOLERANCE["float32"])

    @maps
    def test_a_route_starts_from_the_state_the_last_one_left(self, implementation, h, w):
        inputs = make_inputs(h=h, w=w)
        chained, alone = scan(inputs, HALF, implementation), scan(inputs, HALF[1:], implementation)
        assert np.abs(np.asarray(chained[:, 1] - alone[:, 0])).max() > 0.1

    @pytest.mark.gpu
    def test_without_skip_and_bias(self, implementation):
        inputs = make_inputs()
        zeros = inputs._replace(D=jnp.zeros(3), delta_bias=jnp.zeros(3))
        y = selective_scan_2d(*inputs[:5], implementation=implementation)
        np.testing.assert_array_equal(y, selective_scan_2d(*zeros, implementation=implementation))

    def test_float64_keeps_a_float64_state(self, implementation):
        if implementation != "xla":
            pytest.skip("float64 is for checks on the XLA path")
        inputs = as_float64(make_inputs(n=2))
        with jax.enable_x64(True):
            y = selective_scan_2d(*map(jnp.asarray, inputs), routes=HALF, implementation=implementation)
            assert y.dtype == jnp.float64
        assert_close(y, selective_scan_2d_reference(*inputs, routes=HALF), 1e-13)

    @pytest.mark.parametrize("n", [1, 3])
    def test_gradients_are_slopes(self, implementation, n):
        """Of the definition in float64, by central differences along a random direction of each input."""
        inputs = make_inputs(b=1, h=3, w=4, n=n)
        dy = make_dy(inputs, HALF)
        found = jitted_gradients(inputs, dy, HALF, implementation)
        rng = np.random.default_rng(2)
        exact, h = as_float64(inputs), 1e-6
        for name, gradient in zip(ScanInputs._fields, as_float64(found), strict=True):
            direction = rng.standard_normal(gradient.shape)
            ahead, behind = (
                selective_scan_2d_reference(
                    *exact._replace(**{name: getattr(exact, name) + sign * h * direction}), routes=HALF
                )
                for sign in (1, -1)
            )
            slope = np.sum(as_float64(dy) * (ahead - behind)) / (2 * h)
            scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
            assert abs(np.sum(gradient * direction) - slope) < 1e-5 * scale, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestTransformations:
    def test_jit(self, implementation):
        inputs, dy = make_inputs(n=2), make_dy(make_inputs(), HALF)
        eager = gradients(inputs, dy, HALF, implementation)
        assert_gradients_close(jitted_gradients(inputs, dy, HALF, implementation), eager, TOLERANCE["float32"])

    @pytest.mark.gpu
    def test_remat(self, implementation):
        inputs, dy = make_inputs(n=2), make_dy(make_inputs(), HALF)
        run = jax.checkpoint(lambda inputs: selective_scan_2d(*inputs, routes=HALF, implementation=implementation))
        found = jax.jit(lambda inputs, dy: jax.vjp(run, inputs)[1](dy)[0])(inputs, dy)
        expected = jitted_gradients(inputs, dy, HALF, implementation)
        assert_gradients_close(found, expected, TOLERANCE["float32"])

    @pytest.mark.gpu
    def test_nested_vmap_and_its_gradient(self, implementation):
        """Outer axis on every input, inner axis on those of positions."""
        cases = [[make_inputs(n=2, seed=2 * i + j) for j in range(2)] for i in range(2)]
        shared = {"A": 0, "D": 0, "delta_bias": 0}
        for row in cases:
            row[1] = row[1]._replace(**{name: getattr(row[0], name) for name in shared})
        dy = make_dy(cases[0][0], HALF)
        stacked = ScanInputs(
            **{
                name: jnp.stack([jnp.stack([getattr(x, name) for x in row]) for row in cases])
                if name not in shared
                else jnp.stack([getattr(row[0], name) for row in cases])
                for name in ScanInputs._fields
            }
        )
        inner_axes = ScanInputs(**{name: None if name in shared else 0 for name in ScanInputs._fields})
        batched = lambda f: jax.jit(jax.vmap(jax.vmap(f, (inner_axes,)), (0,)))  # noqa: E731

        y = batched(lambda x: selective_scan_2d(*x, routes=HALF, implementation=implementation))(stacked)
        grads = batched(lambda x: gradients(x, dy, HALF, implementation))(stacked)
        for i in range(2):
            for j in range(2):
                assert_close(y[i, j], scan(cases[i][j], HALF, implementation), TOLERANCE["float32"])
                expected = jitted_gradients(cases[i][j], dy, HALF, implementation)
                found = jax.tree.map(lambda x, i=i, j=j: x[i, j], grads)
                assert_gradients_close(found, expected, GRADIENT_TOLERANCE["float32"])

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_images_of_a_batch_do_not_see_each_other(self, implementation, seed):
        rng = np.random.default_rng(seed)
        b, h, w, d, n = rng.integers((3, 1, 1, 1, 1), (6, 9, 9, 5, 4))
        inputs = make_inputs(b, h, w, d, n, seed=seed)
        order = rng.permutation(b)
        shuffled = inputs._replace(**{name: getattr(inputs, name)[order] for name in ("u", "delta", "B", "C")})
        y, y_shuffled = scan(inputs, HALF, implementation), scan(shuffled, HALF, implementation)
        np.testing.assert_allclose(y_shuffled, y[order], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("h", "w"), [pytest.param(64, 64, marks=pytest.mark.gpu), (1, 4096)])
    def test_memory_of_the_gradient(self, implementation, h, w):
        """Linear in the sequence, and a channel's states do not cost a map each."""

        def temporary_bytes(h: int, w: int, n: int) -> int:
            inputs = jax.eval_shape(lambda: make_inputs(1, h, w, 128, n))
            dy = jax.ShapeDtypeStruct((1, 3, h, w, 128), "float32")
            compiled = jitted_gradients.lower(inputs, dy, HALF, implementation).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        one_map = 4 * h * w * 128
        base = temporary_bytes(h, w, 1)
        assert base < 40 * one_map
        assert temporary_bytes(h, 2 * w, 1) < 2.2 * base
        # Three routes visit 24 maps' worth of states; a map as small as this one also has its share of fixed buffers.
        assert temporary_bytes(h, w, 8) < base + 12 * one_map

    @pytest.mark.gpu
    @pytest.mark.parametrize("states", [1, 2])
    def test_sharded_batch_stays_where_it_is(self, implementation, states):
        """Two or four devices, each with its images: only the gradients of A, D and the bias are exchanged."""
        devices = jax.devices()[:4] if len(jax.devices()) >= 4 else jax.devices()[:2]
        if len(devices) < 2:
            pytest.skip("needs two devices")
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        by_image, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        shardings = ScanInputs(by_image, by_image, everywhere, by_image, by_image, everywhere, everywhere)
        inputs = make_inputs(b=8, h=9, w=11, n=states)
        dy = make_dy(inputs, HALF)

        def forward_and_backward(inputs, dy):
            y, pull_back = jax.vjp(
                lambda inputs: selective_scan_2d(*inputs, routes=HALF, implementation=implementation), inputs
            )
            return y, pull_back(dy)[0]

        step = jax.jit(forward_and_backward, in_shardings=(shardings, by_image))
        compiled = step.lower(inputs, dy).compile()
        collectives = set(re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", compiled.as_text()))
        assert collectives == {"all-reduce"}
        y, grads = jax.block_until_ready(compiled(*jax.device_put((inputs, dy), (shardings, by_image))))
        assert y.sharding.is_equivalent_to(by_image, y.ndim)
        assert_close(y, scan(inputs, HALF, implementation), TOLERANCE["float32"])
        assert_gradients_close(grads, jitted_gradients(inputs, dy, HALF, implementation), TOLERANCE["float32"])


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"u": jnp.zeros((4, 5, 3))}, r"u must be \(batch, height, width, channels\)"),
            ({"u": jnp.zeros((2, 0, 5, 3))}, "must not be empty"),
            ({"delta": jnp.zeros((2, 4, 5, 1))}, r"delta must have shape \(2, 4, 5, 3\)"),
            ({"A": jnp.zeros(3)}, r"A must be \(channels, states\)"),
            ({"A": jnp.zeros((2, 1))}, r"A must have shape \(3, 1\)"),
            ({"B": jnp.zeros((2, 4, 5, 2))}, r"B must have shape \(2, 4, 5, 1\)"),
            ({"C": jnp.zeros((2, 5, 4, 1))}, r"C must have shape \(2, 4, 5, 1\)"),
            ({"D": jnp.zeros(4)}, r"D must have shape \(3,\)"),
            ({"delta_bias": jnp.zeros((3, 1))}, r"delta_bias must have shape \(3,\)"),
            ({"u": jnp.zeros((2, 4, 5, 3), jnp.int32)}, "u must be a floating-point array; got int32"),
            ({"C": jnp.zeros((2, 4, 5, 1), jnp.uint8)}, "C must be a floating-point array; got uint8"),
        ],
    )
    def test_arrays_that_do_not_fit(self, changes, message):
        with pytest.raises(ValueError, match=message):
            selective_scan_2d(*make_inputs()._replace(**changes))

    @pytest.mark.parametrize("routes", [(), ("diagonal",), ("row", "rows")])
    def test_routes(self, routes):
        with pytest.raises(ValueError, match="routes must be one or more of row, row_reversed, column"):
            selective_scan_2d(*make_inputs(), routes=routes)

    def test_implementation(self):
        with pytest.raises(ValueError, match="no scan implementation 'cuda'; there is mosaic, triton, xla"):
            selective_scan_2d(*make_inputs(), implementation="cuda")

    def test_sequence_of_the_wrong_rank(self):
        with pytest.raises(ValueError, match=r"u must be \(batch, length, channels\)"):
            selective_scan(*make_inputs())
