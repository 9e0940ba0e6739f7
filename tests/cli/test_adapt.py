"""`attn adapt`: a policy's parameters are trained and written from the command line, and training goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

import attn_compiler as attn
from adaptation.small import VOCABULARY, Model
from attn_compiler.adaptation.texts import pieces, tokens_of
from attn_compiler.cli import app
from attn_compiler.errors import ShapeError

POLICY = """
version: 1
parameters: learned.safetensors
rules:
  - {match: {kind: self}, attn: {feature: hedgehog}}
"""
SMALL = "cli.test_adapt:small"


def small() -> tuple[Model, Tensor]:
    return Model(), torch.zeros(2, 12, dtype=torch.int64)


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(0, VOCABULARY, (2, 12), generator=generator)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    torch.compiler.reset()
    path = tmp_path / "hedgehog.attn.yaml"
    path.write_text(POLICY, encoding="utf-8")
    return path


def run(policy: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["adapt", SMALL, str(policy), *more])


LEARNING = ("--batches", "cli.test_adapt:batches", "--steps", "6")


def test_parameters_are_trained_and_written_beside_the_policy(policy: Path) -> None:
    result = run(policy, *LEARNING)
    assert result.exit_code == 0, result.output
    assert "step 6 of 6" in result.stdout
    assert "layers.1" in result.stdout
    assert (policy.parent / "learned.safetensors").is_file()
    out = torch.compile(Model().eval(), backend="attn", options={"policy": policy, "target": "torch"})(small()[1])
    assert [decision.outcome for decision in attn.reports()[-1].plan.decisions] == ["approximate", "approximate"]
    assert out.isfinite().all()


def test_a_training_that_was_broken_off_goes_on(policy: Path) -> None:
    few = run(policy, "--batches", "cli.test_adapt:three", "--steps", "6")
    assert few.exit_code == 2
    assert "ended after 3 of 6 steps" in few.stderr
    assert not (policy.parent / "learned.safetensors").exists()
    went_on = json.loads(run(policy, *LEARNING, "--json").stdout)
    (policy.parent / "learned.safetensors").unlink()  # else training begins with what was learned
    at_once = json.loads(run(policy, *LEARNING, "--json", "--state", f"{policy}.pt").stdout)
    assert went_on["curve"] == at_once["curve"]


def three() -> Iterator[Tensor]:
    return islice(batches(), 3)


def test_what_cannot_be_learned_from_is_said(policy: Path, tmp_path: Path) -> None:
    for more, says in (
        ((), "either --text, or --batches"),
        (("--batches", "cli.test_adapt:nothing"), "names no function that gives batches"),
        (("--text", str(tmp_path / "empty")), "empty"),
    ):
        result = run(policy, *more)
        assert result.exit_code == 2
        assert says in result.stderr
    policy.write_text("version: 1\nrules: [{match: {}, attn: {feature: hedgehog}}]\n", encoding="utf-8")
    assert "add `parameters: hedgehog.safetensors`" in run(policy, *LEARNING).stderr


def test_weights_that_a_low_rank_changed_are_written_by_the_names_of_the_model(policy: Path) -> None:
    from safetensors.torch import load_file

    result = run(policy, *LEARNING, "--logits", "2", "--low-rank", "2", "--json")
    assert result.exit_code == 0, result.output
    (path,) = json.loads(result.stdout)["weights"]
    changed, (of, tokens) = load_file(path), small()
    assert sorted(changed) == ["layers.0.qkv.weight", "layers.1.qkv.weight"]
    before = of(tokens)
    of.load_state_dict(changed, strict=False)
    assert not torch.equal(of(tokens), before)


def test_text_is_read_file_by_file_and_drawn_alike_again(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "b" / "c.txt").write_text("cd")
    ids = tokens_of([tmp_path], "bytes", 256)
    assert bytes(ids.tolist()) == b"ab\ncd"
    first, again = (next(pieces(ids, 3, 2)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (3, 2)
    with pytest.raises(ShapeError, match="writes token 100, and the model knows 32"):
        tokens_of([tmp_path], "bytes", 32)
    with pytest.raises(ShapeError, match="has 5 tokens, and a batch takes 9"):
        next(pieces(ids, 1, 9))
