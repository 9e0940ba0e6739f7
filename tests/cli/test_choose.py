"""`attn choose`: heads get the cheapest variant that they bear, and the file that says so is carried out as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import attn_compiler as attn
from attn_compiler.cli import app
from attn_compiler.planning.measured import beside

CANDIDATES = """
version: 1
variants:
  four: {storage: {qk: int4, pv: int4}}
  eight: {storage: {qk: int8, pv: int8}}
"""
HERE = "cli.test_choose:small"


class Layers(nn.Module):
    """Two attentions, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(32, 4, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


def small() -> tuple[nn.Module, tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    return Layers().eval(), (torch.randn(1, 48, 32, generator=generator),)


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    path = tmp_path / "candidates.attn.yaml"
    path.write_text(CANDIDATES, encoding="utf-8")
    return path


def run(candidates: Path, within: float, *more: str) -> Result:
    output = candidates.with_name("chosen.attn.yaml")
    return CliRunner().invoke(app, ["choose", HERE, str(candidates), "--within", str(within), "--output", str(output), *more])


def test_what_is_chosen_is_carried_out_and_keeps_its_promise(candidates: Path) -> None:
    result = run(candidates, 0.05)
    assert result.exit_code == 0, result.output
    assert "all heads eight" in result.output
    chosen = candidates.with_name("chosen.attn.yaml")
    assert beside(chosen).is_file()
    model, args = small()
    decisions = attn.explain(model, args, policy=chosen).decisions
    assert [d.outcome for d in decisions] == ["approximate"] * 2
    assert all(d.error is not None and 0 < d.error <= 0.05 for d in decisions)


def test_heads_that_bear_nothing_stay_exact(candidates: Path) -> None:
    result = run(candidates, 1e-6, "--json")
    assert [rule["attn"] for rule in json.loads(result.stdout)["rules"]] == ["exact"] * 2


def test_a_wide_budget_takes_the_cheapest(candidates: Path) -> None:
    result = run(candidates, 10.0, "--json")
    assert [rule["attn"] for rule in json.loads(result.stdout)["rules"]] == ["four"] * 2


def test_a_file_without_candidates_is_refused_and_nothing_is_written(candidates: Path) -> None:
    candidates.write_text("version: 1\nrules: []\n", encoding="utf-8")
    result = run(candidates, 0.1)
    assert result.exit_code == 2
    assert "has no `variants`, each with its slots" in result.stderr
    candidates.write_text(CANDIDATES + "data: {alpha: a.json}\n", encoding="utf-8")
    assert "cannot read `data`" in run(candidates, 0.1).stderr
    assert [path.name for path in candidates.parent.iterdir()] == [candidates.name]
    candidates.unlink()
    assert "there is no policy file" in run(candidates, 0.1).stderr
