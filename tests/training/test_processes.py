"""Several processes that train together: how they find each other, and a run that survives both kinds of end."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from msvmamba_jax import InputError
from msvmamba_jax.checkpoint import load_checkpoint, save_checkpoint
from msvmamba_jax.data.datasets import load_dataset
from msvmamba_jax.models.parameters import SHAPE_KEYS, abstract_model, get_parameters
from msvmamba_jax.tasks.registry import make_task
from msvmamba_jax.training.processes import join

LIMIT = 600  # seconds that anything here may take before it counts as hanging
STEPS = 11
OPTIONS = [
    "--config=configs/digits.py", "--config.duration=1 epoch", "--config.batch_size=128", "--config.model.width=16",
    "--config.model.depths=(1,1,1,1)", "--config.save_every=4 steps", "--config.evaluate_every=1000 steps",
    "--config.log_every=1 step",
]  # fmt: skip


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Run:
    """Processes that train in one workdir, all with `options`, each with those of its own that `own` gives."""

    def __init__(self, workdir, count, cache, options=OPTIONS, own=lambda index: []):
        address = free_address()
        environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        self.metrics = workdir / "metrics.jsonl"
        self.processes = []
        for index in range(count):
            together = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={index}"]
            command = [sys.executable, "-m", "msvmamba_jax.train", f"--workdir={workdir}", *options, *own(index)]
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


@pytest.mark.nightly
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


DAMAGED = 9  # of 16
FOLDER_CONFIG = """
import runpy

def get_config():
    config = runpy.run_path({digits!r})["get_config"]()
    config.data = {{"source": "folder", "root": {root!r}, "size": 32, "resize": 32, "randaugment": "", "workers": 0}}
    config.batch_size = 8
    config.model.width = 16
    config.model.depths = (1, 1, 1, 1)
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


@pytest.mark.nightly
def test_two_processes_start_from_one_checkpoint_and_count_all_damaged_images(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # what it compiles runs for two steps
    write_images(tmp_path / "data")
    config = tmp_path / "config.py"
    digits = Path(__file__).parents[2] / "configs" / "digits.py"
    config.write_text(FOLDER_CONFIG.format(digits=str(digits), root=str(tmp_path / "data")))
    loaded = runpy.run_path(str(config))["get_config"]()
    description = make_task(loaded, load_dataset(loaded.data)).description
    shapes = get_parameters(abstract_model(lambda: description.build(rngs=SHAPE_KEYS)))
    rng = np.random.default_rng(0)
    theirs = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    save_checkpoint(tmp_path / "start", description, theirs)

    def start(name, pretrained):
        options = [f"--config={config}"]
        return Run(tmp_path / name, 2, tmp_path / "cache", options, lambda i: [f"--config.pretrained={pretrained(i)}"])

    with start("run", lambda index: tmp_path / "start") as run:
        statuses, outputs = run.end()
    assert statuses == [0, 0], outputs
    assert f"Starting from {tmp_path / 'start'}" in outputs[0]
    lines = list(map(json.loads, run.metrics.read_text().splitlines()))
    # Two steps are an epoch: every image came once, and no process can have had them all.
    assert [line["train/corrupt_images"] for line in lines if "train/loss" in line] == [DAMAGED]
    ours = load_checkpoint(tmp_path / "run", "raw")[1]
    for name in ("backbone", "head"):
        equal = [np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (ours[name], theirs[name])), strict=True)]
        assert set(equal) == {name == "backbone"}  # frozen: as it was read; the head has been trained

    # A file that one of them cannot read ends both.
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
