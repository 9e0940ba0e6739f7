"""The source of Triton kernels as people read it, and as a program of its own."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import Variant
from attn_compiler.cli import app
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.triton_launch import load
from attn_compiler.runtime.triton_orders import order
from attn_compiler.targets.triton.blocks import KINDS, Blocks, Kind
from attn_compiler.targets.triton.launch import parts
from attn_compiler.testing import assert_within_budget

LONGEST = 60  # lines of a function
GOLDENS = Path(__file__).parent.parent / "goldens" / "triton"
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "window": {"mask": "causal & window(256)"},
    "dilated": {"mask": "causal & dilated(4) & window(512)"},
    "documents_and_alibi": {"mask": "causal & same(documents)", "score": "score + alibi"},
    "sinks_and_softcap": {
        "mask": "causal & (window(256) | sinks(4))",
        "score": "softcap(score, 50)",
        "normalizer": "softmax_one",
    },
    "sigmoid": {"mask": "causal & valid(padding)", "empty_rows": "mean", "normalizer": "sigmoid"},
}


def source(name: str, **more: object) -> str:
    shape = {"q_len": 4096, "k_len": 4096, "heads": 8, "head_dim": 64, **more}
    return attn.kernel_source(VARIANTS[name], target="triton", **shape)  # type: ignore[arg-type]


def generated(text: str) -> str:
    """The kernel itself, and what it visits."""
    kernel = text[text.index("@triton.jit(do_not_specialize") : text.index("\n\n\nBATCH, HEADS")]
    visits = text[text.index("def visits(") : text.index("\n\n\ndef attend(")]
    return f"{kernel}\n\n\n{visits}\n"


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_generated_reads_as_it_did(name: str, update_golden: bool) -> None:
    path = GOLDENS / f"{name}.txt"
    found = generated(source(name))
    if update_golden:
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8"), "if the new text is better, run pytest with --update-golden"


@pytest.mark.parametrize("name", VARIANTS)
def test_no_hole_and_no_open_question_is_left(name: str) -> None:
    text = source(name)
    assert not re.search(r"# </?[a-z ]+>$", text, re.MULTILINE)
    assert not re.search(r"^ *if [A-Z_]+:$", text, re.MULTILINE)
    compile(text, name, "exec")


def test_a_line_is_short_enough_to_read() -> None:
    assert all(len(line) <= 130 for name in VARIANTS for line in source(name).splitlines() if "sequence(" not in line)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_generated_kernel_is_as_short_as_any_function(name: str, kind: Kind) -> None:
    """What a formula says is all that may be added to a skeleton: geometries of several axes are longer."""
    q_len = 1 if kind == "decode" else 4096
    shape = shape_of(VARIANTS[name], q_len=q_len, k_len=4096, heads=8, head_dim=64, target="triton")
    tree = ast.parse(order(shape, kind, Blocks(), "sm_90").text)
    assert max((f.end_lineno or 0) - f.lineno + 1 for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)) <= LONGEST


def test_what_never_holds_is_no_number() -> None:
    shape = shape_of("causal", q_len=64, k_len=64, heads=1, head_dim=16, target="triton")
    text = order(replace(shape, variant=Variant(mask=(e.k <= e.q) & ~e.true)), "forward", Blocks(), "sm_90").text
    assert "= False" in text
    assert "~True" not in text


def test_heads_that_differ_have_kernels_of_their_own() -> None:
    both = {"mask": "causal", "heads": {"0::2": {"mask": "causal & window(8)"}}}
    text = attn.kernel_source(both, q_len=64, k_len=64, heads=4, head_dim=8, target="triton")
    assert "# Heads 0, 2 of 4.\n" in text
    assert "# Heads 1, 3 of 4.\n" in text


@pytest.mark.parametrize("numbers", [[], [5], [0, 1, 2, 3], [4, 4, 4, 5, 6, 7, 0, 1], [3, 1, 2]], ids=str)
def test_a_sequence_is_its_parts(numbers: list[int]) -> None:
    assert [first + step * n for first, step, count in parts(numbers) for n in range(count)] == numbers


def test_what_is_printed_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    q, k, v = (torch.randn(1, 4, 29, 8) for _ in range(3))
    out = attn.attend(q, k, v, "causal & window(9)", target="triton")
    assert isinstance(out, Tensor)
    printed = attn.kernel_source("causal & window(9)", q_len=29, k_len=29, heads=4, head_dim=8, target="triton")
    [path] = tmp_path.glob("*.py")
    assert printed.replace("import torch\n", "").startswith(path.read_text())


@pytest.mark.parametrize("empty_rows", ["zero", "mean"])
def test_the_kernels_for_few_queries_are_one_program(empty_rows: str) -> None:
    pytest.importorskip("triton")
    variant = {"mask": "causal & window(40)", "empty_rows": empty_rows}
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 290, 8), torch.randn(1, 2, 290, 8)
    printed = attn.kernel_source(variant, q_len=3, k_len=290, heads=4, kv_heads=2, head_dim=8, target="triton")
    assert printed.count("def decode") == 1 + (empty_rows == "mean")
    exact, plain = (attn.attend(q, k, v, variant, target=by, return_lse=True) for by in ("reference", "torch"))
    for results in zip(load(printed).attend(q, k, v), exact, plain, strict=True):
        assert_within_budget(*results)


@pytest.mark.parametrize("mask", ["causal & same(documents)", "causal & blocks(keep, 32)"])
def test_a_saved_kernel_runs_on_its_own(mask: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    path = tmp_path / "kernel.py"
    shape = ["--length", "200", "--heads", "2", "--head-dim", "16", "--score", "score + alibi"]
    result = CliRunner().invoke(app, ["kernel", mask, *shape, "--target", "triton", "--save", str(path)])
    assert result.exit_code == 0, result.output
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "tensor(" in done.stdout
    assert "nan" not in done.stdout
