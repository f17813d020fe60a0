"""Masks: as bits, as targets, and on the image again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from region_points import weights_by_loop

from msvmamba_jax.models.detection import masks as module
from msvmamba_jax.models.detection.masks import pack_masks, paste_masks, unpack_masks


@pytest.mark.parametrize("width", [1, 8, 13, 64])
def test_bits_are_exact(width):
    masks = np.random.default_rng(width).random((3, 5, width)) < 0.5
    packed = bits(masks)
    assert (packed.shape, packed.dtype) == ((3, 5, -(-width // 8)), jnp.uint8)
    np.testing.assert_array_equal(unpack_masks(packed, width), masks)


mask_targets = jax.jit(module.mask_targets)


def bits(masks: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(pack_masks(masks))


def exact_means(mask: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Mean of each of 28 x 28 bins of a box, in float64."""
    height, width = mask.shape
    x1, y1, x2, y2 = np.clip(box.astype(np.float64), 0, [width, height, width, height])
    rows, columns = weights_by_loop(y1, y2, 1, height, 28), weights_by_loop(x1, x2, 1, width, 28)
    return rows @ mask @ columns.T


class TestTargets:
    def test_as_recorded(self, recorded):
        """All bins but ties: where the mean is exactly one half, what was recorded depends on an order of summation.

        There are 55, all in one box, of which 54 were recorded as foreground.
        """
        masks, boxes, truth = (recorded[f"mask_target/{name}"] for name in ("masks", "boxes", "inds"))
        found = mask_targets(bits(masks), jnp.asarray(boxes), jnp.asarray(truth, jnp.int32), jnp.asarray([48, 64]))
        reference = recorded["mask_target/out"].astype(bool)
        ties = np.stack([np.abs(exact_means(masks[i], box) - 0.5) < 1e-9 for i, box in zip(truth, boxes, strict=True)])
        np.testing.assert_array_equal(np.asarray(found)[~ties], reference[~ties])
        assert ties.sum() == 55
        assert np.asarray(found)[ties].all()
        assert reference[ties].sum() == 54

    def test_random_boxes(self, random_boxes):
        rng = np.random.default_rng(0)
        y, x = np.mgrid[:70, :90]
        masks = np.stack([(x - 40) ** 2 + 2 * (y - 30) ** 2 < 900, x + y > 80, (x // 7 + y // 5) % 2 == 0])
        boxes = np.clip(random_boxes(rng, 30, size=80), 0, [90, 70, 90, 70]).astype(np.float32)
        truth = rng.integers(0, 3, 30)
        found = mask_targets(bits(masks), jnp.asarray(boxes), jnp.asarray(truth), jnp.asarray([70, 90]))
        for target, box, index in zip(found, boxes, truth, strict=True):
            exact = exact_means(masks[index], box)
            clear = np.abs(exact - 0.5) > 1e-4
            np.testing.assert_array_equal(np.asarray(target)[clear], (exact >= 0.5)[clear])

    def test_padding_changes_nothing(self):
        masks = np.random.default_rng(1).random((2, 40, 48)) < 0.7
        boxes, truth = jnp.asarray([[3.0, 4.0, 44.0, 39.0], [0.0, 0.0, 48.0, 40.0]]), jnp.asarray([1, 0])
        padded, size = np.pad(masks, ((0, 3), (0, 24), (0, 17)), constant_values=True), jnp.asarray([40, 48])
        expected = mask_targets(bits(masks), boxes, truth, size)
        np.testing.assert_array_equal(mask_targets(bits(padded), boxes, truth, size), expected)


class TestPasting:
    @pytest.mark.parametrize("kind", ["paste", "paste_scaled"])
    def test_as_recorded(self, recorded, kind, largest_error):
        logits, labels = recorded["paste/logits"], recorded["paste/labels"]
        probabilities = 1 / (1 + np.exp(-logits[np.arange(len(labels)), labels]))
        boxes = recorded[f"{kind}/boxes"]
        if kind == "paste_scaled":
            boxes = boxes / np.tile(recorded["paste_scaled/scale_factor"], 2)
            assert largest_error(boxes, recorded["paste_scaled/boxes_after"]) < 1e-5
        _, height, width = recorded["paste/shape"]
        reference = np.unpackbits(recorded[f"{kind}/masks"], axis=-1)[..., :width].astype(bool)
        assert reference.any((1, 2)).sum() == 5  # the smallest box covers no pixel's centre with foreground
        np.testing.assert_array_equal(paste_masks(probabilities, boxes, height, width), reference)

    def test_by_hand(self):
        """A mask whose left half is foreground, over 8 pixels: 4 of them; the image's edge cuts the box."""
        probabilities = np.tile(np.where(np.arange(28) < 14, 0.9, 0.1), (28, 1))[None].astype(np.float32)
        [mask] = paste_masks(probabilities, np.asarray([[2.0, 5.0, 10.0, 13.0]]), 10, 12)
        expected = np.zeros((10, 12), bool)
        expected[5:, 2:6] = True
        np.testing.assert_array_equal(mask, expected)

    def test_degenerate_boxes_are_empty(self):
        boxes = np.asarray(
            [[5.0, 5.0, 5.0, 9.0], [9.0, 9.0, 5.0, 5.0], [50.0, 50.0, 60.0, 60.0], [-9.0, -9.0, -5.0, -5.0]]
        )
        assert not paste_masks(np.ones((4, 28, 28), np.float32), boxes, 20, 20).any()
