"""The training state and the functions that are compiled: one training step, one evaluation step.

The state is a plain dictionary: `step`, `params`, `ema` (the averaged weights) and `opt` (the optimiser's).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from msvmamba_jax.models.parameters import Tree, bind, get_parameters
from msvmamba_jax.tasks.base import Batch, Task

State = dict[str, Any]
Metrics = dict[str, jax.Array]


def initial_state(model: nnx.Module, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step. Traceable."""
    params = get_parameters(model)
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt": optimizer.init(params),
    }


def train_step(
    model: nnx.Module,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    ema_decay: float,
    accumulate: int,
    freeze_backbone: bool = False,
    axis: str | None = None,
    processes: int = 1,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """A function (state, batch) -> (state, metrics); to be compiled.

    Randomness is a function of the seed, the step and the example's place in the global batch alone. With `accumulate`
    > 1 the batch is worked through in that many parts; the update is the same as without, up to rounding.

    Args:
        model: the model, abstract or not; only its structure is used.
        task: gives the loss.
        optimizer: the update rule.
        schedule: the learning rate, for the metrics.
        seed: of the random keys.
        ema_decay: decay of the averaged weights for each step.
        accumulate: parts of a batch.
        freeze_backbone: leave out the backward pass through `backbone`: its gradient is zero.
        axis: None where the function sees the whole batch; under `jax.pmap` its axis name: then every device sees its
            rows, in the order of the devices, and gradients and metrics are averaged over them.
        processes: how many processes the batch comes from. Process p gives the examples p, p + processes, ...
            (`train_batches`), and its rows follow those of process p - 1.
    """

    def gradient(params: Tree, batch: Batch, keys: jax.Array) -> tuple[Tree, Metrics]:
        def loss(params: Tree) -> tuple[jax.Array, Metrics]:
            if freeze_backbone:
                params = {**params, "backbone": jax.lax.stop_gradient(params["backbone"])}
            value, metrics = task.loss(bind(model, params), batch, keys)
            return value, {"loss": value, **metrics}

        return jax.grad(loss, has_aux=True)(params)

    def accumulated(params: Tree, batch: Batch, keys: jax.Array) -> tuple[Tree, Metrics]:
        # Part j takes the rows j, j + accumulate, ...: each device goes on holding rows of its own.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), (dict(batch), keys))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, batch, keys))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    def mirror(x: jax.Array) -> jax.Array:
        x = jnp.flip(x, axis=0)
        if axis is None:
            return x
        devices = jax.lax.axis_size(axis)  # device d's rows, reversed, are the partners of those of device n - 1 - d
        return jax.lax.ppermute(x, axis, [(d, devices - 1 - d) for d in range(devices)])

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params = state["params"]
        step_key = jax.random.fold_in(jax.random.key(seed), state["step"])
        local = jax.tree.leaves(dict(batch))[0].shape[0]
        size = local if axis is None else local * jax.lax.axis_size(axis)
        rows = jnp.arange(local) + (0 if axis is None else local * jax.lax.axis_index(axis))
        per_example = jax.vmap(jax.random.fold_in, (None, 0))
        examples = rows % (size // processes) * processes + rows // (size // processes)
        keys = per_example(step_key, examples)
        batch_key = jax.random.fold_in(step_key, size)  # the first index that no example has
        batch = task.prepare(batch, per_example(batch_key, examples), batch_key, mirror)
        gradients, metrics = (accumulated if accumulate > 1 else gradient)(params, batch, keys)
        if axis is not None:  # all devices hold the same number of rows, so the mean of their means is the batch's
            gradients, metrics = jax.lax.pmean((gradients, metrics), axis)
        updates, opt = optimizer.update(gradients, state["opt"], params)
        params = optax.apply_updates(params, updates)
        # In this form the average of what does not change does not change either, to the last bit.
        ema = jax.tree.map(lambda old, new: old + (1.0 - ema_decay) * (new - old), state["ema"], params)
        metrics = {
            **metrics,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state["step"])),
        }
        return {"step": state["step"] + 1, "params": params, "ema": ema, "opt": opt}, metrics

    return step


def predict_step(model: nnx.Module, task: Task) -> Callable[[Tree, Batch], dict[str, jax.Array]]:
    """A function (params, batch) -> predictions; to be jitted."""

    def step(params: Tree, batch: Batch) -> dict[str, jax.Array]:
        return task.predict(bind(model, params), batch)

    return step
