"""What every detector promises. Widths and depths are cut down."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import randomised

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.detection.fpn import FPN, resize_nearest
from msvmamba_jax.models.detection.heads import BoxHead, MaskHead
from msvmamba_jax.models.detection.inference import PER_IMAGE, detect
from msvmamba_jax.models.detection.layers import Deconvolution
from msvmamba_jax.models.detection.rpn import ProposalLimits, RPNHead
from msvmamba_jax.models.detector import Detector
from msvmamba_jax.models.parameters import abstract_model, flatten, get_parameters
from msvmamba_jax.models.variants import create_detector, list_models

SMALL = {"width": 8, "depths": (1, 1, 1, 1), "num_classes": 5, "channels": 12, "hidden": 20, "drop_path": 0.0}
LIMITS = ProposalLimits(60, 40)
BFLOAT16_TOLERANCE = 0.05  # relative L2; measured: 0.02


@functools.cache
def small_model(name: str = "msvmamba_nano", **options) -> Detector:
    return randomised(abstract_model(lambda: create_detector(name, rngs=nnx.Rngs(0), **(SMALL | options))))


def images(batch=2, height=64, width=96) -> jax.Array:
    return jax.random.normal(jax.random.key(batch), (batch, height, width, 3))


BOXES = jnp.asarray([[[3.0, 5.0, 40.0, 60.0], [10.0, 10.0, 14.0, 90.0], [-9.0, 0.0, 300.0, 300.0]]] * 2)


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, images, boxes):
    model = nnx.merge(graph, state)
    pyramid = model.pyramid(images)
    return pyramid, model.rpn_head(pyramid), model.classify(pyramid, boxes), model.segment(pyramid, boxes)


def run(model: Detector, images: jax.Array, boxes: jax.Array = BOXES):
    """Pyramid, outputs of the RPN, of the box head and of the mask head."""
    return jax.device_get(_run(*nnx.split(model), images, boxes[: len(images)]))


@functools.cache
def float32_outputs():
    return run(small_model(), images())


@functools.partial(jax.jit, static_argnums=0)
def _detect(graph, state, images, sizes, scales):
    return detect(nnx.merge(graph, state), images, sizes, scales, LIMITS)


def detections(model: Detector, images: jax.Array, sizes, scales):
    return jax.device_get(_detect(*nnx.split(model), images, jnp.asarray(sizes), jnp.asarray(scales)))


@pytest.mark.parametrize(
    ("name", "height", "width"), [*((name, 64, 96) for name in list_models()), ("msvmamba_nano", 37, 70)]
)
def test_shapes(name, height, width):
    model = small_model(name)
    call = lambda x, boxes: (lambda p: (p, model.rpn_head(p), model.classify(p, boxes), model.segment(p, boxes)))(  # noqa: E731
        model.pyramid(x)
    )
    pyramid, (logits, deltas), (scores, offsets), masks = jax.eval_shape(call, images(2, height, width), BOXES)
    rows, columns, anchors = height // 4, width // 4, 0
    for level in pyramid:
        assert (level.shape, level.dtype) == ((2, rows, columns, 12), jnp.float32)
        anchors += 3 * rows * columns
        rows, columns = -(-rows // 2), -(-columns // 2)
    assert len(pyramid) == 5
    assert [x.shape for x in (logits, deltas)] == [(2, anchors), (2, anchors, 4)]
    assert [x.shape for x in (scores, offsets)] == [(2, 3, 6), (2, 3, 5, 4)]
    assert masks.shape == (2, 3, 28, 28, 5)


def test_options_reach_the_model():
    model = small_model(num_classes=7, states=3, channels=16, hidden=10, remat=True)
    shapes = {name: x.shape for name, x in flatten(get_parameters(model))}
    assert shapes["fpn.laterals.3.kernel"] == (64, 16)
    assert shapes["box_head.first.kernel"] == (7 * 7 * 16, 10)
    assert shapes["box_head.score.kernel"] == (10, 8)
    assert shapes["box_head.delta.kernel"] == (10, 28)
    assert shapes["mask_head.score.kernel"] == (16, 7)
    assert shapes["backbone.stages.0.blocks.0.mixer.full_ssm.A_log"] == (16, 3)
    assert model.backbone.stages[0].remat


@pytest.mark.parametrize("option", ["num_classes", "channels", "hidden"])
def test_impossible_options_are_named(option):
    with pytest.raises(InputError, match=f"{option} must be at least 1; got 0"):
        create_detector("msvmamba_nano", **(SMALL | {option: 0}), rngs=nnx.Rngs(0))


def test_unknown_names_are_named():
    with pytest.raises(InputError, match="there is no model 'mask_rcnn'"):
        create_detector("mask_rcnn", rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def fresh() -> dict[str, np.ndarray]:
    def build():
        how = {"dtype": jnp.float32, "rngs": nnx.Rngs(0)}
        heads = nnx.Dict(
            fpn=FPN((8, 16, 32, 64), 32, **how),
            rpn_head=RPNHead(32, **how),
            box_head=BoxHead(32, 64, 20, **how),
            mask_head=MaskHead(32, 20, **how),
        )
        return get_parameters(heads)

    return {name: np.asarray(x, np.float64) for name, x in flatten(jax.jit(build)())}


def test_initialisation(fresh):
    """As mmdetection draws them: standard deviations, and zero biases."""
    expected = {
        "fpn.laterals.0.kernel": np.sqrt(2 / (8 + 32)),
        "fpn.outputs.1.kernel": np.sqrt(2 / (9 * 32 * 2)),
        "rpn_head.conv.kernel": 0.01,
        "rpn_head.score.kernel": 0.01,
        "rpn_head.delta.kernel": 0.01,
        "box_head.first.kernel": np.sqrt(2 / (49 * 32 + 64)),
        "box_head.second.kernel": np.sqrt(2 / (64 + 64)),
        "box_head.score.kernel": 0.01,
        "box_head.delta.kernel": 0.001,
        "mask_head.convs.2.kernel": np.sqrt(2 / (9 * 32)),
        "mask_head.upsample.kernel": np.sqrt(2 / (4 * 32)),
        "mask_head.score.kernel": np.sqrt(2 / 20),
    }
    for name, deviation in expected.items():
        x = fresh[name]
        assert abs(x.std() / deviation - 1) < 5 / np.sqrt(2 * x.size), name
        assert abs(x.mean()) < 5 * deviation / np.sqrt(x.size), name
    biases = [x for name, x in fresh.items() if name.endswith("bias")]
    assert len(biases) == 4 + 4 + 3 + 4 + 4 + 1 + 1
    assert not any(x.any() for x in biases)


def test_an_image_does_not_see_its_batch():
    first, second = float32_outputs(), run(small_model(), jnp.stack([jnp.zeros((64, 96, 3)), images()[0]]))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one[0], two[1], atol=1e-5), first, second)


def test_bfloat16_stays_close_to_float32(relative_error, record_property):
    whole, half = float32_outputs(), run(small_model(dtype="bfloat16"), images())
    assert {x.dtype.name for x in half[0]} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(half[1:])} == {"float32"}
    errors = [
        relative_error(a.astype(np.float32), b) for a, b in zip(*map(jax.tree.leaves, (half, whole)), strict=True)
    ]
    record_property("errors", errors)
    print(f"bfloat16: errors {errors}")
    assert max(errors) < BFLOAT16_TOLERANCE


def test_nearest_neighbours():
    x = jnp.arange(3.0)[None, :, None, None]
    np.testing.assert_array_equal(resize_nearest(x, 6, 1)[0, :, 0, 0], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(resize_nearest(x, 5, 2)[0, :, 1, 0], [0, 0, 1, 1, 2])


def test_deconvolution_by_hand(relative_error):
    layer = Deconvolution(3, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 6, 3))
    expected = np.zeros((2, 10, 12, 4))
    for row, column, p, q in np.ndindex(5, 6, 2, 2):
        expected[:, 2 * row + p, 2 * column + q] = x[:, row, column] @ layer.kernel[...][:, p, q] + layer.bias[...]
    assert relative_error(layer(x), expected) < 1e-5


SIZES, SCALES = ((64, 96), (50, 70)), ((1.0, 1.0), (0.5, 0.25))


@functools.cache
def detected():
    return detections(small_model(), images(), SIZES, SCALES)


class TestDetection:
    @pytest.fixture
    def found(self):
        return detected()

    def test_shapes_and_order(self, found):
        assert found.box.shape == (2, PER_IMAGE, 4)
        assert found.mask.shape == (2, PER_IMAGE, 28, 28)
        assert found.valid.any(1).all()
        for score, valid in zip(found.score, found.valid, strict=True):
            assert (np.diff(score) <= 0).all()
            assert (score[valid] > 0.05).all()
            assert not score[~valid].any()
        assert ((found.label >= 0) & (found.label < 5)).all()
        assert ((found.mask >= 0) & (found.mask <= 1)).all()

    def test_boxes_are_within_the_original_image(self, found):
        for box, (height, width), (x, y) in zip(found.box, SIZES, SCALES, strict=True):
            assert (box >= 0).all()
            assert (box <= np.asarray([width / x, height / y] * 2) + 1e-4).all()
            assert box[:, 2].max() > 0.9 * width / x
