"""What a command line says that cannot be carried out: where, what was expected, what was found, and no traceback."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attn_compiler.cli import app

runner = CliRunner()
TINY = "hf:llama,vocab_size=64,hidden_size=32,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2"


def said(*command: str) -> str:
    """The message of a command that fails."""
    result = runner.invoke(app, list(command))
    assert result.exit_code in (1, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


RULES = "version: 1\nrules:\n  - "


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"", "the file is empty; a policy starts with `version: 1`"),
        (b"\xff\xfe\x00\x01", "cannot be read: it is no text in UTF-8 (byte 0)"),
        (b"- a\n- b\n", "p.yaml:1:1: a policy is a mapping with `version` and `rules`, found a list"),
        (b"version: 1\nrules: [\n", "p.yaml:3:1: this is no YAML"),
        (b"rules:\n  - {attn: exact}\n", "p.yaml:1:1: `version: 1` is missing"),
        (
            b"version: 2\nrules: []\n",
            "p.yaml:1:10: this release reads policies of version 1, found 2; a newer release of attn-compiler may read it",
        ),
        (b"version: '1'\nrules: []\n", "p.yaml:1:10: this release reads policies of version 1, found '1'"),
        (b"version: 1\nruls: []\n", 'p.yaml:2:1: unknown key "ruls"; did you mean "rules"?'),
        (f"{RULES}{{attn: {{mask: causl}}}}".encode(), 'there is no word "causl" in masks; did you mean "causal"?'),
        (f"{RULES}{{attn: {{mask: window(-1)}}}}".encode(), "expected a whole number of at least 1, found `-1`"),
        (
            f"{RULES}{{attn: {{mask: window(7, right=2)}}}}".encode(),
            'unknown slot "right=2)"; YAML cut the expression before it at a comma: quote it',
        ),
    ],
)
def test_a_wrong_policy_is_refused_with_its_place(written: bytes, message: str, tmp_path: Path) -> None:
    policy = tmp_path / "p.yaml"
    policy.write_bytes(written)
    assert message in said("check", str(policy))
    assert message in json.loads(runner.invoke(app, ["check", str(policy), "--json"]).stdout)["error"]


def test_a_policy_that_is_no_file(tmp_path: Path) -> None:
    assert f"the policy file {tmp_path} cannot be read: Is a directory" in said("check", str(tmp_path))
    assert "there is no policy file streming; give a path" in said("check", "streming")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("llama", '"llama" names no model; write `package.module:factory` or `hf:type,key=value…`'),
        ("hf:lama", 'transformers knows no model type "lama"; did you mean "llama"?'),
        ("hf:llama,deep", 'expected key=value, found "deep"'),
        ("hf:llama,num_hiden_layers=2", 'has no "num_hiden_layers"; did you mean "num_hidden_layers"?'),
        ("hf:llama,num_hidden_layers=two", "is no configuration: "),
        (f"{TINY},hidden_size=33", "The hidden size (33) is not a multiple of the number of attention heads (2)"),
        ("nowhere:model", 'there is no module "nowhere"'),
        (":model", '"" is no name of a module'),
        (".models:model", '".models" is no name of a module'),
    ],
)
def test_a_model_that_nobody_can_build(source: str, message: str) -> None:
    pytest.importorskip("transformers")
    assert message in said("explain", source, "--length", "16")


def test_a_list_of_all_models_is_no_message() -> None:
    pytest.importorskip("transformers")
    assert len(said("explain", "hf:")) < 1000


@pytest.mark.parametrize(
    ("written", "name", "message"),
    [
        ("def model(size): pass\n", "model", "is called without arguments: missing a required argument: 'size'"),
        ("def model(): return 3\n", "model", "returned int; expected a module, or (module, inputs)"),
        ("def model(): pass\n", "modle", 'has no function "modle"; did you mean "model"?'),
        ("def (:\n", "model", "cannot be imported: SyntaxError"),
        ("from typing import nothing\n", "model", "cannot be imported: ImportError: cannot import name 'nothing'"),
    ],
)
def test_a_factory_that_fails(
    written: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    number = request.node.callspec.indices["written"]
    (tmp_path / f"factory_{number}.py").write_text(written, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert message in said("explain", f"factory_{number}:{name}")


def test_what_the_code_of_the_user_raises_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "factory_that_raises.py").write_text("def model():\n    raise RuntimeError('no weights')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="no weights"):
        runner.invoke(app, ["explain", "factory_that_raises:model"], catch_exceptions=False)


@pytest.mark.parametrize("out", ["nowhere/mask.png", "mask.foo", "mask"])
def test_a_picture_that_cannot_be_written(out: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    message = said("draw", "causal", "--length", "64", "--out", str(tmp_path / out))
    assert ("No such file or directory" if "/" in out else "a picture cannot be written to") in message


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert "Is a directory" in said("explain", TINY, "--length", "16", "--html", str(tmp_path))
    assert not list(tmp_path.parent.glob(".*.part"))


MODEL = """import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.project(x)
def wrong_width(): return Model(), (torch.randn(2, 7),)
def nothing(): return Model(), ()
"""


def test_inputs_that_a_model_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_and_inputs.py").write_text(MODEL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    message = said("explain", "model_and_inputs:wrong_width")
    assert "does not run on its inputs (0: float32 [2, 7])" in message
    assert "return self.project(x)" in message
    assert "does not take: missing a required argument: 'x'" in said("explain", "model_and_inputs:nothing")


@pytest.mark.parametrize("command", ["draw", "kernel"])
def test_a_length_that_is_not_that_of_the_geometry(command: str) -> None:
    grid = [command, "neighborhood(kernel=3)", "--geometry", "8,8"]
    assert "a geometry of 8 × 8 has 64 tokens, and --length says 65" in said(*grid, "--length", "65")
    assert "say how many keys there are" in said(command, "causal")
    assert runner.invoke(app, grid).exit_code == 0
