"""The recipe against the original's recorded learning rates and weight-decay groups, and AdamW worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from msvmamba_jax import InputError, create_model
from msvmamba_jax.convert.names import to_original
from msvmamba_jax.models.parameters import abstract_model, flatten, get_parameters
from msvmamba_jax.models.variants import create_segmenter
from msvmamba_jax.training.durations import Clock
from msvmamba_jax.training.optimizer import (
    adamw,
    all_but_norms,
    all_but_vectors,
    cosine_schedule,
    linear_schedule,
    schedule_of,
    step_schedule,
)


def test_learning_rates_equal_the_recorded_ones(parity):
    recorded = parity.json("recipe/lr_schedule.json")
    scale = recorded["total_batch"] / 512
    schedule = cosine_schedule(
        peak=5e-4 * scale,
        warmup_start=5e-7 * scale,
        minimum=5e-6 * scale,
        warmup_steps=20 * recorded["steps_per_epoch"],
        total_steps=300 * recorded["steps_per_epoch"],
    )
    for step, rate in recorded["values"].items():
        np.testing.assert_allclose(schedule(int(step)), rate, rtol=1e-5, atol=1e-10, err_msg=step)


def options(**optimizer):
    values = {"schedule": "cosine", "learning_rate": 1.0, "warmup": "2 steps", "warmup_start": 0.1, "minimum": 0.01}
    return ConfigDict({"batch_size": 8, "optimizer": {**values, "batch_size": 4, **optimizer}})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"warmup": "10 steps"}, "not shorter than the run of 10 steps"),
        ({"warmup": "100 %"}, "not shorter than the run"),
        ({"warmup": "soon"}, 'like "5 epochs" or "100 steps" or "10 %"'),
        ({"learning_rate": float("nan")}, "peak learning rate"),
        ({"minimum": -1.0}, "minimum learning rate"),
        ({"schedule": "sine"}, "there are cosine, linear, steps"),
    ],
)
def test_impossible_schedules(bad, message):
    with pytest.raises(InputError, match=message):
        schedule_of(options(**bad), Clock(5, 10))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "steps"])
def test_rates_scale_with_the_batch(schedule):
    rate = schedule_of(options(schedule=schedule, drops=("1 epoch",)), Clock(5, 10))
    np.testing.assert_allclose([rate(0), rate(2)], [0.2, 2.0], rtol=1e-6)
    assert rate(9) < 1.0


def test_linear_schedule_arrives_with_the_last_step_of_each_part():
    rate = linear_schedule(peak=1.0, warmup_start=0.0, minimum=0.0, warmup_steps=5, total_steps=16)
    np.testing.assert_allclose([rate(step) for step in range(5)], [0.0, 0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rate(step) for step in range(5, 16)], np.linspace(1.0, 0.0, 11), atol=1e-6)


def test_step_schedule_drops_during_the_warmup_too():
    rate = step_schedule(peak=1.0, warmup_start=0.0, warmup_steps=5, drops=(3, 10, 12))
    np.testing.assert_allclose([rate(2), rate(3), rate(4)], [0.5, 0.075, 0.1], rtol=1e-5)
    np.testing.assert_allclose([rate(9), rate(10), rate(11), rate(12)], [0.1, 0.01, 0.01, 0.001], rtol=1e-5)


def test_weight_decay_groups_equal_the_recorded_ones(parity):
    groups = parity.json("recipe/weight_decay_groups.json")
    parameters = get_parameters(abstract_model(lambda: create_model("msvmamba_nano", rngs=nnx.Rngs(0))))
    shapes = dict(flatten(parameters))
    # A tensor of the original takes the flag of ours through the name table: 1 where it decays.
    flags = {
        name: np.full(shapes[name].shape, decays, np.int8) for name, decays in flatten(all_but_vectors(parameters))
    }
    original = to_original(flags, "multi_scale")
    assert sorted(original) == sorted(groups["decay"] + groups["no_decay"])
    assert all((original[name] == 1).all() for name in groups["decay"])
    assert all((original[name] == 0).all() for name in groups["no_decay"])


def test_norms_of_a_segmenter_do_not_decay(parity):
    """The original's rule: what has "norm" in its name, and it calls 74 tensors of nano so."""
    manifest = parity.json("segmentation/nano.json")["manifest"]
    parameters = get_parameters(abstract_model(lambda: create_segmenter("msvmamba_nano", rngs=nnx.Rngs(0))))
    shapes = dict(flatten(parameters))
    flags = {name: np.full(shapes[name].shape, decays, np.int8) for name, decays in flatten(all_but_norms(parameters))}
    original = to_original(flags, "multi_scale", "segmentation")
    kept = {name for name, flag in original.items() if not flag.any()}
    assert kept == {name for name in manifest if "norm" in name}
    assert len(kept) == 74
    assert all(flag.all() for name, flag in original.items() if name not in kept)


# optax itself mixes dtypes
standard_promotion = jax.numpy_dtype_promotion("standard")


@standard_promotion
def test_adamw_with_clipping_by_hand():
    optimizer = adamw(lambda _: 0.1, weight_decay=0.5, clip_norm=1.0)
    params = {"w": jnp.array([[2.0, 0.0]]), "b": jnp.array([1.0])}
    gradients = {"w": jnp.array([[0.0, 4.0]]), "b": jnp.array([3.0])}  # norm 5, clipped to 1
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # The first Adam update is the sign of the gradient; the matrix also decays by rate * decay * value.
    np.testing.assert_allclose(updates["w"], [[-0.1 * 0.5 * 2.0, -0.1]], rtol=1e-5)
    np.testing.assert_allclose(updates["b"], [-0.1], rtol=1e-5)


@standard_promotion
def test_clipping_bounds_what_adam_sees():
    optimizer = adamw(lambda _: 0.1, weight_decay=0.0, clip_norm=5.0)
    params = {"w": jnp.zeros((1, 2))}
    _, state = optimizer.update({"w": jnp.array([[30.0, 40.0]])}, optimizer.init(params), params)
    moment = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (1, 2))
    np.testing.assert_allclose(moment, [[0.3, 0.4]], rtol=1e-5)  # 0.1 * (3, 4)
