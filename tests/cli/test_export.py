"""`attn export`: one line, one file."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime
import pytest
from typer.testing import CliRunner

from attn_compiler.cli import app
from attn_compiler.export import front

TINY = "hf:llama,num_hidden_layers=1,hidden_size=32,intermediate_size=32,num_attention_heads=4,vocab_size=64"


def test_a_model_is_written_with_lengths_that_may_change(tmp_path: Path) -> None:
    out = tmp_path / "llama.onnx"
    result = CliRunner().invoke(app, ["export", TINY, "--out", str(out), "--length", "16", "--policy", "streaming", "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout[result.stdout.index("{") :])["checks"]) == 2
    (tokens,) = onnxruntime.InferenceSession(out).get_inputs()
    assert all(isinstance(size, str) for size in tokens.shape)
    said = CliRunner().invoke(app, ["explain", str(out)])
    assert "1 exported attention\n\nmodel.layers.0.self_attn: approximate, by rule" in said.stdout
    assert "sinks(4)" in said.stdout
    (record,) = json.loads(CliRunner().invoke(app, ["explain", str(out), "--json"]).stdout)["attentions"]
    assert record["sizes"]["heads"] == 4


def test_a_file_that_is_no_model_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "none.onnx"
    path.write_text("nothing of the kind")
    result = CliRunner().invoke(app, ["explain", str(path)])
    assert result.exit_code == 2
    assert "is no ONNX model" in result.output


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "find_spec", lambda package: None)
    result = CliRunner().invoke(app, ["export", TINY, "--out", str(tmp_path / "llama.onnx")])
    assert result.exit_code == 2
    assert 'pip install "attn-compiler[onnx]"' in result.output


def test_the_ending_of_a_file_says_its_format(tmp_path: Path) -> None:
    pytest.importorskip("torch_mlir", reason="torch-mlir has no wheel for this platform")
    out = tmp_path / "llama.mlir"
    asked = [
        "export",
        TINY,
        "--out",
        str(out),
        "--length",
        "16",
        "--lengths",
        "8",
        "--policy",
        "streaming",
        "--no-vmfb",
        "--json",
    ]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    checks = json.loads(result.stdout[result.stdout.index("{") :])["checks"]
    assert [check["by"] for check in checks] == ["torch-mlir, main", "torch-mlir, tokens_8"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--format", "pt2", "--flavor", "genai"], "--flavor is for files of the format onnx; this one is to be pt2"),
        (["--flavor", "genai"], '`flavor="genai"` needs `decode=True`'),
        (["--dialect", "torch"], "--dialect is for files of the format mlir; this one is to be onnx"),
        (["--format", "mlir", "--decode"], "--decode is for files of the format onnx; this one is to be mlir"),
        (["--format", "mlir", "--lengths", "12,many"], '--lengths takes numbers of tokens, as in 128,512; found "many"'),
    ],
)
def test_options_that_do_not_fit_are_one_message(given: list[str], says: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", TINY, "--out", str(tmp_path / "llama"), "--length", "16", *given])
    assert result.exit_code == 2
    assert says in result.output
