"""Policies on language models: what is computed is what the model computes when its attention is rewritten by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from end_to_end.by_hand import RULE, Seen, all_became, became, check, check_training, computed, everywhere, policy, with_weights
from end_to_end.grids import noise
from end_to_end.models import Run, like_llama, llama, near, tokens

pytestmark = pytest.mark.usefixtures("quick")
LAYERS = ["layers.0.self_attn", "layers.1.self_attn"]


def read(length: int) -> Run:
    ids = tokens(2, length)
    return like_llama(ids)


def streaming(length: int, window: int, sinks: int) -> Tensor:
    return near(length, window, causal=True) | (near(length, length, causal=True) & (torch.arange(length) < sinks))


HEADS = policy({"0": "exact", "1": {"mask": "causal & window(4)"}, "2:4": {"mask": "causal & (window(6) | sinks(2))"}})


def by_head(length: int) -> Seen:
    """Heads 0 and 1 share their keys, and still see differently."""
    both = streaming(length, 6, 2)
    return everywhere(torch.stack([near(length, length, causal=True), near(length, 4, causal=True), both, both]))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_heads_of_a_grouped_llama_see_what_their_group_says(implementation: str) -> None:
    report = check(with_weights(llama(implementation)), read(32), HEADS, by_head(32))
    all_became(report, "approximate", LAYERS)


def test_a_llama_with_a_variant_for_each_group_of_heads_trains() -> None:
    report = check_training(with_weights(llama()).train(), read(32), HEADS, by_head(32))
    all_became(report, "approximate", LAYERS)


def test_what_a_long_window_leaves_out_is_not_computed() -> None:
    length, window = 1024, 64
    report = check(
        with_weights(llama()), read(length), policy("causal & window(64)"), everywhere(near(length, window, causal=True))
    )
    all_became(report, "approximate", LAYERS)
    needed = near(length, window, causal=True).double().mean().item()
    for part in computed(report):
        assert needed <= part < 4 * needed
        assert f"{part:.1%} of the map" in str(report)


class Packed(nn.Module):
    """A llama over several documents in a row, whose positions start again with each of them."""

    def __init__(self, restart: bool) -> None:
        super().__init__()
        self.model, self.restart = with_weights(llama()), restart
        self.kind = nn.Embedding(4, 32)

    def forward(self, ids: Tensor, document_ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1])
        first = (document_ids[:, :, None] == document_ids[:, None]).int().argmax(-1)
        embedded = self.model.embed_tokens(ids) + self.kind(document_ids)
        out = self.model(inputs_embeds=embedded, position_ids=place - first if self.restart else None).last_hidden_state
        assert isinstance(out, Tensor)
        return out


DOCUMENTS = torch.stack([torch.arange(32) // 11, (torch.arange(32) >= 20).long()])


@pytest.mark.parametrize(
    ("mask", "restart"),
    [("same(document)", False), ("causal & same(document) & window(8)", False), ("same(document) & window(8)", True)],
)
def test_packed_documents_do_not_see_each_other(mask: str, restart: bool) -> None:
    rules = policy(mask, labels={"document": {"input": "document_ids"}})
    seen = (DOCUMENTS[:, :, None] == DOCUMENTS[:, None])[:, None] & near(32, 8 if "window" in mask else 32, causal=True)
    report = check(Packed(restart), lambda model: model(tokens(2, 32), DOCUMENTS), rules, everywhere(seen))
    all_became(report, "approximate", [f"model.{name}" for name in LAYERS])


SOURCE, TARGET = 32, 12


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperModel

    return with_weights(WhisperModel(WhisperConfig(
        vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=SOURCE, max_target_positions=SOURCE,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
    )))  # fmt: skip


def t5() -> nn.Module:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0, use_cache=False)
    return with_weights(T5Model(config))


def transcribe(model: nn.Module) -> Tensor:
    sound = noise(2, 8, 2 * SOURCE).to(next(model.parameters()).dtype)
    out = model(input_features=sound, decoder_input_ids=tokens(2, TARGET)).last_hidden_state
    assert isinstance(out, Tensor)
    return out


def translate(model: nn.Module) -> Tensor:
    out = model(input_ids=tokens(2, SOURCE), decoder_input_ids=tokens(2, TARGET)).last_hidden_state
    assert isinstance(out, Tensor)
    return out


def at_lengths(queries: int, keys: int, mask: Tensor) -> Seen:
    return lambda number, q, k: mask if (q.shape[2], k.shape[2]) == (queries, keys) else None


ENCODER = {"version": 1, "rules": [{"match": {"kind": "self", "module": "encoder.**"}, "attn": {"mask": "window(5)"}}]}
CROSS = {"version": 1, "rules": [{"match": {"kind": "cross"}, "attn": {"mask": "keys('0:16, -1')"}}]}


@pytest.mark.parametrize(("build", "run"), [(whisper, transcribe), (t5, translate)])
def test_a_rule_for_the_encoder_leaves_the_decoder_as_it_is(build: Callable[[], nn.Module], run: Run) -> None:
    report = check(build(), run, ENCODER, at_lengths(SOURCE, SOURCE, near(SOURCE, 5)))
    assert [rule for name, _, outcome, rule in became(report) if outcome == "approximate"] == [RULE] * 2
    for name, kind, outcome, rule in became(report):
        assert (outcome, rule) == ("approximate", RULE) if name.startswith("encoder") else rule == "no rule"
        assert kind == ("cross" if name.lower().endswith(("encoder_attn", "encdecattention")) else "self")


@pytest.mark.parametrize(("build", "run"), [(whisper, transcribe), (t5, translate)])
def test_a_rule_for_cross_attention_leaves_all_else_as_it_is(build: Callable[[], nn.Module], run: Run) -> None:
    first = ((torch.arange(SOURCE) < 16) | (torch.arange(SOURCE) == SOURCE - 1)).expand(TARGET, -1)
    report = check(build(), run, CROSS, at_lengths(TARGET, SOURCE, first))
    for _, kind, outcome, rule in became(report):
        assert (outcome, rule) == ("approximate", RULE) if kind == "cross" else rule == "no rule"
    assert [kind for _, kind, _, _ in became(report)].count("cross") == 2
