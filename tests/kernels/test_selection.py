"""Which implementation of the scan is chosen, and what is said about it."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax import create_model
from msvmamba_jax.errors import InputError
from msvmamba_jax.kernels.selective_scan import (
    available_implementations,
    implementations,
    requested_implementation,
    selection,
    selective_scan_2d,
    xla,
)
from msvmamba_jax.kernels.selective_scan.config import float64_refusal
from msvmamba_jax.kernels.selective_scan.routes import ScanInputs

LOGGER = "msvmamba_jax.kernels.selective_scan"


class FakeBackend:
    """The functions of `xla`, which it counts; whether it can run and what it takes is for the test to decide."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.refuses: str | None = None
        self.calls: list[str] = []

    def unavailable(self):
        return self.reason

    def refusal(self, inputs, routes):
        return float64_refusal(inputs) or self.refuses

    def run(self, inputs, routes):
        self.calls.append("run")
        return xla.run(inputs, routes)

    def forward(self, inputs, routes):
        self.calls.append("forward")
        return xla.forward(inputs, routes)

    def backward(self, residuals, dy, routes):
        self.calls.append("backward")
        return xla.backward(residuals, dy, routes)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("MSVMAMBA_SCAN", raising=False)
    for cached in (selection.load, selection._log_once):
        cached.cache_clear()
    yield
    selection.load.cache_clear()


@pytest.fixture
def mosaic(monkeypatch):
    backend = FakeBackend()
    monkeypatch.setitem(sys.modules, f"{selection.__package__}.mosaic", backend)
    return backend


@pytest.fixture
def triton(monkeypatch):
    backend = FakeBackend()
    monkeypatch.setitem(sys.modules, f"{selection.__package__}.triton", backend)
    return backend


@pytest.fixture
def gpu(monkeypatch, mosaic, triton):
    """A machine with a GPU on which both other implementations run."""
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    local_devices = jax.local_devices
    monkeypatch.setattr(jax, "local_devices", lambda **kind: local_devices(**kind) if kind["backend"] else [gpu])


def scan(implementation: str | None = None, dtype: str = "float32") -> jax.Array:
    x = jnp.ones((1, 2, 2, 3), dtype)
    return selective_scan_2d(x, x, -jnp.ones((3, 1)), x[..., :1], x[..., :1], implementation=implementation)


def choose(implementation: str | None = None) -> str:
    x = jnp.ones((1, 2, 2, 3))
    inputs = ScanInputs(x, x, jnp.ones((3, 1)), x[..., :1], x[..., :1], jnp.ones(3), jnp.ones(3))
    return selection.choose(implementation, inputs, ("row",))


class TestNames:
    def test_all_are_known_without_importing_any(self):
        assert implementations() == ("mosaic", "triton", "xla")

    def test_nothing_for_gpus_is_imported_with_the_package(self):
        program = (
            "import sys, msvmamba_jax, msvmamba_jax.kernels.selective_scan as s; s.implementations();"
            "own = {f'{s.__name__}.{name}' for name in ('mosaic', 'triton')};"
            "print([m for m in sys.modules if m in own or m.split('.')[0] == 'triton' or 'pallas' in m])"
        )
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == "[]"

    @pytest.mark.usefixtures("triton")
    def test_available(self, mosaic):
        mosaic.reason = "it needs a Hopper GPU"
        assert available_implementations() == {"mosaic": "it needs a Hopper GPU", "triton": None, "xla": None}


@pytest.mark.usefixtures("gpu")
class TestAutomatic:
    def test_the_fastest(self):
        assert choose() == "mosaic"

    def test_the_fastest_that_can_run(self, mosaic, triton):
        mosaic.reason = "no Hopper"
        assert choose() == "triton"
        triton.reason = "not installed"
        assert choose() == "xla"

    def test_the_fastest_that_takes_the_scan(self, mosaic, triton):
        mosaic.refuses = "too many states"
        assert choose() == "triton"
        scan()
        assert (mosaic.calls, triton.calls) == ([], ["run"])
        triton.refuses = "too many states for this one, too"
        assert choose() == "xla"

    def test_one_that_cannot_run_is_not_asked_what_it_takes(self, monkeypatch, mosaic):
        mosaic.reason = "no Hopper"
        monkeypatch.setattr(mosaic, "refusal", lambda inputs, routes: pytest.fail("asked"))
        assert choose() == "triton"

    def test_the_default_backend_is_no_gpu(self, monkeypatch, mosaic):
        monkeypatch.setattr(jax, "local_devices", lambda **_: [SimpleNamespace(platform="cpu", device_kind="cpu")])
        mosaic.reason = "must not be asked"
        assert choose() == "xla"

    @pytest.mark.parametrize("device", ["cpu", jax.devices("cpu")[0]], ids=["name", "device"])
    def test_the_default_device_is_a_cpu(self, device):
        with jax.default_device(device):
            assert choose() == "xla"
        assert choose() == "mosaic"

    def test_float64(self, mosaic):
        with jax.enable_x64(True):
            assert scan(dtype="float64").dtype == jnp.float64
        assert mosaic.calls == []

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_the_derivative_uses_the_same(self, mosaic, dtype):
        scan(dtype=dtype)
        assert mosaic.calls == ["run"]
        x = jnp.ones((1, 2, 2, 3), dtype)
        grad = jax.grad(lambda x: selective_scan_2d(x, x, -jnp.ones((3, 1)), x[..., :1], x[..., :1]).sum())(x)
        assert mosaic.calls == ["run", "forward", "backward"]
        assert np.isfinite(np.asarray(grad, np.float32)).all()


@pytest.mark.usefixtures("gpu")
class TestRequested:
    def test_by_argument(self):
        assert choose("triton") == "triton"

    def test_by_environment(self, monkeypatch, triton):
        monkeypatch.setenv("MSVMAMBA_SCAN", "triton")
        assert choose() == requested_implementation(None) == "triton"
        scan()
        assert triton.calls == ["run"]

    def test_the_argument_comes_first(self, monkeypatch):
        monkeypatch.setenv("MSVMAMBA_SCAN", "nonsense")
        assert choose("xla") == "xla"

    def test_empty_environment(self, monkeypatch):
        monkeypatch.setenv("MSVMAMBA_SCAN", "")
        assert choose() == "mosaic"
        assert requested_implementation(None) is None

    def test_unknown(self, monkeypatch):
        with pytest.raises(ValueError, match=r"^no scan implementation 'cuda'; there is mosaic, triton, xla$"):
            scan("cuda")
        monkeypatch.setenv("MSVMAMBA_SCAN", "Xla")
        with pytest.raises(ValueError, match=r"^no scan implementation 'Xla' \(from MSVMAMBA_SCAN\); there is mosaic"):
            scan()

    def test_one_that_cannot_run(self, monkeypatch, mosaic):
        mosaic.reason = "it needs a Hopper GPU"
        message = "cannot run here: it needs a Hopper GPU; what can: triton, xla$"
        with pytest.raises(ValueError, match=f"^scan implementation 'mosaic' {message}"):
            scan("mosaic")
        monkeypatch.setenv("MSVMAMBA_SCAN", "mosaic")
        with pytest.raises(ValueError, match=rf"^scan implementation 'mosaic' \(from MSVMAMBA_SCAN\) {message}"):
            scan()

    @pytest.mark.parametrize("name", ["mosaic", "triton"])
    def test_float64(self, name):
        message = f"^scan implementation '{name}' does not take this scan: it computes in float32, and u is float64; "
        with jax.enable_x64(True), pytest.raises(ValueError, match=f"{message}use implementation='xla'$"):
            scan(name, "float64")

    def test_one_that_does_not_take_the_scan(self, monkeypatch, mosaic):
        mosaic.refuses = "too many states"
        message = "does not take this scan: too many states; use implementation='xla'$"
        with pytest.raises(ValueError, match=f"^scan implementation 'mosaic' {message}"):
            scan("mosaic")
        monkeypatch.setenv("MSVMAMBA_SCAN", "mosaic")
        with pytest.raises(ValueError, match=rf"^scan implementation 'mosaic' \(from MSVMAMBA_SCAN\) {message}"):
            scan()
        assert mosaic.calls == []

    def test_models_refuse_early(self, monkeypatch, triton):
        triton.reason = "not installed"
        with pytest.raises(InputError, match="'triton' cannot run here: not installed; what can: mosaic, xla"):
            create_model("msvmamba_nano", scan_implementation="triton", rngs=None)
        monkeypatch.setenv("MSVMAMBA_SCAN", "quantum")
        with pytest.raises(InputError, match=r"no scan implementation 'quantum' \(from MSVMAMBA_SCAN\)"):
            create_model("msvmamba_nano", rngs=None)


@pytest.mark.usefixtures("gpu")
class TestLog:
    def messages(self, caplog) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == LOGGER]

    def test_each_automatic_choice_once(self, caplog, mosaic):
        caplog.set_level(logging.INFO, LOGGER)
        scan()
        scan()
        expected = "(the fastest that runs on NVIDIA H100 80GB HBM3; MSVMAMBA_SCAN or implementation= chooses another)"
        assert self.messages(caplog) == [f"selective scan: mosaic {expected}"]
        mosaic.reason = "broken"
        scan()
        assert self.messages(caplog)[1:] == [f"selective scan: triton {expected}"]

    def test_an_implementation_that_was_passed_over(self, caplog, mosaic):
        caplog.set_level(logging.INFO, LOGGER)
        mosaic.refuses = "too many states"
        scan()
        start = (
            "selective scan: triton (the fastest that runs on NVIDIA H100 80GB HBM3; mosaic does not take this scan: "
        )
        assert self.messages(caplog)[0].startswith(start + "too many states; MSVMAMBA_SCAN or")

    def test_environment(self, caplog, monkeypatch):
        caplog.set_level(logging.INFO, LOGGER)
        monkeypatch.setenv("MSVMAMBA_SCAN", "xla")
        scan()
        scan()
        assert self.messages(caplog) == ["selective scan: xla (from MSVMAMBA_SCAN)"]

    def test_nothing_to_say_of_an_argument(self, caplog):
        caplog.set_level(logging.INFO, LOGGER)
        scan("xla")
        assert self.messages(caplog) == []
