"""`attn.export_onnx`: whole models with a policy, run in onnxruntime, against the same model rewritten by hand."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.errors import ExportError, RefusedError
from attn_compiler.export import onnx_files
from attn_compiler.testing import assert_all_within_budget
from end_to_end.by_hand import with_weights
from end_to_end.models import double, like_llama, llama, tokens

WINDOW = {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": {"mask": "causal & window(8)"}}]}
DYNAMIC = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}


def run(path: Path, **feeds: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path)
    return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in feeds.items()})]


class Attention(nn.Module):
    """Nothing but an attention."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


def write(path: Path, policy: object = WINDOW, **more: object) -> attn.ExportReport:
    return attn.export_onnx(Attention().eval(), (torch.randn(1, 2, 40, 8),), path, policy, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def windowed() -> nn.Module:
    """A llama whose attention can be seen in its results."""
    return with_weights(llama())


@pytest.fixture(scope="module")
def exported(windowed: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, with a window, written once."""
    path: Path = tmp_path_factory.mktemp("exported") / "llama.onnx"
    attn.export_onnx(windowed, (), path, WINDOW, kwargs={"input_ids": tokens()}, dynamic_shapes=DYNAMIC)
    return path


def test_an_exported_llama_computes_what_its_policy_says_at_any_length(exported: Path, windowed: nn.Module) -> None:
    for batch, length in ((1, 1), (2, 300)):
        by_hand = like_llama(tokens(batch, length), window=8)
        with torch.no_grad():
            exact = by_hand(double(windowed))
            found = run(exported, input_ids=tokens(batch, length))
            assert_all_within_budget(found, [exact], lambda by_hand=by_hand: [by_hand(windowed)])


def test_each_attention_is_one_labelled_function(exported: Path) -> None:
    written = onnx.load(exported)
    calls = [node.op_type for node in written.graph.node if node.domain == "attn"]
    assert calls == ["layers.0.self_attn", "layers.1.self_attn"]
    functions = {one.name: {x.key: x.value for x in one.metadata_props} for one in written.functions if one.domain == "attn"}
    assert functions["layers.1.self_attn"]["attn.strategy"] == "either"
    assert "window" in functions["layers.1.self_attn"]["attn.computes"]


def test_the_mask_that_the_model_made_is_gone(exported: Path) -> None:
    assert not [node for node in onnx.load(exported).graph.node if node.op_type in ("And", "LessOrEqual", "Where")]


def test_the_report_says_what_was_checked(tmp_path: Path) -> None:
    report = write(tmp_path / "one.onnx")
    assert [decision.target for decision in report.report.decisions] == ["onnx"]
    assert "checked in onnxruntime" in str(report)
    assert json.loads(json.dumps(report.record()))["bytes"] == (tmp_path / "one.onnx").stat().st_size


def test_what_becomes_of_the_results_of_some_heads_is_part_of_the_file(tmp_path: Path) -> None:
    slots = {"heads": {"1": {"mask": "causal", "scale": 0.5}, "rest": {"mask": "causal", "output": "norm(rms)"}}}
    rule = {"match": {}, "attn": slots, "fallback": "error"}
    assert "checked in onnxruntime" in str(write(tmp_path / "one.onnx", {"version": 1, "rules": [rule]}))


def test_a_check_can_be_left_out(tmp_path: Path) -> None:
    report = write(tmp_path / "one.onnx", check=False)
    assert report.checks == ()
    assert "not compared with the rewritten model" in str(report)


def test_a_table_of_the_policy_becomes_a_constant(tmp_path: Path) -> None:
    policy = {
        "version": 1,
        "labels": {"document": {"given": "documents"}},
        "rules": [{"match": {}, "attn": {"mask": "same(document)"}}],
    }
    documents = torch.arange(40) // 11
    write(tmp_path / "one.onnx", policy, tables={"documents": documents})
    x = torch.randn(1, 2, 40, 8)
    seen = (documents[:, None] == documents) & torch.ones(40, 40, dtype=torch.bool).tril()
    exact = nn.functional.scaled_dot_product_attention(*[x.double()] * 3, attn_mask=seen)
    plain = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=seen)
    assert_all_within_budget(run(tmp_path / "one.onnx", x=x), [exact], lambda: [plain])


def test_a_result_that_differs_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = onnx_files.ir.save

    def spoil(model: onnx_files.ir.Model, *args: object, **more: object) -> None:
        function = next(iter(model.functions.values()))
        doubled = onnx_files.ir.Node("", "Add", [function.outputs[0]] * 2)
        function.append(doubled)
        function.outputs[0] = doubled.outputs[0]
        save(model, *args, **more)

    monkeypatch.setattr(onnx_files.ir, "save", spoil)
    with pytest.raises(ExportError, match="onnxruntime computes something else"):
        write(tmp_path / "one.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_there_survives_a_failure(tmp_path: Path) -> None:
    (tmp_path / "one.onnx").write_text("mine")
    refused = {"version": 1, "rules": [{"match": {}, "attn": {"edit": ["uniform"]}, "fallback": "error"}]}
    with pytest.raises(RefusedError, match="fallback: error"):
        write(tmp_path / "one.onnx", refused)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.eval\(\)"):
        attn.export_onnx(Attention(), (torch.randn(1, 2, 40, 8),), tmp_path / "one.onnx")


def test_a_folder_that_is_not_there_is_said_before_anything_is_traced(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no folder .*missing"):
        attn.export_onnx(nn.Identity().eval(), (), tmp_path / "missing" / "one.onnx")


def test_an_unknown_strategy_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match='did you mean "scan"'):
        write(tmp_path / "one.onnx", strategy="scann")


def test_a_precision_that_onnxruntime_does_not_compute_in_is_refused(tmp_path: Path) -> None:
    x = torch.randn(1, 2, 40, 8, dtype=torch.bfloat16)
    fatal = {"version": 1, "rules": [{"match": {}, "attn": {"mask": "window(8)"}, "fallback": "error"}]}
    with pytest.raises(RefusedError, match="bfloat16"):
        attn.export_onnx(Attention().eval(), (x,), tmp_path / "one.onnx", fatal)


def test_large_weights_stand_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "LARGEST", 0)
    model, path = nn.Sequential(nn.Linear(8, 64), Attention(), nn.Linear(64, 8)).eval(), tmp_path / "one.onnx"
    x = torch.randn(1, 2, 40, 8)
    attn.export_onnx(model, (x,), path, WINDOW)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["one.onnx", "one.onnx.data"]
    assert run(path, input=x)[0].shape == x.shape


def test_weights_of_a_file_that_is_written_over_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)).eval(), tmp_path / "one.onnx"
    (tmp_path / "other.onnx.data").write_text("mine")
    with monkeypatch.context() as changed:
        changed.setattr(onnx_files, "LARGEST", 0)
        attn.export_onnx(model, (torch.randn(2, 8),), path)
    attn.export_onnx(model, (torch.randn(2, 8),), path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["one.onnx", "other.onnx.data"]


def test_what_onnxruntime_cannot_run_is_one_message(tmp_path: Path) -> None:
    model = nn.Linear(8, 8).to(torch.bfloat16).eval()
    with pytest.raises(ExportError, match=r"onnxruntime .* cannot run what the model became: .*NOT_IMPLEMENTED"):
        attn.export_onnx(model, (torch.randn(2, 8, dtype=torch.bfloat16),), tmp_path / "half.onnx")
    assert not list(tmp_path.iterdir())


def test_what_has_no_translation_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"PyTorch's exporter cannot write .*special_airy_ai"):
        attn.export_onnx(Airy().eval(), (torch.randn(2, 8),), tmp_path / "airy.onnx")


@pytest.mark.parametrize("opset", [24, 18])
def test_older_importers_need_not_know_attention(opset: int, tmp_path: Path) -> None:
    path, model = tmp_path / "two.onnx", nn.Sequential(Attention(), Open()).eval()
    report = attn.export_onnx(model, (torch.randn(1, 2, 40, 8),), path, opset=opset)
    assert sorted(decision.outcome for decision in report.report.decisions) == ["exact", "kept"]
    written = onnx.load(path)
    opsets = [entry.version for one in (written, *written.functions) for entry in one.opset_import if not entry.domain]
    assert set(opsets) == {opset}
    operators = {node.op_type for nodes in (written.graph.node, *(one.node for one in written.functions)) for node in nodes}
    assert ("Attention" in operators) == (opset == 24)


@pytest.mark.parametrize("strategy", ["dense", "scan", "either", "listed"])
def test_every_form_runs_in_the_older_opset(strategy: str, tmp_path: Path) -> None:
    sizes = None if strategy == "listed" else ({2: torch.export.Dim.DYNAMIC},)
    report = write(tmp_path / "one.onnx", strategy=strategy, opset=18, dynamic_shapes=sizes)
    assert set(report.strategies.values()) == {strategy}
    assert report.checks


def test_another_opset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="in opset 24 or 18; found 17"):
        write(tmp_path / "one.onnx", opset=17)


class Airy(nn.Module):
    """Something that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(x)


def test_weights_that_are_quantized_later_leave_attention_alone(exported: Path, windowed: nn.Module, tmp_path: Path) -> None:
    quantize_dynamic(exported, tmp_path / "int8.onnx")
    names = [[one.name for one in onnx.load(path).functions] for path in (exported, tmp_path / "int8.onnx")]
    assert names[0] == names[1]
    whole, quantized = (run(path, input_ids=tokens(2, 150))[0] for path in (exported, tmp_path / "int8.onnx"))
    with torch.no_grad():
        unseen = like_llama(tokens(2, 150))(windowed)
    assert 0 < (whole - quantized).norm() < (whole - unseen).norm()


def test_a_file_that_onnxruntime_optimized_and_saved_is_still_right(exported: Path, windowed: nn.Module, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(exported, options)
    assert not onnx.load(tmp_path / "optimized.onnx").functions, "its optimizer inlines ours"
    by_hand = like_llama(tokens(2, 150), window=8)
    with torch.no_grad():
        exact = by_hand(double(windowed))
        found = run(tmp_path / "optimized.onnx", input_ids=tokens(2, 150))
        assert_all_within_budget(found, [exact], lambda: [by_hand(windowed)])


class Masked(nn.Module):
    """An attention whose mask is called as its keys are elsewhere."""

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=k)


def test_a_mask_may_be_called_as_an_operand_is(tmp_path: Path) -> None:
    x, k = torch.randn(1, 2, 40, 8), torch.rand(40, 40) > 0.5
    attn.export_onnx(Masked().eval(), (x, k), tmp_path / "masked.onnx", "exact")
    [out] = run(tmp_path / "masked.onnx", x=x, k=k)
    assert_all_within_budget([out], [Masked()(x.double(), k)], lambda: [Masked()(x, k)])


def test_a_mask_that_shows_nothing_leaves_every_row_empty(tmp_path: Path) -> None:
    nothing = {"version": 1, "rules": [{"match": {}, "attn": {"mask": "none"}}]}
    write(tmp_path / "empty.onnx", nothing)
    [out] = run(tmp_path / "empty.onnx", x=torch.randn(1, 2, 40, 8))
    assert not out.any()


class Twice(nn.Module):
    """One attention called twice, and another that is called as the second call would be."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Attention()
        self.a.call2 = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.a(2 * x) + self.a.call2(3 * x)


def test_every_function_has_a_name_of_its_own(tmp_path: Path) -> None:
    policy = {"version": 1, "rules": [{"match": {"module": "a.call2"}, "attn": {"mask": "window(4)"}}]}
    report = attn.export_onnx(Twice().eval(), (torch.randn(1, 2, 40, 8),), tmp_path / "twice.onnx", policy)
    assert len(report.strategies) == 3


def test_rows_that_become_whole_where_they_are_empty_are_computed_densely_and_said_to_be(tmp_path: Path) -> None:
    policy = {"version": 1, "rules": [{"match": {}, "attn": {"mask": "offsets('3:9')", "empty_rows": "unmasked"}}]}
    for strategy in ("auto", "scan"):
        report = attn.export_onnx(Open().eval(), (torch.randn(1, 2, 900, 8),), tmp_path / "open.onnx", policy, strategy=strategy)
        assert set(report.strategies.values()) == {"dense"}


class Open(nn.Module):
    """An attention that hides nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)
