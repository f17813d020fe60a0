"""Instance masks: compact ground truth, targets of the mask head, and masks put back on the image.

**The contract for ground truth.** An image's instances come as bits, uint8 (g, height, ceil(width / 8)): what
`numpy.packbits(masks, axis=-1)` makes of boolean masks (g, height, width) at the size of the (resized, padded) image.
No detail is lost, and an instance at 800 x 1344 takes 134 KB. Every g compiles anew: pad with zeros to one of a few.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from msvmamba_jax.models.detection.boxes import clip
from msvmamba_jax.models.detection.roi_align import axis_weights, sampling_grid

MASK_SIZE = 28  # rows and columns of the mask head's output
CHUNK = 8  # masks that are unpacked at a time
ROUNDING = 2e-5  # more than means in float32 are off


def pack_masks(masks: np.ndarray) -> np.ndarray:
    """Boolean masks (..., height, width) -> bits (..., height, ceil(width / 8)), uint8, the first column highest."""
    return np.packbits(np.asarray(masks, bool), axis=-1)


def unpack_masks(bits: jax.Array, width: int) -> jax.Array:
    """The inverse of `pack_masks`: (..., height, ceil(width / 8)), uint8 -> (..., height, width), bool."""
    shifts = jnp.arange(7, -1, -1, dtype=jnp.uint8)
    unpacked = (bits[..., None] >> shifts) & 1
    return unpacked.reshape(*bits.shape[:-1], -1)[..., :width].astype(bool)


@jax.named_scope("mask_targets")
def mask_targets(
    bits: jax.Array, boxes: jax.Array, truth: jax.Array, image_size: jax.Array, size: int = MASK_SIZE
) -> jax.Array:
    """What the mask head shall predict for each box (Mask R-CNN, arXiv:1703.06870, section 3.1).

    The ground-truth mask is averaged over size x size bins of the box as RoIAlign does (adaptive sampling), at the
    image's resolution; a bin of at least one half is foreground. One half means one half: what rounding takes from an
    exact tie is given back, so that devices agree.

    Args:
        bits: masks of one image (g, height, ceil(width / 8)), uint8, see the top of this file.
        boxes: proposals (n, 4), in pixels of the same image; what lies outside of it is cut off.
        truth: (n,), int32, the ground truth that each box is assigned to, from 0 to g - 1.
        image_size: (2,), int, height and width of the image with its own padding (see `anchors.padded_size`), at most
            those of the masks. Beyond, the masks do not exist; padding counts as background.
        size: bins along each axis.

    Returns:
        (n, size, size), bool.
    """
    height, width = bits.shape[1], 8 * bits.shape[2]
    boxes = clip(lax.stop_gradient(boxes), image_size)
    valid_height, valid_width = image_size
    rows, columns = jnp.arange(height, dtype=boxes.dtype), jnp.arange(width, dtype=boxes.dtype)

    def target(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        box, index = inputs
        vertical = axis_weights(sampling_grid(box[1], box[3], 1.0, valid_height, size), rows, size)
        horizontal = axis_weights(sampling_grid(box[0], box[2], 1.0, valid_width, size), columns, size)
        mask = unpack_masks(bits[index], width).astype(boxes.dtype)
        product = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)  # noqa: E731
        return product(vertical, product(mask, horizontal.T)) >= 0.5 - ROUNDING

    return lax.map(target, (boxes, truth), batch_size=CHUNK)


def paste_masks(
    probabilities: np.ndarray, boxes: np.ndarray, height: int, width: int, threshold: float = 0.5
) -> np.ndarray:
    """Masks of detections on their image (Mask R-CNN, arXiv:1703.06870, section 3.1, inference), on the host.

    Each mask is stretched over its box bilinearly; outside the mask counts as 0. Pixels of at least `threshold` are
    foreground. NumPy, since images differ in size, and only where the box is: time is proportional to the boxes' areas.

    Args:
        probabilities: (n, size, size), float32.
        boxes: (n, 4), float32, in pixels of that image.
        height, width: of the image.
        threshold: probability from which a pixel belongs to the instance.

    Returns:
        (n, height, width), bool.
    """
    masks = np.zeros((len(probabilities), height, width), bool)
    for mask, probability, (x1, y1, x2, y2) in zip(masks, probabilities, np.asarray(boxes, np.float32), strict=True):
        size = probability.shape[0]
        top, rows = _stretch(y1, y2, size, height)
        left, columns = _stretch(x1, x2, size, width)
        window = rows @ probability.astype(np.float32) @ columns.T
        mask[top : top + len(rows), left : left + len(columns)] = window >= threshold
    return masks


def _stretch(low: np.float32, high: np.float32, size: int, pixels: int) -> tuple[int, np.ndarray]:
    """The first pixel that `size` cells from `low` to `high` reach, and the weights (m, size) of it and the next."""
    cell = (high - low) / size
    if not (np.isfinite(cell) and cell > 0.0):
        return 0, np.zeros((0, size), np.float32)
    first = int(np.clip(np.floor(low - cell), 0, pixels))
    last = int(np.clip(np.ceil(high + cell), first, pixels))
    centre = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    place = ((centre - low) / (high - low) * 2 - 1 + 1) * np.float32(size / 2) - np.float32(0.5)
    return first, np.maximum(1 - np.abs(place[:, None] - np.arange(size, dtype=np.float32)), 0).astype(np.float32)
