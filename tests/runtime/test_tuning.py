"""How Triton kernels are cut: what compiles well, and of that what is fastest; asked once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attn_compiler.errors import CompilerError
from attn_compiler.runtime import tuning
from attn_compiler.runtime.ahead import Compiled, Order
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.triton_orders import order
from attn_compiler.targets.triton.blocks import KINDS, Blocks, Kind, candidates

SHAPE = shape_of("causal", q_len=64, k_len=64, heads=2, head_dim=64, dtype="bfloat16", target="triton")
GOOD = Compiled(128, 0, 1024, {"HGMMA.64": 4, "LDGSTS.E.BYPASS.128": 8, "UTMALDG.2D": 2, "USETMAXREG": 2})
BAD: Mapping[str, Compiled | CompilerError] = {
    "spills": replace(GOOD, stack=8),
    "does not fit": replace(GOOD, shared=1 << 20),
    "multiplies slowly": replace(GOOD, opcodes={"FFMA": 4}),
    "does not compile": CompilerError("no"),
}


def orders(count: int) -> list[Order]:
    return [order(SHAPE, "forward", Blocks(64, 64, 4, stages), "sm_90") for stages in range(1, count + 1)]


def best(monkeypatch: pytest.MonkeyPatch, found: Sequence[Compiled | CompilerError], times: Sequence[float]) -> int:
    monkeypatch.setattr(tuning, "compile_each", lambda _: list(found))
    return tuning.best(orders(len(found)), lambda n: times[n])


def test_the_fastest_of_what_is_sound_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best(monkeypatch, [GOOD, GOOD, GOOD], [2.0, 1.0, 3.0]) == 1


@pytest.mark.parametrize("what", BAD)
def test_what_compiles_badly_is_not_chosen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert best(monkeypatch, [BAD[what], GOOD, GOOD], [1.0, 3.0, 2.0]) == 2


def test_where_all_spill_the_fastest_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best(monkeypatch, [BAD["spills"], BAD["does not fit"], BAD["spills"]], [3.0, 1.0, 2.0]) == 2


def test_a_single_one_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best(monkeypatch, [BAD["spills"], GOOD], []) == 1


def test_an_answer_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    asked: list[int] = []
    monkeypatch.setattr(tuning, "compile_each", lambda given: [GOOD] * len(given))
    monkeypatch.setattr(tuning, "machine_of", lambda _: "sm_90")
    monkeypatch.setattr(tuning, "milliseconds", lambda run: run())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")

    def attempt(blocks: Blocks) -> object:
        asked.append(blocks.stages)
        return lambda: -len(asked)  # the later ones are faster

    some = candidates("forward", "bfloat16", 64, "sm_90")
    for _ in range(2):
        found = tuning.chosen("forward", SHAPE, 0, torch.device("cuda"), attempt, describable=True)  # type: ignore[arg-type]
        assert found == some[-1]
    assert len(asked) == len(some)


@pytest.mark.parametrize(
    ("variant", "describable", "specialized"),
    [
        ("causal & window(9)", True, True),
        ("causal & window(9)", False, False),  # rows that start anywhere cannot be copied tile by tile
        ({"mask": "causal & window(9)", "empty_rows": "mean"}, True, False),  # queries that saw no key need another loop
        ("causal & dilated(4)", True, False),  # its tokens are visited in an order of their own
        ("strided(16, 2)", True, False),  # its tiles stand in a list
    ],
)
def test_warps_are_divided_where_one_loop_over_whole_tiles_suffices(
    variant: object, describable: bool, specialized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "INTERPRETED", (Blocks(16, 16, specialized=True), Blocks(16, 16)))
    shape = shape_of(variant, q_len=256, k_len=256, heads=2, head_dim=16, target="triton")  # type: ignore[arg-type]
    found = tuning.chosen("forward", shape, 0, torch.device("cpu"), lambda _: pytest.fail("tried"), describable=describable)
    assert found.specialized == specialized


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tuning, "machine_of", lambda _: "sm_90")
    found = tuning.chosen("forward", SHAPE, 0, torch.device("cuda"), lambda _: pytest.fail("measured"))
    assert found == candidates("forward", "bfloat16", 64)[0]


def test_another_kernel_or_length_is_another_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    longer = replace(SHAPE, k_len=1000)
    asked = {
        tuning.question("forward", shape, orders(count), torch.device("cuda")) for shape in (SHAPE, longer) for count in (1, 2)
    }
    assert len(asked) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("machine", ["sm_80", "sm_90", "gfx942"])
def test_tiles_are_powers_of_two_and_no_two_are_alike(kind: Kind, dim: int, machine: str) -> None:
    some = candidates(kind, "bfloat16", dim, machine)
    assert len(set(some)) == len(some) > 1
    assert all(n >= 16 and n & (n - 1) == 0 for blocks in some for n in blocks.sizes().values())
