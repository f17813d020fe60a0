"""The batch script, with commands that do what Slurm's do, on one host: start tasks, pass signals on, requeue."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm_train.sh"

LIMIT = 300  # seconds that anything here may take before it counts as hanging

# Every task gets its number and the same command; a signal goes on to all of them, and srun waits for them to end.
SRUN = """#!/usr/bin/env bash
echo "$@" >> "$LOG"
while [[ "$1" == --* ]]; do shift; done
tasks=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do
    wait "$task"; code=$?
    while kill -0 "$task" 2> /dev/null; do wait "$task"; code=$?; done  # a signal had only interrupted it
    [ "$code" -gt "$status" ] && status=$code
done
exit "$status"
"""
SCONTROL = '#!/usr/bin/env bash\necho "scontrol $@" >> "$LOG"\n'

# Stands in for a training that needs a moment to save.
TASK = """#!/usr/bin/env bash
trap 'sleep 0.5; echo "saved $SLURM_PROCID"; exit 143' TERM
echo "task $SLURM_PROCID:" "$@"
echo ready >> "$LOG.ready"
for _ in $(seq ${TURNS}); do sleep 0.05; done
exit "${STATUS}"
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Job:
    """The script as a job of two tasks; leaving the block ends what is left of it."""

    def __init__(self, folder: Path, python: str, *arguments: str, **variables: str) -> None:
        write(folder / "bin" / "srun", SRUN)
        write(folder / "bin" / "scontrol", SCONTROL)
        write(folder / ".venv" / "bin" / "python", python)
        self.log = folder / "log"
        self.number = str(os.getpid())  # of which JAX makes the coordinator's port
        environment = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": self.number,
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_JOB_NUM_NODES": "1",
            **variables,
        }
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, limit: int) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=limit)
        return self.process.returncode, output

    def ready(self) -> bool:
        """Whether both tasks have set their traps."""
        file = self.log.with_name("log.ready")
        return file.is_file() and len(file.read_text().splitlines()) == 2

    def logged(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.is_file() else []


def wait_for(done: object, job: Job, limit: int) -> None:
    until = time.monotonic() + limit
    while not done():  # type: ignore[operator]
        assert time.monotonic() < until
        assert job.process.poll() is None, job.end(LIMIT)
        time.sleep(0.02)


def test_all_tasks_get_the_command_line(tmp_path: Path) -> None:
    with Job(tmp_path, TASK, "--config", "configs/tiny.py", "--workdir", "a folder", TURNS="1", STATUS="0") as job:
        status, output = job.end(LIMIT)
    assert status == 0, output
    training = "-m msvmamba_jax.train --config configs/tiny.py --workdir a folder"
    assert sorted(output.splitlines()) == [f"task {task}: {training}" for task in (0, 1)]
    assert job.logged() == [f"--kill-on-bad-exit=1 .venv/bin/python {training}"]


@pytest.mark.parametrize("status", [1, 130])
def test_a_failed_run_is_not_put_back(tmp_path: Path, status: int) -> None:
    with Job(tmp_path, TASK, TURNS="1", STATUS=str(status)) as job:
        assert job.end(LIMIT)[0] == status
    assert len(job.logged()) == 1


def test_a_stopped_run_saves_and_is_put_back(tmp_path: Path) -> None:
    with Job(tmp_path, TASK, TURNS="6000", STATUS="0") as job:
        wait_for(job.ready, job, LIMIT)
        job.process.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM says
        status, output = job.end(LIMIT)
    assert status == 143, output
    assert {"saved 0", "saved 1"} <= set(output.splitlines())
    assert job.logged()[1:] == [f"scontrol requeue {job.number}"]


@pytest.mark.nightly
def test_tasks_find_each_other_and_train(tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    arguments = [
        f"--config={ROOT / 'configs' / 'digits.py'}", f"--workdir={workdir}", "--config.duration=2 steps",
        "--config.batch_size=8", "--config.model.width=16", "--config.model.depths=(1,1,1,1)", "--config.pictures=0",
        "--config.log_every=1 step", "--config.evaluation_per_device=60", "--config.ema_decay=0",
    ]  # fmt: skip
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # what it compiles runs for two steps
        "JAX_NUM_CPU_DEVICES": "1",
    }
    python = f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} "$@"\n'
    with Job(tmp_path, python, *arguments, **variables) as job:
        status, output = job.end(2 * LIMIT)
    assert status == 0, output
    assert "2 x cpu of 2 processes" in output
    lines = list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines if "train/loss" in line] == [2]  # step 1 compiles; one process writes
    assert lines[-1]["eval/images"] == 360
