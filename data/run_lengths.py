"""Masks as COCO writes them: the lengths of their runs, column by column."""

from __future__ import annotations

import numpy as np


def run_lengths(mask: np.ndarray) -> list[int]:
    """The runs of a mask, down the first column, the second and so on: COCO's uncompressed run-length encoding.

    Only the box around the mask is looked at closely: for small ones this takes a fraction of the time of
    `pycocotools.mask.encode`.

    Args:
        mask: bool (height, width).

    Returns:
        Lengths of the runs, of False and True in turn; the first, of False, can be 0, all others are not.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [height * width]
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    window = np.zeros((right - left, bottom - top + 2), np.int8)  # a column's end is the end of a run, for now
    window[:, 1:-1] = mask[top:bottom, left:right].T
    column, row = np.nonzero(np.diff(window, axis=1))
    edges = (left + column) * height + top + row  # where runs of True begin and end, in turn
    # A run down to the last row goes on in the first one of the next column.
    apart = edges[1:-1:2] != edges[2::2]
    kept = np.concatenate([[True], apart.repeat(2), [True]])
    lengths = np.diff(edges[kept], prepend=0, append=height * width).tolist()
    return lengths if lengths[-1] else lengths[:-1]
