"""RoIAlign over a pyramid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from region_points import weights_by_loop

from msvmamba_jax.models.detection import roi_align as module
from msvmamba_jax.models.detection.roi_align import region_levels, sampling_grid

roi_align = jax.jit(module.roi_align, static_argnames=("strides", "bins"))
axis_weights = jax.jit(module.axis_weights, static_argnames="bins")


def test_levels_as_recorded(recorded):
    rois, levels = recorded["levels/rois"], recorded["levels/level"]
    assert set(levels) == {0, 1, 2, 3}
    np.testing.assert_array_equal(region_levels(jnp.asarray(rois[:, 1:])), levels)


def test_levels_by_hand():
    """A level ends at twice 56 pixels, and each next one at twice that; what has no area is on the finest."""
    boxes = jnp.asarray(
        [[0, 0, 111, 111], [0, 0, 112, 112], [0, 0, 56, 448], [9, 9, 9, 9], [0, 0, 9000, 9000], [5, 5, 2, 9]]
    )
    np.testing.assert_array_equal(region_levels(boxes.astype(jnp.float32)), [0, 1, 1, 0, 3, 0])


@pytest.mark.parametrize("bins", [7, 14])
def test_as_recorded(recorded, largest_error, bins):
    maps = jnp.asarray(recorded["roialign/feat"]).transpose(0, 2, 3, 1)
    rois = recorded["roialign/rois"]
    # Every region on both images, then those of its own.
    boxes = jnp.broadcast_to(jnp.asarray(rois[:, 1:]), (2, len(rois), 4))
    levels = jnp.zeros(boxes.shape[:2], jnp.int32)
    found = roi_align([maps], boxes, strides=(4,), bins=bins, levels=levels)
    found = found[rois[:, 0].astype(int), np.arange(len(rois))].transpose(0, 3, 1, 2)
    assert largest_error(found, recorded[f"roialign/out{bins}"]) < 1e-5


def dense(pyramid, boxes, levels, strides, bins, weights=weights_by_loop) -> np.ndarray:
    """One region after the other, with its whole map, in float64."""
    found = np.zeros((*levels.shape, bins, bins, pyramid[0].shape[-1]))
    for image, region in np.ndindex(levels.shape):
        level, (x1, y1, x2, y2) = levels[image, region], boxes[image, region].astype(np.float64)
        own, scale = np.asarray(pyramid[level][image], np.float64), 1 / strides[level]
        rows, columns = (weights(*ends, scale, n, bins) for ends, n in (((y1, y2), len(own)), ((x1, x2), len(own[0]))))
        found[image, region] = np.einsum("py,qx,yxc->pqc", rows, columns, own)
    return found


AXES = {
    "inside": (3.3, 17.9),
    "across the lower end": (-9.0, 5.0),
    "across the upper end": (20.0, 60.0),
    "around all": (-50.0, 90.0),
    "outside": (-30.0, -10.0),
    "just outside": (-6.5, -2.1),
    "empty": (7.0, 7.0),
    "thin": (7.0, 7.05),
    "whole": (0.0, 30.0),
    "inside out": (9.0, 4.0),
}


@pytest.mark.parametrize("bins", [1, 7, 14])
@pytest.mark.parametrize("name", AXES)
def test_weights_of_an_axis(name, bins):
    for scale, size in ((1.0, 30), (0.25, 8), (0.37, 12)):
        grid = sampling_grid(*(jnp.float32(x) for x in AXES[name]), scale, size, bins)
        found = axis_weights(grid, jnp.arange(size, dtype=jnp.float32), bins=bins)
        np.testing.assert_allclose(found, weights_by_loop(*AXES[name], scale, size, bins), atol=3e-6)


@pytest.mark.parametrize("seed", range(20))
def test_weights_of_random_axes(seed):
    """Sizes over five decades: from far below a position for a bin to hundreds."""
    rng = np.random.default_rng(seed)
    low, length, size = rng.uniform(-20, 60), 10 ** rng.uniform(-2, 3), int(rng.integers(1, 60))
    low, high = np.float32(low), np.float32(low + length)
    grid = sampling_grid(jnp.float32(low), jnp.float32(high), 0.25, size, 7)
    found = axis_weights(grid, jnp.arange(size, dtype=jnp.float32), bins=7)
    np.testing.assert_allclose(found, weights_by_loop(float(low), float(high), 0.25, size, 7), atol=2e-5)


SIZES, STRIDES = ((40, 53), (20, 27), (10, 14), (5, 7)), (4, 8, 16, 32)


def pyramid_and_boxes(seed: int, images: int = 2, regions: int = 9, channels: int = 3):
    rng = np.random.default_rng(seed)
    pyramid = [jnp.asarray(rng.standard_normal((images, *size, channels)), jnp.float32) for size in SIZES]
    centre = rng.uniform(-20, 220, (images, regions, 2))
    half = np.exp(rng.uniform(-1, 5, (images, regions, 2)))  # from half a pixel to 150
    boxes = np.concatenate([centre - half, centre + half], -1).astype(np.float32)
    boxes[:, 0] = [-300, -300, 600, 600]
    boxes[:, 1] = [0, 80, 212, 82]  # along a whole row of the finest map
    boxes[:, 2] = [50, 50, 50, 70]
    boxes[:, 3] = [500, 500, 600, 600]
    boxes[:, 4] = [10, 10, 130, 140]
    return pyramid, boxes


@pytest.mark.parametrize(("seed", "bins", "regions"), [(0, 7, 9), (1, 14, 9), (2, 7, 150), (3, 2, 5)])
def test_against_the_definition(relative_error, seed, bins, regions):
    """150 regions on two images are more than are worked on together; windows take one to several pieces."""
    pyramid, boxes = pyramid_and_boxes(seed, regions=regions)
    levels = np.asarray(region_levels(jnp.asarray(boxes)))
    assert len(set(levels.reshape(-1))) > 1
    found = roi_align(pyramid, jnp.asarray(boxes), strides=STRIDES, bins=bins)
    assert found.dtype == jnp.float32
    assert relative_error(found, dense(pyramid, boxes, levels, STRIDES, bins)) < 1e-5


def test_gradient_against_autodiff_of_the_dense_version():
    pyramid, boxes = pyramid_and_boxes(4)
    levels = np.asarray(region_levels(jnp.asarray(boxes)))
    cotangent = np.random.default_rng(5).standard_normal((*levels.shape, 7, 7, 3)).astype(np.float32)

    def dense_loss(pyramid):
        total = 0.0
        for image, region in np.ndindex(levels.shape):
            level, (x1, y1, x2, y2) = levels[image, region], boxes[image, region].astype(np.float64)
            own, scale = pyramid[level][image], 1 / STRIDES[level]
            rows = jnp.asarray(weights_by_loop(y1, y2, scale, own.shape[0], 7), jnp.float32)
            columns = jnp.asarray(weights_by_loop(x1, x2, scale, own.shape[1], 7), jnp.float32)
            total += jnp.sum(jnp.einsum("py,qx,yxc->pqc", rows, columns, own) * cotangent[image, region])
        return total

    found = jax.jit(
        jax.grad(lambda maps: jnp.sum(roi_align(maps, jnp.asarray(boxes), strides=STRIDES, bins=7) * cotangent))
    )(pyramid)
    for level, (own, reference) in enumerate(zip(found, jax.jit(jax.grad(dense_loss))(pyramid), strict=True)):
        assert reference.any() == (level in levels)
        np.testing.assert_allclose(own, reference, atol=1e-5 * max(np.abs(reference).max(), 1e-9))


def test_boxes_get_no_gradient():
    pyramid, boxes = pyramid_and_boxes(6)
    gradient = jax.grad(lambda boxes: jnp.sum(roi_align(pyramid, boxes, strides=STRIDES, bins=7)))(jnp.asarray(boxes))
    assert not gradient.any()


def test_bfloat16_maps(relative_error):
    pyramid, boxes = pyramid_and_boxes(7)
    half = [x.astype(jnp.bfloat16) for x in pyramid]
    run = lambda maps: roi_align(maps, jnp.asarray(boxes), strides=STRIDES, bins=7)  # noqa: E731
    found, vjp = jax.vjp(run, half)
    assert found.dtype == jnp.bfloat16
    assert relative_error(found.astype(jnp.float32), np.asarray(run(pyramid))) < 0.01
    [gradient] = vjp(found)
    assert [x.dtype for x in gradient] == [jnp.bfloat16] * 4


def test_a_batch_is_its_images():
    pyramid, boxes = pyramid_and_boxes(8, images=3)
    run = lambda maps, boxes: roi_align(maps, boxes, strides=STRIDES, bins=7)  # noqa: E731
    together = run(pyramid, jnp.asarray(boxes))
    mapped = jax.vmap(lambda maps, boxes: run([x[None] for x in maps], boxes[None])[0])(pyramid, jnp.asarray(boxes))
    for image in range(3):
        alone = run([x[image : image + 1] for x in pyramid], jnp.asarray(boxes[image : image + 1]))[0]
        np.testing.assert_allclose(together[image], alone, atol=1e-6)
        np.testing.assert_allclose(mapped[image], alone, atol=1e-6)


def test_broken_features_stay_in_their_image():
    pyramid, boxes = pyramid_and_boxes(9)
    broken = [x.at[1].set(jnp.nan) for x in pyramid]
    found = roi_align(broken, jnp.asarray(boxes), strides=STRIDES, bins=7)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1, 0]).all()
