"""The measurement of the training input, on a few images that it makes up."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from msvmamba_jax.data.datasets import load_dataset
from msvmamba_jax.data.folder import load_folder
from msvmamba_jax.data.pipeline import train_batches

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_input.py"
spec = importlib.util.spec_from_file_location("benchmark_input", SCRIPT)
benchmark_input = importlib.util.module_from_spec(spec)
sys.modules["benchmark_input"] = benchmark_input  # dataclasses look their module up
spec.loader.exec_module(benchmark_input)


def test_report(monkeypatch, tmp_path, capsys):
    benchmark_input.write_images(tmp_path / "data", 4, 9)
    options = ["--workers", "0", "--size", "16", "--batch-size", "2", "--images", "4", "--repeats", "2"]
    arguments = ["--root", str(tmp_path / "data"), *options, "--output", str(tmp_path / "report.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark_input.py", *arguments])
    monkeypatch.setattr(benchmark_input, "plain_loops", in_this_process)
    benchmark_input.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 9
    (row,) = report["workers"].values()
    for name in ("of_plain", "cpu_of_plain", "images_per_second", "seconds_to_first_batch"):
        assert 0 < row[name]["least"] <= row[name]["median"] <= row[name]["most"]
    assert sum(stage["share"] for stage in report["stages"].values()) == pytest.approx(1)
    assert "threads" in capsys.readouterr().out


def in_this_process(folder, work, size, batch_size, processes):
    """As `plain_loops`, which starts processes that import this script by the name of the main program."""
    assert processes == 1
    wall, cpu, _ = benchmark_input.plain_loop(folder, work, size, batch_size)
    return len(work.numbers) / wall, cpu / len(work.numbers)


def test_the_plain_loop_does_the_work_of_the_pipeline(tmp_path):
    benchmark_input.write_images(tmp_path, 4, 9)
    dataset = load_dataset({"source": "folder", "root": str(tmp_path), "size": 32})
    folder, _, _ = load_folder(tmp_path)
    work = benchmark_input.find_work(dataset, batch_size=3, seed=1, step=2, images=12)
    with contextlib.closing(train_batches(dataset, batch_size=3, seed=1, start_step=2)) as batches:
        for step in range(4):
            part = benchmark_input.Work(*(x[3 * step : 3 * step + 3] for x in (work.numbers, work.counters, work.keys)))
            _, _, plain = benchmark_input.plain_loop(folder, part, 32, 3)
            np.testing.assert_array_equal(next(batches)["image"], plain)


def test_plain_loops_and_workers_from_the_command(tmp_path):
    benchmark_input.write_images(tmp_path / "data", 4, 9)
    options = ["--workers", "2", "--size", "16", "--batch-size", "2", "--images", "4", "--repeats", "1"]
    subprocess.run(
        [sys.executable, str(SCRIPT), "--root", str(tmp_path / "data"), *options, "--output", str(tmp_path / "report")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=300,
    )
    row = json.loads((tmp_path / "report").read_text())["workers"]["2"]
    assert row["cpu_milliseconds"]["median"] > 0
    assert row["reader_cpu_milliseconds"]["median"] > 0
