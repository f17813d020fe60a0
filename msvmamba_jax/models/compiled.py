"""Compilation of a model's methods where they are called outside of `jax.jit`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

Method = TypeVar("Method", bound=Callable[..., Any])


def compiled(method: Method) -> Method:
    """Decorates a method of an `nnx.Module` so that a call on arrays runs as one compiled program.

    Without it JAX would compile a program for every operation and shape, which takes minutes. Calls that pass tracers,
    as inside `jax.jit` or `jax.grad`, are left alone. Keyword-only arguments, such as `train`, are static.
    """
    signature = inspect.signature(method)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(graph: Any, options: tuple[tuple[str, Any], ...], state: Any, arguments: Any) -> tuple[Any, Any]:
        model = nnx.merge(graph, state)
        return method(model, *arguments, **dict(options)), nnx.state(model, nnx.BatchStat)

    @functools.wraps(method)
    def call(self: nnx.Module, *arguments: Any, **options: Any) -> Any:
        graph, state = nnx.split(self)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((state, arguments, options))):
            return method(self, *arguments, **options)
        bound = signature.bind(self, *arguments, **options)
        result, statistics = run(graph, tuple(bound.kwargs.items()), state, bound.args[1:])
        if any(bound.kwargs.values()):
            nnx.update(self, statistics)
        return result

    return call  # type: ignore[return-value]
