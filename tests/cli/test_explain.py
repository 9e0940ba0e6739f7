"""`attn explain`: what people see, what programs read, and errors as one message."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attn_compiler.cli import app

pytest.importorskip("transformers")

runner = CliRunner()
TINY = "hf:llama,vocab_size=64,hidden_size=32,intermediate_size=32,num_hidden_layers=2,num_attention_heads=2"


def _explained(*options: str, model: str = TINY) -> dict[str, object]:
    result = runner.invoke(app, ["explain", model, "--length", "128", "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_model_is_explained_without_weights() -> None:
    sites = _explained()["sites"]
    assert [site["name"] for site in sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert {(site["phase"], site["outcome"], site["q_len"]) for site in sites} == {("prefill", "exact", 128)}


def test_an_implementation_is_the_idiom_of_the_site() -> None:
    idioms = [{site["idiom"] for site in _explained("--implementation", name)["sites"]} for name in ("sdpa", "eager")]
    assert idioms[0] == {"sdpa"}
    assert "sdpa" not in idioms[1]


def test_a_model_in_training_is_explained_as_such() -> None:
    assert {site["phase"] for site in _explained("--train")["sites"]} == {"train"}


def test_a_policy_shows_what_becomes_of_the_model(tmp_path: Path) -> None:
    policy = tmp_path / "window.attn.yaml"
    policy.write_text("version: 1\nrules:\n  - {match: {layers: 1}, attn: {mask: causal & window(16)}}\n", encoding="utf-8")
    sites = _explained("--policy", str(policy))["sites"]
    assert [(site["outcome"], site["rule"]) for site in sites] == [("exact", "no rule"), ("approximate", "rule 1")]


def test_a_page_is_written(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = runner.invoke(app, ["explain", TINY, "--length", "64", "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert "self_attn" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "model",
    [
        "hf:bert,hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,vocab_size=64",
        "hf:t5,d_model=32,d_ff=32,d_kv=16,num_heads=2,num_layers=1,vocab_size=64",
        "hf:vit,hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,image_size=32,patch_size=8",
    ],
)
def test_encoders_encoder_decoders_and_images_get_inputs_of_their_own(model: str) -> None:
    assert _explained(model=model)["sites"]


def test_a_factory_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "import torch\n"
        "class Attends(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return torch.softmax(x @ x.transpose(-1, -2), -1) @ x\n"
        "def make():\n"
        "    return Attends(), (torch.randn(1, 2, 32, 8),)\n"
    )
    (tmp_path / "my_own_model.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert len(_explained(model="my_own_model:make")["sites"]) == 1


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("llama", "hf:type"),
        ("hf:lama", "llama"),
        ("hf:llama,hidden_size", "key=value"),
        ("no_such_module:make", "no_such_module"),
        ("json:lods", "loads"),
        (f"{TINY},max_position_embeddings=16", "--length 16"),
    ],
)
def test_a_wrong_model_is_one_message_and_no_traceback(model: str, says: str) -> None:
    result = runner.invoke(app, ["explain", model, "--length", "64"])
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_models_of_transformers_without_it_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = runner.invoke(app, ["explain", TINY])
    assert result.exit_code == 2
    assert "pip install transformers" in result.stderr
