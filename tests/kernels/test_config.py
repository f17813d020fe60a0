"""The choice of launch configurations."""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from msvmamba_jax.kernels.selective_scan import config
from msvmamba_jax.kernels.selective_scan.config import Device, Problem, choose, forced
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs

PROBLEM = Problem("forward", 2, 7, 9, 64, 1, 3, "bfloat16")
OTHER = dataclasses.replace(PROBLEM, direction="backward")
DEVICE = Device("a GPU", 8)


@dataclasses.dataclass(frozen=True)
class Config:
    channels: int
    stages: int = 2


def heuristic(problem: Problem, device: Device) -> Config:
    return Config(problem.channels)


def chosen(problem: Problem = PROBLEM, backend: str = "one") -> Config:
    return choose(backend, problem, DEVICE, heuristic)


def test_heuristic():
    assert chosen() == Config(64)


def test_measured_fields_override_the_heuristic(monkeypatch):
    key = "forward bfloat16 2x7x9x64 states=1 routes=3"
    assert PROBLEM.key == key
    monkeypatch.setattr(config, "measured", lambda: {"a GPU": {"one": {key: {"stages": 5}}}})
    assert chosen() == Config(64, 5)
    assert chosen(OTHER) == Config(64)
    assert chosen(backend="another") == Config(64)
    assert choose("one", PROBLEM, Device("another GPU", 8), heuristic) == Config(64)
    with forced("one", PROBLEM, Config(1)):
        assert chosen() == Config(1)


def test_the_dtype_of_delta_is_part_of_a_problem_where_it_differs():
    spec = jax.ShapeDtypeStruct
    maps, small, vector = spec((2, 7, 9, 64), "bfloat16"), spec((2, 7, 9, 1), "bfloat16"), spec((64,), "float32")
    inputs = ScanInputs(maps, maps, spec((64, 1), "float32"), small, small, vector, vector)
    assert Problem.of("forward", inputs, ("row", "column", "row_reversed")) == PROBLEM
    mixed = Problem.of("forward", inputs._replace(delta=spec(maps.shape, "float32")), ("row",) * 3)
    assert mixed.key == f"{PROBLEM.key} delta=float32"


def test_the_file_can_be_read():
    assert isinstance(config.measured(), dict)


class TestLocalDevice:
    def test_of_a_gpu(self, monkeypatch):
        gpu = SimpleNamespace(
            platform="gpu", device_kind="a GPU", core_count=170, shared_memory_per_block_optin=99 * 1024
        )
        monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
        assert config.local_device() == Device("a GPU", 170, 99 * 1024)

    def test_of_a_gpu_that_says_nothing(self, monkeypatch):
        monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="gpu", device_kind="a GPU")])
        assert config.local_device() == Device("a GPU", 132, 227 * 1024)

    def test_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform="cpu", device_kind="cpu")])
        assert config.local_device() == config.H100


@pytest.mark.parametrize(
    ("platform", "name", "expected"),
    [("gpu", "9.0", 9.0), ("gpu", "12.0", 12.0), ("gpu", "gfx942", None), ("gpu", "", None), ("tpu", "9.0", None)],
)
def test_compute_capability(platform, name, expected):
    assert config.compute_capability(SimpleNamespace(platform=platform, compute_capability=name)) == expected
    assert config.compute_capability(SimpleNamespace(platform="cpu")) is None


class TestForced:
    def test_for_one_backend_and_problem_and_no_longer(self):
        with forced("one", PROBLEM, Config(1)):
            assert chosen() == Config(1)
            assert chosen(OTHER) == Config(64)
            assert chosen(backend="another") == Config(64)
            with forced("one", OTHER, Config(2)), forced("one", PROBLEM, Config(3)):
                assert [chosen(), chosen(OTHER)] == [Config(3), Config(2)]
            assert [chosen(), chosen(OTHER)] == [Config(1), Config(64)]
        assert chosen() == Config(64)

    def test_ends_with_an_error(self):
        with pytest.raises(ZeroDivisionError), forced("one", PROBLEM, Config(1)):
            _ = 1 / 0
        assert chosen() == Config(64)

    def test_in_this_thread_only(self):
        found = []
        with forced("one", PROBLEM, Config(1)):
            thread = threading.Thread(target=lambda: found.append(chosen()))
            thread.start()
            thread.join()
            chosen()
        assert found == [Config(64)]

    def test_nobody_asked(self):
        """A traced function does not ask again: what would be measured is another configuration."""
        inner = jax.jit(lambda x: x * chosen().channels)
        run = lambda: jax.jit(lambda x: inner(x))(jnp.ones((), jnp.int32))  # noqa: E731
        assert run() == 64
        unasked = pytest.raises(RuntimeError, match="nothing chose a configuration for forward")
        with unasked, forced("one", PROBLEM, Config(1)):
            assert run() == 64
        jax.clear_caches()
        with forced("one", PROBLEM, Config(1)):
            assert run() == 1
