"""`docs/where.md` says which target carries what; every cell is asked again here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import LanguageError
from attn_compiler.runtime import triton
from attn_compiler.runtime.call import operands_of
from attn_compiler.runtime.exported import uncarried
from attn_compiler.runtime.targets import OPT_IN, TARGETS
from attn_compiler.targets.operands import Operands
from attn_compiler.testing import variant_of

PAGE = Path(__file__).parent.parent / "docs" / "where.md"
LENGTH, HEADS, DIM = 1024, 2, 16
SIZES: dict[str, Any] = {
    "heads": HEADS, "kv_heads": HEADS, "q_len": LENGTH, "k_len": LENGTH, "head_dim": DIM, "values": None, "layer": 0, "layers": 1
}  # fmt: skip
YES, NO = "yes", "–"

TABLES = {
    "document": torch.zeros(LENGTH, dtype=torch.int64),
    "real": torch.ones(1, LENGTH, dtype=torch.bool),
    "regions": torch.ones(LENGTH, LENGTH, dtype=torch.bool),
    "bitmap": torch.ones(LENGTH // 16, LENGTH // 16, dtype=torch.bool),
    "bias": torch.zeros(HEADS, LENGTH, LENGTH),
    "alpha": torch.ones(HEADS),
    "sink": torch.zeros(HEADS),
    "gate": torch.zeros(1, HEADS, LENGTH, dtype=torch.float64),
    "gates": torch.zeros(1, HEADS, LENGTH, DIM),
    "beta": torch.zeros(1, HEADS, LENGTH),
    "output_gate": torch.zeros(1, HEADS, LENGTH, DIM),
    "local_conv": torch.zeros(1, HEADS, DIM, 3),
    "memory_k": torch.zeros(1, HEADS, 3, DIM),
    "memory_v": torch.zeros(1, HEADS, 3, DIM),
    "taps": torch.zeros(1, HEADS, DIM, 9),
    "hedgehog_q": torch.zeros(1, HEADS, DIM, DIM),
    "hedgehog_k": torch.zeros(1, HEADS, DIM, DIM),
}

Asked = Callable[[Operands, Variant], str | None]


def trained(operands: Operands) -> Operands:
    return replace(operands, differentiated=True)


COLUMNS: dict[str, Asked] = {
    "C++": lambda operands, variant: TARGETS["cpp"].refuse(operands, variant),
    "C++, trained": lambda operands, variant: TARGETS["cpp"].refuse(trained(operands), variant),
    "Triton": lambda operands, variant: TARGETS["triton"].refuse(operands, variant),
    "Triton, trained": lambda operands, variant: TARGETS["triton"].refuse(trained(operands), variant),
    "PyTorch": lambda operands, variant: TARGETS["torch"].refuse(trained(operands), variant),
    "flex": lambda operands, variant: OPT_IN["flex"].refuse(operands, variant),
    "ONNX": lambda _, variant: uncarried(variant),
}


def rows() -> dict[str, list[str]]:
    """The cells of the page, by what is written in front of them."""
    found = re.findall(r"^\| `(.+?)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    return {written.replace(r"\|", "|"): cells.split(" | ") for written, cells in found}


def answers(written: str) -> list[str]:
    """What the targets say."""
    slots = yaml.safe_load(f"{{{written}}}")
    try:
        variant = variant_of(slots, heads=HEADS, kv_heads=HEADS, length=LENGTH, dim=DIM)
    except LanguageError:
        return [NO for _ in COLUMNS]
    q, k, v = torch.zeros(3, 1, HEADS, LENGTH, DIM)
    derived = {table.name for part in variant.parts() for table in part.derived}
    tables = {name: TABLES[name] for name in variant.tables() - derived}
    operands = operands_of(q, k, v, variant, tables, None, None, 0, 1, False)
    return [NO if refuse(operands, variant) else YES for refuse in COLUMNS.values()]


@pytest.mark.parametrize("written", rows())
def test_what_the_page_says_of_a_variant_is_what_the_targets_say(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_machine", lambda *_: None)  # as where there is a GPU
    assert rows()[written] == answers(written)
