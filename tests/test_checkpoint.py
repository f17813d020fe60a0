"""Which checkpoint of a run its workdir stands for."""

from __future__ import annotations

import json

import pytest

from msvmamba_jax.checkpoint import find_checkpoint


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({5: 0.3, 10: 0.9, 15: 0.5, 20: None}, "10"),  # the best
        ({5: 0.9, 10: 0.9, 15: None}, "10"),  # of equal ones the later
        ({5: None, 10: None, 100: None}, "100"),  # none was evaluated: the latest
    ],
)
def test_a_workdir_stands_for_its_best_checkpoint(tmp_path, scores, expected):
    for step, score in scores.items():
        folder = tmp_path / "checkpoints" / str(step)
        for name in ("state", "model", "metrics"):
            (folder / name).mkdir(parents=True)
        if score is not None:
            (folder / "metrics" / "metrics").write_text(json.dumps({"score": score}))
    assert find_checkpoint(tmp_path).name == expected
