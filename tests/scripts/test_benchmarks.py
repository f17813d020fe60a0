"""The scripts that measure: what they report, and that nothing wrong passes for fast."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msvmamba_jax.kernels.selective_scan import config, measurement, selective_scan_2d
from msvmamba_jax.kernels.selective_scan.config import Device, Problem, choose
from msvmamba_jax.kernels.selective_scan.measurement import covered, examples, measure, workload
from msvmamba_jax.kernels.selective_scan.shapes import ScanShape

ROOT = Path(__file__).parents[2]
SHAPE = ScanShape("small", 2, 3, 4, 5, 2, ("row", "column_reversed"))


def load(name: str) -> types.ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


benchmark_scan, benchmark_model, tune_scan = map(load, ("benchmark_scan", "benchmark_model", "tune_scan"))


def strict_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script in this process: the exit status and the JSON that it wrote."""

    def call(script: types.ModuleType, *arguments: str) -> tuple[int, Any]:
        output = tmp_path / "output.json"
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments, "--output", str(output)])
        return script.main(), strict_json(output)

    return call


def different_sets(count: int, dtype: str = "float32") -> list[measurement.Example]:
    [(inputs, dy)] = examples(SHAPE, dtype, 1)
    return [measurement.Example(inputs._replace(u=inputs.u * (1 + i)), dy) for i in range(count)]


# How scans are measured


class TestMeasurement:
    def test_workloads(self):
        [(inputs, dy)] = sets = different_sets(1)
        scan = lambda inputs: selective_scan_2d(*inputs, routes=SHAPE.routes, implementation="xla")  # noqa: E731
        y, pull_back = jax.jit(lambda inputs: jax.vjp(scan, inputs))(inputs)
        assert dy.shape == y.shape
        for direction, expected in (("forward", y), ("saving", [y]), ("backward", pull_back(dy)[0])):
            function, arguments = workload(direction, SHAPE, "xla", sets)
            found = jax.jit(function)(*arguments[0])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)

    def test_time_in_which_a_gpu_is_busy(self, monkeypatch):
        """From a profile such as a GPU's: two streams that overlap, host threads and derived lines beside them."""
        event = "events {{ metadata_id: 1 offset_ps: {} duration_ps: {} }}"
        line = "lines {{ name: '{}' timestamp_ns: 1000 {} }}"
        program = "event_metadata { key: 1 value { id: 1 name: 'program' } }"
        streams = [
            line.format("Stream #14(Compute)", event.format(0, 3_000_000) + event.format(10_000_000, 2_000_000)),
            line.format("Stream #15(MemcpyD2D)", event.format(2_000_000, 3_000_000)),
            line.format("XLA Ops", event.format(0, 50_000_000)),
        ]
        host = line.format("Stream of threads", event.format(0, 90_000_000))
        text = f"planes {{ name: '/device:GPU:0' {program} {' '.join(streams)} }} planes {{ name: '/host:CPU' {host} }}"

        class Profiler:
            def __init__(self, folder: str, profiler_options: Any) -> None:
                self.file = Path(folder) / "plugins" / "profile" / "machine.xplane.pb"

            def __enter__(self) -> None:
                self.file.parent.mkdir(parents=True)

            def __exit__(self, *_: object) -> None:
                self.file.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))

        monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(platform="gpu")])
        monkeypatch.setattr(jax.profiler, "trace", Profiler)
        monkeypatch.setattr(measurement, "median_seconds", lambda execute, repeats: 0.005)  # four of them, then
        seconds, programs = measurement.busy(lambda: jnp.zeros(1), 2)
        np.testing.assert_allclose(seconds, 7e-6 / 4)  # of 0 to 5 and 10 to 12 microseconds
        assert programs == 3 / 4

    def test_covered(self):
        assert covered([]) == 0
        assert covered([(4.0, 6.0), (0.0, 5.0), (1.0, 2.0), (7.0, 8.0)]) == 7

    def test_measure_uses_the_sets_in_turn(self):
        seen = []

        def function(x: jax.Array) -> jax.Array:
            jax.debug.callback(lambda x: seen.append(int(x)), x)
            return 2 * x

        found = measure(function, [(jnp.asarray(i),) for i in range(3)], 2)
        assert found.result == 0
        assert found.milliseconds > 0
        assert (found.programs, found.sets) == (None, 3)
        assert set(seen) == {0, 1, 2}

    def test_relative_error(self):
        x, y = jnp.asarray([3.0, 4.0]), jnp.asarray([2.0])
        assert measurement.relative_error((x, y), (x, y)) == 0
        np.testing.assert_allclose(measurement.relative_error((x, 1.5 * y), (x + 0.1, y)), 0.5)
        assert math.isnan(measurement.relative_error((x, y * math.nan), (x, y)))

    def test_no_gpu_has_no_special_function_units(self):
        if jax.devices()[0].platform == "cpu":
            assert measurement.special_function_rate() is None


# benchmark_scan


class TestBenchmarkScan:
    def test_quick(self, run, capsys):
        status, report = run(benchmark_scan, "--quick", "--implementations", "xla")
        assert status == 0
        assert report["finished"]
        assert report["arguments"]["implementations"] == ["xla"]
        assert report["copy_bytes_per_second"] > 0
        rows = report["rows"]
        assert [(row["dtype"], row["direction"]) for row in rows] == [
            ("bfloat16", "forward"),
            ("bfloat16", "backward"),
            ("float32", "forward"),
            ("float32", "backward"),
        ]
        for row in rows:
            assert (row["status"], row["message"], row["relative_error"]) == ("ok", None, None)
            assert row["speedup"] == 1
            numbers = [x for x in row.values() if isinstance(x, (int, float))]
            assert len(numbers) == 9
            assert all(math.isfinite(x) and x > 0 for x in numbers)
        title, header, *lines = capsys.readouterr().out.splitlines()
        assert jax.__version__ in title
        assert header.split()[:4] == ["problem", "dtype", "direction", "implementation"]
        assert [line.split()[:4] for line in lines] == [["quick", r["dtype"], r["direction"], "xla"] for r in rows]

    @pytest.fixture
    def others(self, monkeypatch):
        """Implementations that are wrong in three ways."""

        def scan(*inputs, routes, implementation):
            y = selective_scan_2d(*inputs, routes=routes, implementation="xla")
            if implementation == "broken":
                raise NotImplementedError("no such shape\nand a long story")
            return y * {"xla": 1.0, "wrong": 1.1, "undefined": math.nan}[implementation]

        monkeypatch.setattr(measurement, "selective_scan_2d", scan)
        available = dict.fromkeys(["wrong", "broken", "xla", "undefined"], None) | {"absent": "it is a test"}
        monkeypatch.setattr(benchmark_scan, "available_implementations", lambda: available)
        monkeypatch.setattr(benchmark_scan, "implementations", lambda: tuple(available))

    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_wrong_and_failing_implementations(self, others, run, capsys, direction):
        status, report = run(benchmark_scan, "--quick", "--dtypes", "float32", "--directions", direction)
        assert status == 1
        rows = {row["implementation"]: row for row in report["rows"]}
        assert list(rows) == ["xla", "wrong", "broken", "undefined"]
        assert {name: row["status"] for name, row in rows.items()} == {
            "xla": "ok",
            "wrong": "WRONG",
            "broken": "failed",
            "undefined": "WRONG",
        }
        assert rows["wrong"]["relative_error"] == pytest.approx(0.1, rel=1e-3)
        assert rows["wrong"]["speedup"] == pytest.approx(rows["xla"]["milliseconds"] / rows["wrong"]["milliseconds"])
        assert rows["undefined"]["relative_error"] is None
        assert (rows["broken"]["message"], rows["broken"]["milliseconds"]) == ("no such shape", None)
        out, err = capsys.readouterr()
        assert [line.split()[-1] for line in out.splitlines()[3:]] == ["WRONG", "shape", "WRONG"]
        assert "failed: no such shape" in out
        assert err == "2 rows are WRONG\n"

    def test_without_a_reference(self, others, run):
        status, report = run(
            benchmark_scan, "--quick", "--dtypes", "float32", "--directions", "forward", "--implementations", "wrong",
            "--reference-implementation", "none",
        )  # fmt: skip
        [row] = report["rows"]
        assert status == 0
        assert (row["implementation"], row["status"], row["speedup"]) == ("wrong", "unchecked", None)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--tasks", "poetry"], "invalid choice: 'poetry'"),
            (["--variants", "msvmamba_huge"], "invalid choice: 'msvmamba_huge'"),
            (["--batches", "3"], "invalid choice: 3"),
            (["--implementations", "absent"], "'absent' cannot run here: it is a test"),
            (["--reference-implementation", "absent"], "'absent' cannot run here: it is a test"),
            (["--tasks", "detection", "--batches", "128"], "no shape has such a task"),
            (["--repeats", "0"], "--repeats must be at least 1"),
        ],
    )
    def test_impossible_arguments(self, others, run, capsys, arguments, message):
        with pytest.raises(SystemExit) as stopped:
            run(benchmark_scan, *arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err

    def test_floor(self):
        """1000 bytes at 1 kB/s take a second, 3000 exponentials at 1000/s three."""
        assert benchmark_scan.Ceilings(1e3, None).floor_milliseconds(1000, 3000) == 1000
        assert benchmark_scan.Ceilings(1e3, 1e3).floor_milliseconds(1000, 3000) == 3000
        assert benchmark_scan.Ceilings(1e3, 1e6).floor_milliseconds(1000, 3000) == 1000


# benchmark_model


class TestBenchmarkModel:
    def test_report(self, run, monkeypatch, capsys):
        """With processes that do not really run, one of which fails."""
        found = {
            "milliseconds": 20.0,
            "images_per_second": 100.0,
            "first_call_seconds": 1.0,
            "peak_bytes": 2**31,
            "scan_milliseconds": 5.0,
            "scan_share": 0.25,
        }

        def process(wanted: Any) -> dict[str, Any]:
            if wanted is None:
                return {"device": "a GPU", "jax": "1", "available": {"mosaic": None, "triton": "no", "xla": None}}
            return found if wanted.implementation == "mosaic" else {"failed": "out of memory"}

        monkeypatch.setattr(benchmark_model, "in_own_process", process)
        status, report = run(
            benchmark_model, "--variants", "msvmamba_nano", "--measurements", "inference_bfloat16", "--batch", "2"
        )
        assert status == 0
        good, bad = report["rows"]
        assert {name: good[name] for name in found} == found
        assert (good["variant"], good["implementation"], good["batch"]) == ("msvmamba_nano", "mosaic", 2)
        assert (bad["implementation"], bad["failed"]) == ("xla", "out of memory")
        *_, line, failure = capsys.readouterr().out.splitlines()
        assert line.split()[3:] == ["20.00", "100.0", "2.00", "5.00", "25%"]
        assert failure.endswith("failed: out of memory")
        with pytest.raises(SystemExit):
            run(benchmark_model, "--implementations", "triton")
        assert "'triton' cannot run here: no" in capsys.readouterr().err

    @pytest.mark.nightly
    def test_a_process_that_fails(self):
        wanted = benchmark_model.Measurement(
            "classification", "msvmamba_none", "xla", "inference_float32", 1, 32, 32, 1, False
        )
        assert "there is no model 'msvmamba_none'" in benchmark_model.in_own_process(wanted)["failed"]
        traced = dataclasses.replace(wanted, variant="msvmamba_nano", height=2, width=2)  # less than a patch
        assert "at least 4 x 4 pixels" in benchmark_model.in_own_process(traced)["failed"]

    @pytest.mark.parametrize("name", ["inference_float32", "training_float32"])
    def test_what_a_process_measures(self, monkeypatch, name):
        """With programs that do nothing and measurements that are given."""
        executed = []
        program = lambda wanted: lambda: executed.append(wanted.name)  # noqa: E731
        monkeypatch.setattr(benchmark_model, "inference", program)
        monkeypatch.setattr(benchmark_model, "training", program)
        monkeypatch.setattr(benchmark_model, "median_seconds", lambda execute, repeats: (execute(), 0.5)[1])
        monkeypatch.setattr(benchmark_model, "scan_seconds", lambda wanted: 0.125)
        found = benchmark_model.run_measurement(
            benchmark_model.Measurement("classification", "msvmamba_nano", "xla", name, 2, 32, 32, 1, True)
        )
        assert executed == [name] * 2
        assert found.pop("first_call_seconds") >= 0
        assert (found.pop("peak_bytes") is None) == (jax.devices()[0].memory_stats() is None)
        assert found == {
            "milliseconds": 500, "images_per_second": 4, "scan_milliseconds": 125, "scan_share": 0.25,
        }  # fmt: skip

    @pytest.mark.parametrize("task", ["classification", "segmentation", "detection"])
    def test_batches_are_of_the_task(self, task):
        wanted = benchmark_model.Measurement(task, "msvmamba_nano", "xla", "training_float32", 2, 32, 32, 1, True)
        batch = benchmark_model.make_batch(wanted)
        assert {len(x) for x in batch.values()} == {2}
        assert batch["image"].shape == (2, 32, 32, 3)
        assert wanted.description.task == benchmark_model.make_task(wanted.description).description.task == task

    @pytest.mark.nightly
    @pytest.mark.parametrize("task", ["classification", "segmentation"])
    def test_quick(self, run, task):
        status, report = run(
            benchmark_model, "--quick", "--variants", "msvmamba_nano", "--implementations", "xla", "--task", task,
            "--measurements", "inference_float32", "training_float32",
        )  # fmt: skip
        assert status == 0
        assert report["finished"]
        assert [row["name"] for row in report["rows"]] == ["inference_float32", "training_float32"]
        for row in report["rows"]:
            assert "failed" not in row
            assert row["images_per_second"] == pytest.approx(2e3 / row["milliseconds"])
            assert row["scan_share"] == pytest.approx(row["scan_milliseconds"] / row["milliseconds"])
            assert row["scan_milliseconds"] > 0


# tune_scan

PROBLEM = Problem("forward", 1, 2, 3, 4, 1, 1, "float32")
CONTENTS = {"GPU 1": {"mosaic": {"p": {"a": 1}, "q": {"a": 2}}, "triton": {"p": {"b": 3}}}, "GPU 2": {"mosaic": {}}}


@dataclasses.dataclass(frozen=True)
class Config:
    """Of a backend that multiplies."""

    factor: float
    milliseconds: float = 1.0


class TestTuning:
    def test_best(self):
        assert tune_scan.best({"heuristic": 1.0, "a": 0.98, "b": 0.96}, "heuristic") == "b"
        assert tune_scan.best({"heuristic": 1.0, "a": 0.98}, "heuristic") is None
        assert tune_scan.best({"heuristic": 1.0}, "heuristic") is None

    def test_merged(self):
        before = json.dumps(CONTENTS)
        changed = tune_scan.merged(CONTENTS, "GPU 1", "mosaic", "p", {"a": 5})
        assert changed["GPU 1"] == {"mosaic": {"p": {"a": 5}, "q": {"a": 2}}, "triton": {"p": {"b": 3}}}
        assert tune_scan.merged({}, "GPU", "mosaic", "p", {"a": 5}) == {"GPU": {"mosaic": {"p": {"a": 5}}}}
        without = tune_scan.merged(CONTENTS, "GPU 1", "triton", "p", None)
        assert without["GPU 1"] == {"mosaic": {"p": {"a": 1}, "q": {"a": 2}}}
        assert tune_scan.merged({}, "GPU", "mosaic", "p", None) == {}
        assert json.dumps(CONTENTS) == before

    def test_write_is_stable_and_leaves_nothing_behind(self, tmp_path):
        path = tmp_path / "measured.json"
        tune_scan.write(path, {"b": {}, "a": {"y": {}, "x": {}}})
        first = path.read_text()
        tune_scan.write(path, {"a": {"x": {}, "y": {}}, "b": {}})
        assert path.read_text() == first
        assert first.index('"a"') < first.index('"x"') < first.index('"y"') < first.index('"b"')
        assert list(tmp_path.iterdir()) == [path]

    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch):
        """Scans take as long as their configuration says."""

        def measure(function, sets, repeats):
            result = function(*sets[0])
            return measurement.Measurement(_multiply.chosen.milliseconds, 0.0, None, len(sets), result)

        monkeypatch.setattr(tune_scan, "measure", measure)

    def test_configurations_are_measured_checked_and_survived(self, capsys):
        milliseconds = tune_scan.try_configurations(
            "fake", PROBLEM, _multiply, [(jnp.ones(3),)], 1, [Config(2.0), Config(2.5), Config(0.0), Config(2.0, 5.0)]
        )
        assert milliseconds == {Config(2.0): 1.0, Config(2.0, 5.0): 5.0}
        out = capsys.readouterr().out
        assert "WRONG by 2.5e-01" in out
        assert "ValueError('factor is 0')" in out

    def test_nothing_counts_where_the_heuristic_fails(self):
        sets = [(jnp.ones(3),)]
        assert tune_scan.try_configurations("fake", PROBLEM, _multiply, sets, 1, [Config(0.0), Config(2.0)]) == {}

    def test_tune(self, monkeypatch, tmp_path):
        """A heuristic that is slow on one of two problems."""
        file = tmp_path / "measured.json"
        file.write_text(json.dumps({"another": {"fake": {"p": {"factor": 1}}}}))
        backend = types.ModuleType("msvmamba_jax.kernels.selective_scan.fake")
        backend.heuristic = lambda problem, device: Config(2.0, 2.0 if problem.batch == 1 else 1.0)
        backend.candidates = lambda problem, device: [Config(2.0), Config(2.0, 2.0), Config(3.0, 0.5)]
        monkeypatch.setitem(sys.modules, backend.__name__, backend)
        monkeypatch.setattr(tune_scan, "FILE", file)
        device = Device("GPU", 1)
        for batch in (1, 2):
            problem = dataclasses.replace(PROBLEM, batch=batch)
            work = lambda *_, problem=problem: (lambda x: _multiply(x, problem), [(jnp.ones(3),)])  # noqa: E731
            monkeypatch.setattr(tune_scan, "workload", work)
            tune_scan.tune("fake", SHAPE, problem, device, 1)
        assert strict_json(file) == {
            "GPU": {"fake": {PROBLEM.key: {"factor": 2.0, "milliseconds": 1.0}}},
            "another": {"fake": {"p": {"factor": 1}}},
        }
        config.measured.cache_clear()

    def test_needs_a_backend_that_runs(self, monkeypatch, capsys):
        monkeypatch.setattr(tune_scan, "available_implementations", lambda: {"mosaic": "no GPU", "xla": None})
        monkeypatch.setattr(sys, "argv", ["tune_scan", "mosaic"])
        with pytest.raises(SystemExit):
            tune_scan.main()
        assert "'mosaic' cannot run here: no GPU" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--tasks", "detection", "--batches", "128"], "no shape has such a task"),
            (["--repeats", "0"], "--repeats must be at least 1"),
        ],
    )
    def test_impossible_arguments(self, monkeypatch, capsys, arguments, message):
        monkeypatch.setattr(tune_scan, "available_implementations", lambda: {"mosaic": None, "xla": None})
        monkeypatch.setattr(sys, "argv", ["tune_scan", "mosaic", *arguments])
        with pytest.raises(SystemExit) as stopped:
            tune_scan.main()
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def _multiply(x: jax.Array, problem: Problem = PROBLEM) -> jax.Array:
    chosen = choose("fake", problem, Device("GPU", 1), lambda problem, device: Config(7.0))
    if not chosen.factor:
        raise ValueError("factor is 0")
    _multiply.chosen = chosen
    return x * chosen.factor
