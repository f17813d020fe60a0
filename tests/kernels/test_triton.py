"""The Triton backend without a GPU: its plans, the compiled code, and its kernels in Triton's interpreter.

Run as a program with TRITON_INTERPRET=1, this file is the part that the interpreter does.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import traceback
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_scan import HALF, VALUES, Scan, assert_nan_stays_in_its_image, compare, random_scan

from msvmamba_jax.kernels.selective_scan import api, selection
from msvmamba_jax.kernels.selective_scan import triton as backend
from msvmamba_jax.kernels.selective_scan.config import H100, Problem
from msvmamba_jax.kernels.selective_scan.recurrence import LOG1P_PRECISE
from msvmamba_jax.kernels.selective_scan.routes import ROUTES, ScanInputs, visiting_order


def make_problem(direction="forward", b=128, h=56, w=56, d=96, n=1, routes=1, dtype="bfloat16") -> Problem:
    return Problem(direction, b, h, w, d, n, routes, dtype)


class TestHeuristic:
    @pytest.mark.parametrize("direction", ["forward", "backward"])
    @pytest.mark.parametrize(
        ("b", "h", "w", "d"), [(128, 56, 56, 96), (128, 28, 28, 192), (128, 14, 14, 384), (128, 7, 7, 768)]
    )
    def test_large_batches_are_not_split(self, direction, b, h, w, d):
        assert backend.heuristic(make_problem(direction, b, h, w, d), H100).parts == 1

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_long_maps_of_one_image_are_split(self, direction):
        parts = backend.heuristic(make_problem(direction, b=1, h=200, w=334), H100).parts
        assert 100 < parts <= (200 * 334) ** 0.5

    def test_short_maps_are_not_split(self):
        assert backend.heuristic(make_problem(b=1, h=7, w=7), H100).parts == 1

    def test_fewer_images_are_split_more(self):
        parts = [backend.heuristic(make_problem(b=b), H100).parts for b in (1, 16, 32, 128)]
        assert parts == sorted(parts, reverse=True)

    @pytest.mark.parametrize("n", [1, 2, 3, 16, 64])
    def test_states_of_a_chunk_fit_into_registers(self, n):
        unroll = backend.heuristic(make_problem("backward", n=n), H100).unroll
        assert unroll * n <= 16 or unroll == 1


class TestPlan:
    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("parts", [1, 3])
    @pytest.mark.parametrize("n", [1, 2, 16])
    @pytest.mark.parametrize(("direction", "save"), [("forward", False), ("forward", True), ("backward", True)])
    @pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 70), (70, 1), (3, 5), (11, 3), (13, 14), (56, 8)])
    def test_chunks_visit_every_position_in_order(self, route, parts, n, direction, save, h, w):
        problem = make_problem(direction, h=h, w=w, n=n)
        config = dataclasses.replace(backend.heuristic(problem, H100), parts=parts)
        plan = backend.make_plan(problem, (route,), 0, config, save=save)
        visited, saved = [], []
        for segment in range(plan.segments):
            first = min(segment * plan.chunks_per_segment, plan.chunks)
            last = min(first + plan.chunks_per_segment, plan.chunks)
            assert (last - first) % plan.chunks_per_interval == 0
            for index in range(first, last):
                line, offset = index // plan.chunks_per_line, index % plan.chunks_per_line * plan.unroll
                for t in range(offset, min(offset + plan.unroll, plan.length)):
                    if save and t % plan.interval == 0:
                        saved.append(line * plan.saved_per_line + t // plan.interval)
                    visited.append(plan.start + line * plan.line_step + t * plan.step)
        np.testing.assert_array_equal(visited, visiting_order(route, h, w))
        assert saved == list(range(plan.saved))
        assert not plan.whole or plan.chunks * plan.unroll == h * w

    @pytest.mark.parametrize("n", [1, 2, 3, 16, 64])
    @pytest.mark.parametrize(("h", "w"), [(56, 56), (28, 28), (14, 14), (7, 7), (200, 334), (13, 9)])
    def test_forward_and_backward_agree_on_the_saved_states(self, n, h, w):
        plans = []
        for direction, b in (("forward", 128), ("forward", 1), ("backward", 128), ("backward", 1)):
            problem = make_problem(direction, b, h, w, n=n, routes=2)
            config = backend.heuristic(problem, H100)
            plans.append(backend.make_plan(problem, ("row", "column"), 1, config, save=True))
        assert len({(plan.interval, plan.saved, plan.saved_per_line) for plan in plans}) == 1

    def test_later_routes_resume(self):
        for direction, expected in (("forward", [False, True, True]), ("backward", [True, True, False])):
            problem = make_problem(direction, routes=3)
            config = backend.heuristic(problem, H100)
            plans = [backend.make_plan(problem, HALF, route, config, save=True) for route in range(3)]
            assert [plan.resumes for plan in plans] == expected


def test_float64_is_refused():
    inputs = ScanInputs(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes_of(1, 2, 2, 3, 1)))
    assert backend.refusal(inputs, ("row",)) is None
    inputs = inputs._replace(D=jax.ShapeDtypeStruct((3,), "float64"))
    assert backend.refusal(inputs, ("row",)) == "it computes in float32, and D is float64"


def test_where_it_cannot_run():
    if any(device.platform == "gpu" for device in jax.local_devices()):
        pytest.skip("there is a GPU")
    reason = backend.unavailable()
    assert reason is not None
    assert "jax-triton is not installed" in reason or "compute capability 8.0" in reason


def test_softplus_polynomial():
    """As the kernels evaluate it: by float32 multiply-adds that round once."""
    rng = np.random.default_rng(0)
    e = np.concatenate([rng.uniform(0, 1, 100_000), np.exp(-rng.uniform(0, 40, 100_000)), [1.0]]).astype(np.float32)
    coefficients = np.asarray(LOG1P_PRECISE, np.float32).astype(np.float64)
    value = np.full(e.shape, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = (value * e + coefficient).astype(np.float32).astype(np.float64)
    expected = np.log1p(e.astype(np.float64))
    assert np.max(np.abs((value * e).astype(np.float32) / expected - 1)) < 2.5e-7


def test_the_kernels_have_the_polynomial_of_the_other_backend():
    shared = pytest.importorskip("msvmamba_jax.kernels.selective_scan.triton_chunk", reason="no triton")
    assert shared._LOG1P.value is LOG1P_PRECISE


# The compiled code


class Case(NamedTuple):
    kernel: str
    save: bool
    b: int
    h: int
    w: int
    d: int
    n: int = 1
    route: str = "row"
    dtype: str = "bf16"


CASES = [
    Case("forward", False, 128, 56, 56, 96),
    Case("forward", True, 128, 28, 28, 192, route="column_reversed", dtype="fp32"),
    Case("forward", False, 1, 200, 334, 96, route="column"),
    Case("forward", False, 128, 56, 56, 192, 16),
    Case("backward", True, 128, 56, 56, 96, dtype="fp32"),
    Case("backward", True, 128, 28, 28, 192, route="column_reversed"),
    Case("backward", True, 1, 200, 334, 96),
    Case("backward", True, 128, 56, 56, 192, 16),
    Case("summary", False, 1, 200, 334, 96, route="row_reversed"),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_compile_without_spilling_registers(case, capability, tmp_path):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from msvmamba_jax.kernels.selective_scan import triton_kernels

    kernel = getattr(triton_kernels, f"{case.kernel}_kernel")
    direction = "backward" if case.kernel == "backward" else "forward"
    problem = make_problem(direction, case.b, case.h, case.w, case.d, case.n)
    plan = backend.make_plan(problem, (case.route,), 0, backend.heuristic(problem, H100), save=case.save)
    constants: dict[str, Any] = {"PLAN": plan}
    if case.kernel == "forward" and not case.save:
        constants["states"] = None
    if case.kernel == "backward" and plan.chunks_per_interval == 1:
        constants["scratch"] = None
    if case.kernel == "summary":
        constants["REVERSE"] = False
    per_position = {"u", "delta", "B", "C", "x", "BC", "dy", "y", "other_routes", "du", "ddelta"}
    signature = {
        name: "constexpr" if name in constants else f"*{case.dtype if name in per_position else 'fp32'}"
        for name in kernel.arg_names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name] != "constexpr"
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})

    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    assert [int(x) for x in found.groups()[1:]] == [0, 0]  # where spilled registers go


@pytest.mark.parametrize("parts", [1, 2])
def test_lowers_for_a_gpu_on_any_machine(parts, monkeypatch):
    """Forward and backward, with one launch for each route and two where routes are split."""
    pytest.importorskip("jax_triton", reason="needs jaxlib's CUDA plugin", exc_type=ImportError)
    monkeypatch.setattr(backend, "choose", functools.partial(choose_parts, parts))
    backend._launcher.cache_clear()
    inputs = ScanInputs(
        *(
            jax.ShapeDtypeStruct(shape, "float32" if name in ("A", "D", "delta_bias") else "bfloat16")
            for name, shape in zip(ScanInputs._fields, shapes_of(2, 3, 5, 40, 1), strict=True)
        )
    )
    dy = jax.ShapeDtypeStruct((2, 3, 3, 5, 40), "bfloat16")

    def forward_and_backward(inputs, dy):
        y, residuals = backend.forward(inputs, HALF)
        return y, backend.backward(residuals, dy, HALF)

    lowered = jax.jit(forward_and_backward).trace(inputs, dy).lower(lowering_platforms=("cuda",))
    y, gradients = lowered.out_info
    assert (y.shape, y.dtype) == (dy.shape, dy.dtype)
    assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, x.dtype) for x in inputs]
    assert lowered.as_text().count("@triton_kernel_call") == 6 * parts


def test_gradient_lowers_inside_shard_map(monkeypatch):
    """Where a kernel's results must be known to differ between shards."""
    pytest.importorskip("jax_triton", reason="needs jaxlib's CUDA plugin", exc_type=ImportError)
    if len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    for module in (api, selection):
        monkeypatch.setattr(module, "load", lambda name: backend)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    inputs = ScanInputs(*(jax.ShapeDtypeStruct(shape, "float32") for shape in shapes_of(8, 3, 5, 40, 1)))
    specs = ScanInputs(*(jax.P() if name in ("A", "D", "delta_bias") else jax.P("data") for name in inputs._fields))

    def loss(inputs):
        y = api.selective_scan_2d(*inputs, routes=HALF, implementation="triton")
        return jax.lax.psum(jnp.sum(y), "data")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(specs,), out_specs=jax.P())
    lowered = jax.jit(jax.grad(sharded)).trace(inputs).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@triton_kernel_call") == 6


# The interpreter


class Interpreted(NamedTuple):
    """A small problem, and how it is computed."""

    scan: Scan
    parts: int = 1  # segments of each route
    kind: str = "ordinary"  # of values


WITH_NAN = Scan(2, 2, 1, ("row", "column"), b=2)
SCANS = [
    Interpreted(Scan(3, 3, 1, HALF, b=2)),
    Interpreted(Scan(3, 2, 2, HALF, b=2), 2),
    Interpreted(Scan(11, 2, 1, ("column", "row_reversed"), b=1)),  # chunks that reach past the ends of lines
    Interpreted(Scan(11, 2, 3, ("column_reversed",), b=1), 2),
    Interpreted(Scan(1, 19, 1, ("column",), b=1, d=33), 3),
    Interpreted(Scan(5, 2, 16, ("row", "column"), b=1)),  # several chunks between saved states
    Interpreted(Scan(3, 5, 1, HALF, "bfloat16", b=1)),
    Interpreted(WITH_NAN, 2),
    *(Interpreted(random_scan(seed, longest=4)._replace(b=1), 1 + seed % 2, kind) for seed, kind in enumerate(VALUES)),
]


@pytest.fixture(scope="session")
def interpreted() -> list[str]:
    """Errors of each scan, empty where there is none, from one process in which Triton interprets its kernels."""
    pytest.importorskip("triton")
    pytest.importorskip("torch", reason="the interpreter reads and writes tensors of PyTorch")
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(len(SCANS)), ids=lambda index: "-".join(map(str, SCANS[index])))
def test_interpreted(index, interpreted, record_property):
    record_property("compared", "triton:interpreted")
    assert interpreted[index] == ""


def shapes_of(b: int, h: int, w: int, d: int, n: int) -> tuple[tuple[int, ...], ...]:
    of_channels, of_states = (b, h, w, d), (b, h, w, n)
    return (of_channels, of_channels, (d, n), of_states, of_states, (d,), (d,))


def choose_parts(parts: int, implementation: str, problem: Problem, device: Any, heuristic: Any) -> Any:
    return dataclasses.replace(heuristic(problem, device), parts=parts)


def interpret(scan: Scan, parts: int, kind: str) -> None:
    """Compares the kernels with the recurrence."""
    backend._call = call_interpreter
    backend.by_image = lambda function, shared: function
    backend.choose = functools.partial(choose_parts, parts)
    backend._launcher.cache_clear()

    def compute(inputs, dy, routes):
        y, residuals = backend.forward(inputs, routes)
        return [y, backend.run(inputs, routes)], backend.backward(residuals, dy, routes)

    # The interpreter rounds bfloat16 towards zero.
    compare(compute, scan, [kind], tolerance=2.0**-7 if scan.dtype == "bfloat16" else None)
    if scan == WITH_NAN:
        assert_nan_stays_in_its_image(compute, scan)


def outcome(scan: Interpreted) -> str:
    try:
        interpret(*scan)
    except Exception:
        return traceback.format_exc()
    return ""


def call_interpreter(kernel, arrays, results, problem, plan, in_place=None, **constants) -> tuple[jax.Array, ...]:
    """What takes the place of `triton._call`. Results start as NaN, so that what is not written is noticed."""
    tensors = [to_torch(np.asarray(x)) for x in arrays]
    outputs = [to_torch(np.full(x.shape, np.nan, x.dtype)) for x in results]
    for argument, result in (in_place or {}).items():
        outputs[result] = tensors[argument]
    kernel[(problem.batch * plan.segments * plan.tiles,)](*tensors, *outputs, PLAN=plan, **constants)
    return tuple(jnp.asarray(to_numpy(x, result.dtype)) for x, result in zip(outputs, results, strict=True))


def to_torch(x: np.ndarray) -> Any:
    import torch

    if x.dtype == jnp.bfloat16:  # which PyTorch does not take from NumPy
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def to_numpy(x: Any, dtype: np.dtype) -> np.ndarray:
    import torch

    return x.view(torch.int16).numpy().view(dtype) if dtype == jnp.bfloat16 else x.numpy()


def let_numbers_bound_loops() -> None:
    """Converts the interpreter's numbers, arrays of one element, to integers, which NumPy has stopped to do."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if __name__ == "__main__":
    let_numbers_bound_loops()
    print(json.dumps([outcome(scan) for scan in SCANS]))
