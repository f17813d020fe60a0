"""Segmenters and detectors on four devices: a training step is that of one device."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from msvmamba_jax.checkpoint import KINDS, Description
from msvmamba_jax.models.detection.rpn import ProposalLimits
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model, bind, get_weights
from msvmamba_jax.tasks.detection import Detection
from msvmamba_jax.tasks.segmentation import Segmentation
from msvmamba_jax.training.parallelism import JitLayout, make_layout
from msvmamba_jax.training.step import initial_state, train_step

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices"),
]

BATCH, HEIGHT, WIDTH, CLASSES = 4, 64, 96, 3


def make_task(task):
    sizes = {"segmentation": {"channels": 8, "auxiliary_channels": 8}, "detection": {"channels": 8, "hidden": 8}}[task]
    model = {"name": "msvmamba_nano", "width": 8, "depths": (1, 1, 1, 1), "drop_path": 0.3, "num_classes": CLASSES}
    description = Description(
        model={**model, **sizes}, task=task, class_names=tuple("abc"), preprocessing=KINDS[task].preprocessing()
    )
    if task == "segmentation":
        return Segmentation(description=description)
    limits = ProposalLimits(20, 10)
    return Detection(
        description=description,
        proposals=limits,
        evaluation_proposals=limits,
        anchor_samples=16,
        region_samples=16,
    )


def make_batch(task):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (BATCH, HEIGHT, WIDTH, 3), np.uint8)
    extent = np.array([[HEIGHT, WIDTH], [HEIGHT, 80], [50, WIDTH], [40, 70]], np.int32)
    if task == "segmentation":
        return {"image": images, "labels": rng.integers(0, CLASSES, (BATCH, HEIGHT, WIDTH), np.uint8), "extent": extent}
    corner = rng.uniform(0, 30, (BATCH, 8, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(8, 30, (BATCH, 8, 2))], -1).astype(np.float32)
    masks = np.zeros((BATCH, 8, HEIGHT, WIDTH), bool)
    for image, instance in np.ndindex(BATCH, 8):
        left, top, right, bottom = boxes[image, instance].astype(int)
        masks[image, instance, top:bottom, left:right] = True
    return {
        "image": images,
        "extent": extent,
        "boxes": boxes,
        "labels": rng.integers(0, CLASSES, (BATCH, 8), np.int32),
        "valid": np.arange(8) < np.array([[8], [3], [1], [0]]),
        "masks": np.packbits(masks, axis=-1),
    }


def layout_of(name):
    if name == "one":
        axes = (AxisType.Auto,) * 2
        return JitLayout(jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=axes, devices=jax.devices()[:1]))
    return make_layout("pmap" if name == "pmap" else "jit", fsdp=2 if name == "fsdp" else 1, batch_size=BATCH)


@jax.numpy_dtype_promotion("standard")  # optax itself mixes dtypes
def step(task, name):
    """State and metrics after one step."""
    layout = layout_of(name)
    options = {"axis": layout.axis} if KINDS[task.description.task].batch_normalised else {}
    optimizer = optax.sgd(0.1)
    model = abstract_model(lambda: task.description.build(rngs=SHAPE_KEYS, **options))
    compiled = layout.compile_train(
        train_step(model, task, optimizer, lambda _: 0.1, seed=0, ema_decay=0.0, accumulate=1, axis=layout.axis)
    )
    weights = get_weights(task.description.build(rngs=nnx.Rngs(0), **options))
    state = layout.create(lambda weights: initial_state(bind(model, weights), optimizer, ema=False), weights)
    batch = layout.put(make_batch(task.description.task))
    return jax.device_get(jax.block_until_ready(compiled(state, batch)))


@pytest.fixture(scope="module")
def one():
    return {name: step(make_task(name), "one") for name in ("segmentation", "detection")}


def distance(found, reference):
    """Relative L2 distance of two trees of arrays."""
    flat = lambda tree: np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)])  # noqa: E731
    return np.linalg.norm(flat(found) - flat(reference)) / np.linalg.norm(flat(reference))


@pytest.mark.parametrize("layout", ["fsdp", "pmap"])
def test_segmentation(one, layout):
    state, metrics = step(make_task("segmentation"), layout)
    reference, reference_metrics = one["segmentation"]
    assert distance(state, reference) < 1e-4
    assert distance(metrics, reference_metrics) < 1e-3


def test_detection_under_jit(one):
    state, metrics = step(make_task("detection"), "fsdp")
    reference, reference_metrics = one["detection"]
    assert distance(state, reference) < 1e-4
    for name, value in reference_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_detection_under_pmap_averages_the_losses_of_the_devices():
    """Each device divides by its own examples, as each process of the original does; one image has no object."""
    task, batch = make_task("detection"), make_batch("detection")
    _, metrics = step(task, "pmap")
    model = abstract_model(lambda: task.description.build(rngs=SHAPE_KEYS))
    weights = get_weights(task.description.build(rngs=nnx.Rngs(0)))
    step_key = jax.random.fold_in(jax.random.key(0), 0)

    @jax.jit
    def own(weights, image, example):
        """The losses of a device that has this image only."""
        keys = jax.random.fold_in(step_key, example)[None]
        return task.loss(bind(model, weights), task.prepare(image, keys, step_key, lambda x: x), keys)

    losses = [own(weights, {name: x[i : i + 1] for name, x in batch.items()}, i) for i in range(BATCH)]
    of_devices = [{"loss": loss, **parts} for loss, parts in losses]
    assert np.ptp([float(found["loss"]) for found in of_devices]) > 0.1
    for name in of_devices[0]:
        expected = np.mean([float(found[name]) for found in of_devices])
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)
