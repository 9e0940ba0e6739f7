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


@pytest.mark.parametrize("pairs", [False, True])
def test_both_ways_of_multiplying_bfloat16_are_within_budget(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pairs and "avx512_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this machine does not multiply pairs")
    monkeypatch.setattr(kernels, "pairs_are_faster", lambda: pairs)
    kernels.launches.cache_clear()
    with torch.no_grad():
        for seed in range(20):
            case: Case = random_case(seed)
            assert_case(case, torch.bfloat16, "cpp")
    kernels.launches.cache_clear()
