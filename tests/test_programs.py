"""Programs for one shape after the other are forgotten before the process has no place for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax import programs
from msvmamba_jax.programs import ManyShapes, half_of_the_memory_maps_are_taken
from msvmamba_jax.training.parallelism import make_layout


def traced_function():
    """A jitted function, and the lengths for which it was traced."""
    traced = []

    @jax.jit
    def double(x):
        traced.append(x.shape[0])
        return 2 * x

    return double, traced


def test_nothing_is_forgotten_while_there_is_room():
    double, traced = traced_function()
    function = ManyShapes(double, lambda: False)
    for length in (1, 2, 1, 2):
        np.testing.assert_array_equal(function(jnp.ones(length)), np.full(length, 2.0))
    assert traced == [1, 2]


def test_programs_are_forgotten_before_a_new_shape():
    double, traced = traced_function()
    function = ManyShapes(double, lambda: len(traced) >= 2)
    for length in (1, 2, 2, 1, 3, 1):
        np.testing.assert_array_equal(function(jnp.ones(length)), np.full(length, 2.0))
    assert traced == [1, 2, 3, 1]


def test_forgetting_gives_memory_maps_back():
    maps = _maps()
    compiled = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)
    function = ManyShapes(compiled, lambda: _maps() >= maps + 24)
    most = 0
    for length in range(2, 42):
        function(np.ones((length, length), np.float32))
        most = max(most, _maps())
    assert most < maps + 60  # forty programs take more than a hundred


def _maps() -> int:
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps)
    except OSError:
        pytest.skip("no Linux")


@pytest.mark.parametrize(("taken", "expected"), [(5, False), (6, True)])
def test_half_of_the_maps(tmp_path, taken, expected):
    for path, content in (("sys/vm/max_map_count", "10\n"), ("self/maps", "55d0-55d1 r--p 0 00:00 0\n" * taken)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(content)
    assert half_of_the_memory_maps_are_taken(tmp_path) is expected


def test_a_system_without_such_files_is_never_crowded(tmp_path):
    assert not half_of_the_memory_maps_are_taken(tmp_path)


@pytest.mark.parametrize("parallelism", ["jit", "pmap"])
def test_predictions_of_a_run_ask_before_each_new_shape(monkeypatch, parallelism):
    asked = []
    monkeypatch.setattr(programs, "half_of_the_memory_maps_are_taken", lambda: asked.append(1) or False)
    layout = make_layout(parallelism, fsdp=1, batch_size=4)
    predict = layout.compile_predict(lambda params, batch: {"y": params["w"] * batch["x"]})
    for length in (1, 2, 1):
        found = predict({"w": jnp.float32(3)}, layout.put({"x": np.ones((4, length), np.float32)}))
        np.testing.assert_array_equal(found["y"], np.full((4, length), 3.0))
    assert len(asked) == 2
