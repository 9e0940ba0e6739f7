"""`attn kernel` prints the source of a kernel."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

import attn_compiler as attn
from attn_compiler.cli import app

COMMAND = ["kernel", "causal & window(256)", "--length", "4096", "--heads", "8", "--head-dim", "64", "--dtype", "bfloat16"]


def expected() -> str:
    return attn.kernel_source("causal & window(256)", q_len=4096, k_len=4096, heads=8, head_dim=64, dtype="bfloat16")


def test_what_is_piped_is_the_source_and_nothing_else() -> None:
    result = CliRunner().invoke(app, COMMAND)
    assert result.exit_code == 0
    assert result.stdout == expected()


def test_programs_read_the_source() -> None:
    found = json.loads(CliRunner().invoke(app, [*COMMAND, "--json"]).stdout)
    assert found == {"target": "cpp", "dtype": "bfloat16", "source": expected()}


def test_a_terminal_gets_colors() -> None:
    result = CliRunner().invoke(app, COMMAND, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert result.exit_code == 0
    assert "\x1b[" in result.stdout


def test_a_grid_and_a_score_may_be_given() -> None:
    more = ["--geometry", "8,8", "--score", "softcap(score, 50)", "--normalizer", "softmax_one"]
    result = CliRunner().invoke(app, ["kernel", "neighborhood([3, 3])", "--length", "64", *more])
    assert result.exit_code == 0
    assert "tangent(dot * task.scale / 50.0f) * 50.0f" in result.stdout


def test_a_wrong_target_is_one_message() -> None:
    result = CliRunner().invoke(app, [*COMMAND, "--target", "cuda"])
    assert result.exit_code == 2
    assert 'no target "cuda" has kernels to print; known: cpp' in result.stderr


def test_linear_attention_is_saved_as_a_program(tmp_path: Path) -> None:
    more = ["--feature", "elu_one", "--state", "gate(scalar)", "--target", "triton", "--save", str(tmp_path / "linear.py")]
    assert CliRunner().invoke(app, ["kernel", "causal", "--length", "1024", *more]).exit_code == 0
    written = (tmp_path / "linear.py").read_text()
    compile(written, "linear.py", "exec")
    assert all(f"def {kernel}(" in written for kernel in ("states", "scan", "gather", "attend"))
