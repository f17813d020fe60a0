"""The measurement of the training input, on a few images that it makes up."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_input.py"
spec = importlib.util.spec_from_file_location("benchmark_input", SCRIPT)
benchmark_input = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark_input)


def test_report(monkeypatch, tmp_path, capsys):
    benchmark_input.write_images(tmp_path / "data", 4)
    options = ["--workers", "0", "--size", "16", "--batch-size", "2", "--images", "4", "--repeats", "1"]
    arguments = ["--root", str(tmp_path / "data"), *options, "--output", str(tmp_path / "report.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark_input.py", *arguments])
    benchmark_input.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["times_plain"].keys() == {"plain", "0"}
    assert report["times_plain"]["plain"] == 1
    rates = report["images_per_second"]
    assert report["times_plain"]["0"] == pytest.approx(rates["0"] / rates["plain"])
    assert sum(stage["share"] for stage in report["stages"].values()) == pytest.approx(1)
    assert "plain Pillow loop" in capsys.readouterr().out
