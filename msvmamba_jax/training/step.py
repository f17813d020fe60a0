"""The training state and the functions that are compiled: one training step, one evaluation step.

The state is a plain dictionary: `step`, `params`, `opt` (the optimiser's); `batch_stats`, where the model has running
statistics; and `ema`, the averaged weights (parameters and statistics), where they are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from msvmamba_jax.checkpoint import Weights
from msvmamba_jax.models.parameters import Tree, bind, get_parameters, get_statistics, merge
from msvmamba_jax.tasks.base import Batch, Task

State = dict[str, Any]
Metrics = dict[str, jax.Array]


def initial_state(model: nnx.Module, optimizer: optax.GradientTransformation, *, ema: bool = True) -> State:
    """The state before the first step, with averaged weights or without. Traceable."""
    params, statistics = get_parameters(model), get_statistics(model)
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt": optimizer.init(params)}
    if statistics:
        state["batch_stats"] = statistics
    if ema:
        state["ema"] = jax.tree.map(jnp.copy, merge(params, statistics))
    return state


def weights_of(state: State, kind: Weights) -> Tree:
    """What `bind` takes: the "raw" weights of a state, or the averaged ones, "ema"."""
    return state["ema"] if kind == "ema" else merge(state["params"], state.get("batch_stats", {}))


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
    > 1 the batch is worked through in that many parts; the update is the same as without, up to rounding, but that a
    batch normalisation takes the statistics of each part, and their averages into its running ones, and that losses
    which are divided by what a batch holds (detection's) are divided part by part.

    Args:
        model: the model, abstract or not; only its structure is used.
        task: gives the loss.
        optimizer: the update rule.
        schedule: the learning rate, for the metrics.
        seed: of the random keys.
        ema_decay: decay of the averaged weights for each step, where the state has any.
        accumulate: parts of a batch.
        freeze_backbone: leave out the backward pass through `backbone`: its gradient is zero.
        axis: None where the function sees the whole batch; under `jax.pmap` its axis name: then every device sees its
            rows, in the order of the devices, and gradients and metrics are averaged over them.
        processes: how many processes the batch comes from. Process p gives the examples p, p + processes, ...
            (`train_batches`), and its rows follow those of process p - 1.
    """

    def gradient(params: Tree, statistics: Tree, batch: Batch, keys: jax.Array) -> tuple[Tree, tuple[Tree, Metrics]]:
        def loss(params: Tree) -> tuple[jax.Array, tuple[Tree, Metrics]]:
            if freeze_backbone:
                params = {**params, "backbone": jax.lax.stop_gradient(params["backbone"])}
            bound = bind(model, merge(params, statistics))
            value, metrics = task.loss(bound, batch, keys)
            return value, (get_statistics(bound), {"loss": value, **metrics})

        return jax.grad(loss, has_aux=True)(params)

    def accumulated(params: Tree, statistics: Tree, batch: Batch, keys: jax.Array) -> tuple[Tree, tuple[Tree, Metrics]]:
        # Part j takes the rows j, j + accumulate, ...: each device goes on holding rows of its own.
        parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), (dict(batch), keys))
        shapes = jax.eval_shape(gradient, params, statistics, batch, keys)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, statistics, *part)), None

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
        statistics = state.get("batch_stats", {})
        gradients, (statistics, metrics) = (accumulated if accumulate > 1 else gradient)(
            params, statistics, batch, keys
        )
        if axis is not None:  # all devices hold the same number of rows
            gradients, statistics, metrics = jax.lax.pmean((gradients, statistics, metrics), axis)
        updates, opt = optimizer.update(gradients, state["opt"], params)
        params = optax.apply_updates(params, updates)
        new = {"step": state["step"] + 1, "params": params, "opt": opt}
        if statistics:
            new["batch_stats"] = statistics
        if "ema" in state:
            # In this form the average of what does not change does not change either, to the last bit.
            average = lambda old, new: old + (1.0 - ema_decay) * (new - old)  # noqa: E731
            new["ema"] = jax.tree.map(average, state["ema"], merge(params, statistics))
        metrics = {
            **metrics,
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": jnp.asarray(schedule(state["step"])),
        }
        return new, metrics

    return step


def predict_step(model: nnx.Module, task: Task) -> Callable[[Tree, Batch], dict[str, jax.Array]]:
    """A function (weights, batch) -> predictions; to be jitted."""

    def step(weights: Tree, batch: Batch) -> dict[str, jax.Array]:
        return task.predict(bind(model, weights), batch)

    return step
