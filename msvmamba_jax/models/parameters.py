"""A model's arrays as a plain nested dictionary, and back.

The dictionary has string keys only (a list's items are "0", "1", ...), so that optimisers, checkpoints and converters
see the same tree whether it comes from a model or from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from msvmamba_jax.errors import InputError

Tree = dict[str, Any]
Model = TypeVar("Model", bound=nnx.Module)


def get_parameters(model: nnx.Module) -> Tree:
    """The arrays of all `nnx.Param` of `model`, nested as its attributes are: what is trained."""
    return _with_string_keys(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def get_statistics(model: nnx.Module) -> Tree:
    """The arrays of all `nnx.BatchStat` of `model`: running means and variances; {} where there are none."""
    return _with_string_keys(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))


def get_weights(model: nnx.Module) -> Tree:
    """Parameters and statistics in one tree: all that a checkpoint must hold."""
    return merge(get_parameters(model), get_statistics(model))


def merge(tree: Tree, other: Tree) -> Tree:
    """The union of two nested dictionaries.

    Raises:
        ValueError: both have a leaf at the same place, or one has a leaf where the other has a dictionary.
    """
    merged = dict(tree)
    for key, value in other.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            merged[key] = merge(merged[key], value)
        else:
            raise ValueError(f"both trees have a leaf at {key}")
    return merged


class _ShapeKeys:
    """Stands in for `nnx.Rngs` where the values of parameters do not matter: every key is the same.

    Tracing the counters of `nnx.Rngs` takes most of the time of `abstract_model`.
    """

    def __getattr__(self, stream: str) -> Callable[[], jax.Array]:
        return lambda: jax.random.key(0)


SHAPE_KEYS: Any = _ShapeKeys()


def abstract_model(build: Callable[[], Model]) -> Model:
    """What `build` returns, with shapes in place of arrays: costs no memory and compiles nothing.

    Fastest where `build` passes `SHAPE_KEYS` as its keys.
    """
    return nnx.eval_shape(build)


def bind(model: Model, weights: Tree) -> Model:
    """A copy of `model` (which may be abstract) that holds `weights`, a tree as `get_weights` gives.

    Raises:
        InputError: names or shapes differ from the model's; the sentence lists what does not fit.
    """
    graph, state, *rest = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
    check_fit(_with_string_keys(nnx.to_pure_dict(state)), weights)
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(weights))
    return nnx.merge(graph, state, *rest, copy=True)


def check_fit(expected: Tree, found: Tree, what: str = "the weights") -> None:
    """Compares names and shapes of two trees.

    Raises:
        InputError: they differ; the sentence lists missing, unknown and differently shaped arrays.
    """
    want, have = dict(flatten(expected)), dict(flatten(found))
    problems = [f"{name} is missing" for name in want if name not in have]
    problems += [f"{name} is unknown" for name in have if name not in want]
    problems += [
        f"{name} has shape {tuple(np.shape(have[name]))} instead of {tuple(np.shape(want[name]))}"
        for name in want
        if name in have and np.shape(have[name]) != np.shape(want[name])
    ]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise InputError(f"{what} do not fit the model: {shown}")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of a nested dictionary with their names joined by dots, in the dictionary's order."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    tree: Tree = {}
    for name, value in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def count(parameters: Tree) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(np.shape(leaf))) for _, leaf in flatten(parameters))


def _with_string_keys(tree: Mapping[Any, Any]) -> Tree:
    return {str(k): _with_string_keys(v) if isinstance(v, Mapping) else v for k, v in tree.items()}
