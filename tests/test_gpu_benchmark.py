"""The benchmark for GPUs, as far as a machine without one can tell: every step runs, and what was not measured is said."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module("gpu")
    for name in set(sys.modules) - before:
        if name == "gpu" or name.startswith(("_gpu_", "_tables")):
            del sys.modules[name]


def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(folder), "--dry", "--seeds", "1", "--rounds", "1", *more])
    gpu.main()
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_every_step_runs_without_a_gpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run(gpu, monkeypatch, tmp_path, "--only", "window 1024, 4 kv heads", "--minutes", "60")
    [row] = found["attentions"]  # type: ignore[misc]
    assert isinstance(row["ours"], float)
    assert isinstance(row["flex"], float)
    assert {one["step"] for one in found["models"]} == {"forward", "training"}  # type: ignore[attr-defined]
    assert all(isinstance(float(one["ours"]), float) for one in found["models"])  # type: ignore[attr-defined]
    assert found["checked"]["wrong"] == []  # type: ignore[index]
    assert {*found["replayed"].values()} == {"right"}  # type: ignore[attr-defined]
    assert {one["met"] for one in found["targets"]} == {"unmeasured"}  # type: ignore[attr-defined]
    assert "| window 1024, 4 kv heads |" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_tables_are_read_without_a_gpu_too(gpu: ModuleType) -> None:
    """What they show is found out by kernels of their own, forward and backward."""
    clock = gpu.Clock("cpu", 1, float("inf"))
    shapes = [one.tiny() for one in gpu.SHAPES if one.tables and not one.linear]
    found = {"ceilings": {}, "left out": {}}
    rows = list(gpu.timings(shapes, clock, found))
    assert len(rows) == sum(1 + one.trains for one in shapes) > 5
    assert all(isinstance(row["ours"], float) for row in rows)


def test_linear_attention_is_timed_where_its_kernels_run(
    gpu: ModuleType,
) -> None:
    shapes = [shape.tiny() for shape in gpu.SHAPES if shape.linear]
    assert len(shapes) == 4
    clock, found = gpu.Clock("cpu", 1, time.monotonic() + 3600), {"ceilings": {}, "left out": {}}
    rows = list(gpu.timings(shapes[1:2], clock, found))
    assert [row["attention"] for row in rows] == ["linear, heads of 64", "linear, heads of 64, backward"]
    rows.append(next(gpu.timings(shapes[3:], clock, found)))
    assert rows[2]["attention"] == "gated linear attention"
    assert all(isinstance(row["ours"], float) for row in rows), found["left out"]


def test_codes_are_multiplied_without_a_gpu_too(gpu: ModuleType) -> None:
    shapes = [one.tiny() for one in gpu.SHAPES if one.storage]
    found = {"ceilings": {}, "left out": {}}
    rows = list(gpu.timings(shapes, gpu.Clock("cpu", 1, float("inf")), found))
    assert len(rows) == len(shapes) >= 5
    assert all(isinstance(row["ours"], float) for row in rows)
    assert set(gpu.of_codes("cpu").values()) == {"right"}


def test_a_graph_that_does_not_follow_its_tables_is_seen(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one would not whose host had looked at them: what it gave at first, it gives again."""
    graphs = sys.modules["_gpu_graphs"]
    monkeypatch.setattr(graphs, "CASES", {"documents": graphs.CASES["documents"]})

    def captured(run: Callable[[], object]) -> Callable[[], object]:
        first = run()
        return lambda: first

    monkeypatch.setattr(graphs, "captured", captured)
    assert graphs.replayed("cpu") == {"documents": "right"}
    monkeypatch.setattr(graphs, "is_played_again", lambda _: True)
    assert "AssertionError" in graphs.replayed("cpu")["documents"]


def test_what_there_is_no_time_for_is_said(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = run(gpu, monkeypatch, tmp_path, "--minutes", "0")
    assert found["attentions"] == []
    assert set(found["left out"].values()) == {"no time left"}  # type: ignore[attr-defined]
    assert {one["inductor / ours"] for one in found["models"]} == {"no time left"}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("row", "met"),
    [
        ({"attention": "window 1024", "TFLOP/s": 301.0}, "yes"),
        ({"attention": "window 1024", "TFLOP/s": 299.0}, "no"),
        ({"attention": "window 1024", "TFLOP/s": "–"}, "unmeasured"),
        ({"attention": "another one", "TFLOP/s": 301.0}, "unmeasured"),
    ],
)
def test_a_target_is_met_by_what_was_measured(gpu: ModuleType, row: dict[str, object], met: str) -> None:
    assert gpu.reached("window 1024", "TFLOP/s", 300.0, [row])["met"] == met


def test_a_ratio_is_one_of_times(gpu: ModuleType) -> None:
    row = {"attention": "x", "cuDNN": 8.0, "ours": 2.0}
    assert gpu.reached("x", "cuDNN / ours", 4.0, [row]) == {
        "attention": "x", "target": "cuDNN / ours ≥ 4", "found": "4.00", "met": "yes",
    }  # fmt: skip


@pytest.mark.parametrize(("ours", "met"), [("4.90", "yes"), ("5.10", "no"), ("–", "unmeasured")])
def test_a_model_is_held_to_its_target(gpu: ModuleType, ours: str, met: str) -> None:
    row = {"model": "window 1024", "tokens": 16384, "step": "training", "inductor": "10.00", "ours": ours}
    [target] = [one for one in gpu.PAYING if "16384" in one[0] and "training" in one[0]]
    assert gpu.reached(*target, [gpu.named(row)])["met"] == met
    assert gpu.reached(*target, [gpu.named(row | {"tokens": 4096})])["met"] == "unmeasured"


def test_who_cannot_say_a_case_is_left_out_in_silence_and_who_fails_is_not(gpu: ModuleType) -> None:
    def unsuitable() -> None:
        gpu.attentions(gpu.SHAPES[0], "cpu")["NATTEN"](*3 * [None])

    def failing() -> None:
        raise RuntimeError("out of memory")

    assert gpu.objection(unsuitable) == ""
    assert gpu.objection(failing) == "RuntimeError: out of memory"
    assert gpu.objection(lambda: None) is None
