"""How the tests call the scripts that make up data sets."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load_script(name: str) -> ModuleType:
    """The script of that name, under which worker processes find its functions."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def run(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *arguments: object) -> None:
    """Calls the script with a command line."""
    monkeypatch.syspath_prepend(str(SCRIPTS))  # for the worker processes
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


def contents(root: Path) -> dict[Path, bytes]:
    """All files of a folder."""
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def check_that_nothing_is_overwritten(monkeypatch: pytest.MonkeyPatch, script: ModuleType, root: Path) -> None:
    """A folder that holds a file stays as it is."""
    root.mkdir()
    (root / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="exists and is not empty"):
        run(monkeypatch, script, root)
    assert list(root.iterdir()) == [root / "mine.txt"]


def check_options(monkeypatch: pytest.MonkeyPatch, script: ModuleType, root: Path, *, least: int) -> None:
    """What cannot be drawn is refused before a folder is made."""
    for options in (("--train", 0), ("--low", least - 1), ("--low", 100, "--high", 99)):
        with pytest.raises(SystemExit):
            run(monkeypatch, script, root, *options)
    assert not root.exists()
