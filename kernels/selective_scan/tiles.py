"""How a GPU kernel cuts a map into boxes that hold consecutive positions of a route.

A line is a row of the map for a row route, a column for a column route. A tile is what is copied at once: some whole
lines where lines are short, a piece of one line where they are long. It is walked in chunks, whose positions are
unrolled and before each of which the state is kept for the backward. Tiles may reach over the map's edge: positions
outside must be passed over.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from msvmamba_jax.kernels.selective_scan.routes import Route, along_rows, is_reversed

LONGEST_CHUNK = 16
"""Positions whose states fit in registers."""

ACROSS: dict[Route, Route] = {
    "row": "column",
    "row_reversed": "column_reversed",
    "column": "row",
    "column_reversed": "row_reversed",
}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of one route, numbered as they lie on the map (not as they are visited).

    Tiles, chunks of a tile and positions of a tile are counted along the unreversed route.

    Attributes:
        route: the order of travel.
        length: positions of a line.
        lines: lines of the map.
        span: positions of a line that a tile holds; more than one line only if it holds lines whole.
        depth: lines that a tile holds.
        chunk: positions of a chunk; it divides `span`.
    """

    route: Route
    length: int
    lines: int
    span: int
    depth: int
    chunk: int

    @property
    def positions(self) -> int:
        """Of a tile."""
        return self.span * self.depth

    @property
    def chunks(self) -> int:
        """Of a tile."""
        return self.positions // self.chunk

    @property
    def pieces(self) -> int:
        """Tiles that a line is cut into."""
        return -(-self.length // self.span)

    @property
    def count(self) -> int:
        """Tiles of the map."""
        return self.pieces * -(-self.lines // self.depth)

    @property
    def box(self) -> tuple[int, int]:
        """(rows, columns) of a tile."""
        return (self.depth, self.span) if along_rows(self.route) else (self.span, self.depth)

    @property
    def reversed(self) -> bool:
        """Whether the route starts at the map's end."""
        return is_reversed(self.route)

    @property
    def exact(self) -> bool:
        """Whether no tile reaches over the edge of the map."""
        return self.length % self.span == 0 and self.lines % self.depth == 0

    def corner(self, tile: int) -> tuple[int, int]:
        """First (row, column) of a tile; `tile` may be a scalar inside a kernel, as below."""
        line, along = tile // self.pieces * self.depth, tile % self.pieces * self.span
        return (line, along) if along_rows(self.route) else (along, line)

    def place(self, position: int) -> int:
        """Where a position of a tile lies in its box, read row by row."""
        if along_rows(self.route):
            return position
        return position % self.span * self.depth + position // self.span

    def chunk_and_position(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """For each place of the map (h, w), the number of its chunk on the route, and its position in that chunk."""
        row, column = np.indices((height, width))
        line, along = (row, column) if along_rows(self.route) else (column, row)
        tile = line // self.depth * self.pieces + along // self.span
        position = line % self.depth * self.span + along % self.span
        return tile * self.chunks + position // self.chunk, position % self.chunk

    def inside(self, tile: int, position: int) -> bool:
        """Whether a position of a tile lies on the map."""
        line, along = tile // self.pieces * self.depth, tile % self.pieces * self.span
        return (along + position % self.span < self.length) & (line + position // self.span < self.lines)


def tiles(route: Route, height: int, width: int, target: int) -> Tiles:
    """Tiles of about `target` positions, at least two, that hold as few positions outside the map as possible."""
    length, lines = (width, height) if along_rows(route) else (height, width)
    if length == 1:  # such lines in a row are one line across
        length, lines = lines, length
        route = ACROSS[route]
    span = max(2, _span(length, target)) if lines == 1 else _span(length, target)
    depth = min(lines, max(1, target // span)) if span >= length else 1
    depth = -(-lines // -(-lines // depth))  # as many tiles, more evenly filled
    return Tiles(route, length, lines, span, depth, chunk=span // -(-span // LONGEST_CHUNK))


def _span(length: int, target: int) -> int:
    """Size of the equal pieces that cover a line: the least waste, then the largest."""
    if length <= LONGEST_CHUNK:
        return length
    in_chunks = [size for size in range(LONGEST_CHUNK // 2, max(target, LONGEST_CHUNK) + 1) if _whole_chunks(size)]
    return min(in_chunks, key=lambda size: (-(-length // size) * size, -size))


def _whole_chunks(size: int) -> bool:
    return size % -(-size // LONGEST_CHUNK) == 0
