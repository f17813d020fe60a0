"""Settings and fixtures of all tests: strict dtypes, four devices, one cache of compiled programs, the recordings."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from msvmamba_jax.models import depthwise
from msvmamba_jax.programs import cache_folder, half_of_the_memory_maps_are_taken

# One cache for all workers, for the commands that tests start, and for later runs.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder() / "tests")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

if not Path("/dev/nvidiactl").exists():
    # For CPUs: a quarter of the time to compile, and what is compiled here runs only a few times. Commands inherit it.
    flags = ["--xla_backend_optimization_level=0"]
    if jax.__version_info__ < (0, 11):  # newer ones end where they do not know a flag
        flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
jax.config.update("jax_num_cpu_devices", 4)  # takes effect only before the first use of a device
jax.config.update("jax_default_matmul_precision", "highest")  # GPUs round float32 factors to 10 bits otherwise
jax.config.update("jax_numpy_dtype_promotion", "strict")  # an accidental float32 in a bfloat16 model is an error


@pytest.fixture(autouse=True)
def quickly_compiled_convolutions(request, monkeypatch):
    """On a CPU, XLA's grouped convolution runs for longer than the sum of shifted maps but compiles in less time.

    Tests marked `shifted_sums` use what users get.
    """
    if not request.node.get_closest_marker("shifted_sums"):
        monkeypatch.setattr(depthwise, "_shifted_sum", depthwise._grouped_conv)
        monkeypatch.setattr(depthwise, "_shifted_sum_vjp", depthwise._grouped_conv_vjp)


def pytest_terminal_summary(terminalreporter):
    """Says which backends of kernels had their numbers compared: tests record a property `compared`."""
    compared = [
        value
        for report in terminalreporter.stats.get("passed", [])
        if report.when == "call"
        for name, value in report.user_properties
        if name == "compared"
    ]
    for backend, count in sorted(collections.Counter(compared).items()):
        terminalreporter.write_line(f"numbers of {backend} compared with a reference in {count} tests")
    if path := os.environ.get("COMPARED_BACKENDS_FILE"):
        with open(path, "a") as file:
            file.writelines(f"{backend}\n" for backend in compared)


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """What hundreds of tests have compiled would use up a process's memory maps."""
    yield
    if half_of_the_memory_maps_are_taken():
        jax.clear_caches()


class Parity:
    """The folder `tests/parity`: arrays of the original implementation, and the weights they were recorded with."""

    folder = Path(__file__).parent / "parity"

    def __init__(self) -> None:
        spec = importlib.util.spec_from_file_location("parity_weights", self.folder / "weights.py")
        assert spec is not None
        assert spec.loader is not None
        self.weights = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.weights)

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / name) as file:
            return dict(file)

    def state_dict(self, name: str, seed: int = 0) -> dict[str, np.ndarray]:
        """The whole state dict that the manifest in the JSON file `name` describes."""
        return self.weights.state_dict(self.json(name)["manifest"], seed)

    def images(self, tag: str, batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
        """The input of that recording, channels last."""
        return self.weights.inputs(tag, (batch, 3, height, width), seed).transpose(0, 2, 3, 1)


def relative_error(found: Any, reference: np.ndarray) -> float:
    """L2 norm of the difference over that of the reference."""
    found = np.asarray(found, np.float64)
    assert found.shape == reference.shape, (found.shape, reference.shape)
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


@pytest.fixture(scope="session")
def parity() -> Parity:
    return Parity()


@pytest.fixture(scope="session", name="relative_error")
def relative_error_fixture() -> Any:
    return relative_error
