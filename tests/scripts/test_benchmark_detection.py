"""The benchmark of detection: both versions of every operator agree, and one that is wrong does not pass for fast."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
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


def test_the_time_of_a_program_goes_to_its_innermost_part():
    @jax.named_scope("rpn")
    def inner(x):
        return jnp.sin(x)

    @jax.named_scope("backbone")
    def outer(x):
        return inner(x @ x) @ x

    text = jax.jit(jax.grad(lambda x: jnp.sum(outer(x)))).lower(jnp.ones((8, 8))).compile().as_text()
    names = {
        part: re.findall(rf'%([\w.-]+) = [^\n]*op_name="[^"]*\b{part}\b[^"]*"', text) for part in ("rpn", "backbone")
    }
    product = next(name for name in names["backbone"] if name not in names["rpn"])
    programs = [module.Program(0, 30, names["rpn"][0]), module.Program(40, 90, product), module.Program(0, 20, "graph")]
    total, shares = module.parts(text, programs)
    assert total == 100
    assert shares == {"backbone": 0.5, "rpn": 0.3, "other": 0.2}
    assert list(shares) == ["backbone", "rpn", "other"]


def test_parts_are_scopes_of_the_detector():
    options = {"name": "msvmamba_nano", "width": 8, "depths": (1, 1, 1, 1), "channels": 8, "hidden": 16}
    shapes = module.Shapes(argparse.Namespace(batch=1, size=(64, 64), regions=8, channels=8))
    parameters, functions = module.detectors(shapes, options)
    text = {name: jax.jit(function).lower(parameters).as_text(debug_info=True) for name, function in functions.items()}
    for part in module.PARTS:
        scopes = [name for name in text if re.search(rf'[/("]{part}[/)"]', text[name])]
        assert "training" in scopes or part == "suppression", part
        assert "inference" in scopes or part in ("rpn_losses", "regions", "mask_targets"), part


def test_the_report(monkeypatch, tmp_path, capsys):
    path = tmp_path / "report.json"
    rows = {"add": (lambda x: x + x, lambda x: 2 * x, (jnp.ones(3),), 0.0)}
    monkeypatch.setattr(module, "operators", lambda shapes: rows)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--quick", "--operators-only", "--output", str(path)])
    assert module.main() == 0
    assert json.loads(path.read_text())["operators"]["add"]["ratio"] == 1
    assert "add" in capsys.readouterr().out
