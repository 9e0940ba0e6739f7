"""`attn.export_mlir`: one attention written by torch-mlir, run by its execution engine and by IREE."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.errors import ExportError, MissingPackageError, RefusedError
from attn_compiler.export.metadata import labels
from attn_compiler.export.mlir import front, iree
from attn_compiler.export.mlir.engine import Engine
from attn_compiler.testing import assert_all_within_budget
from end_to_end.by_hand import policy
from end_to_end.models import near

pytest.importorskip("torch_mlir", reason="torch-mlir has no wheel for this platform")
needs_iree = pytest.mark.skipif(not iree.is_there(), reason="IREE is not installed")
WINDOW = policy("causal & window(8)")
LENGTH = 96


class Attention(nn.Module):
    """Nothing but an attention."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def given(length: int = LENGTH) -> Tensor:
    return torch.randn(2, 2, length, 8)


def write(path: Path, rules: object = WINDOW, **more: object) -> attn.ExportReport:
    return attn.export_mlir(Attention().eval(), (given(),), path, rules, vmfb=False, **more)  # type: ignore[arg-type]


def assert_computes(run: Callable[[Tensor], Tensor], length: int, window: int | None = 8) -> None:
    x, seen = given(length), near(length, window or length, causal=True)
    attend = nn.functional.scaled_dot_product_attention
    exact = attend(x.double(), x.double(), x.double(), attn_mask=seen)
    assert_all_within_budget([run(x)], [exact], lambda: [attend(x, x, x, attn_mask=seen)])


class Mapped(nn.Module):
    """An attention with weights beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(8, 512)
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) + (self.map(x) @ self.map.weight)  # type: ignore[no-any-return]


def test_bytecode_holds_the_same_in_half_the_bytes(tmp_path: Path) -> None:
    text, code = (tmp_path / name for name in ("one.mlir", "one.mlirbc"))
    for path in (text, code):
        assert attn.export_mlir(Mapped().eval(), (given(),), path, WINDOW, vmfb=False).checks
    assert code.stat().st_size < 0.75 * text.stat().st_size
    assert labels(code) == labels(text) != ()


@needs_iree
def test_iree_reads_bytecode(tmp_path: Path) -> None:
    report = attn.export_mlir(Mapped().eval(), (given(),), tmp_path / "one.mlirbc", WINDOW, vmfb=True)
    assert [check.by for check in report.checks] == ["torch-mlir, main", "IREE, main"]


@pytest.mark.parametrize("dialect", ["linalg", "torch"])
def test_a_window_is_written_in_blocks_and_computes_what_it_says(dialect: str, tmp_path: Path) -> None:
    path = tmp_path / "one.mlir"
    report = write(path, dialect=dialect)
    assert [decision.form for decision in report.report.decisions] == ["blocks of queries, each with the keys in reach"]
    assert f"{LENGTH}x{LENGTH}x" not in path.read_text()  # of shapes in linalg
    assert f",{LENGTH},{LENGTH}]" not in path.read_text()  # of shapes in the torch dialect
    engine = Engine(path, dialect)
    assert_computes(lambda x: engine.run("main", [x])[0], LENGTH)


def test_without_a_policy_all_pairs_are_computed(tmp_path: Path) -> None:
    path = tmp_path / "one.mlir"
    write(path, "exact")
    assert f"{LENGTH}x{LENGTH}x" in path.read_text()
    assert_computes(lambda x: Engine(path, "linalg").run("main", [x])[0], LENGTH, window=None)


def test_every_bucket_is_a_function_of_its_own_sizes_and_all_share_their_weights(tmp_path: Path) -> None:
    path, model = tmp_path / "two.mlir", nn.Sequential(nn.Linear(8, 8, bias=False), Attention()).eval()
    report = attn.export_mlir(model, (given(),), path, WINDOW, buckets={"short": {"input": given(20)}}, vmfb=False)
    assert re.findall(r"func.func @(\w+)", path.read_text()) == ["main", "short"]
    assert [check.by for check in report.checks] == ["torch-mlir, main", "torch-mlir, short"]
    assert [label.name for label in labels(path)] == ["1 in main", "1 in short"]
    assert len(re.findall(r'^ *torch_tensor_8_8_torch\.float32\w*: "0x', path.read_text(), re.MULTILINE)) == 1
    engine = Engine(path, "linalg")
    for name, length in (("main", LENGTH), ("short", 20)):
        x = given(length)
        with torch.no_grad():
            q, seen = model[0](x), near(length, 8, causal=True)
        exact = nn.functional.scaled_dot_product_attention(*[q.double()] * 3, attn_mask=seen)
        plain = nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=seen)
        assert_all_within_budget(engine.run(name, [x]), [exact], lambda plain=plain: [plain])


def test_the_file_says_what_became_of_its_attentions(tmp_path: Path) -> None:
    report = write(tmp_path / "one.mlir")
    assert "checked in torch-mlir, main" in str(report)
    assert json.loads(json.dumps(report.record()))["bytes"] == (tmp_path / "one.mlir").stat().st_size
    comments = [line for line in (tmp_path / "one.mlir").read_text().splitlines() if line.startswith("//")]
    assert "//             window(8)  q − k < 8" in comments
    (label,) = labels(tmp_path / "one.mlir")
    assert (label.name, label.outcome, label.sizes["q_len"]) == ("attention", "approximate", LENGTH)
    assert label.strategy == report.report.decisions[0].form


def test_a_check_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "Engine", lambda *args: pytest.fail("the engine was asked"))
    report = write(tmp_path / "one.mlir", check=False)
    assert report.checks == ()
    assert "not compared with the rewritten model" in str(report)


def test_a_file_of_others_has_no_attentions(tmp_path: Path) -> None:
    (tmp_path / "theirs.mlir").write_text("module {}")
    assert labels(tmp_path / "theirs.mlir") == ()
    with pytest.raises(ExportError, match="there is no file"):
        labels(tmp_path / "missing.mlir")


def test_a_table_of_the_policy_becomes_a_constant(tmp_path: Path) -> None:
    rules = policy("same(document)", labels={"document": {"given": "documents"}})
    documents = torch.arange(LENGTH) // 11
    write(tmp_path / "one.mlir", rules, tables={"documents": documents})
    x = given()
    seen = (documents[:, None] == documents) & near(LENGTH, LENGTH, causal=True)
    exact = nn.functional.scaled_dot_product_attention(*[x.double()] * 3, attn_mask=seen)
    plain = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=seen)
    assert_all_within_budget(Engine(tmp_path / "one.mlir", "linalg").run("main", [x]), [exact], lambda: [plain])


class Several(nn.Module):
    """Results of several kinds, inputs that are no tensors, and some that nobody reads."""

    def forward(self, x: Tensor, scaled: bool, unused: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        x = x * 2 if scaled else x
        return x, x[0] > 0, x.amax(), x.half(), x.to(torch.bfloat16), at + 1


def test_results_may_be_of_any_kind(tmp_path: Path) -> None:
    args = (torch.randn(2, 8), True, torch.randn(3), torch.tensor(4))
    report = attn.export_mlir(Several().eval(), args, tmp_path / "several.mlir", vmfb=False)
    wanted = Several()(*args)
    found = Engine(tmp_path / "several.mlir", "linalg").run("main", [args[0], args[2], args[3]])
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert len(report.checks) == 1


class Sorted(nn.Module):
    """Something that torch-mlir has an operator of its own for."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(dim=-1)[0]


def test_operators_that_only_torch_mlir_can_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.mlir"
    with pytest.raises(ExportError, match=r"only it can read: tm_tensor\.sort"):
        attn.export_mlir(Sorted().eval(), (torch.zeros(2, 5),), path)
    assert not path.exists()


class Inner(nn.Module):
    """Something that torch-mlir does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(x)


def test_what_torch_mlir_does_not_have_is_named_with_its_place(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity(), nn.Sequential(Inner())).eval()
    with pytest.raises(ExportError, match=r"torch-mlir cannot lower .* 1\.0, aten\.special_airy_ai\.default: failed to legalize"):
        attn.export_mlir(model, (torch.randn(2, 8),), tmp_path / "airy.mlir")
    assert not list(tmp_path.iterdir())


class Counting(nn.Module):
    """A model that remembers how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * self.calls


def test_a_model_that_remembers_its_calls_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match='the model writes to "calls"'):
        attn.export_mlir(Counting().eval(), (torch.randn(2, 8),), tmp_path / "counting.mlir")


class Dropping(nn.Module):
    """An attention that drops weights in every call."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True, dropout_p=0.5)


def test_active_dropout_is_refused(tmp_path: Path) -> None:
    fatal = policy("causal & window(8)")
    fatal["rules"][0]["fallback"] = "error"  # type: ignore[index]
    with pytest.raises(RefusedError, match="its dropout is active"):
        attn.export_mlir(Dropping().eval(), (given(),), tmp_path / "one.mlir", fatal)


def test_a_result_that_differs_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = front.lowered
    monkeypatch.setattr(front, "lowered", lambda *args: str(lowered(*args)).replace("arith.divf", "arith.mulf"))
    with pytest.raises(ExportError, match="torch-mlir, main computes something else"):
        write(tmp_path / "one.mlir")
    assert not list(tmp_path.iterdir())


def test_an_unknown_dialect_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match='did you mean "linalg"'):
        write(tmp_path / "one.mlir", dialect="linag")


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "find_spec", lambda package: None)
    with pytest.raises(MissingPackageError, match=r"pip install \"attn-compiler\[mlir\]\""):
        write(tmp_path / "one.mlir")


def test_without_iree_the_report_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iree, "is_there", lambda: False)
    (tmp_path / "one.mlir").write_text("of another model")
    (tmp_path / "one.vmfb").write_text("compiled from that")
    report = attn.export_mlir(nn.ReLU().eval(), (torch.randn(3),), tmp_path / "one.mlir")
    assert report.notes == (f"no one.vmfb: IREE is not installed ({iree.INSTALL})",)
    assert [one.name for one in tmp_path.iterdir()] == ["one.mlir"]
    with pytest.raises(MissingPackageError, match="iree-base-runtime"):
        attn.export_mlir(nn.ReLU().eval(), (torch.randn(3),), tmp_path / "one.mlir", vmfb=True)


@needs_iree
@pytest.mark.parametrize("dialect", ["linalg", pytest.param("torch", marks=pytest.mark.full)])
def test_iree_compiles_a_window_and_computes_what_it_says(dialect: str, tmp_path: Path) -> None:
    report = attn.export_mlir(Attention().eval(), (given(),), tmp_path / "one.mlir", WINDOW, dialect=dialect)  # type: ignore[arg-type]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["one.mlir", "one.vmfb"]
    assert [check.by for check in report.checks] == ["torch-mlir, main", "IREE, main"]
    compiled = iree.Compiled(tmp_path / "one.vmfb")
    assert_computes(lambda x: compiled.run("main", [x])[0], LENGTH)
