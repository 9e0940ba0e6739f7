"""The source of kernels as people read it: what is generated is kept beside the tests and reviewed as code."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ShapeError

GOLDENS = Path(__file__).parent.parent / "goldens" / "cpp"
ONE = "softmax_one"
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "window": {"mask": "causal & window(256)"},
    "dilated": {"mask": "causal & dilated(4) & window(512)"},
    "neighborhood": {"geometry": [56, 56], "mask": "neighborhood([7, 7])"},
    "documents_and_alibi": {"mask": "causal & same(documents)", "score": "score + alibi"},
    "relative_bias": {"mask": "all", "score": 'score + buckets("bias", 128)'},
    "sinks_and_softcap": {
        "mask": "causal & (window(256) | sinks(4))",
        "score": "softcap(score, 50)",
        "normalizer": "softmax_one",
    },
    "sigmoid": {"mask": "causal & valid(padding)", "normalizer": "sigmoid"},
    "few_queries": {"mask": "causal & (window(256) | sinks(4))", "score": "score + alibi"},
}


def source(name: str, **more: object) -> str:
    shape = {"q_len": 1 if name == "few_queries" else 3136, "k_len": 3136, "heads": 8, "head_dim": 64, **more}
    return attn.kernel_source(VARIANTS[name], **shape)  # type: ignore[arg-type]


def generated(text: str) -> str:
    """What is not the skeleton's: the fields and functions that are printed from the variant."""
    view = text[text.index("struct Task {") : text.index("// What a query gets that sees no key")]
    functions = re.findall(r"^INLINE \w+ (?:position_of|weight_from|factor_of|total_of)\(.*?^}\n", text, re.MULTILINE | re.DOTALL)
    return "\n".join((view.rstrip() + "\n", *functions))


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_generated_reads_as_it_did(name: str, update_golden: bool) -> None:
    path = GOLDENS / f"{name}.cpp"
    found = generated(source(name))
    if update_golden:
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8"), "if the new text is better, run pytest with --update-golden"


@pytest.mark.parametrize("name", ["neighborhood", "relative_bias", "documents_and_alibi", "few_queries"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_source_compiles_without_warnings(name: str, dtype: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    (tmp_path / "kernel.cpp").write_text(source(name, dtype=dtype))
    flags = ["-std=c++17", "-fopenmp", "-march=native", "-Wall", "-Wextra", "-fsyntax-only"]
    flags += ["-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Wno-psabi"]
    done = subprocess.run([compiler, *flags, "kernel.cpp"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_line_is_short_enough_to_read() -> None:
    assert all(len(line) <= 130 for name in VARIANTS for line in source(name).splitlines())


def test_no_hole_is_left() -> None:
    assert not any(re.search(r"^\s*// <", source(name), re.MULTILINE) for name in VARIANTS)


def test_heads_that_differ_have_kernels_of_their_own() -> None:
    both = {"mask": "causal", "heads": {"0::2": {"mask": "causal & window(8)"}}}
    text = attn.kernel_source(both, q_len=64, k_len=64, heads=4, head_dim=8)
    assert "// Heads 0, 2 of 4.\n" in text
    assert "// Heads 1, 3 of 4.\n" in text


def test_a_table_is_read_as_it_is_stored() -> None:
    ids = torch.zeros(1, 64, dtype=torch.int32)
    shape = {"q_len": 64, "k_len": 64, "heads": 4, "head_dim": 8}
    assert "read<vindex, int64_t>" in attn.kernel_source("same(documents)", **shape)  # type: ignore[arg-type]
    assert "read<vindex, int32_t>" in attn.kernel_source("same(documents)", tables={"documents": ids}, **shape)  # type: ignore[arg-type]


def five_axes() -> Variant:
    return Variant(mask=e.table("wide", e.b, e.h, e.i, e.k, e.layer, sort=e.Sort.BOOL))


@pytest.mark.parametrize(
    ("variant", "more", "message"),
    [
        ("causal", {"target": "cuda"}, 'no target "cuda" has kernels to print; known: cpp'),
        ("causal", {"dtype": "float64"}, 'no kernel takes "float64"'),
        ("causal", {"kv_heads": 3}, "4 query heads of 8 numbers and 3 key heads do not make an attention"),
        (five_axes(), {}, 'the target cpp: the table "wide" has more than 4 axes'),
    ],
)
def test_what_cannot_be_printed_is_said(variant: Variant | str, more: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=re.escape(message)):
        attn.kernel_source(variant, **{"q_len": 64, "k_len": 64, "heads": 4, "head_dim": 8, **more})  # type: ignore[arg-type]


def test_what_is_printed_is_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    q, k, v = (torch.randn(1, 4, 23, 8) for _ in range(3))
    out = attn.attend(q, k, v, "causal & window(7)", target="cpp")
    assert isinstance(out, Tensor)
    printed = attn.kernel_source("causal & window(7)", q_len=23, k_len=23, heads=4, head_dim=8)
    assert [path.read_text() for path in tmp_path.glob("*.cpp")] == [printed]
