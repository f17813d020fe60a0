"""Parameters and statistics of a model as trees, and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from msvmamba_jax.errors import InputError
from msvmamba_jax.models.parameters import (
    abstract_model,
    bind,
    flatten,
    get_parameters,
    get_statistics,
    get_weights,
    merge,
)


class Layer(nnx.Module):
    def __init__(self, start: float):
        self.scale = nnx.Param(jnp.full(3, start))
        self.mean = nnx.BatchStat(jnp.full(3, start + 0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.mean[...] = x
        return x * self.scale[...]


class Model(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([Layer(1.0), Layer(2.0)])
        self.head = nnx.Param(jnp.zeros((2, 2)))


class Plain(nnx.Module):
    def __init__(self):
        self.head = nnx.Param(jnp.zeros((2, 2)))


def leaves(tree):
    return {name: np.asarray(x).tolist() for name, x in flatten(tree)}


def test_parameters_and_statistics_are_apart():
    assert leaves(get_parameters(Model())) == {
        "layers.0.scale": [1.0] * 3,
        "layers.1.scale": [2.0] * 3,
        "head": [[0.0] * 2] * 2,
    }
    assert leaves(get_statistics(Model())) == {"layers.0.mean": [1.5] * 3, "layers.1.mean": [2.5] * 3}
    assert leaves(get_weights(Model())) == leaves(get_parameters(Model())) | leaves(get_statistics(Model()))


def test_a_model_without_statistics():
    assert get_statistics(Plain()) == {}
    assert leaves(get_weights(Plain())) == leaves(get_parameters(Plain())) == {"head": [[0.0] * 2] * 2}
    assert leaves(get_parameters(bind(Plain(), {"head": np.ones((2, 2))}))) == {"head": [[1.0] * 2] * 2}


@pytest.mark.parametrize("abstract", [False, True])
def test_bind_takes_both_kinds(abstract):
    model = abstract_model(Model) if abstract else Model()
    weights = jax.tree.map(lambda x: x + 10, get_weights(Model()))
    bound = bind(model, weights)
    assert leaves(get_weights(bound)) == leaves(weights)
    assert leaves(get_statistics(bound)) == {"layers.0.mean": [11.5] * 3, "layers.1.mean": [12.5] * 3}
    if not abstract:
        assert leaves(get_weights(model)) == leaves(get_weights(Model()))


def test_statistics_that_a_traced_call_updates():
    """The training step's way: bind, call, read back; nothing leaks out of the trace."""
    model = abstract_model(Model)

    @jax.jit
    def step(parameters, statistics, x):
        bound = bind(model, merge(parameters, statistics))
        return bound.layers[1](x), get_statistics(bound)

    y, statistics = step(get_parameters(Model()), get_statistics(Model()), jnp.arange(3.0))
    assert y.tolist() == [0.0, 2.0, 4.0]
    assert leaves(statistics) == {"layers.0.mean": [1.5] * 3, "layers.1.mean": [0.0, 1.0, 2.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["layers"]["1"].pop("mean"), r"layers\.1\.mean is missing"),
        (lambda tree: tree["layers"]["1"].pop("scale"), r"layers\.1\.scale is missing"),
        (lambda tree: tree["layers"]["0"].update(var=np.zeros(3)), r"layers\.0\.var is unknown"),
        (
            lambda tree: tree["layers"]["0"].update(mean=np.zeros(4)),
            r"layers\.0\.mean has shape \(4,\) instead of \(3,\)",
        ),
    ],
)
def test_bind_names_what_does_not_fit(change, message):
    weights = get_weights(Model())
    change(weights)
    with pytest.raises(InputError, match=message):
        bind(Model(), weights)


def test_merge():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merge(tree, {"a": {"c": {"x": 4}}, "f": 5}) == {"a": {"b": 1, "c": {"d": 2, "x": 4}}, "e": 3, "f": 5}
    assert tree == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert merge(tree, {}) == merge({}, tree) == tree


@pytest.mark.parametrize("other", [{"e": 3}, {"a": {"b": 1}}, {"a": 1}, {"e": {"x": 1}}])
def test_merge_never_decides_between_two_leaves(other):
    with pytest.raises(ValueError, match="both trees have a leaf at"):
        merge({"a": {"b": 1}, "e": 3}, other)
