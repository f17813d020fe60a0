"""The curves of runs as a picture, also of runs that still go on, and a sentence where there is none."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "draw_curves.py"
spec = importlib.util.spec_from_file_location("draw_curves", SCRIPT)
draw_curves = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw_curves)


def write_run(workdir, end=""):
    workdir.mkdir()
    lines = [{"step": s, "train/loss": 3 / s, "train/images_per_second": 9.0} for s in (1, 2, 3)]
    lines += [{"step": 3, f"{name}/accuracy_top1": 0.5} for name in ("eval", "eval_ema")]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return workdir


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["draw_curves.py", *map(str, arguments)])
    draw_curves.main()


@pytest.mark.parametrize("end", ["", '{"step": 4, "train/lo', '{"step": 4, "train/loss": 0.5}'])
def test_a_last_line_may_be_half_written(tmp_path, end):
    curves = draw_curves.read_curves(write_run(tmp_path / "run", end))
    whole = end.endswith("}")
    assert curves["train/loss"] == ([1, 2, 3, 4][: 3 + whole], [3.0, 1.5, 1.0, 0.5][: 3 + whole])
    assert curves["eval_ema/accuracy_top1"] == ([3], [0.5])


def test_picture(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    pictures = []
    for workdirs in ((one,), (one, two)):
        run(monkeypatch, *workdirs, "--output", tmp_path / "curves.png")
        pictures.append(np.asarray(Image.open(tmp_path / "curves.png")))
    assert pictures[0].shape == (800, 1500, 4)
    assert (pictures[0] != pictures[1]).any()


def test_errors(monkeypatch, tmp_path):
    run_folder = write_run(tmp_path / "run")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    broken = write_run(tmp_path / "broken", "nonsense\n")
    for arguments, message in (
        ((tmp_path / "nowhere",), "No such file"),
        ((empty,), "no metrics yet"),
        ((run_folder, broken), "Line 6"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, *arguments, "--output", tmp_path / "curves.png")
        assert message in str(stopped.value)
        assert not (tmp_path / "curves.png").exists()


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="plot"):
        run(monkeypatch, write_run(tmp_path / "run"), "--output", tmp_path / "curves.png")
