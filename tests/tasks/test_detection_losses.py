"""The losses of Mask R-CNN: padding, images without objects, sampling, and a whole training step."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from msvmamba_jax.models.detection.anchors import pyramid_anchors
from msvmamba_jax.models.detection.boxes import encode, iou
from msvmamba_jax.models.detection.inference import detect
from msvmamba_jax.models.detection.masks import pack_masks, paste_masks, unpack_masks
from msvmamba_jax.models.detection.rpn import ProposalLimits, Proposals
from msvmamba_jax.models.detection.sampling import Quota, everything
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model, bind, flatten, get_parameters
from msvmamba_jax.models.variants import create_detector
from msvmamba_jax.tasks.detection_losses import (
    Truth,
    box_losses,
    choose_regions,
    detection_loss,
    mask_loss,
    rpn_losses,
)

SIZES = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]  # of 64 x 96 pixels
HEIGHT, WIDTH = 64, 96


def ground_truth(objects: int = 3, padding: int = 0, images: int = 2) -> Truth:
    """Ellipses in their boxes; what is padding has boxes, labels and masks too, which must not matter."""
    rng = np.random.default_rng(0)
    total = objects + padding
    corner = rng.uniform(0, 30, (images, 40, 2))[:, :total]
    size = rng.uniform(15, 34, (images, 40, 2))[:, :total]
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    centre, half = corner + size / 2, size / 2
    inside = [
        [((x - c[0]) / h[0]) ** 2 + ((y - c[1]) / h[1]) ** 2 < 1 for c, h in zip(*pair, strict=True)]
        for pair in zip(centre, half, strict=True)
    ]
    masks = np.asarray(inside, bool).reshape(images, total, HEIGHT, WIDTH)
    return Truth(
        box=jnp.asarray(np.concatenate([corner, corner + size], -1), jnp.float32),
        label=jnp.asarray(rng.integers(0, 5, (images, 40))[:, :total], jnp.int32),
        valid=jnp.broadcast_to(jnp.arange(total) < objects, (images, total)),
        mask=jnp.asarray(pack_masks(masks)),
        image_size=jnp.asarray([[64, 96], [50, 70]])[:images],
    )


def outputs(*shape: int, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


KEYS = jax.random.split(jax.random.key(3), 2)
ANCHORS = pyramid_anchors(SIZES).shape[0]


class TestRPN:
    QUOTA = Quota(40, 10)

    def run(self, truth, quota=QUOTA, keys=KEYS, sizes=SIZES, **outputs_of):
        logits = outputs_of.get("logits", outputs(2, ANCHORS))
        deltas = outputs_of.get("deltas", outputs(2, ANCHORS, 4, seed=2))
        run = jax.jit(lambda *x: rpn_losses(x[0], x[1], sizes, x[2], x[3], quota))
        return jax.device_get(run(logits, deltas, truth, keys))

    def test_more_padding_of_the_ground_truth_changes_nothing(self):
        first, second = self.run(ground_truth()), self.run(ground_truth(padding=4))
        assert (first.box > 0).any()
        jax.tree.map(np.testing.assert_array_equal, first, second)

    def test_a_larger_batch_shape_changes_nothing(self):
        """Neither the values nor which anchors are drawn."""
        larger = [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]
        rng = np.random.default_rng(0)
        maps = [rng.standard_normal((2, *size, 3, 5)).astype(np.float32) for size in larger]
        found = []
        for sizes in (SIZES, larger):
            cut = [x[:, :h, :w].reshape(2, -1, 5) for x, (h, w) in zip(maps, sizes, strict=True)]
            x = jnp.asarray(np.concatenate(cut, 1))
            found.append(self.run(ground_truth(), sizes=sizes, logits=x[..., 0], deltas=x[..., 1:]))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *found)

    def test_without_objects(self):
        """All examples are negative; the divisor counts one positive an image that is not there."""
        found = self.run(ground_truth(objects=0, padding=2), logits=jnp.zeros((2, ANCHORS)))
        np.testing.assert_allclose(found.score.sum(), np.log(2) * 80 / 82, rtol=1e-6)
        assert not found.box.any()

    def test_keys_decide(self):
        first, again = self.run(ground_truth()), self.run(ground_truth())
        other = self.run(ground_truth(), keys=KEYS[::-1])
        jax.tree.map(np.testing.assert_array_equal, first, again)
        assert (first.score != other.score).any()


REGIONS = Quota(24, 8)


def proposals(count: int = 60, padding: int = 0) -> Proposals:
    """Boxes near the ground truth, and elsewhere."""
    rng = np.random.default_rng(5)
    near = np.asarray(ground_truth().box)[:, rng.integers(0, 3, count)] + rng.normal(0, 3, (2, count, 4))
    boxes = np.where(rng.random((2, count, 1)) < 0.6, near, near[..., ::-1] / 2)
    boxes = np.concatenate([np.minimum(boxes[..., :2], boxes[..., 2:]), np.maximum(boxes[..., :2], boxes[..., 2:])], -1)
    boxes = np.pad(np.clip(boxes, 0, 60), ((0, 0), (0, padding), (0, 0)), mode="edge")
    valid = jnp.broadcast_to(jnp.arange(count + padding) < count, boxes.shape[:2])
    return Proposals(jnp.asarray(boxes, jnp.float32), jnp.ones(boxes.shape[:2]), valid)


choose = jax.jit(choose_regions, static_argnums=3)


class TestRegions:
    def test_quota_and_order(self):
        regions = jax.device_get(choose(proposals(), ground_truth(), KEYS, REGIONS))
        assert regions.valid.all()
        assert (regions.positive.sum(1) == 8).all()
        assert regions.positive[:, :8].all()

    def test_padding_changes_nothing(self):
        first = choose(proposals(), ground_truth(), KEYS, REGIONS)
        jax.tree.map(np.testing.assert_array_equal, first, choose(proposals(padding=9), ground_truth(), KEYS, REGIONS))
        second = choose(proposals(), ground_truth(padding=4), KEYS, REGIONS)
        jax.tree.map(np.testing.assert_array_equal, first, second)

    def test_ground_truth_is_among_the_regions(self):
        truth = ground_truth()
        found = choose(proposals(), truth, None, everything(63))
        for box, regions, positive in zip(truth.box, found.box, found.positive, strict=True):
            np.testing.assert_array_equal(regions[:3], box)
            assert positive[:3].all()

    def test_without_objects(self):
        regions = choose(proposals(), ground_truth(objects=0, padding=2), KEYS, REGIONS)
        assert not regions.positive.any()
        assert regions.valid.all()
        losses = box_losses(outputs(2, 24, 6), outputs(2, 24, 5, 4), regions, ground_truth(objects=0, padding=2))
        assert np.isfinite(losses).all()
        assert losses[1] == 0


class TestHeads:
    @pytest.fixture
    def regions(self):
        return choose(proposals(), ground_truth(), KEYS, REGIONS)

    def test_boxes_by_loop(self, regions):
        truth, logits, deltas = ground_truth(), outputs(2, 24, 6), outputs(2, 24, 5, 4)
        found = box_losses(logits, deltas, regions, truth)
        entropy, distance, correct = 0.0, 0.0, 0
        for i, r in np.ndindex(2, 24):
            owner, positive = regions.truth[i, r], regions.positive[i, r]
            label = int(truth.label[i, owner]) if positive else 5
            entropy -= jax.nn.log_softmax(logits[i, r])[label]
            correct += int(jnp.argmax(logits[i, r])) == label
            if positive:
                goal = encode(regions.box[i, r], truth.box[i, owner], (0.1, 0.1, 0.2, 0.2))
                distance += jnp.abs(deltas[i, r, label] - goal).sum()
        np.testing.assert_allclose(found, np.asarray([entropy, distance, correct]) / 48, rtol=1e-5)

    def test_masks_that_fit_cost_nothing(self, regions):
        """And where a mask is all background the cost is the share of the foreground, up to the logits' size."""
        truth = ground_truth()
        first = jax.tree.map(lambda x: x[:, :8], regions)
        run = jax.jit(mask_loss)
        flat = run(jnp.zeros((2, 8, 28, 28, 5)), first, truth)
        np.testing.assert_allclose(flat, np.log(2), rtol=1e-6)
        whole, none = (run(jnp.full((2, 8, 28, 28, 5), x), first, truth) for x in (50.0, -50.0))
        np.testing.assert_allclose(whole + none, 50, rtol=1e-5)  # every pixel is wrong in one of them
        assert 0.5 < none / 50 < 0.95  # an ellipse covers pi / 4 of its box

    def test_only_the_layer_of_the_class_learns(self, regions):
        truth, first = ground_truth(), jax.tree.map(lambda x: x[:, :8], regions)
        gradient = jax.jit(jax.grad(mask_loss))(outputs(2, 8, 28, 28, 5), first, truth)
        label = jnp.take_along_axis(truth.label, first.truth, 1)
        touched = jnp.any(gradient != 0, axis=(2, 3))
        np.testing.assert_array_equal(touched, label[..., None] == jnp.arange(5))


SMALL = {"width": 8, "depths": (1, 1, 1, 1), "num_classes": 5, "channels": 12, "hidden": 20, "drop_path": 0.1}
OPTIONS = {"limits": ProposalLimits(60, 40), "rpn_quota": everything(ANCHORS), "head_quota": REGIONS}
IMAGES = outputs(2, HEIGHT, WIDTH, 3, seed=7)


@functools.cache
def small_model():
    return create_detector("msvmamba_nano", rngs=nnx.Rngs(0), **SMALL)


def loss(parameters, images, truth, keys):
    return detection_loss(bind(small_model(), parameters), images, truth, keys, **OPTIONS)


def test_all_losses():
    total, metrics = jax.jit(loss)(get_parameters(small_model()), IMAGES, ground_truth(), KEYS)
    parts = {name: value for name, value in metrics.items() if name.endswith("_loss")}
    assert parts.keys() == {"rpn_score_loss", "rpn_box_loss", "score_loss", "box_loss", "mask_loss"}
    np.testing.assert_allclose(sum(parts.values()), total, rtol=1e-6)
    assert min(parts.values()) > 0
    assert 0 <= metrics["head_accuracy"] <= 1


def test_bfloat16_is_traced():
    """Under strict promotion; losses and gradients stay float32."""
    model = abstract_model(lambda: create_detector("msvmamba_nano", rngs=SHAPE_KEYS, dtype="bfloat16", **SMALL))
    run = lambda p, *batch: detection_loss(bind(model, p), *batch, **OPTIONS)  # noqa: E731
    shapes = jax.eval_shape(jax.value_and_grad(run, has_aux=True), get_parameters(model), IMAGES, ground_truth(), KEYS)
    assert {x.dtype.name for x in jax.tree.leaves(shapes)} == {"float32"}


@pytest.mark.nightly
def test_a_training_step_on_two_devices():
    """Every parameter learns, what one device computes is computed, and no activation is exchanged."""
    step = jax.value_and_grad(loss, has_aux=True)
    arguments = get_parameters(small_model()), IMAGES, ground_truth(), KEYS
    expected = jax.device_get(jax.jit(step)(*arguments))
    for path, gradient in flatten(expected[1]):
        assert np.isfinite(gradient).all(), path
        assert gradient.any(), path

    mesh = Mesh(np.asarray(jax.devices()[:2]), "data")
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    arguments = jax.device_put(arguments, (whole, split, split, split))
    compiled = jax.jit(step, out_shardings=whole).lower(*arguments).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    found = jax.device_get(compiled(*arguments))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected)


@pytest.mark.nightly
def test_a_small_detector_learns():
    """Two images by heart: coloured ellipses are found, named and outlined."""
    truth, rng = ground_truth(), np.random.default_rng(0)
    masks = np.asarray(unpack_masks(truth.mask, WIDTH))
    colours, images = rng.normal(0, 1.5, (5, 3)), rng.normal(0, 0.1, (2, HEIGHT, WIDTH, 3))
    for i, k in np.ndindex(2, 3):
        images[i][masks[i, k]] = colours[truth.label[i, k]]
    images = jnp.asarray(images, jnp.float32)
    options = SMALL | {"width": 16, "channels": 32, "hidden": 64, "drop_path": 0.0}
    model = create_detector("msvmamba_nano", rngs=nnx.Rngs(0), **options)
    optimiser, limits = optax.adam(2e-3), ProposalLimits(200, 100)

    # Runs longer than it compiles, so compiled as for users and not as tests/conftest.py has it.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
    def update(parameters, state, keys):
        quota = Quota(64, 16)
        run = lambda p: detection_loss(bind(model, p), images, truth, keys, limits=limits, head_quota=quota)  # noqa: E731
        (loss, _), gradients = jax.value_and_grad(run, has_aux=True)(parameters)
        updates, state = optimiser.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss

    with jax.numpy_dtype_promotion("standard"):  # Optax is not strict
        parameters = get_parameters(model)
        state, losses = optimiser.init(parameters), []
        for number in range(200):
            keys = jax.random.split(jax.random.key(number), 2)
            parameters, state, loss = update(parameters, state, keys)
            losses.append(float(loss))
    assert np.mean(losses[-20:]) < 0.2 * losses[0]

    found = jax.jit(lambda p: detect(bind(model, p), images, truth.image_size, jnp.ones((2, 2)), limits))(parameters)
    found = jax.device_get(found)
    for i in range(2):
        best = np.asarray(iou(truth.box[i][:, None], found.box[i])).argmax(1)
        np.testing.assert_array_equal(found.label[i][best], truth.label[i])
        assert (found.score[i][best] > 0.9).all()
        outlines = paste_masks(found.mask[i][best], found.box[i][best], HEIGHT, WIDTH)
        common, union = (f(outlines, masks[i]).sum((1, 2)) for f in (np.logical_and, np.logical_or))
        print(f"mask overlaps {common / union}")
        assert (common / union > 0.7).all()
