"""Several processes that train together: how they find each other, and a run that survives both kinds of end."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small_runs
from PIL import Image
from small_runs import ROOT

from msvmamba_jax import InputError
from msvmamba_jax.checkpoint import Description, load_checkpoint, save_checkpoint
from msvmamba_jax.data.datasets import load_dataset
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model, get_weights
from msvmamba_jax.tasks.registry import make_task
from msvmamba_jax.training.processes import join

LIMIT = 600  # seconds that anything here may take before it counts as hanging


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Run:
    """Processes that train in one workdir with the same command, each with options of its own that `own` gives."""

    def __init__(self, workdir, count, command, own=lambda index: []):
        address = free_address()
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        }  # fmt: skip
        self.metrics = workdir / "metrics.jsonl"
        self.processes = []
        for index in range(count):
            together = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"]
            self.processes.append(
                subprocess.Popen(
                    [*command, f"--workdir={workdir}", *own(index)] + together * (count > 1),
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


def weights(workdir, step, kind="raw"):
    leaves = jax.tree.leaves(load_checkpoint(workdir / "checkpoints" / str(step), kind)[1])
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def test_two_processes_end_as_one_would(tmp_path):
    """One process of several devices here; one of the two gets a signal, and both save and go on."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    status, _, err = small_runs.run(alone)
    assert status == 0, err
    command = small_runs.command_line(None)
    stopped_at = 3
    with Run(together, 2, command, lambda index: ["--at", str(stopped_at), "SIGTERM"] * index) as run:
        statuses, outputs = run.end()
    assert statuses == [128 + signal.SIGTERM] * 2, outputs
    assert "stopped by SIGTERM after step" in outputs[0]
    assert "stopped by" not in outputs[1]
    assert saved(together)[-1] == stopped_at
    with Run(together, 2, command) as run:
        statuses, outputs = run.end()
    assert statuses == [0, 0], outputs
    assert f"going on from step {stopped_at}" in outputs[0]
    assert training_steps(together) == [2, 3, 5, 6]  # one process writes; the first step of each start compiles
    assert_agreement(together, alone, small_runs.STEPS, images=10)


def assert_agreement(together, alone, step, images):
    """Weights and scores are the same up to rounding."""
    assert saved(together)[-1] == saved(alone)[-1] == step
    scores = [json.loads((path / "metrics.jsonl").read_text().splitlines()[-1]) for path in (alone, together)]
    assert scores[0]["step"] == scores[1]["step"] == step
    assert scores[0]["eval_ema/images"] == scores[1]["eval_ema/images"] == images
    np.testing.assert_allclose(scores[1]["eval_ema/loss"], scores[0]["eval_ema/loss"], rtol=1e-4)
    ours, theirs = weights(together, step), weights(alone, step)
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


@pytest.mark.nightly
def test_two_processes_of_a_real_model_are_killed_and_resumed(tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    command = [
        sys.executable, "-m", "msvmamba_jax.train", f"--config={ROOT / 'configs' / 'digits.py'}",
        "--config.duration=6 steps", "--config.batch_size=128", "--config.model.width=8",
        "--config.model.depths=(1,1,1,1)", "--config.save_every=2 steps", "--config.evaluate_every=1000 steps",
        "--config.log_every=1 step",
    ]  # fmt: skip
    with Run(alone, 1, command) as run:
        statuses, outputs = run.end()
        assert statuses == [0], outputs
    with Run(together, 2, command) as run:
        run.wait_for(lambda: (together / "checkpoints" / "2").is_dir() and run.reached(3))
    # Leaving the block has killed both. A later checkpoint may be there as well.
    with Run(together, 2, command) as run:
        statuses, outputs = run.end()
        assert statuses == [0, 0], outputs
    assert "going on from step" in outputs[0]
    steps = training_steps(together)
    assert steps == sorted(set(steps))
    assert_agreement(together, alone, 6, images=360)


DAMAGED = 9  # of 16
FOLDER_CONFIG = """
import runpy

def get_config():
    config = runpy.run_path({digits!r})["get_config"]()
    config.data = {{"source": "folder", "root": {root!r}, "size": 32, "resize": 32, "randaugment": "", "workers": 0}}
    config.batch_size = 8
    config.freeze_backbone = True
    config.duration = config.log_every = "2 steps"
    config.ema_decay = 0.0
    config.pictures = 0
    return config
"""


def write_images(root):
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for index in range(count):
            path = root / split / str(index % 2) / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)
            if split == "train" and index < DAMAGED:
                path.write_bytes(b"damaged")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts two processes on a folder of images, of which some are damaged, from checkpoints given by process.

    `start.theirs` are the weights of the checkpoint in `tmp_path / "start"`.
    """
    monkeypatch.setattr(Description, "build", small_runs.build)
    write_images(tmp_path / "data")
    config = tmp_path / "config.py"
    digits = ROOT / "configs" / "digits.py"
    config.write_text(FOLDER_CONFIG.format(digits=str(digits), root=str(tmp_path / "data")))
    loaded = runpy.run_path(str(config))["get_config"]()
    description = make_task(loaded, load_dataset(loaded.data)).description
    shapes = get_weights(abstract_model(lambda: description.build(rngs=SHAPE_KEYS)))
    rng = np.random.default_rng(0)
    theirs = jax.tree.map(lambda x: rng.uniform(0.05, 0.1, x.shape).astype(np.float32), shapes)
    save_checkpoint(tmp_path / "start", description, theirs)

    command = [sys.executable, small_runs.__file__, f"--config={config}"]

    def start(name, pretrained):
        return Run(tmp_path / name, 2, command, lambda index: [f"--config.pretrained={pretrained(index)}"])

    start.theirs = theirs
    return start


def test_two_processes_start_from_one_checkpoint_and_count_all_damaged_images(start, tmp_path):
    with start("run", lambda index: tmp_path / "start") as run:
        statuses, outputs = run.end()
    assert statuses == [0, 0], outputs
    assert f"Starting from {tmp_path / 'start'}" in outputs[0]
    lines = list(map(json.loads, run.metrics.read_text().splitlines()))
    # Two steps are an epoch: every image came once, and no process can have had them all.
    assert [line["train/corrupt_images"] for line in lines if "train/loss" in line] == [DAMAGED]
    ours = load_checkpoint(tmp_path / "run", "raw")[1]
    for name in ("backbone", "head"):
        leaves = map(jax.tree.leaves, (ours[name], start.theirs[name]))
        equal = [np.array_equal(x, y) for x, y in zip(*leaves, strict=True)]
        assert set(equal) == {name == "backbone"}  # frozen: as it was read; the head has been trained


@pytest.mark.nightly
def test_a_checkpoint_that_one_process_cannot_read_ends_both(start, tmp_path):
    with start("none", lambda index: f"{tmp_path / 'start'}{index or ''}") as run:
        statuses, outputs = run.end()
    assert statuses == [1, 1], outputs
    assert f"error: there is no checkpoint at {tmp_path / 'start1'}" in outputs[1]
    assert f"error: on process 1: there is no checkpoint at {tmp_path / 'start1'}" in outputs[0]
    assert "Traceback" not in "".join(outputs)


COUNT_AND_FAIL = """
import sys
import jax
from msvmamba_jax import InputError
from msvmamba_jax.training.parallelism import make_layout
from msvmamba_jax.training.processes import join, same, together, total

join(sys.argv[1], 2, int(sys.argv[2]))
with together():
    pass
print(total(10 + jax.process_index()), same(7), same(jax.process_index()))
for failing in ([1], [0, 1]):
    try:
        with together():
            if jax.process_index() in failing:
                raise InputError(f"{jax.process_index()} cannot read" + " it" * 1000)
    except InputError as error:
        print(str(error)[:30])
try:
    make_layout("pmap", fsdp=1, batch_size=8)
except InputError as error:
    print(error)
"""


def test_processes_add_up_and_fail_together():
    address = free_address()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COUNT_AND_FAIL, address, str(index)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=LIMIT) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = ([line for line in output.splitlines() if not line.startswith("[Gloo]")] for output, _ in outputs)
    assert first[0] == second[0] == "21 True False"
    assert first[1] == "on process 1: 1 cannot read it it"[:30]
    assert first[2] == "0 cannot read it it it it it it it it it"[:30]
    assert second[1] == second[2] == "1 cannot read it it it it it it it it it"[:30]
    assert first[3] == second[3] == "parallelism 'pmap' runs in one process; use 'jit' for several"


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
