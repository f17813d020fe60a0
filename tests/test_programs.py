"""Compiled programs are kept between processes, and forgotten before a process has no place for more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from msvmamba_jax import programs
from msvmamba_jax.programs import ManyShapes, half_of_the_memory_maps_are_taken, keep_compiled_programs
from msvmamba_jax.training.parallelism import make_layout


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XDG_CACHE_HOME": "/cache"}, "/cache/msvmamba_jax"),
        ({"XDG_CACHE_HOME": ""}, str(Path.home() / ".cache" / "msvmamba_jax")),
        ({"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, None),
        ({"JAX_COMPILATION_CACHE_DIR": ""}, None),
    ],
)
def test_where_compiled_programs_are_kept(monkeypatch, environment, folder):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compiled_programs()
        found = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    assert (found and str(Path(found).parent)) == folder


def test_a_folder_that_was_chosen_already_stays():
    before = jax.config.jax_compilation_cache_dir
    assert before  # the tests' own
    keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == before


def test_programs_are_kept_after_others_were_compiled_without_a_cache(tmp_path):
    program = """
import jax, jax.numpy as jnp
from pathlib import Path
from msvmamba_jax.programs import keep_compiled_programs
jnp.arange(7).sum()
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 3)(jnp.ones(5))
assert any(Path(jax.config.jax_compilation_cache_dir).iterdir())
"""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


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
