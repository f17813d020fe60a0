"""The detectors compute what the original did; README.md in this folder says how that was recorded."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modules import call, maps

from msvmamba_jax.convert.names import to_original, to_ours
from msvmamba_jax.models.detection.anchors import STRIDES, base_anchors, inside, level_of_anchors, pyramid_anchors
from msvmamba_jax.models.detection.assignment import HEAD_THRESHOLDS, IGNORED, NEGATIVE, RPN_THRESHOLDS, assign
from msvmamba_jax.models.detection.boxes import HEAD_DEVIATIONS, encode, iou
from msvmamba_jax.models.detection.inference import detect_in
from msvmamba_jax.models.detection.masks import mask_targets, pack_masks, paste_masks
from msvmamba_jax.models.detection.roi_align import region_levels, roi_align
from msvmamba_jax.models.detection.rpn import TEST_LIMITS, TRAINING_LIMITS, Proposals, propose
from msvmamba_jax.models.detection.sampling import everything
from msvmamba_jax.models.detector import Detector, pyramid_sizes
from msvmamba_jax.models.parameters import (
    SHAPE_KEYS,
    abstract_model,
    bind,
    check_fit,
    count,
    flatten,
    get_parameters,
    get_weights,
    unflatten,
)
from msvmamba_jax.models.variants import create_detector
from msvmamba_jax.tasks.detection_losses import Truth, choose_regions, head_losses, rpn_losses

TOLERANCE = 1e-4  # relative L2 of arrays, absolute of losses; float32
PIXELS = 1e-2  # of boxes

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

# Steps over channels, and over rows and columns, of what is stored of each map.
SLICES = {
    "input": (1, 4),
    **{f"backbone/{i}": (8, 4) for i in range(4)},
    **{f"fpn/{i}": (16, step) for i, step in enumerate((4, 4, 2, 1, 1))},
    **{f"rpn_cls/{i}": (1, step) for i, step in enumerate((2, 2, 1, 1, 1))},
    **{f"rpn_reg/{i}": (1, step) for i, step in enumerate((4, 2, 1, 1, 1))},
    "roi7": (8, 1),
    "roi14": (16, 2),
    "mask_logits": (8, 2),
}

every_variant = pytest.mark.parametrize("variant", ["nano", "micro", "tiny"])
# Losses and whole models with their gradients take long to compile.
nano_first = pytest.mark.parametrize(
    "variant",
    ["nano", pytest.param("micro", marks=pytest.mark.nightly), pytest.param("tiny", marks=pytest.mark.nightly)],
)
assign_jit = jax.jit(assign, static_argnums=2)
choose_jit = jax.jit(choose_regions, static_argnums=3)


class Recording:
    """What was recorded of one variant, and the model with the weights it was recorded with."""

    def __init__(self, parity: Any, variant: str):
        self.parity, self.variant = parity, variant
        self.about = parity.json(f"detection/{variant}.json")
        self.arrays = parity.arrays(f"detection/{variant}.npz")
        meta = self.about["meta"]
        self.image_size = jnp.asarray([meta["img_shape"]])
        self.scales = jnp.asarray([meta["scale_factor"]], jnp.float32)
        self.padded = tuple(meta["batch_input_shape"])
        self.original_size = tuple(meta["ori_shape"])
        self.weights = parity.state_dict(f"detection/{variant}.json")
        for name, factor in self.about["rules"].items():
            self.weights[name] *= np.float32(factor)

    @functools.cached_property
    def model(self) -> Detector:
        abstract = abstract_model(lambda: create_detector(f"msvmamba_{self.variant}", drop_path=0.0, rngs=SHAPE_KEYS))
        return bind(abstract, unflatten(to_ours(self.weights, "multi_scale", "detection")))

    @functools.cached_property
    def images(self) -> np.ndarray:
        """(1, h, w, 3)."""
        about = self.about["input"]
        if about["kind"] != "raw":
            return self.parity.images(f"detection.{self.variant}", 1, *self.padded)
        noise = self.parity.weights.inputs(about["name"], tuple(about["shape"]))
        rgb = np.clip(np.rint(50 * noise + 120), 0, 255).astype(np.uint8)[..., ::-1]
        normalised = (rgb.astype(np.float32) - np.float32(MEAN)) / np.float32(STD)
        (height, width), (h, w, _) = self.padded, normalised.shape
        return np.pad(normalised, ((0, height - h), (0, width - w), (0, 0)))[None]

    @functools.cached_property
    def pyramid(self) -> list[jax.Array]:
        return call(self.model.fpn, self.features)

    @functools.cached_property
    def features(self) -> list[jax.Array]:
        stages = maps(self.model.backbone, self.images)
        return [call(norm, stages[f"stage{i}"]) for i, norm in enumerate(self.model.out_norms)]

    @functools.cached_property
    def sizes(self) -> list[tuple[int, int]]:
        return pyramid_sizes(self.pyramid)

    @functools.cached_property
    def rpn(self) -> tuple[jax.Array, jax.Array]:
        return call(self.model.rpn_head, self.pyramid)

    @functools.cached_property
    def found(self) -> dict[str, np.ndarray]:
        """Our values of every map, channels last."""
        found = {"input": self.images}
        found |= {f"backbone/{i}": x for i, x in enumerate(self.features)}
        found |= {f"fpn/{i}": x for i, x in enumerate(self.pyramid)}
        for i, x in enumerate(self.pyramid):
            found[f"rpn_cls/{i}"], found[f"rpn_reg/{i}"] = call(self.model.rpn_head, x, method="level")
        boxes = jnp.asarray(self.arrays["rois"][None, :, 1:])
        for bins in (7, 14):
            found[f"roi{bins}"] = roi_align(self.pyramid[:4], boxes, strides=STRIDES[:4], bins=bins)[0]
        found["head_cls"], found["head_reg"] = call(self.model.box_head, found["roi7"])
        found["mask_logits"] = call(self.model.mask_head, found["roi14"])
        return jax.device_get(found)

    @functools.cached_property
    def truth(self) -> Truth:
        """The ground truth, with two more boxes that are not valid."""
        masks = self.masks("train/gt_masks")
        return Truth(
            box=jnp.asarray(np.pad(self.arrays["train/gt_boxes"], ((0, 2), (0, 0)), mode="edge"))[None],
            label=jnp.asarray(np.pad(self.arrays["train/gt_labels"], (0, 2)), jnp.int32)[None],
            valid=jnp.asarray([[True, True, True, False, False]]),
            mask=jnp.asarray(np.pad(pack_masks(masks), ((0, 2), (0, 0), (0, 0))))[None],
            image_size=self.image_size,
        )

    def masks(self, name: str) -> np.ndarray:
        width = self.arrays[f"{name}_shape"][-1]
        return np.unpackbits(self.arrays[name], axis=-1)[..., :width].astype(bool)

    @functools.cached_property
    def given(self) -> Proposals:
        """The proposals of the recorded losses, and two that are not valid."""
        boxes = np.pad(self.arrays["train/proposals"], ((0, 2), (0, 0)))
        valid = jnp.arange(len(boxes)) < len(boxes) - 2
        return Proposals(jnp.asarray(boxes)[None], jnp.ones((1, len(boxes))), valid[None])


@pytest.fixture(scope="module")
def recordings(parity):
    return {variant: Recording(parity, variant) for variant in ("nano", "micro", "tiny")}


@pytest.fixture
def recording(recordings, variant) -> Recording:
    return recordings[variant]


TRAINING = {
    *("gt_boxes", "gt_labels", "gt_masks", "gt_masks_shape", "proposals", "rpn_loss_cls", "rpn_loss_bbox"),
    *("roi_loss_cls", "roi_acc", "roi_loss_bbox", "roi_loss_mask", "total", "grad_l2"),
    *("roi_assigned_gt_inds", "roi_max_overlaps", "roi_pos_priors", "roi_neg_priors", "roi_pos_assigned_gt"),
    *("roi_labels", "roi_bbox_targets", "roi_bbox_weights", "roi_mask_targets", "roi_mask_targets_shape"),
    *("rpn_valid_anchors", "rpn_positive", "rpn_positive_gt", "rpn_counts", "rpn_max_overlaps_every97"),
    *("rpn_proposals_boxes", "rpn_proposals_scores", "full_loss_rpn_cls", "full_loss_rpn_bbox"),
    *("full_loss_cls", "full_acc", "full_loss_bbox", "full_loss_mask"),
}


@every_variant
def test_every_recorded_array_is_compared(recording):
    names = {f"{name}/{part}" for name in SLICES for part in ("shape", "stats", "slice")}
    names |= {"rois", "roi_levels", "head_cls", "head_reg", "anchors/counts", "anchors/base"}
    names |= {f"anchors/{level}/{end}" for level in range(5) for end in ("first", "last")}
    names |= {"proposals/boxes", "proposals/scores", "det/boxes", "det/scores", "det/labels"}
    names |= {"det/mask_areas", "det/masks_first8", "det/mask_shape"} | {f"train/{name}" for name in TRAINING}
    if recording.variant == "micro":
        names |= {"input/last_valid", "input/last_valid_column", "input/padding_max_abs"}
    gradients = {name for name in recording.arrays if name.startswith("train/grad/")}
    assert len(gradients) == 8
    assert recording.arrays.keys() == names | gradients


@every_variant
class TestForward:
    def test_every_recorded_map(self, recording, relative_error, record_property):
        errors = {}
        for name, (channels, step) in SLICES.items():
            x = recording.found[name].astype(np.float64)
            assert x.transpose(0, 3, 1, 2).shape == tuple(recording.arrays[f"{name}/shape"]), name
            stats = np.stack([x.mean((0, 1, 2)), x.std((0, 1, 2)), np.abs(x).sum((0, 1, 2)), np.abs(x).max((0, 1, 2))])
            for row, found, reference in zip(
                ("mean", "std", "sum", "max"), stats, recording.arrays[f"{name}/stats"], strict=True
            ):
                errors[f"{name}/{row}"] = relative_error(found, reference)
            part = x[:, ::step, ::step, ::channels].transpose(0, 3, 1, 2)
            errors[f"{name}/slice"] = relative_error(part, recording.arrays[f"{name}/slice"])
        for name in ("head_cls", "head_reg"):
            x = recording.found[name]
            errors[name] = relative_error(x.reshape(len(x), -1), recording.arrays[name])
        worst = max(errors, key=errors.__getitem__)
        record_property("worst_error", f"{worst} {errors[worst]:.1e}")
        print(f"{recording.variant}: worst error {errors[worst]:.1e} ({worst})")
        assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}

    def test_levels_of_the_regions(self, recording):
        boxes = jnp.asarray(recording.arrays["rois"][:, 1:])
        np.testing.assert_array_equal(region_levels(boxes), recording.arrays["roi_levels"])

    def test_anchors(self, recording):
        anchors, levels = np.asarray(pyramid_anchors(recording.sizes)), level_of_anchors(recording.sizes)
        for level, stride in enumerate(STRIDES):
            np.testing.assert_allclose(base_anchors(stride), recording.arrays["anchors/base"][level], rtol=1e-6)
            own = anchors[levels == level]
            assert len(own) == recording.arrays["anchors/counts"][level]
            np.testing.assert_allclose(own[:9], recording.arrays[f"anchors/{level}/first"], rtol=1e-6)
            np.testing.assert_allclose(own[-9:], recording.arrays[f"anchors/{level}/last"], rtol=1e-6)


def test_padding_of_the_input(recordings):
    recording = recordings["micro"]
    image, (height, width) = recording.images[0], recording.about["size"]
    last, column = recording.arrays["input/last_valid"][0], recording.arrays["input/last_valid_column"][0]
    np.testing.assert_allclose(image[height - 1].T, last, atol=1e-5)
    np.testing.assert_allclose(image[:, width - 1].T, column, atol=1e-5)
    padding = [np.abs(image[height:]).max(), np.abs(image[:, width:]).max()]
    np.testing.assert_array_equal(padding, recording.arrays["input/padding_max_abs"])


def match(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """For each reference box its nearest of those found, as a permutation; coordinates agree within `PIXELS`."""
    distance = np.abs(found[:, None] - reference).max(-1)
    nearest = distance.argmin(0)
    assert distance.min(0).max() < PIXELS
    return nearest


@every_variant
class TestProposals:
    @pytest.mark.parametrize("kind", ["test", "training"])
    def test_as_recorded(self, recording, kind):
        limits, prefix = {
            "test": (TEST_LIMITS, "proposals/"),
            "training": (TRAINING_LIMITS, "train/rpn_proposals_"),
        }[kind]
        propose_jit = jax.jit(lambda x, y, size: propose(x, y, recording.sizes, size, limits))
        found = jax.device_get(propose_jit(*recording.rpn, recording.image_size))
        boxes, scores = recording.arrays[f"{prefix}boxes"], recording.arrays[f"{prefix}scores"]
        assert found.valid.sum() == len(boxes)
        assert (np.diff(found.score[0]) <= 0).all()
        own = np.concatenate([found.box[0], 100 * found.score[0, :, None]], 1)[found.valid[0]]
        nearest = match(own, np.concatenate([boxes, 100 * scores[:, None]], 1))
        assert len(set(nearest)) == len(boxes)


@every_variant
def test_detections(recording, relative_error):
    proposals = Proposals(
        jnp.asarray(recording.arrays["proposals/boxes"])[None],
        jnp.asarray(recording.arrays["proposals/scores"])[None],
        jnp.ones((1, len(recording.arrays["proposals/boxes"])), bool),
    )

    @jax.jit
    def run(weights, pyramid, proposals):
        return detect_in(bind(recording.model, weights), pyramid, proposals, recording.image_size, recording.scales)

    found = jax.device_get(run(get_weights(recording.model), recording.pyramid, proposals))
    boxes, labels = recording.arrays["det/boxes"], recording.arrays["det/labels"]
    assert found.valid.sum() == len(boxes)
    own = np.concatenate([found.box[0], 100 * found.score[0, :, None], 100.0 * found.label[0, :, None]], 1)
    reference = np.concatenate([boxes, 100 * recording.arrays["det/scores"][:, None], 100.0 * labels[:, None]], 1)
    nearest = match(own[found.valid[0]], reference)
    assert len(set(nearest)) == len(boxes)

    masks = paste_masks(found.mask[0][nearest], found.box[0][nearest], *recording.original_size)
    assert masks.shape == tuple(recording.arrays["det/mask_shape"])
    areas, expected = masks.sum((1, 2)), recording.arrays["det/mask_areas"]
    assert (np.abs(areas - expected) <= np.maximum(2, 0.005 * expected)).all()
    first = np.unpackbits(recording.arrays["det/masks_first8"], axis=-1)[..., : masks.shape[-1]].astype(bool)
    assert (masks[:8] != first).sum() <= 2e-4 * first.size


@every_variant
class TestTargets:
    """Assignment, examples and targets, without any network."""

    def test_anchors(self, recording):
        arrays, truth = recording.arrays, recording.truth
        valid = inside(recording.sizes, jnp.asarray(recording.about["meta"]["pad_shape"]))
        assert arrays["train/rpn_valid_anchors"].tolist() == [int(valid.sum()), valid.size]
        anchors = pyramid_anchors(recording.sizes)
        found = assign_jit(anchors, truth.box[0], RPN_THRESHOLDS, valid_candidates=valid, valid_truths=truth.valid[0])
        owner = np.asarray(found.truth)
        np.testing.assert_array_equal(np.flatnonzero(owner >= 0), arrays["train/rpn_positive"])
        np.testing.assert_array_equal(owner[owner >= 0] + 1, arrays["train/rpn_positive_gt"])
        counts = [(owner >= 0).sum(), (owner == NEGATIVE).sum(), (owner == IGNORED).sum()]
        assert counts == arrays["train/rpn_counts"].tolist()
        np.testing.assert_allclose(found.overlap[::97], arrays["train/rpn_max_overlaps_every97"], atol=1e-6)

    def test_regions(self, recording):
        arrays, truth, given = recording.arrays, recording.truth, recording.given
        found = assign_jit(
            given.box[0], truth.box[0], HEAD_THRESHOLDS, valid_candidates=given.valid[0], valid_truths=truth.valid[0]
        )
        np.testing.assert_array_equal(found.truth[:-2] + 1, arrays["train/roi_assigned_gt_inds"])
        np.testing.assert_allclose(found.overlap[:-2], arrays["train/roi_max_overlaps"], atol=1e-6)

        regions = jax.tree.map(lambda x: np.asarray(x[0]), choose_jit(given, truth, None, everything(105)))
        positive, negative = regions.positive, regions.valid & ~regions.positive
        np.testing.assert_array_equal(regions.box[positive], arrays["train/roi_pos_priors"])
        np.testing.assert_array_equal(regions.box[negative], arrays["train/roi_neg_priors"])
        np.testing.assert_array_equal(regions.truth[positive], arrays["train/roi_pos_assigned_gt"])
        labels = np.where(positive, truth.label[0][regions.truth], 80)[regions.valid]
        np.testing.assert_array_equal(labels, arrays["train/roi_labels"])
        np.testing.assert_array_equal(positive[regions.valid], arrays["train/roi_bbox_weights"])
        offsets = encode(regions.box[positive], truth.box[0][regions.truth[positive]], HEAD_DEVIATIONS)
        reference = arrays["train/roi_bbox_targets"]
        np.testing.assert_allclose(offsets, reference[: positive.sum()], atol=1e-5)
        assert not reference[positive.sum() :].any()

    def test_masks(self, recording):
        arrays = recording.arrays
        owner = jnp.asarray(arrays["train/roi_pos_assigned_gt"], jnp.int32)
        size = jnp.asarray(recording.about["meta"]["pad_shape"])
        run = jax.jit(mask_targets)
        found = run(recording.truth.mask[0], jnp.asarray(arrays["train/roi_pos_priors"]), owner, size)
        np.testing.assert_array_equal(found, recording.masks("train/roi_mask_targets"))


def rpn_and_head_losses(model, pyramid, sizes, truth, proposals):
    """All losses by their recorded names, from all examples; None for proposals takes the RPN's own."""
    logits, deltas = model.rpn_head(pyramid)
    rpn = rpn_losses(logits, deltas, sizes, truth, None, everything(logits.shape[1]))
    if proposals is None:
        proposals = propose(logits, deltas, sizes, truth.image_size, TRAINING_LIMITS)
    examples = proposals.box.shape[1] + truth.box.shape[1]
    head = head_losses(model, pyramid, proposals, truth, None, everything(examples)._replace(positives=64))
    return rpn, head


@nano_first
@pytest.mark.parametrize("kind", ["given", "full"])
def test_losses(recording, kind):
    """With the given proposals, and with the RPN's own."""

    @jax.jit
    def run(weights, pyramid, truth, proposals):
        return rpn_and_head_losses(bind(recording.model, weights), pyramid, recording.sizes, truth, proposals)

    proposals = recording.given if kind == "given" else None
    found = run(get_weights(recording.model), recording.pyramid, recording.truth, proposals)
    rpn, head = jax.device_get(found)
    names = {
        "given": ("rpn_loss_cls", "rpn_loss_bbox", "roi_loss_cls", "roi_loss_bbox", "roi_loss_mask", "roi_acc"),
        "full": ("loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask", "acc"),
    }[kind]
    prefix = {"given": "train/", "full": "train/full_"}[kind]
    values = (rpn.score, rpn.box, head.score, head.box, head.mask, 100 * head.accuracy)
    errors = {}
    for name, value in zip(names, values, strict=True):
        errors[name] = np.abs(value - recording.arrays[prefix + name].reshape(np.shape(value))).max()
    print(f"{recording.variant}, {kind}: {errors}")
    assert max(errors.values()) < TOLERANCE
    if kind == "given":
        total = sum(np.sum(value) for value in values[:-1])
        assert abs(total - recording.arrays["train/total"][0]) < 2 * TOLERANCE


@nano_first
def test_gradients(recording, relative_error, record_property):
    model, sizes = recording.model, recording.sizes

    @jax.jit
    @jax.value_and_grad
    def gradient(parameters, images, truth, proposals):
        bound = bind(model, parameters)
        rpn, head = rpn_and_head_losses(bound, bound.pyramid(images), sizes, truth, proposals)
        return jnp.sum(rpn.score) + jnp.sum(rpn.box) + head.score + head.box + head.mask

    total, gradients = gradient(get_parameters(model), jnp.asarray(recording.images), recording.truth, recording.given)
    # So `Recording.found` and `Recording.pyramid` are no second definition of the model.
    assert abs(total - recording.arrays["train/total"][0]) < 2 * TOLERANCE
    found = to_original(dict(flatten(jax.device_get(gradients))), "multi_scale", "detection")
    names = recording.about["grad_l2_names"]
    assert found.keys() == set(names)
    errors = {}
    for name, norm in zip(names, recording.arrays["train/grad_l2"], strict=True):
        assert norm > 0
        errors[name] = abs(np.linalg.norm(found[name].astype(np.float64)) - norm) / norm
    for name, x in recording.arrays.items():
        if name.startswith("train/grad/"):
            errors[name] = relative_error(found[name.removeprefix("train/grad/")], x)
    worst = max(errors, key=errors.__getitem__)
    record_property("worst_error", f"{worst} {errors[worst]:.1e}")
    print(f"{recording.variant}: gradients, worst error {errors[worst]:.1e} ({worst})")
    assert len(errors) == len(names) + 8
    assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


@every_variant
class TestWeights:
    def test_number_of_parameters(self, recording):
        assert count(get_parameters(recording.model)) == recording.about["params"]

    def test_round_trip_is_exact(self, recording):
        ours = to_ours(recording.weights, "multi_scale", "detection")
        check_fit(get_weights(recording.model), unflatten(ours))
        back = to_original(ours, "multi_scale", "detection")
        assert back.keys() == recording.weights.keys()
        for name, tensor in recording.weights.items():
            assert (back[name].shape, back[name].dtype) == (tensor.shape, tensor.dtype), name
            assert back[name].tobytes() == tensor.tobytes(), name


def test_crowds_and_padding_are_no_ground_truth(recordings):
    """The ground truths that are not valid, which `Recording.truth` has, have no influence: without them the same."""
    recording = recordings["nano"]
    few = jax.tree.map(lambda x: x[:, :3] if x.ndim > 1 and x.shape[1] == 5 else x, recording.truth)
    assert few.box.shape == (1, 3, 4)
    quota = everything(96)._replace(total=64, positives=16)
    keys = jax.random.split(jax.random.key(0), 1)
    a, b = (choose_jit(recording.given, truth, keys, quota) for truth in (recording.truth, few))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert (np.asarray(iou(a.box[0][:, None], few.box[0])).max(1) > 0.5)[np.asarray(a.positive[0])].all()
