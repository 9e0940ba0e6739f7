"""`export_onnx(…, decode=True)`: text generated in onnxruntime, against torch with attention rewritten by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.errors import ExportError, ShapeError
from attn_compiler.export import Decoder
from attn_compiler.testing.budget import assert_all_within_budget
from end_to_end.by_hand import Seen, by_hand, policy, with_weights
from end_to_end.models import double, tokens

TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
SINKS = policy("causal & (window(8) | sinks(2))")


def llama(positions: int = 512) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=2, max_position_embeddings=positions))


def gemma() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**TINY, num_hidden_layers=3, head_dim=8, sliding_window=6, layer_types=kinds)
    return Gemma3ForCausalLM(config)


def sinks(number: int, q: Tensor, k: Tensor) -> Tensor:
    """The eight newest tokens and the first two."""
    row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return (column <= row) & ((row - column < 8) | (column < 2))


@dataclass(frozen=True)
class Exported:
    """A model, what its policy means, its file, and what that remembers of 40 tokens, layer by layer."""

    model: nn.Module
    seen: Seen
    path: Path
    report: attn.ExportReport
    lengths: tuple[int, ...]

    def logits(self, model: nn.Module, text: Tensor) -> Tensor:
        """Those of the last token, everything computed anew."""
        run = by_hand(lambda model: model(input_ids=text, use_cache=False).logits[:, -1], self.seen)
        with torch.no_grad():
            return run(model)


MODELS: Mapping[str, tuple[Callable[[], nn.Module], object, Seen, tuple[int, ...]]] = {
    "llama": (llama, SINKS, sinks, (9, 9)),
    "gemma": (gemma, "exact", lambda number, q, k: None, (5, 40, 5)),
}


@pytest.fixture(scope="module", params=list(MODELS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    build, asked, seen, lengths = MODELS[request.param]
    model, path = with_weights(build()), tmp_path_factory.mktemp("decoding") / "model.onnx"
    report = attn.export_onnx(model, (tokens(1, 24),), path, asked, decode=True)  # type: ignore[arg-type]
    return Exported(model, seen, path, report, lengths)


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 30)])
def test_generated_text_is_that_of_torch(exported: Exported, rows: int, length: int) -> None:
    prompt = text = tokens(rows, length)
    for _ in range(20):
        text = torch.cat([text, exported.logits(exported.model, text).argmax(-1, keepdim=True)], dim=1)
    assert Decoder(exported.path).generate(prompt.numpy(), 20).tolist() == text.tolist()


def test_a_text_may_be_read_in_pieces_of_any_size(exported: Exported) -> None:
    text, decoder, before = tokens(2, 40), Decoder(exported.path), 0
    past = decoder.start(2)
    for size in (3, 1, 20, 1, 2, 13):
        logits, past = decoder.step(text[:, before : before + size].numpy(), before, past)
        before += size
        here = text[:, :before]
        exact = exported.logits(double(exported.model), here)
        assert_all_within_budget([torch.from_numpy(logits)], [exact], lambda here=here: [exported.logits(exported.model, here)])
    keys = [x.shape() for name, x in past.items() if name.endswith(".key")]
    assert keys == [[2, 2, length, 8] for length in exported.lengths]


def test_inputs_and_outputs_are_called_as_usual(exported: Exported) -> None:
    graph = onnx.load(exported.path).graph
    given, results = [x.name for x in graph.input], [x.name for x in graph.output]
    assert given[:4] == ["input_ids", "position_ids", "past_key_values.0.key", "past_key_values.0.value"]
    assert results[:3] == ["logits", "present.0.key", "present.0.value"]


def test_the_report_says_what_each_cache_holds(exported: Exported) -> None:
    held = {9: "the latest 7 tokens and the first 2", 5: "the latest 5 tokens", 40: "every token"}
    assert list(exported.report.caches.values()) == [held[length] for length in exported.lengths]
    assert exported.report.report.decisions[0].site.name == "model.layers.0.self_attn"


def test_a_row_that_has_ended_goes_on_with_its_last_token(exported: Exported) -> None:
    decoder, prompt = Decoder(exported.path), tokens(2, 12)
    free = decoder.generate(prompt.numpy(), 12)
    end = int(free[0, 14])
    ended = decoder.generate(prompt.numpy(), 12, end=end)
    first = free[0].tolist().index(end, 12)
    assert (ended[0, first:] == end).all()
    assert (ended[:, :first] == free[:, :first])[0].all()


def test_a_prompt_without_tokens_is_refused(exported: Exported) -> None:
    with pytest.raises(ShapeError, match="one token at least"):
        Decoder(exported.path).generate(tokens(1, 3)[:, :0].numpy(), 1)


def test_a_file_without_caches_does_not_decode(tmp_path: Path) -> None:
    attn.export_onnx(nn.Linear(8, 8).eval(), (torch.zeros(1, 8),), tmp_path / "linear.onnx")
    with pytest.raises(ExportError, match="decode=True"):
        Decoder(tmp_path / "linear.onnx")


def assert_refused(path: Path, says: str, model: nn.Module | None = None, asked: object = "exact", **more: object) -> None:
    with pytest.raises(ExportError, match=says):
        attn.export_onnx((model or llama()).eval(), (tokens(1, 24),), path / "no.onnx", asked, decode=True, **more)  # type: ignore[arg-type]
    assert not list(path.iterdir())


def test_a_policy_for_one_phase_alone_is_refused(tmp_path: Path) -> None:
    rule = {"match": {"phase": "decode"}, "attn": {"mask": "causal & window(8)"}}
    assert_refused(tmp_path, "one graph serves them all", asked={"version": 1, "rules": [rule]})


def test_what_decoding_does_not_take_is_said(tmp_path: Path) -> None:
    assert_refused(tmp_path, "transformers that generate", nn.Linear(8, 8))
    assert_refused(tmp_path, "token_type_ids", kwargs={"token_type_ids": torch.ones(1, 24)})
    assert_refused(tmp_path, r"is said of \[1, 24\] tokens", kwargs={"attention_mask": torch.ones(1, 23)})
    assert_refused(tmp_path, "leave out `dynamic_shapes`", dynamic_shapes={})


def test_a_cache_that_the_mask_needs_whole_is_held_whole(tmp_path: Path) -> None:
    slopes = {"match": {}, "attn": {"mask": "causal & (window(8) | sinks(2))", "score": "score + alibi"}}
    report = attn.export_onnx(
        with_weights(llama()), (tokens(1, 24),), tmp_path / "whole.onnx", {"version": 1, "rules": [slopes]}, decode=True
    )
    assert set(report.caches.values()) == {"every token"}


def test_a_model_of_few_positions_is_tried_within_them(tmp_path: Path) -> None:
    report = attn.export_onnx(llama(positions=128).eval(), (tokens(2, 24),), tmp_path / "model.onnx", SINKS, decode=True)
    assert len(report.checks) == 3
