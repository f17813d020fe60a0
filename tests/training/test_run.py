"""Whole runs as a user starts them: real processes that are killed, stopped, started again and starved.

All of them compile the same small model; a compilation cache in a temporary folder keeps that to once.
"""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from msvmamba_jax import InputError, load_model
from msvmamba_jax.checkpoint import available_weights, find_checkpoint, load_checkpoint
from msvmamba_jax.data.datasets import load_dataset
from msvmamba_jax.models.parameters import flatten
from msvmamba_jax.tasks.registry import make_task
from msvmamba_jax.training.loop import train

ROOT = Path(__file__).parents[2]
STEPS = 12
OPTIONS = {
    "config.model.width": 8,
    "config.model.depths": (1, 1, 1, 1),
    "config.model.drop_path": 0.2,
    "config.batch_size": 119,  # 12 steps an epoch
    "config.duration": "1 epoch",
    "config.log_every": "1 step",
    "config.evaluate_every": "4 steps",
    "config.save_every": "2 steps",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def start(cache):
    """Starts a run in a process of its own."""

    def start(workdir, *program, **options):
        flags = {**OPTIONS, **{f"config.{name}": value for name, value in options.items()}}
        program = program or ("-m", "msvmamba_jax.train")
        command = [sys.executable, *program, "--config=configs/digits.py", f"--workdir={workdir}"]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONUNBUFFERED": "1",
        }
        return subprocess.Popen(
            command + [f"--{name}={value}" for name, value in flags.items()],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def run(start):
    """Runs to the end: exit status, standard output, standard error."""

    def run(workdir, **options):
        process = start(workdir, **options)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    return run


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    status, out, err = run(workdir)
    assert status == 0, err
    assert f"step {STEPS}/{STEPS}" in out
    return workdir


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(process, workdir, step):
    """Returns as soon as metrics.jsonl tells of `step`."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (workdir / "metrics.jsonl").exists() and any(line["step"] >= step for line in metrics(workdir)):
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get there")


def assert_identical(a, b):
    for weights in ("raw", "ema"):
        (_, one), (_, two) = (load_checkpoint(w / "checkpoints" / str(STEPS), weights) for w in (a, b))
        for (name, x), (_, y) in zip(flatten(one), flatten(two), strict=True):
            assert x.tobytes() == y.tobytes(), f"{weights} {name}"


def test_outputs(uninterrupted):
    lines = metrics(uninterrupted)
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == list(range(2, STEPS + 1))  # the first one holds the compilation
    for name in ("loss", "learning_rate", "gradient_norm", "images_per_second", "memory_gib"):
        assert train[0][f"train/{name}"] > 0
    assert all(0 <= line["train/waiting_share"] <= 1 for line in train)
    for name in ("eval", "eval_ema"):
        evaluations = [line for line in lines if f"{name}/accuracy_top1" in line]
        assert [line["step"] for line in evaluations] == [4, 8, 12]
        assert all(line[f"{name}/images"] == 360 for line in evaluations)
    assert train[-1]["train/loss"] < train[0]["train/loss"]
    assert json.loads((uninterrupted / "config.json").read_text())["batch_size"] == 119
    assert list((uninterrupted / "tensorboard").iterdir())
    assert {10, 12} <= {int(p.name) for p in (uninterrupted / "checkpoints").iterdir()}  # the latest two
    assert available_weights(uninterrupted) == ["raw", "ema"]
    assert find_checkpoint(uninterrupted).name in ("4", "8", "12")  # those that have a score
    assert load_model(uninterrupted).num_classes == 10


@pytest.mark.parametrize("step", [3, 11])
def test_killed_run_ends_with_the_same_bits(start, run, uninterrupted, tmp_path, step):
    workdir = tmp_path / "killed"
    process = start(workdir)
    wait_for_step(process, workdir, step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    status, out, err = run(workdir)
    assert status == 0, err
    assert "going on from step" in out or step == 3  # the first save may not have been on disk yet
    assert_identical(uninterrupted, workdir)
    assert [line["step"] for line in metrics(workdir) if "eval/loss" in line] == [4, 8, 12]


def test_sigterm_saves_first(start, run, uninterrupted, tmp_path):
    workdir = tmp_path / "stopped"
    process = start(workdir, save_every="1000 steps", evaluate_every="1000 steps")
    wait_for_step(process, workdir, 5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "stopped by SIGTERM after step" in out
    saved = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert saved[0] >= 5
    status, out, err = run(workdir)
    assert status == 0, err
    assert f"going on from step {saved[0]}" in out
    assert_identical(uninterrupted, workdir)


STOPPED_WHILE_IT_EVALUATES = """
import os, signal
from msvmamba_jax import train
from msvmamba_jax.training import loop

evaluate = loop.evaluate

def interrupted(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*arguments, **options)

loop.evaluate = interrupted
train.main()
"""


def test_sigterm_during_an_evaluation_saves_first(start, run, uninterrupted, tmp_path):
    workdir = tmp_path / "stopped"
    process = start(workdir, "-c", STOPPED_WHILE_IT_EVALUATES, save_every="1000 steps")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "step 4, eval: not evaluated to the end" in out
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]
    assert not any("eval/loss" in line for line in metrics(workdir))
    status, out, err = run(workdir)
    assert status == 0, err
    assert "going on from step 4" in out
    assert_identical(uninterrupted, workdir)


def test_complete_run_is_left_alone(run, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    status, out, _ = run(uninterrupted)
    assert status == 0
    assert "the run is complete" in out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_workdir_of_another_model(run, uninterrupted):
    checkpoints = sorted(p.name for p in (uninterrupted / "checkpoints").iterdir())
    status, _, err = run(uninterrupted, **{"model.name": "msvmamba_micro"})
    assert status == 1
    assert "holds a run with another model" in err
    assert "Traceback" not in err
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == checkpoints


def test_loss_that_is_not_finite_stops_the_run(run, tmp_path):
    workdir = tmp_path / "diverging"
    status, _, err = run(workdir, **{"optimizer.learning_rate": 1e30, "optimizer.warmup": "25 %"})
    assert status == 1
    assert "not finite at step" in err
    assert "config.optimizer.learning_rate" in err
    assert "Traceback" not in err
    for step in (workdir / "checkpoints").iterdir():
        _, parameters = load_checkpoint(step, "raw")
        assert all(np.isfinite(x).all() for _, x in flatten(parameters))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_reported(run, tmp_path):
    workdir = tmp_path / "full"
    workdir.mkdir()
    (workdir / "tensorboard").mkdir()
    (workdir / "metrics.jsonl").symlink_to("/dev/full")
    # The file is replaced when it is opened, so let the run write its configuration to the full device instead.
    (workdir / "config.json.tmp").symlink_to("/dev/full")
    status, _, err = run(workdir)
    assert status == 1
    assert "the disk is full" in err
    assert "Traceback" not in err


def test_a_workdir_that_cannot_be(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, _, err = run(tmp_path / "file" / "run")
    assert status == 1
    assert err == f"error: cannot make the folder {tmp_path / 'file' / 'run'}: Not a directory\n"


def test_damaged_metrics(run, uninterrupted, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(uninterrupted, workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    with (workdir / "metrics.jsonl").open("r+b") as file:
        file.write(b"\0\0\0\xff")
    status, _, err = run(workdir)
    assert status == 1
    assert "metrics.jsonl has a damaged line" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer.clip_norm": -1.0}, "clip_norm must not be negative"),
        ({"model.name": "msvmamba_huge"}, "there is no model 'msvmamba_huge'"),
        ({"batch_size": 5000}, "lower batch_size"),
        ({"data.source": "imagenot"}, "Unknown data source"),
        ({"save_every": "0 steps"}, "save_every must be at least 1 step"),
        ({"evaluate_every": "7"}, "evaluate_every must be like"),
        ({"evaluation_per_device": -1}, "evaluation_per_device must not be negative"),
        ({"optimizer.warmup": "100 %"}, "not shorter than the run"),
        ({"scan_implementation": "quantum"}, "no scan implementation 'quantum'"),
        ({"dtype": "int8"}, "dtype"),
        ({"profile": "20"}, "config.profile must be START:STOP"),
    ],
)
def test_impossible_options(tmp_path, options, message):
    config = runpy.run_path(str(ROOT / "configs" / "digits.py"))["get_config"]()
    options = OPTIONS | {"config.batch_size": 120} | {f"config.{name}": value for name, value in options.items()}
    config.update_from_flattened_dict({name.removeprefix("config."): value for name, value in options.items()})

    def start():
        dataset = load_dataset(config.data)
        train(config, make_task(config, dataset), dataset, tmp_path / "run")

    with pytest.raises(InputError, match=re.escape(message)):
        start()
    assert not (tmp_path / "run").exists()


def test_an_impossible_option_ends_with_one_sentence(run, tmp_path):
    status, _, err = run(tmp_path / "run", accumulate=2)
    assert status == 1
    assert err == "error: batch_size 119 does not divide into 2 parts on 1 devices: choose a multiple of 2\n"
