"""`attn calibrate --static`: the policy with scales fixed by what was seen, and what that costs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import attn_compiler as attn
from attn_compiler.cli import app
from attn_compiler.planning.measured import beside

POLICY = """
version: 1
rules:
  - {match: {kind: self}, attn: {storage: {qk: int8, pv: bf16}}, tolerance: {site: 0.1}}
"""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


def small() -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return Layer().eval(), (torch.randn(1, 24, 32),)


def test_scales_are_fixed_and_what_they_cost_is_measured(tmp_path: Path) -> None:
    given, fixed = tmp_path / "given.yaml", tmp_path / "fixed.yaml"
    given.write_text(POLICY, encoding="utf-8")
    result = CliRunner().invoke(app, ["calibrate", "cli.test_calibrate:small", str(given), "--static", str(fixed)])
    assert result.exit_code == 0, result.output
    assert beside(fixed).is_file()
    assert not beside(given).exists()
    model, args = small()
    [decision] = attn.explain(model, args, policy=fixed).decisions
    assert decision.outcome == "approximate"
    held = decision.variant.storage.qk
    assert held is not None
    assert len(held.largest) == 2
    assert decision.variant.storage.pv is not None
    assert decision.error is not None
    assert 0 < decision.error < 0.1


def test_a_policy_without_rules_has_no_scales(tmp_path: Path) -> None:
    given = tmp_path / "given.yaml"
    given.write_text("version: 1\n", encoding="utf-8")
    result = CliRunner().invoke(
        app, ["calibrate", "cli.test_calibrate:small", str(given), "--static", str(tmp_path / "fixed.yaml")]
    )
    assert result.exit_code == 2
    assert "has no `rules` whose scales could be fixed" in result.stderr
    assert [x.name for x in tmp_path.iterdir()] == ["given.yaml"]
