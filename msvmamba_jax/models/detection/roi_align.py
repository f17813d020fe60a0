"""RoIAlign (Mask R-CNN, arXiv:1703.06870, section 3) over a feature pyramid: exact, with static shapes.

A region is divided into bins x bins cells of a grid; each bin is the mean over ceil(bin height) x ceil(bin width)
points, and each point is interpolated bilinearly between four positions of the map. So the number of points depends on
the region. But points are a product of two axes, and so are bilinear weights: with a matrix of weights for each axis,

    region[p, q] = sum over y, x of  rows[p, y] * columns[q, x] * map[y, x]

without approximation, where only the window of positions under the region counts. The window is read as a list of
positions, in pieces of 256; a piece is one gather and one matrix product (bins^2 x 256) (256 x channels). Regions with
equally many pieces are worked on together, so that the cost follows the windows' areas, and memory does not grow with
them. A position is an index into all levels of all images at once: no level is computed for a region that is not on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from msvmamba_jax.kernels.selective_scan.partitioning import by_image, vary_alike
from msvmamba_jax.models.depthwise import accumulator_dtype

PIECE = 256  # positions in one matrix product
GROUP = 128  # regions worked on together
FINEST_SIZE = 56  # a region of twice this side is the first of the second level


def region_levels(boxes: jax.Array, levels: int = 4) -> jax.Array:
    """The pyramid level (...,), int32, for each box (..., 4): FPN (arXiv:1612.03144), equation 1.

    floor(log2(sqrt(width * height) / 56)), limited to 0 .. levels - 1.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    side = jnp.sqrt(jnp.maximum(size[..., 0] * size[..., 1], 0.0))
    return jnp.clip(jnp.floor(jnp.log2(side / FINEST_SIZE + 1e-6)), 0, levels - 1).astype(jnp.int32)


@jax.named_scope("roi_align")
def roi_align(
    pyramid: Sequence[jax.Array],
    boxes: jax.Array,
    *,
    strides: Sequence[int],
    bins: int,
    levels: jax.Array | None = None,
) -> jax.Array:
    """Features of regions, with half-pixel centres ("aligned") and adaptive sampling.

    Differentiable with respect to the maps; boxes get no gradient. A region of no width or height gives zeros. Products
    are taken in the maps' dtype and summed in float32. On a GPU the gradient's sums over regions that share positions
    come in no fixed order, so its last bits may differ from run to run.

    Args:
        pyramid: maps (b, h_i, w_i, c), finest first.
        boxes: (b, r, 4), in pixels; may lie anywhere.
        strides: pixels between neighbouring positions of each map.
        bins: cells of the grid along each axis.
        levels: (b, r), int32, the map that each region is read from; None: by its size, see `region_levels`.

    Returns:
        (b, r, bins, bins, c), in the dtype of the maps.
    """
    boxes = lax.stop_gradient(boxes)
    if levels is None:
        levels = region_levels(boxes, len(pyramid))
    layout = _Layout(tuple((x.shape[1], x.shape[2]) for x in pyramid), tuple(strides), bins)
    positions = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in pyramid], axis=1)
    return _align(layout, positions, boxes, levels)


class Grid(NamedTuple):
    """One axis of regions' sampling points, in positions of their map; all (...,) float32.

    Attributes:
        start: where the first bin begins.
        bin: length of a bin.
        samples: points in a bin, a whole number; 0 where the region has no length.
        size: positions of the map.
    """

    start: jax.Array
    bin: jax.Array
    samples: jax.Array
    size: jax.Array


def sampling_grid(low: jax.Array, high: jax.Array, scale: jax.Array | float, size: jax.Array | int, bins: int) -> Grid:
    """The points along one axis of regions from `low` to `high` (...,) pixels on maps of `scale` positions a pixel."""
    start, end = low * scale - 0.5, high * scale - 0.5
    length = end - start
    return Grid(start, length / bins, jnp.ceil(length / bins), jnp.asarray(size, low.dtype))


def axis_weights(grid: Grid, position: jax.Array, bins: int) -> jax.Array:
    """How much positions of the map count in each bin: the mean over its points of their bilinear weights.

    A point less than one position outside the map is moved to its edge, one further out counts as zero. Of a position,
    the points within distance 1 matter. Where a bin has two or more they are more than 1/2 apart, so these are at
    most four, found without looking at the others; one more on each side allows for rounding.

    Args:
        grid: of regions (...,).
        position: (..., k), float32, whole numbers.
        bins: bins of the axis.

    Returns:
        (..., bins, k), float32.
    """
    start, length, samples, size = (jnp.asarray(x)[..., None, None] for x in grid)
    position = position[..., None, :]
    begin = start + jnp.arange(bins, dtype=length.dtype)[:, None] * length
    spacing = length / jnp.maximum(samples, 1.0)
    offset = (position - 1.0 - begin) / jnp.where(samples > 0.0, spacing, 1.0) - 0.5
    first = jnp.maximum(jnp.ceil(offset) - 1.0, 0.0)
    total = jnp.zeros(())
    for step in range(6):
        index = first + step
        point = begin + (index + 0.5) * spacing
        weight = jnp.maximum(1.0 - jnp.abs(jnp.clip(point, 0.0, size - 1.0) - position), 0.0)
        total += jnp.where((index < samples) & (point >= -1.0) & (point <= size), weight, 0.0)
    return total / jnp.maximum(samples, 1.0)


class _Layout(NamedTuple):
    """What is known when tracing: rows and columns of each map, their strides, bins."""

    sizes: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    bins: int

    @property
    def positions(self) -> int:
        return sum(height * width for height, width in self.sizes)


class _Windows(NamedTuple):
    """The positions under n regions, row by row.

    Attributes:
        rows, columns: the grids (n,).
        top, left: first row and column (n,), int32, of the window.
        width: its columns (n,), int32.
        positions: their number (n,), int32, in it.
        base: index (n,), int32, of position (0, 0) of the region's map.
        stride: positions (n,), int32, in a row of the map.
    """

    rows: Grid
    columns: Grid
    top: jax.Array
    left: jax.Array
    width: jax.Array
    positions: jax.Array
    base: jax.Array
    stride: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _align(layout: _Layout, positions: jax.Array, boxes: jax.Array, levels: jax.Array) -> jax.Array:
    """positions (b, all levels' positions, c), boxes (b, r, 4), levels (b, r) -> (b, r, bins, bins, c)."""
    (regions,) = _forward(layout)(positions, boxes, levels)
    return regions


def _align_forward(
    layout: _Layout, positions: jax.Array, boxes: jax.Array, levels: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _align(layout, positions, boxes, levels), (boxes, levels)


def _align_backward(
    layout: _Layout, residuals: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    boxes, levels = residuals
    (positions,) = _backward(layout)(gradient, boxes, levels)
    return positions, jnp.zeros_like(boxes), None


_align.defvjp(_align_forward, _align_backward)


@functools.cache
def _forward(layout: _Layout) -> Callable[..., tuple[jax.Array, ...]]:
    return by_image(functools.partial(_regions, layout), shared=())


@functools.cache
def _backward(layout: _Layout) -> Callable[..., tuple[jax.Array, ...]]:
    return by_image(functools.partial(_gradient, layout), shared=())


def _regions(layout: _Layout, positions: jax.Array, boxes: jax.Array, levels: jax.Array) -> tuple[jax.Array]:
    channels, cells = positions.shape[-1], layout.bins**2
    flat = positions.reshape(-1, channels)

    def group(windows: _Windows) -> jax.Array:
        axes = _axes(layout, windows)

        def add(piece: jax.Array, total: jax.Array) -> jax.Array:
            place, _ = _places(windows, piece)
            return total + _product("nbk,nkc->nbc", _weights(windows, axes, piece), flat[place])

        start = jnp.zeros((*windows.base.shape, cells, channels), accumulator_dtype(flat.dtype))
        start, _ = vary_alike((start, flat))
        return lax.fori_loop(0, _pieces(windows), add, start).astype(flat.dtype)

    order, windows = _grouped_windows(layout, boxes, levels)
    regions = lax.map(group, windows).reshape(-1, cells, channels)
    # Back into the order in which the regions came.
    ordered = jnp.zeros((levels.size, cells, channels), flat.dtype)
    ordered = ordered.at[order[: levels.size]].set(regions[: levels.size], unique_indices=True)
    return (ordered.reshape(*levels.shape, layout.bins, layout.bins, channels),)


def _gradient(layout: _Layout, gradient: jax.Array, boxes: jax.Array, levels: jax.Array) -> tuple[jax.Array]:
    """The gradient of `positions`; positions under several regions collect from all of them."""
    channels, cells = gradient.shape[-1], layout.bins**2
    gradient = gradient.reshape(-1, cells, channels)

    def group(total: jax.Array, work: tuple[jax.Array, _Windows]) -> tuple[jax.Array, None]:
        order, windows = work
        own, axes = gradient.at[order].get(mode="fill", fill_value=0), _axes(layout, windows)

        def add(piece: jax.Array, total: jax.Array) -> jax.Array:
            place, inside = _places(windows, piece)
            place = jnp.where(inside, place, total.shape[0])  # beyond the end, where nothing is added
            return total.at[place].add(_product("nbk,nbc->nkc", _weights(windows, axes, piece), own), mode="drop")

        return lax.fori_loop(0, _pieces(windows), add, total), None

    order, windows = _grouped_windows(layout, boxes, levels)
    start = jnp.zeros((levels.shape[0] * layout.positions, channels), accumulator_dtype(gradient.dtype))
    start, _ = vary_alike((start, gradient))
    total, _ = lax.scan(group, start, (order.reshape(windows.base.shape), windows))
    return (total.astype(gradient.dtype).reshape(levels.shape[0], layout.positions, channels),)


def _grouped_windows(layout: _Layout, boxes: jax.Array, levels: jax.Array) -> tuple[jax.Array, _Windows]:
    """Regions (b, r) by falling area of their windows, in groups: their order (n,), and windows (groups, group).

    Empty places are filled up with regions of no positions, whose order is beyond the last region.
    """
    windows = _windows(layout, boxes, levels)
    regions = windows.positions.size
    order = jnp.argsort(windows.positions, descending=True).astype(jnp.int32)
    group = min(GROUP, regions)
    padding = -regions % group
    windows = jax.tree.map(lambda x: jnp.pad(x[order], (0, padding)).reshape(-1, group), windows)
    return jnp.pad(order, (0, padding), constant_values=regions), windows


def _windows(layout: _Layout, boxes: jax.Array, levels: jax.Array) -> _Windows:
    heights, widths = np.asarray(layout.sizes, np.int32).T
    bases = np.cumsum([0, *(heights * widths)[:-1]], dtype=np.int32)
    image = jnp.arange(boxes.shape[0], dtype=jnp.int32)[:, None] * layout.positions
    base = (image + jnp.asarray(bases)[levels]).reshape(-1)
    boxes, levels = boxes.reshape(-1, 4), levels.reshape(-1)
    stride = jnp.asarray(widths)[levels]
    scale = jnp.asarray([1.0 / s for s in layout.strides], boxes.dtype)[levels]
    rows = sampling_grid(boxes[:, 1], boxes[:, 3], scale, jnp.asarray(heights)[levels], layout.bins)
    columns = sampling_grid(boxes[:, 0], boxes[:, 2], scale, stride, layout.bins)
    top, height = _window(rows, layout.bins)
    left, width = _window(columns, layout.bins)
    return _Windows(rows, columns, top, left, width, height * width, base, stride)


def _window(grid: Grid, bins: int) -> tuple[jax.Array, jax.Array]:
    """The first position and the number of positions that points of an axis may touch; int32."""
    last = grid.size - 1.0
    low = jnp.clip(jnp.floor(grid.start), 0.0, last)
    high = jnp.clip(jnp.floor(grid.start + bins * grid.bin) + 1.0, 0.0, last)
    return low.astype(jnp.int32), jnp.where(grid.samples > 0.0, high - low + 1.0, 0.0).astype(jnp.int32)


def _pieces(windows: _Windows) -> jax.Array:
    return jnp.max((windows.positions + PIECE - 1) // PIECE)


def _axes(layout: _Layout, windows: _Windows) -> tuple[jax.Array, jax.Array]:
    """The weights of all rows (n, bins, rows of the largest map) and of all columns (n, bins, columns)."""
    height, width = np.asarray(layout.sizes).max(0)
    dtype = windows.rows.start.dtype
    rows, columns = (jnp.broadcast_to(jnp.arange(size, dtype=dtype), (1, size)) for size in (height, width))
    return axis_weights(windows.rows, rows, layout.bins), axis_weights(windows.columns, columns, layout.bins)


def _row_and_column(windows: _Windows, piece: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the positions (n, 256) of one piece of each window, int32, and which places are not behind the window's end.

    Behind it, the window's last position is repeated.
    """
    place, end = piece * PIECE + jnp.arange(PIECE, dtype=jnp.int32), windows.positions[:, None]
    row, column = jnp.divmod(jnp.clip(place, 0, jnp.maximum(end - 1, 0)), jnp.maximum(windows.width, 1)[:, None])
    return row + windows.top[:, None], column + windows.left[:, None], place < end


def _places(windows: _Windows, piece: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where a piece's positions (n, 256), int32, are among all levels and images, and which are in the window."""
    row, column, inside = _row_and_column(windows, piece)
    return windows.base[:, None] + row * windows.stride[:, None] + column, inside


def _weights(windows: _Windows, axes: tuple[jax.Array, jax.Array], piece: jax.Array) -> jax.Array:
    """Weights (n, bins^2, 256), float32, of a piece's positions in each bin; 0 behind the window's end."""
    row, column, inside = _row_and_column(windows, piece)
    rows = jnp.take_along_axis(axes[0], row[:, None], axis=2)
    columns = jnp.take_along_axis(axes[1], column[:, None], axis=2)
    weights = rows[:, :, None] * jnp.where(inside[:, None], columns, 0.0)[:, None]
    return weights.reshape(weights.shape[0], -1, PIECE)


def _product(equation: str, weights: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.einsum(
        equation,
        weights.astype(values.dtype),
        values,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=accumulator_dtype(values.dtype),
    )
