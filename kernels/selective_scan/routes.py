"""The four orders in which a scan can visit the positions of a map, and the arguments that every backend takes."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import numpy as np

Route = Literal["row", "row_reversed", "column", "column_reversed"]
"""`row` reads a map as text is read; `column` goes down each column, left to right; `_reversed` starts at the end."""

ROUTES: tuple[Route, ...] = get_args(Route)


class ScanInputs(NamedTuple):
    """What a backend receives: checked, complete, channels last.

    Shapes: b images, h rows, w columns, d channels, n states per channel. Dtypes: each array has the floating dtype in
    which the caller gave it; a backend converts to what it computes in.
    """

    u: jax.Array  # (b, h, w, d)
    delta: jax.Array  # (b, h, w, d), before the bias and the softplus
    A: jax.Array  # (d, n)
    B: jax.Array  # (b, h, w, n)
    C: jax.Array  # (b, h, w, n)
    D: jax.Array  # (d,)
    delta_bias: jax.Array  # (d,)


SHARED = tuple(ScanInputs._fields.index(name) for name in ("A", "D", "delta_bias"))
"""Positions in `ScanInputs` of what belongs to all images."""


def along_rows(route: Route) -> bool:
    """Whether consecutive positions of `route` are neighbours in a row (otherwise in a column)."""
    return route in ("row", "row_reversed")


def is_reversed(route: Route) -> bool:
    """Whether `route` starts at the map's last position."""
    return route in ("row_reversed", "column_reversed")


def visiting_order(route: Route, height: int, width: int) -> np.ndarray:
    """Flat row-major positions (height * width,) in the order in which `route` visits them."""
    positions = np.arange(height * width).reshape(height, width)
    order = (positions if along_rows(route) else positions.T).reshape(-1)
    return order[::-1] if is_reversed(route) else order
