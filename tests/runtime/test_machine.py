"""Measuring the machine: once, kept for all processes, and believed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Kind, Phase, Site
from attn_compiler.runtime import cpp, kernels, machine
from attn_compiler.runtime.compiler import macros, why_not
from attn_compiler.targets.cpp.spec import Unit
from attn_compiler.testing import Case, assert_case, random_case


def test_a_measurement_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    assert machine.known("how far", lambda: 7.0) == 7.0
    assert machine.known("how deep", lambda: 2.0) == 2.0
    assert machine.known("how far", lambda: 1 / 0) == 7.0
    assert len(list(tmp_path.iterdir())) == 1


def test_a_question_within_a_question_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    assert machine.known("outer", lambda: machine.known("inner", lambda: 1.0) + 1) == 2.0
    assert machine.known("inner", lambda: 1 / 0) == 1.0


@pytest.mark.parametrize("damage", ["", "{", "[1]", "\\x00"])
def test_a_damaged_file_of_answers_is_written_anew(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    machine.known("how far", lambda: 7.0)
    [place] = tmp_path.iterdir()
    place.write_text(damage, encoding="utf-8")
    assert machine.known("how far", lambda: 8.0) == 8.0
    assert machine.known("how far", lambda: 1 / 0) == 8.0


def test_what_takes_longer_is_not_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    gain = machine.faster("sums", lambda: sum(range(20000)), lambda: sum(range(10)))
    assert gain > 1
    assert machine.faster("sums", lambda: None, lambda: None) == gain


def site(variant: Variant) -> Site:
    return Site(
        name="attn", kind=Kind.SELF, phase=Phase.PREFILL, layer=0, layers=1, batch=1, heads=2, kv_heads=2, q_len=512, k_len=512,
        head_dim=64, value_dim=64, dtype="float32", computes=variant, frame=None, q_hint=512, k_hint=512,
    )  # fmt: skip


@pytest.mark.parametrize(("gain", "outcome"), [(1.0, Refusal), (2.0, Carried)])
def test_where_pytorch_is_as_fast_it_serves(gain: float, outcome: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "_dense_gain", lambda *_: gain)
    assert isinstance(cpp.CppTarget().carry(site(Variant()), Variant()), outcome)


def test_a_window_is_carried_however_fast_pytorch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "_dense_gain", lambda *_: 0.1)
    window = Variant(mask=(e.k <= e.q) & (e.q - e.k < 9))
    assert isinstance(cpp.CppTarget().carry(site(window), window), Carried)


SECONDS = {Unit.FLOATS: 3.0, Unit.PAIRS: 4.0, Unit.TILES: 1.0}


@pytest.mark.parametrize(
    ("there", "allowed", "fastest"),
    [
        ((), True, Unit.FLOATS),
        (("bf16",), True, Unit.FLOATS),
        (("amx", "bf16"), False, Unit.FLOATS),
        (("amx", "bf16"), True, Unit.TILES),
    ],
)
def test_the_fastest_unit_serves_among_those_that_are_there(
    there: tuple[str, ...], allowed: bool, fastest: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"bf16": Unit.PAIRS.value[0], "amx": Unit.TILES.value[0]}
    monkeypatch.setattr(machine, "macros", lambda: frozenset(name for one in there for name in known[one].split()))
    monkeypatch.setattr(machine, "may_use_tiles", lambda: allowed)
    monkeypatch.setattr(machine, "_seconds_of", SECONDS.__getitem__)
    assert machine.fastest.__wrapped__(tuple(Unit)) is fastest


def test_a_process_may_not_use_tiles_that_its_machine_lacks() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    assert machine.may_use_tiles() in ({False, True} if "amx_bf16" in flags else {False})


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_units_are_measured() -> None:
    there = [unit for unit in Unit if unit.is_among(macros()) and unit is not Unit.TILES]
    assert all(0 < machine._seconds_of(unit) < 1 for unit in there)
    assert machine.fastest(tuple(Unit)) in Unit


@pytest.mark.parametrize("pairs", [False, True])
def test_both_ways_of_multiplying_bfloat16_are_within_budget(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pairs and "avx512_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this machine does not multiply pairs")
    monkeypatch.setattr(kernels, "fastest", lambda _: Unit.PAIRS if pairs else Unit.FLOATS)
    kernels.launches.cache_clear()
    with torch.no_grad():
        for seed in range(20):
            case: Case = random_case(seed)
            assert_case(case, torch.bfloat16, "cpp")
    kernels.launches.cache_clear()
