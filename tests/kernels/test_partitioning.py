"""A launch over images on several devices and under transformations: what it sees, what it gives, what is exchanged."""

from __future__ import annotations

import functools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from msvmamba_jax.kernels.selective_scan import mosaic, selection, selective_scan_2d, xla
from msvmamba_jax.kernels.selective_scan.partitioning import by_image
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs

P = PartitionSpec
BOTH = P(("data", "fsdp"))
WEIGHT = jnp.asarray([0.5, -2.0, 3.0, 1.0])

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")

mesh_kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def launch(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Stands in for a kernel: (b, t, 4) and (4,) to (b, t, 4), and (b, 1) that tells how many images it saw."""
    powers = jnp.asarray(np.arange(1.0, x.shape[1] + 1)[:, None], x.dtype)  # captured by the program as a constant
    y = jnp.cumsum(x * weight, axis=1) + powers
    return y, jnp.full((x.shape[0], 1), x.shape[0], jnp.int32) + 0 * x[:, :1, 0].astype(jnp.int32)


def images(*leading: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((*leading, 3, 4)), jnp.float32)


def make_mesh(kind: AxisType = AxisType.Auto, **axes: int) -> Mesh:
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def square(kind: AxisType = AxisType.Auto) -> Mesh:
    return make_mesh(kind, data=2, fsdp=2)


def put(mesh: Mesh, x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, spec))


def collectives(compiled) -> list[tuple[str, str]]:
    """Shape and name of every result of an exchange between devices."""
    names = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter|collective-broadcast"
    found = re.findall(rf"= ([^=]*?) ({names})(?:-start)?\(", compiled.as_text())
    return [(shape, name) for shapes, name in found for shape in re.findall(r"\w+\[[\d,]*\]", shapes)]


def test_gradients_of_parameters_are_added_up_across_devices():
    mesh = square()
    xs = [put(mesh, images(8)[:, 0] * scale, BOTH) for scale in (1.0, 2.0, 3.0)]
    compiled = jax.jit(mosaic._sum_over_images).lower(xs).compile()
    assert {name for _, name in collectives(compiled)} == {"all-reduce"}
    for x, found in zip(xs, compiled(xs), strict=True):
        np.testing.assert_allclose(found, np.sum(x, axis=0), rtol=1e-5, atol=1e-5)


def compile_and_run(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled(*arguments), collectives(compiled)


def assert_same(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def per_image():
    return by_image(launch, shared=(1,))


class TestJit:
    @mesh_kinds
    @pytest.mark.parametrize(
        ("axes", "spec", "seen"),
        [
            ({"data": 4}, P("data"), 2),
            ({"data": 2, "fsdp": 2}, BOTH, 2),
            ({"data": 2, "fsdp": 2}, P(("fsdp", "data")), 2),
            ({"data": 2, "fsdp": 2}, P("fsdp"), 4),
            ({"data": 4}, P(), 8),
        ],
        ids=str,
    )
    def test_each_device_takes_its_images(self, per_image, kind, axes, spec, seen):
        mesh = make_mesh(kind, **axes)
        x, weight = put(mesh, images(8), spec), put(mesh, WEIGHT, P())
        (y, count), exchanged = compile_and_run(per_image, x, weight)
        assert exchanged == []
        assert_same(y, launch(images(8), WEIGHT)[0])
        np.testing.assert_array_equal(count, seen)
        assert y.sharding.is_equivalent_to(x.sharding, y.ndim)
        eager, count = per_image(x, weight)
        assert_same(eager, y)
        np.testing.assert_array_equal(count, seen)

    @mesh_kinds
    def test_sharded_parameters_are_gathered_and_nothing_else(self, per_image, kind):
        mesh = square(kind)
        x, weight = put(mesh, images(8), BOTH), put(mesh, WEIGHT, P("fsdp"))
        (y, count), exchanged = compile_and_run(per_image, x, weight)
        assert exchanged == [("f32[4]", "all-gather")]
        assert_same(y, launch(images(8), WEIGHT)[0])
        np.testing.assert_array_equal(count, 2)

    def test_the_finest_of_several_shardings_is_taken(self):
        mesh = square()
        add = by_image(lambda x, y: launch(x + y, WEIGHT), shared=())
        x, y = put(mesh, images(8), P("data")), put(mesh, images(8), BOTH)
        (found, count), exchanged = compile_and_run(add, x, y)
        assert exchanged == []
        np.testing.assert_array_equal(count, 2)
        assert_same(found, launch(2 * images(8), WEIGHT)[0])

    def test_images_that_are_cut_themselves_are_brought_together(self, per_image):
        mesh = square()
        x = put(mesh, images(8), P("data", None, "fsdp"))
        y, _ = jax.jit(per_image)(x, WEIGHT)
        assert_same(y, launch(images(8), WEIGHT)[0])

    def test_number_of_images_that_does_not_divide(self, per_image):
        sharding = NamedSharding(make_mesh(data=4), P("data"))
        run = jax.jit(lambda x: per_image(lax.with_sharding_constraint(x, sharding)[:6], WEIGHT)[0])
        assert_same(run(images(8)), launch(images(8)[:6], WEIGHT)[0])

    def test_under_scan_and_remat(self, per_image):
        mesh = square()
        x = put(mesh, images(8), BOTH)

        @jax.checkpoint
        def step(x, weight):
            return per_image(x, weight)

        run = lambda x: lax.scan(step, x, jnp.stack([WEIGHT, WEIGHT / 2]))  # noqa: E731
        (y, counts), exchanged = compile_and_run(run, x)
        assert exchanged == []
        np.testing.assert_array_equal(counts, 2)
        assert_same(y, launch(launch(images(8), WEIGHT)[0], WEIGHT / 2)[0])


class TestManual:
    """Where the program is written for one device, it gets what that device has."""

    def test_pmap(self, per_image):
        y, count = jax.pmap(per_image, in_axes=(0, None))(images(4, 2), WEIGHT)
        np.testing.assert_array_equal(count, 2)
        assert_same(y.reshape(8, 3, 4), launch(images(8), WEIGHT)[0])

    @mesh_kinds
    @pytest.mark.parametrize("check", [True, False])
    @pytest.mark.parametrize("manual", [("data", "fsdp"), ("data",)], ids=str)
    def test_shard_map(self, per_image, kind, check, manual):
        mesh = square(kind)
        spec = P(manual)
        run = jax.shard_map(
            per_image, mesh=mesh, in_specs=(spec, P()), out_specs=spec, axis_names=set(manual), check_vma=check
        )
        with jax.set_mesh(mesh):
            (y, count), exchanged = compile_and_run(run, put(mesh, images(8), spec), put(mesh, WEIGHT, P()))
        assert exchanged == []
        np.testing.assert_array_equal(count, 2 if "fsdp" in manual else 4)
        assert_same(y, launch(images(8), WEIGHT)[0])

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    def test_shard_map_over_some_of_the_axes_of_the_batch(self, per_image, kind):
        mesh = square(kind)
        run = jax.shard_map(per_image, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"})
        with jax.set_mesh(mesh):
            y, _ = jax.jit(run)(put(mesh, images(8), BOTH), put(mesh, WEIGHT, P()))
        assert_same(y, launch(images(8), WEIGHT)[0])

    def test_vmap_inside(self, per_image):
        run = jax.shard_map(
            jax.vmap(per_image, in_axes=(0, None)),
            mesh=make_mesh(data=4),
            in_specs=(P(None, "data"), P()),
            out_specs=P(None, "data"),
        )
        y, count = jax.jit(run)(images(3, 8), WEIGHT)
        np.testing.assert_array_equal(count, 6)
        assert_same(y[1], launch(images(3, 8)[1], WEIGHT)[0])


class TestVmap:
    """Against one call for each index; the number of images seen tells whether they were folded into one launch."""

    @pytest.mark.parametrize("jit", [True, False])
    @pytest.mark.parametrize(("x_axis", "weight_axis", "seen"), [(0, None, 6), (2, None, 6), (0, 0, 2), (None, 0, 2)])
    def test_vmap(self, per_image, jit, x_axis, weight_axis, seen):
        x = images(2) if x_axis is None else jnp.moveaxis(images(3, 2), 0, x_axis)
        weight = WEIGHT if weight_axis is None else jnp.stack([WEIGHT, WEIGHT + 1, 2 * WEIGHT])
        run = jax.vmap(per_image, in_axes=(x_axis, weight_axis))
        y, count = (jax.jit(run) if jit else run)(x, weight)
        np.testing.assert_array_equal(count, seen)
        for i in range(3):
            x_i = x if x_axis is None else jnp.take(x, i, axis=x_axis)
            weight_i = weight if weight_axis is None else weight[i]
            assert_same(y[i], launch(x_i, weight_i)[0])

    @pytest.mark.parametrize(
        ("outer", "inner", "seen"),
        [
            ((0, None), (0, None), 12),
            ((0, 0), (0, None), 4),
            ((0, None), (0, 0), 6),
            ((0, 0), (0, 0), 2),
            ((0, None), (None, 0), 6),
        ],
    )
    def test_nested(self, per_image, outer, inner, seen):
        x = images(3, 2, 2) if inner[0] == 0 else images(3, 2)
        weight = WEIGHT
        for size, axis in ((2, inner[1]), (3, outer[1])):
            weight = weight if axis is None else jnp.stack([weight * (i + 1) for i in range(size)])
        y, count = jax.jit(jax.vmap(jax.vmap(per_image, inner), outer))(x, weight)
        np.testing.assert_array_equal(count, seen)
        for i in range(3):
            for j in range(2):
                weight_i = weight if outer[1] is None else weight[i]
                expected = launch(x[i, j] if inner[0] == 0 else x[i], weight_i if inner[1] is None else weight_i[j])
                assert_same(y[i, j], expected[0])

    def test_some_of_the_images_unmapped(self):
        add = by_image(lambda x, y, weight: launch(x + y, weight), shared=(2,))
        x, y = images(3, 2), images(2)
        found, count = jax.vmap(add, in_axes=(0, None, None))(x, y, WEIGHT)
        np.testing.assert_array_equal(count, 6)
        assert_same(found[1], launch(x[1] + y, WEIGHT)[0])

    @mesh_kinds
    @pytest.mark.parametrize("spec", [P(None, ("data", "fsdp")), P("data", "fsdp"), P(("data", "fsdp"))], ids=str)
    def test_any_of_the_axes_sharded(self, per_image, kind, spec):
        mesh = square(kind)
        x = put(mesh, images(4, 4), spec)
        (y, count), exchanged = compile_and_run(jax.vmap(per_image, in_axes=(0, None)), x, put(mesh, WEIGHT, P()))
        assert exchanged == []
        np.testing.assert_array_equal(count, 4)
        assert_same(np.asarray(y)[1], launch(images(4, 4)[1], WEIGHT)[0])

    def test_mapped_parameters_with_sharded_images(self, per_image):
        mesh = square()
        x = put(mesh, images(3, 8), P(None, ("data", "fsdp")))
        weights = jnp.stack([WEIGHT, WEIGHT + 1, 2 * WEIGHT])
        (y, count), exchanged = compile_and_run(jax.vmap(per_image), x, weights)
        assert exchanged == []
        np.testing.assert_array_equal(count, 2)
        assert_same(y[2], launch(images(3, 8)[2], weights[2])[0])

    def test_scan_inside(self, per_image):
        run = lambda x, weight: lax.scan(lambda x, _: per_image(x, weight), x, length=2)  # noqa: E731
        y, count = jax.jit(jax.vmap(run, in_axes=(0, None)))(images(3, 2), WEIGHT)
        np.testing.assert_array_equal(count, 6)
        assert_same(y[1], launch(launch(images(3, 2)[1], WEIGHT)[0], WEIGHT)[0])


# A derivative around it, as the scan has

_forward = by_image(lambda x, weight: (x * weight,), shared=(1,))
_backward = by_image(lambda x, dy, weight: (dy * weight, jnp.sum(dy * x, axis=1)), shared=(2,))


@jax.custom_vjp
def multiply(x, weight):
    return _forward(x, weight)[0]


def _multiply_backward(residuals, dy):
    x, weight = residuals
    dx, dweight = _backward(x, dy, weight)
    return dx, jnp.sum(dweight, axis=0)


multiply.defvjp(lambda x, weight: (_forward(x, weight)[0], (x, weight)), _multiply_backward)


def loss(x, weight):
    return jnp.sum(jnp.sin(multiply(x, weight)))


def plain_loss(x, weight):
    return jnp.sum(jnp.sin(x * weight))


class TestGradient:
    @mesh_kinds
    def test_sharded(self, kind):
        mesh = square(kind)
        x, weight = put(mesh, images(8), BOTH), put(mesh, WEIGHT, P())
        found, exchanged = compile_and_run(jax.grad(jax.checkpoint(loss), (0, 1)), x, weight)
        assert exchanged == [("f32[4]", "all-reduce")]
        assert found[0].sharding.is_equivalent_to(x.sharding, x.ndim)
        for gradient, expected in zip(found, jax.grad(plain_loss, (0, 1))(images(8), WEIGHT), strict=True):
            assert_same(gradient, expected)

    def test_vmap_for_the_gradient_of_each_image(self):
        per_example = jax.vmap(jax.grad(loss, 1), in_axes=(0, None))
        expected = jax.vmap(jax.grad(plain_loss, 1), in_axes=(0, None))(images(8, 1), WEIGHT)
        assert_same(jax.jit(per_example)(images(8, 1), WEIGHT), expected)
        x = put(square(), images(8, 1), BOTH)
        found, exchanged = compile_and_run(per_example, x, WEIGHT)
        assert exchanged == []
        assert_same(found, expected)

    def test_of_vmap(self):
        batched = lambda f: lambda x, w: jnp.sum(jax.vmap(f)(x, w) ** 2)  # noqa: E731
        weights = jnp.stack([WEIGHT, 2 * WEIGHT])
        found = jax.jit(jax.grad(batched(loss), (0, 1)))(images(2, 3), weights)
        for gradient, expected in zip(found, jax.grad(batched(plain_loss), (0, 1))(images(2, 3), weights), strict=True):
            assert_same(gradient, expected)


# The selective scan itself, as if its functions were kernels

_SHARED = (2, 5, 6)  # A, D and delta_bias
HALF = ("row_reversed", "column", "column_reversed")


class _Opaque:
    """The functions of `xla`, launched image by image as those of a GPU backend are."""

    unavailable = staticmethod(xla.unavailable)
    refusal = staticmethod(xla.refusal)

    @staticmethod
    def run(inputs, routes):
        return by_image(lambda *arrays: (xla.run(ScanInputs(*arrays), routes),), shared=_SHARED)(*inputs)[0]

    @staticmethod
    def forward(inputs, routes):
        return _Opaque.run(inputs, routes), inputs

    @staticmethod
    def backward(inputs, dy, routes):
        def of_images(*arrays):
            *arrays, dy = arrays
            one = lambda inputs, dy: xla.backward(xla.Residuals(inputs), dy, routes)  # noqa: E731
            split = ScanInputs(*(x if i in _SHARED else x[:, None] for i, x in enumerate(arrays)))
            in_axes = ScanInputs(*(None if i in _SHARED else 0 for i in range(7)))
            grads = jax.vmap(one, in_axes=(in_axes, 0))(split, dy[:, None])
            return tuple(g if i in _SHARED else g[:, 0] for i, g in enumerate(grads))

        grads = by_image(of_images, shared=_SHARED)(*inputs, dy)
        return ScanInputs(*(jnp.sum(g, axis=0) if i in _SHARED else g for i, g in enumerate(grads)))


@pytest.fixture
def opaque_scan(monkeypatch):
    """`selective_scan_2d` with another implementation named `opaque`."""
    monkeypatch.setitem(sys.modules, f"{selection.__package__}.opaque", _Opaque)
    monkeypatch.setattr(selection, "implementations", lambda: ("opaque", "xla"))


def scan_inputs(b=8, h=4, w=5, d=8, n=2) -> ScanInputs:
    rng = np.random.default_rng(0)
    shapes = ScanInputs((b, h, w, d), (b, h, w, d), (d, n), (b, h, w, n), (b, h, w, n), (d,), (d,))
    inputs = ScanInputs(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes))
    return inputs._replace(A=-jnp.exp(inputs.A))


def scan_and_gradients(implementation: str):
    def run(inputs: ScanInputs, dy: jax.Array):
        y, pull_back = jax.vjp(
            lambda inputs: selective_scan_2d(*inputs, routes=HALF, implementation=implementation), inputs
        )
        return y, pull_back(dy)[0]

    return run


@pytest.mark.usefixtures("opaque_scan")
class TestScan:
    @pytest.mark.parametrize(
        ("kind", "parameters"),
        [(AxisType.Auto, P()), (AxisType.Auto, P("fsdp")), (AxisType.Explicit, P())],
        ids=["replicated", "fsdp", "explicit"],
    )
    def test_sharded(self, kind, parameters):
        mesh = square(kind)
        inputs = scan_inputs()
        dy = jnp.ones((8, 3, 4, 5, 8)) * jnp.arange(1.0, 9)
        specs = ScanInputs(*(parameters if i in _SHARED else BOTH for i in range(7)))
        sharded = ScanInputs(*(put(mesh, x, spec) for x, spec in zip(inputs, specs, strict=True)))
        (y, grads), exchanged = compile_and_run(scan_and_gradients("opaque"), sharded, put(mesh, dy, BOTH))
        names = {name for _, name in exchanged}
        assert "all-reduce" in names
        if parameters:  # gathered, and their gradients exchanged anew
            assert {shape for shape, name in exchanged if name == "all-gather"} == {"f32[8,2]", "f32[8]"}
        else:
            assert names == {"all-reduce"}
        largest = max(math.prod(map(int, re.findall(r"\d+(?=[,\]])", shape))) for shape, _ in exchanged)
        assert largest <= 8 * 2  # of any array that is exchanged: that of A, not that of any image
        expected_y, expected = jax.jit(scan_and_gradients("xla"))(inputs, dy)
        assert_same(y, expected_y)
        for found, reference in zip(grads, expected, strict=True):
            np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("implementation", ["opaque", "xla"])
    def test_gradient_in_shard_map(self, implementation):
        """Parameters are the same in all shards, so their gradients are added up."""
        inputs = scan_inputs()
        specs = ScanInputs(*(P() if i in _SHARED else P("data") for i in range(7)))

        def loss(inputs: ScanInputs) -> jax.Array:
            scan = lambda inputs: selective_scan_2d(*inputs, routes=HALF, implementation=implementation)  # noqa: E731
            local = jax.shard_map(scan, mesh=make_mesh(data=4), in_specs=(specs,), out_specs=P("data"))
            return jnp.sum(jnp.sin(local(inputs)))

        plain = lambda inputs: jnp.sum(jnp.sin(selective_scan_2d(*inputs, routes=HALF, implementation="xla")))  # noqa: E731
        for found, expected in zip(jax.jit(jax.grad(loss))(inputs), jax.grad(plain)(inputs), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("implementation", ["opaque", "xla"])
    def test_gradient_under_pmap(self, implementation):
        inputs = scan_inputs()
        scan = functools.partial(selective_scan_2d, routes=HALF)

        def local_gradient(u, delta, A, B, C, D, delta_bias):
            loss = lambda A, u: jnp.sum(jnp.sin(scan(u, delta, A, B, C, D, delta_bias, implementation=implementation)))  # noqa: E731
            dA, du = jax.grad(loss, (0, 1))(A, u)
            return lax.psum(dA, "data"), du

        split = ScanInputs(*(x if i in _SHARED else x.reshape(4, 2, *x.shape[1:]) for i, x in enumerate(inputs)))
        in_axes = tuple(None if i in _SHARED else 0 for i in range(7))
        dA, du = jax.pmap(local_gradient, axis_name="data", in_axes=in_axes)(*split)
        loss = lambda inputs: jnp.sum(jnp.sin(scan(*inputs, implementation="xla")))  # noqa: E731
        expected = jax.jit(jax.grad(loss))(inputs)
        np.testing.assert_allclose(dA[0], expected.A, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(du.reshape(expected.u.shape), expected.u, rtol=1e-4, atol=1e-4)
