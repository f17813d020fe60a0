"""Erasing, mixup and CutMix: the recorded targets, and the distributions against a simulation of the written rules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msvmamba_jax import InputError
from msvmamba_jax.checkpoint import Description
from msvmamba_jax.data.preprocessing import Preprocessing
from msvmamba_jax.tasks.classification import Classification
from msvmamba_jax.tasks.erasing import draw_box, erase
from msvmamba_jax.tasks.mixing import Mixing, mix_targets

BOTH = Mixing(mixup=0.8, cutmix=1.0)


def flip(x):
    return jnp.flip(x, axis=0)


def test_targets_equal_the_recorded_ones(parity):
    recorded = parity.json("recipe/randaugment_ops.json")["mixup_target"]
    targets = optax.smooth_labels(jax.nn.one_hot(jnp.array(recorded["labels"]), recorded["num_classes"]), 0.1)
    mixed = mix_targets(targets, jnp.float32(recorded["lam"]), flip)
    np.testing.assert_allclose(mixed, np.array(recorded["target"]), atol=1e-6)


def simulated_boxes(rng, count, height, width):
    """The rule in NumPy: rows and columns of `count` boxes."""
    boxes = []
    for _ in range(count):
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
            rows, columns = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if rows < height and columns < width:
                boxes.append((rows, columns))
                break
    return np.array(boxes)


@pytest.mark.parametrize("size", [(32, 32), (24, 56)])
def test_boxes_follow_the_rule(size):
    count = 4000
    keys = jax.random.split(jax.random.key(0), count)
    top, left, rows, columns = map(np.asarray, jax.jit(jax.vmap(lambda key: draw_box(key, *size)))(keys))
    expected = simulated_boxes(np.random.default_rng(0), count, *size)
    quantiles = [0.05, 0.25, 0.5, 0.75, 0.95]
    area = rows * columns / (size[0] * size[1])
    expected_area = expected.prod(axis=1) / (size[0] * size[1])
    np.testing.assert_allclose(np.quantile(area, quantiles), np.quantile(expected_area, quantiles), atol=0.015)
    aspect, expected_aspect = np.log(rows / columns), np.log(expected[:, 0] / expected[:, 1])
    np.testing.assert_allclose(np.quantile(aspect, quantiles), np.quantile(expected_aspect, quantiles), atol=0.12)
    assert (rows < size[0]).all()
    assert (columns < size[1]).all()
    for start, length, side in ((top, rows, size[0]), (left, columns, size[1])):
        assert (start >= 0).all()
        assert (start + length <= side).all()
        place = start / (side - length)
        np.testing.assert_allclose([place.mean(), (start == 0).any(), (place == 1).any()], [0.5, 1, 1], atol=0.03)


def test_erasing():
    count = 2000
    keys = jax.random.split(jax.random.key(1), count)
    images = jnp.full((count, 16, 16, 3), 7.0)
    erased = np.asarray(jax.jit(lambda x, k: erase(x, k, 0.25))(images, keys))
    changed = (erased != 7).all(axis=-1)
    np.testing.assert_array_equal(changed, (erased != 7).any(axis=-1))
    hit = changed.any(axis=(1, 2))
    assert abs(hit.mean() - 0.25) < 0.03
    for mask in changed[hit][:50]:  # every one a full box
        assert mask.sum() == mask.any(axis=0).sum() * mask.any(axis=1).sum()
    noise = erased[changed]
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)
    assert len(np.unique(noise)) > 0.9 * noise.size  # another value in every pixel and channel
    assert erase(images, keys, 0.0) is images


def test_weights_of_mixing():
    keys = jax.random.split(jax.random.key(2), 8000)
    mixing = Mixing(mixup=0.8, cutmix=2.0, switch_probability=0.3, probability=0.6)
    weight, cut = map(np.asarray, jax.jit(jax.vmap(mixing.draw))(keys))
    mixed = weight < 1
    assert abs(mixed.mean() - 0.6) < 0.02
    assert not cut[~mixed].any()
    assert abs(cut[mixed].mean() - 0.3) < 0.03
    for alpha, weights in ((0.8, weight[mixed & ~cut]), (2.0, weight[cut])):
        expected = [0.5, 1 / (4 * (2 * alpha + 1))]  # mean and variance of Beta(alpha, alpha)
        np.testing.assert_allclose([weights.mean(), weights.var()], expected, atol=0.015)
    for only, answer in ((Mixing(mixup=0.8), False), (Mixing(cutmix=1.0), True)):
        assert (np.asarray(jax.vmap(only.draw)(keys[:50])[1]) == answer).all()


def test_mixup_is_the_weighted_mean_with_the_reversed_batch():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 8, 3)), jnp.float32)
    targets = jnp.eye(4)
    mixed, mixed_targets = Mixing(mixup=0.8)(images, targets, jax.random.key(3), flip)
    weight = float(mixed_targets[0, 0])
    assert 0 < weight < 1
    np.testing.assert_allclose(mixed, weight * images + (1 - weight) * images[::-1], rtol=1e-5, atol=1e-6)


def test_weight_of_cutmix_is_the_area_that_stays():
    images = jnp.broadcast_to(jnp.arange(4.0)[:, None, None, None], (4, 12, 20, 3))
    mix = jax.jit(lambda key: Mixing(cutmix=1.0)(images, jnp.eye(4), key, flip))
    shares, clipped = [], 0
    for seed in range(60):
        mixed, targets = map(np.asarray, mix(jax.random.key(seed)))
        own = mixed == np.asarray(images)
        assert (own | (mixed == np.asarray(images)[::-1])).all()
        assert (own == own[:1]).all()  # one box for the whole batch
        pasted = ~own[0, :, :, 0]
        rows, columns = pasted.any(axis=1), pasted.any(axis=0)
        assert pasted.sum() == rows.sum() * columns.sum()
        np.testing.assert_allclose(targets[0], [own[0].mean(), 0, 0, 1 - own[0].mean()], atol=1e-6)
        shares.append(pasted.mean())
        clipped += rows[0] or rows[-1] or columns[0] or columns[-1]
    assert len(set(shares)) > 20
    assert 0 < clipped < 60


def task(**options):
    description = Description(
        model={"name": "msvmamba_nano", "num_classes": 4}, class_names=tuple("abcd"), preprocessing=Preprocessing()
    )
    return Classification(description=description, label_smoothing=0.1, **options)


def test_order_and_label():
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    batch = {"image": images, "label": np.arange(4, dtype=np.int32)}
    keys, batch_key = jax.random.split(jax.random.key(5), 4), jax.random.key(6)
    plain = task().prepare(batch, keys, batch_key, flip)
    found = task(erase_probability=1.0, mixing=BOTH).prepare(batch, keys, batch_key, flip)
    images, targets = BOTH(erase(plain["image"], keys, 1.0), plain["target"], batch_key, flip)
    np.testing.assert_array_equal(found["image"], images)
    np.testing.assert_array_equal(found["target"], targets)
    np.testing.assert_array_equal(found["label"], np.argmax(targets, axis=-1))
    assert found["label"].dtype == jnp.int32
    assert found["image"].dtype == jnp.float32


def test_bad_values_are_one_sentence():
    for options, name in (({"mixup": -1.0}, "mix.mixup"), ({"probability": 1.5}, "mix.probability")):
        with pytest.raises(InputError, match=name):
            Mixing(**options)
    with pytest.raises(InputError, match="erase_probability"):
        task(erase_probability=2.0)
