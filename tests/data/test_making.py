"""Work in many processes returns in the order of the jobs; previews are tiled row by row."""

from __future__ import annotations

import numpy as np
from PIL import Image

from msvmamba_jax.data.making import contact_sheet, run


def test_results_come_in_order() -> None:
    jobs = [range(3_000_000)] * 8 + [range(number) for number in range(9)]  # the second chunk is done first
    assert run(sum, jobs, processes=2) == [sum(job) for job in jobs]


def test_tiles_of_a_preview_by_hand() -> None:
    tiles = [Image.new("RGB", size, colour) for size, colour in (((3, 2), "red"), ((2, 4), "lime"), ((1, 1), "blue"))]
    expected = np.full((11, 9, 3), 255)  # two rows of cells of 3 x 4 pixels, with one pixel around each
    expected[1:3, 1:4] = 255, 0, 0
    expected[1:5, 5:7] = 0, 255, 0
    expected[6, 1] = 0, 0, 255
    np.testing.assert_array_equal(np.asarray(contact_sheet(tiles, columns=2, gap=1)), expected)
