"""Bodies that are asked for by name: what the file holds then, and what is said where an attention has no such body."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn

WINDOW = {"version": 1, "rules": [{"match": {}, "attn": {"mask": "causal & window(8)"}}]}
ALIBI = {"version": 1, "rules": [{"match": {}, "attn": {"mask": "causal & window(8)", "score": "score * 2"}}]}
LOOPS = {"Scan", "Loop", "If"}


class Causal(nn.Module):
    """Nothing but an attention."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def written(path: Path, strategy: str, policy: object = WINDOW, **more: object) -> tuple[attn.ExportReport, list[str]]:
    """The report of a file, and the operators of its one function."""
    given = {"dynamic_shapes": ({2: torch.export.Dim.DYNAMIC},), **more}
    report = attn.export_onnx(Causal().eval(), (torch.randn(2, 2, 300, 8),), path, policy, strategy=strategy, **given)  # type: ignore[arg-type]
    [function] = [one for one in onnx.load(path).functions if one.domain == "attn"]
    return report, [node.op_type for node in function.node]


@pytest.mark.parametrize("opset", [24, 18])
def test_products_of_matrices_need_neither_a_loop_nor_attention(opset: int, tmp_path: Path) -> None:
    report, operators = written(tmp_path / "one.onnx", "matmul", opset=opset)
    assert not LOOPS & {*operators}
    assert "Attention" not in operators
    assert operators.count("MatMul") == 2
    assert report.checks
    assert report.notes == ()


def test_blocks_are_the_heads_of_one_attention(tmp_path: Path) -> None:
    report, operators = written(tmp_path / "one.onnx", "batched")
    assert operators.count("Attention") == 1
    assert not {*operators} & {*LOOPS, "MatMul"}
    assert report.checks


def test_a_window_is_onnxruntimes_own_where_that_is_asked_for(tmp_path: Path) -> None:
    report, operators = written(tmp_path / "one.onnx", "contrib")
    assert operators.count("GroupQueryAttention") == 1
    assert report.checks


@pytest.mark.parametrize(
    ("strategy", "policy", "more", "says"),
    [
        ("batched", ALIBI, {}, "adds to scores, and changes them in no other way"),
        ("batched", WINDOW, {"opset": 18}, "opset 18 has no Attention"),
        ("contrib", ALIBI, {}, "a softmax of scaled products, and nothing else"),
        ("contrib", "streaming", {}, "masks are causal, with a window or none"),
        ("matmul", "exact", {}, "nothing bounds how far its queries see"),
        ("listed", WINDOW, {}, "its lengths change from call to call"),
        ("states", WINDOW, {}, "its weights are no products of features"),
        ("branches", WINDOW, {}, "it has none"),
    ],
    ids=str,
)
def test_where_an_attention_has_no_such_body_the_report_says_why(
    strategy: str, policy: object, more: dict[str, object], says: str, tmp_path: Path
) -> None:
    report, _ = written(tmp_path / "one.onnx", strategy, policy, **more)
    assert set(report.strategies.values()) == {"dense"}
    [note] = report.notes
    assert f'has no body "{strategy}"' in note
    assert says in note
    assert note in str(report)
