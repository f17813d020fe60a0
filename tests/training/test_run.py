"""Whole runs as a user starts them: killed, stopped, started again and starved."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import BATCH, ROOT, STEPS, build, command_line, configuration, few_digits, run

from msvmamba_jax import InputError, load_model
from msvmamba_jax.checkpoint import Description, available_weights, find_checkpoint, load_checkpoint
from msvmamba_jax.data.datasets import load_dataset
from msvmamba_jax.models.parameters import flatten
from msvmamba_jax.tasks.registry import make_task
from msvmamba_jax.training import loop
from msvmamba_jax.training.loop import train


def run_process(command):
    """Runs a command on as many devices as this process has: exit status, standard output, standard error."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(jax.device_count()),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    status, out, err = run(workdir)
    assert status == 0, err
    assert f"step {STEPS}/{STEPS}" in out
    return workdir


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_identical(a, b, step=STEPS):
    for weights in ("raw", "ema"):
        (_, one), (_, two) = (load_checkpoint(w / "checkpoints" / str(step), weights) for w in (a, b))
        for (name, x), (_, y) in zip(flatten(one), flatten(two), strict=True):
            assert x.tobytes() == y.tobytes(), f"{weights} {name}"


def test_outputs(uninterrupted, monkeypatch):
    monkeypatch.setattr(Description, "build", build)
    lines = metrics(uninterrupted)
    train = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in train] == list(range(2, STEPS + 1))  # the first one holds the compilation
    for name in ("loss", "learning_rate", "gradient_norm", "images_per_second", "memory_gib"):
        assert train[0][f"train/{name}"] > 0
    assert all(0 <= line["train/waiting_share"] <= 1 for line in train)
    for name in ("eval", "eval_ema"):
        evaluations = [line for line in lines if f"{name}/accuracy_top1" in line]
        assert [line["step"] for line in evaluations] == [3, 6]
        assert all(line[f"{name}/images"] == 10 for line in evaluations)
    assert train[-1]["train/loss"] < train[0]["train/loss"]
    assert json.loads((uninterrupted / "config.json").read_text())["batch_size"] == BATCH
    assert list((uninterrupted / "tensorboard").iterdir())
    assert {4, 6} <= {int(p.name) for p in (uninterrupted / "checkpoints").iterdir()}  # the latest two
    assert available_weights(uninterrupted) == ["raw", "ema"]
    assert find_checkpoint(uninterrupted).name in ("3", "6")  # those that have a score
    assert load_model(uninterrupted).num_classes == 10


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.nightly), 5])
def test_killed_run_ends_with_the_same_bits(uninterrupted, tmp_path, step):
    workdir = tmp_path / "killed"
    status, _, err = run_process(command_line(workdir, "--at", str(step), "SIGKILL"))
    assert status == -signal.SIGKILL, err
    status, out, err = run(workdir)
    assert status == 0, err
    assert ("going on from step" in out) == (step > 1)
    assert_identical(uninterrupted, workdir)
    assert [line["step"] for line in metrics(workdir) if "eval/loss" in line] == [3, 6]


def test_sigterm_saves_first(uninterrupted, tmp_path):
    """In a process of its own, for its exit status."""
    workdir = tmp_path / "stopped"
    never = {"save_every": "1000 steps", "evaluate_every": "1000 steps"}
    status, out, err = run_process(command_line(workdir, "--at", "4", "SIGTERM", **never))
    assert status == 128 + signal.SIGTERM, err
    assert "stopped by SIGTERM after step 4" in out
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]
    status, out, err = run(workdir)
    assert status == 0, err
    assert "going on from step 4" in out
    assert_identical(uninterrupted, workdir)


def test_sigterm_during_an_evaluation_saves_first(uninterrupted, tmp_path, monkeypatch):
    workdir = tmp_path / "stopped"
    evaluate = loop.evaluate

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", interrupted)
        status, out, err = run(workdir, save_every="1000 steps")
    assert status == 128 + signal.SIGTERM, err
    assert "step 3, eval: not evaluated to the end" in out
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
    assert not any("eval/loss" in line for line in metrics(workdir))
    status, out, err = run(workdir)
    assert status == 0, err
    assert "going on from step 3" in out
    assert_identical(uninterrupted, workdir)


def test_a_second_signal_ends_a_process_at_once():
    stop = loop.StopRequest()
    assert stop.agreed() is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.agreed() == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.nightly
def test_a_real_model_ends_with_the_same_bits(tmp_path):
    """`python -m msvmamba_jax.train` from the outside: killed, stopped, and started again."""
    options = {"model.width": 8, "model.depths": (1, 1, 1, 1), "model.drop_path": 0.2, "batch_size": 120}
    times = {"duration": "8 steps", "log_every": "1 step", "evaluate_every": "4 steps", "save_every": "2 steps"}
    flags = [f"--config.{name}={value}" for name, value in {**options, **times}.items()]
    command = [sys.executable, "-m", "msvmamba_jax.train", f"--config={ROOT / 'configs' / 'digits.py'}", *flags]
    status, _, err = run_process([*command, f"--workdir={tmp_path / 'whole'}"])
    assert status == 0, err
    patched = [sys.executable, str(Path(__file__).with_name("small_runs.py")), "--real"]
    for number in ("SIGKILL", "SIGTERM"):
        workdir = tmp_path / number
        status, _, err = run_process([*patched, "--at", "5", number, *command[3:], f"--workdir={workdir}"])
        assert status == {"SIGKILL": -9, "SIGTERM": 143}[number], err
        status, out, err = run_process([*command, f"--workdir={workdir}"])
        assert status == 0, err
        assert "going on from step" in out
        assert_identical(tmp_path / "whole", workdir, step=8)


def test_complete_run_is_left_alone(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    status, out, _ = run(uninterrupted)
    assert status == 0
    assert "the run is complete" in out
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_workdir_of_another_model(uninterrupted):
    checkpoints = sorted(p.name for p in (uninterrupted / "checkpoints").iterdir())
    status, _, err = run(uninterrupted, **{"model.name": "msvmamba_micro"})
    assert status == 1
    assert "holds a run with another model" in err
    assert "Traceback" not in err
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == checkpoints


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    workdir = tmp_path / "diverging"
    status, _, err = run(
        workdir, **{"optimizer.learning_rate": 1e30, "optimizer.warmup": "2 steps", "save_every": "1 step"}
    )
    assert status == 1
    assert re.search("not finite at step [2-6]", err)
    assert "config.optimizer.learning_rate" in err
    assert "Traceback" not in err
    steps = list((workdir / "checkpoints").iterdir())
    assert steps
    for step in steps:
        _, parameters = load_checkpoint(step, "raw")
        assert all(np.isfinite(x).all() for _, x in flatten(parameters))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_reported(tmp_path):
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


def test_a_workdir_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    status, _, err = run(tmp_path / "file" / "run")
    assert status == 1
    assert err == f"error: cannot make the folder {tmp_path / 'file' / 'run'}: Not a directory\n"


def test_damaged_metrics(uninterrupted, tmp_path):
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
    def start():
        config = configuration(**options)
        dataset = few_digits()
        if options.get("data.source"):
            load_dataset(config.data)
        train(config, make_task(config, dataset), dataset, tmp_path / "run")

    with pytest.raises(InputError, match=re.escape(message)):
        start()
    assert not (tmp_path / "run").exists()


def test_an_impossible_option_ends_with_one_sentence(tmp_path):
    status, _, err = run(tmp_path / "run", accumulate=4)
    assert status == 1
    devices = jax.device_count()
    message = f"error: batch_size {BATCH} does not divide into 4 parts on {devices} devices"
    assert err == f"{message}: choose a multiple of {4 * devices}\n"
