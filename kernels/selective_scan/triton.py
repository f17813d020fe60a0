"""The selective scan as Triton programs for NVIDIA GPUs of compute capability 8.0 and newer.

Each program walks some channels of one image along a route, with the state in registers: u, delta, B and C are read
once and y is written once for each route, and the next route's launch starts from the state that the last one left.
Where images and channels are too few to occupy the GPU, a route is split into segments: a first launch finds what each
segment makes of a state that starts at zero, and the program of a segment then folds the summaries of those before it
into the state that it starts from.

For the backward, the forward keeps the state before every few positions of each route; the states between them are
recomputed in registers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from msvmamba_jax.kernels.selective_scan.config import (
    Device,
    Problem,
    choose,
    compute_capability,
    float64_refusal,
    local_device,
)
from msvmamba_jax.kernels.selective_scan.partitioning import by_image
from msvmamba_jax.kernels.selective_scan.routes import SHARED, Route, ScanInputs, along_rows, is_reversed


class Residuals(NamedTuple):
    """What the backward needs of the forward."""

    inputs: ScanInputs
    states: tuple[jax.Array, ...]  # for each route (b, saved, n, d), float32


@dataclasses.dataclass(frozen=True)
class Config:
    """How a problem is spread over the GPU.

    Attributes:
        channels: of one program, a power of two from 32 on: so many lanes' worth.
        unroll: at most so many positions are loaded while as many others are computed. The plan of a route takes what
            fits its lines and the distance between saved states.
        parts: segments that a route is split into.
    """

    channels: int
    unroll: int
    parts: int


def unavailable() -> str | None:
    """Why this backend cannot run on this process's devices, as a clause; None if it can."""
    if importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("triton") is None:
        return "jax-triton is not installed: pip install 'msvmamba-jax[triton]'"
    if (compute_capability(jax.local_devices()[0]) or 0) < 8.0:
        return "it needs an NVIDIA GPU of compute capability 8.0 (Ampere) or higher"
    return None


def refusal(inputs: ScanInputs, routes: tuple[Route, ...]) -> str | None:
    """Why this backend does not take a scan, as a clause; None if it does."""
    return float64_refusal(inputs)


def heuristic(problem: Problem, device: Device) -> Config:
    """A configuration for shapes that nobody has measured.

    A program is one warp and issues at most one instruction a cycle, so that a scheduler has enough with one or two of
    them. To split a route pays off only while most schedulers idle: everything is then read twice. More segments than
    the square root of the route's length would spend more time on folding summaries than on positions.
    """
    padded = _padded(problem.states)
    unroll = max(2, 16 // padded) if problem.direction == "forward" else _longest_backward_chunk(padded)
    schedulers = 4 * device.multiprocessors
    programs = problem.batch * -(-problem.channels // _LANES)
    positions = problem.height * problem.width
    parts = 1
    if 2 * programs < schedulers and positions >= _SHORTEST_SPLIT_ROUTE:
        parts = round(min(2 * schedulers / programs, positions**0.5))
    return Config(channels=_LANES, unroll=unroll, parts=parts)


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Configurations worth measuring."""
    start = heuristic(problem, device)
    parts = {start.parts} if start.parts == 1 else {max(1, start.parts // 2), start.parts, 2 * start.parts}
    unrolls = sorted({start.unroll, max(2, start.unroll // 2)})
    return [
        Config(channels, unroll, p) for channels in (_LANES, 2 * _LANES) for unroll in unrolls for p in sorted(parts)
    ]


_LANES = 32
_SHORTEST_SPLIT_ROUTE = 512  # below, the second launch costs more than it saves


def run(inputs: ScanInputs, routes: tuple[Route, ...]) -> jax.Array:
    """Scans the map along `routes` and keeps nothing for a derivative.

    Returns:
        y (b, routes, h, w, d) in the dtype of `inputs.u`.
    """
    (y,) = _launcher("run", routes)(*_for_kernels(inputs))
    return y.astype(inputs.u.dtype)


def forward(inputs: ScanInputs, routes: tuple[Route, ...]) -> tuple[jax.Array, Residuals]:
    """As `run`, with the residuals for `backward`."""
    y, *states = _launcher("forward", routes)(*_for_kernels(inputs))
    return y.astype(inputs.u.dtype), Residuals(inputs, tuple(states))


def backward(residuals: Residuals, dy: jax.Array, routes: tuple[Route, ...]) -> ScanInputs:
    """The gradient of `forward` with respect to every input, given dy (b, routes, h, w, d)."""
    inputs = _for_kernels(residuals.inputs)
    du, ddelta, dB, dC, dparameters = _launcher("backward", routes)(
        *inputs, dy.astype(inputs.u.dtype), *residuals.states
    )
    dparameters = jnp.sum(dparameters, axis=0)  # (n + 2, d)
    gradients = ScanInputs(du, ddelta, dparameters[:-2].T, dB, dC, dparameters[-2], dparameters[-1])
    return ScanInputs(*(g.astype(x.dtype) for g, x in zip(gradients, residuals.inputs, strict=True)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for: one route, as evenly spaced lines that are cut into chunks.

    Map positions are numbered row by row.

    Attributes:
        positions: of a map.
        channels: of a map.
        states: of a channel.
        padded: `states` rounded up to a power of two.
        tile: channels of a program.
        tiles: programs that share an image and a segment.
        routes: of the whole path.
        route: index of this one.
        resumes: whether the walk starts with a state, that of another route, and not with zero.
        start: first position.
        step: from a position to the next one of its line.
        line_step: from the start of a line to that of the next line.
        length: positions of a line.
        whole: whether no chunk reaches past the end of its line.
        unroll: positions of a chunk.
        chunks: of all lines.
        chunks_per_line: of which the last ones may reach past its end.
        segments: that the route is split into.
        chunks_per_segment: of which the last segments may have fewer.
        interval: positions from one saved state to the next; 0 to save none.
        chunks_per_interval: 1 if chunks are longer than intervals.
        saved: states saved along the route.
        saved_per_line: states saved along a line.
    """

    positions: int
    channels: int
    states: int
    padded: int
    tile: int
    tiles: int
    routes: int
    route: int
    resumes: bool
    start: int
    step: int
    line_step: int
    length: int
    whole: bool
    unroll: int
    chunks: int
    chunks_per_line: int
    segments: int
    chunks_per_segment: int
    interval: int
    chunks_per_interval: int
    saved: int
    saved_per_line: int


def make_plan(problem: Problem, routes: tuple[Route, ...], route: int, config: Config, *, save: bool) -> Plan:
    """The plan of one route.

    Args:
        problem: what is computed.
        routes: the orders of travel.
        route: index of the one to plan.
        config: how.
        save: whether the forward keeps states for a backward; True for the backward itself.
    """
    height, width = problem.height, problem.width
    # A map of one row or one column looks the same along both; as one line it needs the fewest chunks.
    by_row = along_rows(routes[route]) or min(height, width) == 1
    lines, length = (1, height * width) if by_row else (width, height)
    sign = -1 if is_reversed(routes[route]) else 1
    backward = problem.direction == "backward"
    interval = saving_interval(length, problem.states) if save else 0
    unroll = _chunk_length(length, config.unroll, interval, below_interval=backward)
    chunks_per_interval = max(1, interval // unroll)
    unit = unroll * chunks_per_interval  # positions that stay in one segment
    units = -(-length // unit)  # of a line
    saved_per_line = -(-length // interval) if save else 0
    return Plan(
        positions=height * width,
        channels=problem.channels,
        states=problem.states,
        padded=_padded(problem.states),
        tile=config.channels,
        tiles=-(-problem.channels // config.channels),
        routes=len(routes),
        route=route,
        resumes=route != (len(routes) - 1 if backward else 0),
        start=height * width - 1 if sign < 0 else 0,
        step=sign * (1 if by_row else width),
        line_step=sign,
        length=length,
        whole=length % unit == 0,
        unroll=unroll,
        chunks=lines * units * chunks_per_interval,
        chunks_per_line=units * chunks_per_interval,
        segments=config.parts,
        chunks_per_segment=-(-lines * units // config.parts) * chunks_per_interval,
        interval=interval,
        chunks_per_interval=chunks_per_interval,
        saved=lines * saved_per_line,
        saved_per_line=saved_per_line,
    )


def saving_interval(length: int, states: int) -> int:
    """Positions from one saved state to the next, on lines of `length` positions.

    It depends on nothing that may differ between the forward and its backward, such as the number of images at once.
    On long lines, saved states take at most half as many bytes as y in float32, however many states there are.
    """
    padded = _padded(states)
    chunk = _chunk_length(length, _longest_backward_chunk(padded))
    return chunk * _chunk_length(-(-length // chunk), max(1, 2 * padded // chunk))


def _longest_backward_chunk(padded: int) -> int:
    """Positions all of whose states fit into registers."""
    return max(1, 8 // padded)


def _chunk_length(length: int, longest: int, interval: int = 0, *, below_interval: bool = False) -> int:
    """A length of chunks, up to `longest`, for which a line needs few chunks and they reach little past its end.

    Args:
        length: positions of the line.
        longest: upper limit.
        interval: what the chunks must divide or be multiples of; 0 for no such condition.
        below_interval: whether they must divide it.
    """

    def fits(chunk: int) -> bool:
        return not interval or interval % chunk == 0 or (chunk % interval == 0 and not below_interval)

    def cost(chunk: int) -> float:
        masks = 1.0 if length % chunk == 0 else 1.1
        return -(-length // chunk) * (chunk + 2) * masks

    return min(filter(fits, range(longest, 0, -1)), key=cost)


def _padded(states: int) -> int:
    return 1 << (states - 1).bit_length()


# Launches


@functools.cache
def _launcher(direction: str, routes: tuple[Route, ...]) -> Callable[..., tuple[jax.Array, ...]]:
    functions = {"run": _run_images, "forward": _forward_images, "backward": _backward_images}
    return by_image(functools.partial(functions[direction], routes), shared=SHARED)


def _run_images(routes: tuple[Route, ...], *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """y (b, routes, h, w, d)."""
    return _forward_launches(ScanInputs(*inputs), routes, save=False)


def _forward_images(routes: tuple[Route, ...], *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """y (b, routes, h, w, d), and for each route the saved states (b, saved, n, d)."""
    return _forward_launches(ScanInputs(*inputs), routes, save=True)


def _forward_launches(inputs: ScanInputs, routes: tuple[Route, ...], *, save: bool) -> tuple[jax.Array, ...]:
    from msvmamba_jax.kernels.selective_scan import triton_kernels as kernels

    u, delta, A, B, _, _, bias = inputs
    problem = Problem.of("forward", inputs, routes)
    config = choose("triton", problem, local_device(), heuristic)
    y = state = absent = bias  # a kernel takes any array in the place of one that it does not read
    saved: list[jax.Array] = []
    for route in range(len(routes)):
        plan = make_plan(problem, routes, route, config, save=save)
        summaries = absent
        if plan.segments > 1:
            (summaries,) = _call(
                kernels.summary_kernel,
                (u, delta, A, B, bias),
                [_summaries(problem, plan)],
                problem,
                plan,
                REVERSE=False,
            )
        results = [jax.ShapeDtypeStruct((problem.batch, len(routes), *u.shape[1:]), u.dtype), _state(problem)]
        arrays = (*inputs, state, summaries, y)
        in_place = {len(arrays) - 1: 0} if route else {}  # so that y need not be put together from the routes' parts
        if save:
            results.append(_float32(problem.batch, plan.saved, plan.states, plan.channels))
            y, state, states = _call(kernels.forward_kernel, arrays, results, problem, plan, in_place)
            saved.append(states)
        else:
            y, state = _call(kernels.forward_kernel, arrays, results, problem, plan, in_place, states=None)
    return (y, *saved)


def _backward_images(routes: tuple[Route, ...], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """du, ddelta (b, h, w, d), dB, dC (b, h, w, n), and dparameters (b, n + 2, d) of A, D and the bias."""
    from msvmamba_jax.kernels.selective_scan import triton_kernels as kernels

    inputs, dy, saved = ScanInputs(*arrays[:7]), arrays[7], arrays[8:]
    u, delta, A, B, C, _, bias = inputs
    problem = Problem.of("backward", inputs, routes)
    config = choose("triton", problem, local_device(), heuristic)
    state = absent = bias
    contributions: list[tuple[jax.Array, ...]] = []
    for route in reversed(range(len(routes))):
        plan = make_plan(problem, routes, route, config, save=True)
        summaries = absent
        if plan.segments > 1:
            (summaries,) = _call(
                kernels.summary_kernel,
                (dy, delta, A, C, bias),
                [_summaries(problem, plan)],
                problem,
                plan,
                REVERSE=True,
            )
        results = [
            # The contributions of several routes are rounded to the dtype of u before they are added up.
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct(u.shape, delta.dtype if len(routes) == 1 else u.dtype),
            _float32(problem.batch, plan.tiles, *u.shape[1:3], 2, plan.states),
            _float32(problem.batch, plan.segments, plan.states + 2, plan.channels),
            _state(problem),
        ]
        arrays = (*inputs, dy, saved[route], state, summaries)
        if plan.chunks_per_interval > 1:
            blocks = (problem.batch, plan.segments, plan.tiles, plan.chunks_per_interval)
            results.append(_float32(*blocks, plan.padded, plan.tile))
            *gradients, state, _ = _call(kernels.backward_kernel, arrays, results, problem, plan)
        else:
            *gradients, state = _call(kernels.backward_kernel, arrays, results, problem, plan, scratch=None)
        contributions.append(tuple(gradients))
    du, ddelta, dBC, dparameters = zip(*contributions, strict=True)
    dB, dC = (tuple(x[..., index, :] for x in dBC) for index in (0, 1))
    return (
        _total(du, u.dtype),
        _total(ddelta, delta.dtype),
        _total(dB, B.dtype, axis=1),
        _total(dC, C.dtype, axis=1),
        _total(dparameters, jnp.dtype("float32"), axis=1),
    )


def _call(
    kernel: Any,
    arrays: tuple[jax.Array, ...],
    results: Sequence[jax.ShapeDtypeStruct],
    problem: Problem,
    plan: Plan,
    in_place: dict[int, int] | None = None,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Launches one program for each image, segment and tile; `in_place` are arguments whose memory results take."""
    import jax_triton

    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_shape=tuple(results),
        grid=(problem.batch * plan.segments * plan.tiles,),
        num_warps=1,
        compute_capability=_compute_capability(),
        input_output_aliases=in_place,
        PLAN=plan,
        **constants,
    )


def _summaries(problem: Problem, plan: Plan) -> jax.ShapeDtypeStruct:
    return _float32(problem.batch, plan.segments, plan.states + 1, plan.channels)


def _state(problem: Problem) -> jax.ShapeDtypeStruct:
    return _float32(problem.batch, problem.states, problem.channels)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _total(arrays: Sequence[jax.Array], dtype: jnp.dtype, axis: int | None = None) -> jax.Array:
    """Sum of the arrays, in float32, over an axis of theirs as well if one is given."""
    if axis is not None:
        arrays = [jnp.sum(x, axis=axis) for x in arrays]
    if len(arrays) == 1:
        return arrays[0].astype(dtype)
    return functools.reduce(jnp.add, (x.astype(jnp.float32) for x in arrays)).astype(dtype)


def _for_kernels(inputs: ScanInputs) -> ScanInputs:
    """The inputs in dtypes that the kernels compute with."""
    u = inputs.u if inputs.u.dtype in (jnp.float32, jnp.bfloat16) else inputs.u.astype(jnp.float32)
    parameters = {name: getattr(inputs, name).astype(jnp.float32) for name in ("A", "D", "delta_bias")}
    of_positions = {
        name: x if x.dtype in (jnp.float32, jnp.bfloat16, jnp.float16) else x.astype(jnp.float32)
        for name, x in (("delta", inputs.delta), ("B", inputs.B), ("C", inputs.C))
    }
    return ScanInputs(u=u, **of_positions, **parameters)


def _compute_capability() -> int:
    """That of this process's GPU, such as 90; of the device that `config.local_device` assumes where there is none."""
    capability = compute_capability(jax.local_devices()[0])
    return round(10 * capability) if capability else 90
