"""What the tests of data sets prepared for TensorFlow Datasets share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msvmamba_jax.data import encoded

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged files are reported again, though another test has met them."""
    monkeypatch.setattr(encoded, "_reported", set())


@pytest.fixture(scope="module")
def prepare(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Calls the script that the test file's SCRIPT names, with a command line."""
    pytest.importorskip("tensorflow_datasets")
    name = request.module.SCRIPT
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def prepare(*arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
            script.main()

    return prepare


@pytest.fixture(scope="module")
def prepared(prepare: Callable[..., None], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test file's folder as the script has prepared it."""
    data_dir = tmp_path_factory.mktemp("prepared")
    prepare(folder, data_dir)
    return data_dir


@pytest.fixture
def stopped(prepare: Callable[..., None], tmp_path: Path) -> Callable[[Path], str]:
    """The one sentence with which the script refuses a source."""

    def stopped(source: Path) -> str:
        with pytest.raises(SystemExit) as stop:
            prepare(source, tmp_path / "prepared")
        message = str(stop.value)
        assert message.startswith("error: ")
        assert "\n" not in message
        return message

    return stopped
