"""The random choice of examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.models.detection import sampling
from msvmamba_jax.models.detection.assignment import IGNORED, NEGATIVE
from msvmamba_jax.models.detection.sampling import Quota, everything, priorities

sample = jax.jit(sampling.sample, static_argnums=2)


def truths(positives: int, negatives: int, ignored: int, seed: int = 0) -> jax.Array:
    truth = np.repeat([3, NEGATIVE, IGNORED], [positives, negatives, ignored])
    return jnp.asarray(np.random.default_rng(seed).permutation(truth), jnp.int32)


def draw(truth: jax.Array, quota: Quota, seed: int = 0):
    places = jnp.arange(truth.size, dtype=jnp.uint32)
    return jax.device_get(sample(truth, priorities(jax.random.key(seed), places), quota))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((50, 100, 10), (8, 12)),  # enough of both
        ((3, 100, 10), (3, 17)),  # negatives fill up
        ((50, 5, 10), (8, 5)),  # positives do not
        ((0, 100, 0), (0, 20)),
        ((4, 0, 30), (4, 0)),
        ((2, 3, 1), (2, 3)),  # fewer candidates than places
        ((0, 0, 9), (0, 0)),
    ],
)
def test_counts_and_order(counts, expected):
    truth = truths(*counts)
    chosen = draw(truth, Quota(20, 8))
    assert chosen.candidate.shape == (20,)
    assert (chosen.positive.sum(), chosen.negative.sum()) == expected
    np.testing.assert_array_equal(np.flatnonzero(chosen.positive), np.arange(expected[0]))
    np.testing.assert_array_equal(np.flatnonzero(chosen.negative), expected[0] + np.arange(expected[1]))
    for mask, wanted in ((chosen.positive, truth >= 0), (chosen.negative, truth == NEGATIVE)):
        index = chosen.candidate[mask]
        assert np.asarray(wanted)[index].all()
        assert (np.diff(index) > 0).all()  # rising, none twice


def test_everything_takes_all():
    truth = truths(9, 20, 5)
    chosen = draw(truth, everything(34))
    np.testing.assert_array_equal(chosen.candidate[chosen.positive], np.flatnonzero(truth >= 0))
    np.testing.assert_array_equal(chosen.candidate[chosen.negative], np.flatnonzero(truth == NEGATIVE))


def test_every_candidate_has_the_same_chance():
    truth = truths(20, 40, 0)
    keys = jax.random.split(jax.random.key(1), 2000)
    places = jnp.arange(60, dtype=jnp.uint32)
    chosen = jax.jit(jax.vmap(lambda key: sample(truth, priorities(key, places), Quota(20, 8))))(keys)
    counts = np.bincount(np.asarray(chosen.candidate[chosen.valid]), minlength=60)
    expected = np.where(truth >= 0, 2000 * 8 / 20, 2000 * 12 / 40)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(800)
    assert counts.sum() == 2000 * 20


def test_priorities_belong_to_places():
    places = jnp.asarray([5, 1, 7, 4_000_000_000], jnp.uint32)
    all_places = priorities(jax.random.key(3), places)
    assert all_places.dtype == jnp.int32
    assert (all_places >= 0).all()
    assert len(set(all_places.tolist())) == 4
    np.testing.assert_array_equal(priorities(jax.random.key(3), places[2:]), all_places[2:])
    assert (priorities(jax.random.key(4), places) != all_places).any()


def test_ignored_candidates_change_nothing():
    truth, places = truths(30, 60, 0), jnp.arange(90, dtype=jnp.uint32)
    priority = priorities(jax.random.key(0), places)
    expected = sample(truth, priority, Quota(20, 8))
    more = jnp.concatenate([truth, jnp.full(40, IGNORED, jnp.int32)])
    found = sample(more, priorities(jax.random.key(0), jnp.arange(130, dtype=jnp.uint32)), Quota(20, 8))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
