"""Several processes that train together: how they find each other, and a run that survives both kinds of end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from msvmamba_jax import InputError
from msvmamba_jax.checkpoint import load_checkpoint
from msvmamba_jax.training.processes import join

LIMIT = 600  # seconds that anything here may take before it counts as hanging
STEPS = 11
OPTIONS = [
    "--config=configs/digits.py", "--config.duration=1 epoch", "--config.batch_size=128", "--config.model.width=16",
    "--config.model.depths=(1,1,1,1)", "--config.save_every=4 steps", "--config.evaluate_every=1000 steps",
    "--config.log_every=1 step",
]  # fmt: skip


class Run:
    """Processes that train in one workdir."""

    def __init__(self, workdir, count, cache):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        self.metrics = workdir / "metrics.jsonl"
        self.processes = []
        for index in range(count):
            together = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"]
            command = [sys.executable, "-m", "msvmamba_jax.train", f"--workdir={workdir}", *OPTIONS]
            self.processes.append(
                subprocess.Popen(
                    command + together * (count > 1),
                    env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )
            )  # fmt: skip

    def wait_for(self, done):
        """Until `done()`, which must come before the processes end."""
        limit = time.monotonic() + LIMIT
        while not done():
            assert time.monotonic() < limit, "hangs"
            assert all(process.poll() is None for process in self.processes), self.end()
            time.sleep(0.05)

    def reached(self, step):
        return self.metrics.is_file() and f'{{"step": {step},' in self.metrics.read_text()

    def end(self):
        """Exit statuses and outputs."""
        outputs = [process.communicate(timeout=LIMIT)[0] for process in self.processes]
        return [process.returncode for process in self.processes], outputs

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


def training_steps(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "train/loss" in line]


def saved(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").iterdir() if folder.name.isdecimal())


@pytest.mark.slow
def test_two_processes_are_killed_stopped_and_resumed_and_end_as_one_would(tmp_path):
    cache, alone, together = tmp_path / "cache", tmp_path / "alone", tmp_path / "together"
    with Run(alone, 1, cache) as run:
        statuses, outputs = run.end()
        assert statuses == [0], outputs

    with Run(together, 2, cache) as run:
        run.wait_for(lambda: (together / "checkpoints" / "4").is_dir() and run.reached(5))
    # Leaving the block has killed both. A checkpoint of step 8 may be there as well.

    with Run(together, 2, cache) as run:
        run.wait_for(lambda: run.reached(9))
        run.processes[1].send_signal(signal.SIGTERM)
        statuses, outputs = run.end()
    if statuses != [0, 0]:  # the signal may have come too late on a slow machine
        assert statuses == [128 + signal.SIGTERM] * 2, outputs
        assert "stopped by SIGTERM after step" in outputs[0]
        assert "stopped by" not in outputs[1]
        assert saved(together)[-1] in (9, 10)

    with Run(together, 2, cache) as run:
        statuses, outputs = run.end()
        assert statuses == [0, 0], outputs
    assert saved(together)[-1] == STEPS
    steps = training_steps(together)
    assert steps == sorted(set(steps))  # one process writes, and nothing twice
    scores = [json.loads((path / "metrics.jsonl").read_text().splitlines()[-1]) for path in (alone, together)]
    assert scores[0]["step"] == scores[1]["step"] == STEPS
    assert scores[0]["eval_ema/images"] == scores[1]["eval_ema/images"] == 360
    np.testing.assert_allclose(scores[1]["eval_ema/loss"], scores[0]["eval_ema/loss"], rtol=1e-4)
    ours, theirs = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(load_checkpoint(path, "raw")[1])])
        for path in (together, alone)
    )
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("127.0.0.1:1", None, None), {}, "need all of --coordinator"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "2"}, "need all of --coordinator"),
        ((None, None, None), {"JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID must be a number"),
        (("127.0.0.1:1", 2, 2), {}, r"process_id must be in 0\.\.1"),
    ],
)
def test_impossible_processes(monkeypatch, arguments, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        join(*arguments)


def test_a_process_by_itself_joins_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_: pytest.fail("there is nobody to join"))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    join()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, (None, None, None)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, ("a:1", 2, 0)),
    ],
)
def test_processes_come_from_the_environment(monkeypatch, environment, expected):
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: found.append(arguments))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    join()
    assert found == [expected]
