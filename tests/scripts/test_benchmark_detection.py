"""The benchmark of detection: both versions of every operator agree, and one that is wrong does not pass for fast."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

SPEC = importlib.util.spec_from_file_location(
    "benchmark_detection", Path(__file__).parents[2] / "scripts" / "benchmark_detection.py"
)
module = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(module)


@functools.cache
def operators():
    return module.operators(module.Shapes(argparse.Namespace(batch=2, size=(64, 96), regions=32, channels=4)))


@pytest.fixture(autouse=True)
def one_second(monkeypatch):
    monkeypatch.setattr(module, "median_seconds", lambda execute, repeats: (execute(), 1.0)[1])


@pytest.mark.parametrize(
    "name",
    ["RoIAlign", "RoIAlign, gradient", "suppression", "suppression by class", "assignment", "mask targets"],
)
def test_both_versions_agree(name):
    assert len(operators()) == 6
    assert module.compare(*operators()[name], repeats=1) == {"ours_ms": 1000, "obvious_ms": 1000, "ratio": 1}


def test_a_wrong_version_is_refused():
    with pytest.raises(AssertionError, match="the two versions differ by"):
        module.compare(lambda x: x, lambda x: 1.1 * x, (jnp.ones(3),), 0.05, repeats=1)
    with pytest.raises(AssertionError, match="the two versions differ by nan"):
        module.compare(lambda x: x, lambda x: x * jnp.nan, (jnp.ones(3),), 0.05, repeats=1)


def test_the_report(monkeypatch, tmp_path, capsys):
    path = tmp_path / "report.json"
    rows = {"add": (lambda x: x + x, lambda x: 2 * x, (jnp.ones(3),), 0.0)}
    monkeypatch.setattr(module, "operators", lambda shapes: rows)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--operators-only", "--output", str(path)])
    assert module.main() == 0
    assert json.loads(path.read_text())["operators"]["add"]["ratio"] == 1
    assert "add" in capsys.readouterr().out
