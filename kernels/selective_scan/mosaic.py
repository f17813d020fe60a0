"""The selective scan as Pallas Mosaic GPU kernels, for NVIDIA GPUs of compute capability 9.0 and higher.

They are written for Hopper and measured on nothing else.

A block is a warpgroup that takes one image and a block of channels along the whole path (all routes, one after the
other), its states in registers. Tiles of u and delta come in, and tiles of y go out, through asynchronous copies
between device and shared memory that run ahead of the arithmetic; a route is only a rule for the next tile's address.
Where images and channels are too few to fill the GPU, each route is cut into segments: a first kernel finds the state
that each segment leaves when entered with zero and the sum of its step sizes, from which every block of the second
kernel works out the state that enters its segment. The backward does the same from both ends.

Maps that fit in shared memory, where they stay for all routes, have kernels of their own: `mosaic_small` the forward
over maps of some tens of positions, `mosaic_resident` that of several routes over larger ones and
`mosaic_resident_backward` the backward of several routes. Where images and channels are few, these two take a single
route, too. Each is chosen where it is faster, as measured.

The backward travels against the routes. The forward kept the state before every chunk of positions; the states in
between are recomputed. A block that takes the whole path adds up the gradients of u and delta over routes as it comes
by a position again. Sums over channels (for B and C) are taken within a block; those over blocks and images outside.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from msvmamba_jax.kernels.selective_scan import (
    mosaic_block,
    mosaic_kernels,
    mosaic_lines,
    mosaic_resident,
    mosaic_resident_backward,
    mosaic_small,
    mosaic_team,
)
from msvmamba_jax.kernels.selective_scan.config import (
    Device,
    Problem,
    choose,
    compute_capability,
    float64_refusal,
    local_device,
)
from msvmamba_jax.kernels.selective_scan.partitioning import by_image
from msvmamba_jax.kernels.selective_scan.routes import SHARED, Route, ScanInputs, along_rows
from msvmamba_jax.kernels.selective_scan.tiles import Tiles, tiles

_WORD = 8  # channels; the copy engine addresses 16 bytes


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    What the forward keeps must not depend on it: on several devices XLA expects of each a part of what one would keep.

    Attributes:
        stages: tiles of the inputs that are in shared memory or on the way.
        parts: segments that each route is cut into; 1 leaves the path whole, in one launch.
    """

    stages: int
    parts: int


_BLOCK = mosaic_block.THREADS  # channels
_POSITIONS = 16  # of a tile, about: copies of 4 or 8 KiB


def heuristic(problem: Problem, device: Device) -> Config:
    """Enough blocks for the GPU, and enough bytes on the way to each multiprocessor.

    As many stages (two to four) as let two blocks share a multiprocessor, or else as many as one block has room for: a
    single one, whose copies wait for the arithmetic, if nothing else fits. The path stays whole if there is a block for
    every second multiprocessor, since cutting it reads the inputs twice; otherwise each route is cut for two blocks to
    a multiprocessor, but into segments of four tiles at least.
    """
    blocks = problem.batch * -(-problem.channels // _BLOCK)
    parts = 1
    if 2 * blocks < device.multiprocessors:
        wanted = -(-2 * device.multiprocessors // (blocks * problem.routes))
        parts = max(1, min(wanted, problem.height * problem.width // (4 * _POSITIONS)))
    # Where blocks are to share, a single route counts as two: it rather keeps its stages than gets a second block.
    chained = dataclasses.replace(problem, routes=max(2, problem.routes))
    for counted, share in (
        (chained, device.shared_memory // 2 - mosaic_block.RESERVED),
        (problem, device.shared_memory),
    ):
        for stages in (4, 3, 2):
            if _shared_bytes(counted, Config(stages, parts), device) <= share:
                return Config(stages, parts)
    return Config(1, parts)


def candidates(problem: Problem, device: Device) -> list[Config]:
    """Configurations worth measuring; kernels that keep a map in shared memory have but one."""
    one = heuristic(problem, device)
    if problem.direction == "backward":
        geometry = _geometry(problem, _likely_routes(problem)[-1], one, device)
        words = 1 if problem.dtype == "bfloat16" else 2
        resident = mosaic_team.team_for(geometry, words, device) is not None
    else:
        resident = _stays_resident(problem, device) or _stays_small(problem, device, resident=False)
    if resident:
        return [one]
    parts = {one.parts}
    if parts != {1}:
        parts |= {part for start in parts for part in (start // 2, start * 2)}
    found = (Config(stages, part) for stages in (2, 3, 4, 6) for part in sorted(parts))
    return [config for config in found if _shared_bytes(problem, config, device) <= device.shared_memory]


def _shared_bytes(problem: Problem, config: Config, device: Device) -> int:
    """Of a block, along whichever routes need most: a problem tells their number only."""
    backward = problem.direction == "backward"
    geometries = [_geometry(problem, routes, config, device) for routes in _likely_routes(problem)]
    return max(mosaic_kernels.shared_bytes(geometry, backward=backward) for geometry in geometries)


def _likely_routes(problem: Problem) -> list[tuple[Route, ...]]:
    """Routes that a problem may have, all along rows, or along columns, or both."""
    axes: list[tuple[Route, ...]] = [("row",), ("column",)]
    if problem.routes > 1:
        axes.append(("column", "row"))
    return [(some * problem.routes)[: problem.routes] for some in axes]


class Residuals(NamedTuple):
    """What the backward needs of the forward."""

    inputs: ScanInputs
    states: jax.Array  # see `mosaic_kernels.scan`
    words: tuple[jax.Array, ...]  # one array or none, see `_words_to_keep`


def unavailable() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    if (compute_capability(jax.local_devices()[0]) or 0) >= 9.0:
        return None
    return "it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or higher"


def refusal(inputs: ScanInputs, routes: tuple[Route, ...]) -> str | None:
    """Why this backend does not take a scan, as a clause; None if it does."""
    if (reason := float64_refusal(inputs)) is not None:
        return reason
    device = local_device()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    problem = Problem.of("backward", jax.eval_shape(_in_kernel_dtypes, shapes), routes)
    # What needs least, of the forward and the backward. Not what the heuristic proposes: that depends on the number of
    # images, which is not yet known under `jax.vmap` or of a part of a sharded batch.
    geometry = _geometry(problem, routes, Config(stages=1, parts=1), device)
    needed = max(mosaic_kernels.shared_bytes(geometry, backward=backward) for backward in (False, True))
    if needed > device.shared_memory:
        return (
            f"with {problem.states} states on {problem.height} x {problem.width} maps in {problem.dtype} a block would "
            f"need {needed} bytes of shared memory, and the GPU has {device.shared_memory}"
        )
    return None


def run(inputs: ScanInputs, routes: tuple[Route, ...]) -> jax.Array:
    """Scans the map along `routes` without keeping states: y (b, routes, h, w, d) in the dtype of `inputs.u`."""
    return _launch(_forward_of_images, routes, False)(*_in_kernel_dtypes(inputs))[0].astype(inputs.u.dtype)


def forward(inputs: ScanInputs, routes: tuple[Route, ...]) -> tuple[jax.Array, Residuals]:
    """Scans the map along `routes`: y (b, routes, h, w, d) in the dtype of `inputs.u`, and the residuals."""
    arrays = _in_kernel_dtypes(inputs)
    words = _words_to_keep(arrays, routes)
    y, states = _launch(_forward_of_images, routes, True)(*arrays, *words)
    return y.astype(inputs.u.dtype), Residuals(inputs, states, words)


def backward(residuals: Residuals, dy: jax.Array, routes: tuple[Route, ...]) -> ScanInputs:
    """The gradient of `forward` with respect to every input, given dy (b, routes, h, w, d)."""
    inputs, states, words = residuals
    arrays = _in_kernel_dtypes(inputs)
    gradient = _launch(_backward_of_images, routes)(*arrays, states, dy.astype(arrays.u.dtype), *words)
    du, ddelta, dB, dC, dA, dD, dbias = gradient
    *of_states, dD, dbias = _sum_over_images([*(dA[:, i] for i in range(dA.shape[1])), dD, dbias])
    gradients = ScanInputs(u=du, delta=ddelta, A=jnp.stack(of_states, axis=1), B=dB, C=dC, D=dD, delta_bias=dbias)
    return ScanInputs(*(g.astype(x.dtype) for g, x in zip(gradients, inputs, strict=True)))


def _words_to_keep(inputs: ScanInputs, routes: tuple[Route, ...]) -> tuple[jax.Array, ...]:
    """B and C as the kernels need them that keep a map in shared memory, if the backward may be such a one.

    The forward mostly needs them, too, so that one program of XLA's less runs. Whether they are kept must not depend on
    the number of images, of which on several devices each has a part: so they are if a single image would need them.
    Where nobody does in the end, XLA leaves them out, within a program.
    """
    problem = dataclasses.replace(Problem.of("backward", inputs, routes), batch=1)
    geometry = _geometry(problem, routes, Config(stages=1, parts=1), local_device())
    if mosaic_team.team_for(geometry, mosaic_lines.words_of(inputs), local_device()) is None:
        return ()
    return (mosaic_lines.packed(inputs),)


@functools.cache
def _launch(function: Callable[..., tuple[jax.Array, ...]], *options: Any) -> Callable[..., tuple[jax.Array, ...]]:
    return by_image(functools.partial(function, *options), shared=SHARED)


def _in_kernel_dtypes(inputs: ScanInputs) -> ScanInputs:
    u, delta = (x if x.dtype in (jnp.float32, jnp.bfloat16) else x.astype(jnp.float32) for x in inputs[:2])
    return inputs._replace(u=u, delta=delta)


def _forward_of_images(routes: tuple[Route, ...], save: bool, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """y, and with `save` the states; after the inputs, `arrays` may have what `_words_to_keep` found."""
    inputs, words = ScanInputs(*arrays[:7]), arrays[7:]
    problem = Problem.of("forward", inputs, routes)
    geometry = _geometry_here(problem, routes)
    alike = all(x.dtype == inputs.u.dtype for x in (inputs.delta, inputs.B, inputs.C))
    resident = alike and _stays_resident(problem, local_device())
    if _is_small(problem, geometry, local_device(), resident):
        y, *states = mosaic_small.scan(geometry, _small_operands(inputs, geometry), save=save)
        return (y[..., : inputs.u.shape[-1]], *states)
    if resident:
        lanes = geometry.channels + -geometry.channels % mosaic_resident.CHANNELS
        operands = _operands(inputs, geometry, _packed(inputs, words), lanes)
        y, *states = mosaic_resident.scan(geometry, operands, local_device(), save=save)
        return (y[..., : inputs.u.shape[-1]], *states)
    operands = _operands(inputs, geometry, _tiled(inputs, geometry), geometry.lanes)
    ends = mosaic_kernels.segment_ends(geometry, operands) if geometry.parts > 1 else None
    y, *states = mosaic_kernels.scan(geometry, operands, ends, save=save)
    return (y[..., : inputs.u.shape[-1]], *states)


def _packed(inputs: ScanInputs, words: Sequence[jax.Array]) -> jax.Array:
    return words[0] if words else mosaic_lines.packed(inputs)


def _is_small(problem: Problem, geometry: mosaic_block.Geometry, device: Device, resident: bool) -> bool:
    """Whether `mosaic_small` takes a problem: only if states are kept for as many channels as one of its blocks has."""
    return geometry.block == _BLOCK and _stays_small(problem, device, resident)


def _stays_small(problem: Problem, device: Device, resident: bool) -> bool:
    """Whether that kernel is to take a problem; `resident`: that `mosaic_resident` would."""
    supported = mosaic_small.supports(problem, device.shared_memory)
    return supported and (mosaic_small.faster(problem, device) or not resident)


def _stays_resident(problem: Problem, device: Device) -> bool:
    return mosaic_resident.supports(problem, device.shared_memory) and mosaic_resident.faster(problem, device)


def _backward_of_images(routes: tuple[Route, ...], *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """du, ddelta (b, h, w, d), dB, dC (b, h, w, n); dA (b, n, d), and the gradients of D and the bias (b, d)."""
    inputs = ScanInputs(*arrays[:7])
    states, dy, *words = arrays[7:]
    problem = Problem.of("backward", inputs, routes)
    geometry = _geometry_here(problem, routes)
    channels, dy = inputs.u.shape[-1], _fill_up(dy, geometry.channels)
    team = mosaic_team.team_for(geometry, mosaic_lines.words_of(inputs), local_device())
    if team is not None:
        lanes = geometry.channels + -geometry.channels % team.channels
        operands = _operands(inputs, geometry, _packed(inputs, words), lanes)
        du, ddelta, dBC, dA, dD, dbias = mosaic_resident_backward.scan_backward(geometry, team, operands, dy, states)
        dB, dC = mosaic_resident_backward.on_the_map(geometry, team, dBC)
        du, ddelta, dA, dD, dbias = (x[..., :channels] for x in (du, ddelta, dA[:, None], dD, dbias))
        return du, ddelta, dB, dC, dA, dD, dbias
    operands = _operands(inputs, geometry, _tiled(inputs, geometry), geometry.lanes)
    ends = later = None
    if geometry.parts > 1:
        ends = mosaic_kernels.segment_ends(geometry, operands)
        later = mosaic_kernels.later_segment_ends(geometry, operands, dy)
    du, ddelta, dBC, dparameters = mosaic_kernels.scan_backward(geometry, operands, dy, states, ends, later)
    du, ddelta = (_sum_over_routes(x)[..., :channels] for x in (du, ddelta))
    dB, dC = _sums_on_the_map(geometry, dBC)
    dparameters, n = jnp.sum(dparameters, axis=1)[..., :channels], problem.states
    return du, ddelta, dB, dC, dparameters[:, :n], dparameters[:, n], dparameters[:, n + 1]


def _geometry_here(problem: Problem, routes: tuple[Route, ...]) -> mosaic_block.Geometry:
    device = local_device()
    return _geometry(problem, routes, choose("mosaic", problem, device, heuristic), device)


def _geometry(problem: Problem, routes: tuple[Route, ...], config: Config, device: Device) -> mosaic_block.Geometry:
    route_tiles = tuple(tiles(route, problem.height, problem.width, _POSITIONS) for route in routes)
    channels = problem.channels + -problem.channels % _WORD
    geometry = mosaic_block.Geometry(
        routes=route_tiles,
        batch=problem.batch,
        height=problem.height,
        width=problem.width,
        channels=channels,
        block=_BLOCK,
        states=problem.states,
        stages=config.stages,
        parts=config.parts,
        dtype=jnp.dtype(problem.dtype),
        delta_dtype=jnp.dtype(problem.delta_dtype or problem.dtype),
    )
    # Pallas writes a box that is contiguous in memory as one piece, so that what reaches over the edge of the map or of
    # its channels would fall on what lies next. So choose blocks, and if need be channels, for which no such box is.
    choices = [
        dataclasses.replace(geometry, channels=channels, block=block)
        for channels, block in ((channels, _BLOCK), (channels, 2 * _BLOCK), (channels + _WORD, _BLOCK))
        if not any(_spills(route, problem.width, channels, block) for route in route_tiles)
    ]
    # More channels mean copies of the maps, but smaller blocks than twice as large ones. What is kept must not depend
    # on the direction or on the configuration, so neither must this.
    return next((choice for choice in choices if _fits(choice, device)), choices[-1])


def _fits(geometry: mosaic_block.Geometry, device: Device) -> bool:
    """Whether some configuration of the backward, which needs more than the forward, has room."""
    least = dataclasses.replace(geometry, stages=1, parts=1)
    return mosaic_kernels.shared_bytes(least, backward=True) <= device.shared_memory


def _spills(route: Tiles, width: int, channels: int, block: int) -> bool:
    """Whether boxes of a route reach over an edge and are contiguous in a map of so many channels."""
    if route.exact and channels % block == 0:
        return False
    expected = 1
    for size, stride in ((block, 1), (route.box[1], channels), (route.box[0], width * channels)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _operands(inputs: ScanInputs, geometry: mosaic_block.Geometry, BC: jax.Array, lanes: int) -> mosaic_block.Operands:
    """The maps pass as they are, unless channels do not fill words."""
    return mosaic_block.Operands(
        u=_fill_up(inputs.u, geometry.channels),
        delta=_fill_up(inputs.delta, geometry.channels),
        BC=BC,
        parameters=_parameters(inputs, lanes),
    )


def _small_operands(inputs: ScanInputs, geometry: mosaic_block.Geometry) -> mosaic_small.Operands:
    B, C = mosaic_small.flat(inputs.B, inputs.C)
    return mosaic_small.Operands(
        u=_fill_up(inputs.u, geometry.channels),
        delta=_fill_up(inputs.delta, geometry.channels),
        B=B,
        C=C,
        parameters=_parameters(inputs, geometry.lanes),
    )


def _parameters(inputs: ScanInputs, lanes: int) -> mosaic_block.Parameters:
    """As they are if their channels fill `lanes`, those of all blocks.

    Others are filled up together: a program of XLA's for each would take longer than it works.
    """
    parameters = [x.astype(jnp.float32) for x in (inputs.A.T, inputs.D[None], inputs.delta_bias[None])]
    if lanes > inputs.u.shape[-1]:
        parameters = [_fill_up(jnp.concatenate(parameters), lanes)] * 3
    return mosaic_block.Parameters(*parameters)


def _tiled(inputs: ScanInputs, geometry: mosaic_block.Geometry) -> jax.Array:
    """B and C as the tiles of all routes hold them: (b, tiles of the path, rows, 32), float32."""

    def along_path(x: jax.Array) -> jax.Array:
        tiled = [_to_tiles(x, route) for route in geometry.routes]
        return jnp.concatenate(
            [jnp.pad(x, ((0, 0), (0, 0), (0, geometry.positions - x.shape[2]), (0, 0))) for x in tiled], axis=1
        ).astype(jnp.float32)

    # Joined last: XLA then makes one program of it all.
    BC = jnp.concatenate([along_path(inputs.B), along_path(inputs.C)], axis=-1)
    BC = BC.reshape(*BC.shape[:2], -1)
    BC = jnp.pad(BC, ((0, 0), (0, 0), (0, geometry.packed - BC.shape[-1])))
    return BC.reshape(*BC.shape[:2], -1, mosaic_block.ROW)


def _fill_up(x: jax.Array, channels: int) -> jax.Array:
    missing = channels - x.shape[-1]
    return jnp.pad(x, (*((0, 0) for _ in x.shape[:-1]), (0, missing))) if missing else x


def _sum_over_routes(x: jax.Array) -> jax.Array:
    return x[:, 0] if x.shape[1] == 1 else jnp.sum(x, axis=1, dtype=jnp.float32).astype(x.dtype)


def _sum_over_images(xs: Sequence[jax.Array]) -> list[jax.Array]:
    """Sums of arrays (b, d), float32.

    On one device by a reduction of all at once, of which XLA makes one program. On several that would gather what each
    device has, and reduce it once more; the sum of a single array becomes an all-reduce.
    """
    if jax.device_count() > 1:
        return list(jnp.sum(jnp.stack(xs, axis=1), axis=0))
    zeros = [jnp.float32(0.0)] * len(xs)
    return list(lax.reduce(list(xs), zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (0,)))


def _sums_on_the_map(geometry: mosaic_block.Geometry, dBC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(b, blocks of channels, chunks of the path, n, sums) -> dB and dC (b, h, w, n), summed over blocks and routes.

    By indices, since XLA makes one program of all these, and several of reductions, slices and transpositions.
    """

    def on_the_map(of_C: bool) -> jax.Array:
        parts = []
        for route, first in zip(geometry.routes, geometry.first_chunk, strict=False):
            chunk, position = route.chunk_and_position(geometry.height, geometry.width)
            position = position + route.chunk if of_C else position
            parts += [
                dBC.at[:, block, first + chunk, :, position].get(mode="promise_in_bounds")
                for block in range(geometry.blocks)
            ]
        return jnp.moveaxis(functools.reduce(jnp.add, parts), 2, 0)

    return on_the_map(of_C=False), on_the_map(of_C=True)


def _to_tiles(x: jax.Array, route: Tiles) -> jax.Array:
    """(b, h, w, m) -> (b, tiles, positions, m): small arrays as a route's tiles hold them."""
    x = x if along_rows(route.route) else jnp.swapaxes(x, 1, 2)
    lines, length = -route.lines % route.depth, -route.length % route.span
    x = jnp.pad(x, ((0, 0), (0, lines), (0, length), (0, 0)))
    x = x.reshape(x.shape[0], -1, route.depth, route.pieces, route.span, x.shape[-1])
    return jnp.swapaxes(x, 2, 3).reshape(x.shape[0], route.count, route.positions, x.shape[-1])
