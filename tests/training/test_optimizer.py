"""The recipe against the original's recorded learning rates and weight-decay groups, and AdamW worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msvmamba_jax import InputError, create_model
from msvmamba_jax.convert.names import to_original
from msvmamba_jax.models.parameters import abstract_model, flatten, get_parameters
from msvmamba_jax.training.optimizer import adamw, cosine_schedule, decay_mask


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


@pytest.mark.parametrize("warmup_steps", [-1, 10, 11])
def test_warmup_must_be_shorter_than_the_run(warmup_steps):
    with pytest.raises(InputError, match="warmup_steps"):
        cosine_schedule(peak=1.0, warmup_start=0.0, minimum=0.0, warmup_steps=warmup_steps, total_steps=10)


def test_weight_decay_groups_equal_the_recorded_ones(parity):
    groups = parity.json("recipe/weight_decay_groups.json")
    parameters = get_parameters(abstract_model(lambda: create_model("msvmamba_nano", rngs=nnx.Rngs(0))))
    shapes = dict(flatten(parameters))
    # A tensor of the original takes the flag of ours through the name table: 1 where it decays.
    flags = {name: np.full(shapes[name].shape, decays, np.int8) for name, decays in flatten(decay_mask(parameters))}
    original = to_original(flags, "multi_scale")
    assert sorted(original) == sorted(groups["decay"] + groups["no_decay"])
    assert all((original[name] == 1).all() for name in groups["decay"])
    assert all((original[name] == 0).all() for name in groups["no_decay"])


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
