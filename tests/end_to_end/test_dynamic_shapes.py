"""Random batches and lengths need two compilations at most, and compute what the model does, or what the policy means."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler import backend
from attn_compiler import torch_private as private
from attn_compiler.runtime.targets import TARGETS
from attn_compiler.testing import assert_all_within_budget
from end_to_end.models import Run, additive, assert_outcome, llama, outcome

Inputs = dict[str, Tensor]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def shapes(count: int, shortest: int, longest: int) -> Iterator[tuple[int, int]]:
    """Random batches and lengths, the first two of which differ in both: automatic dynamic sees all at once."""
    draw = torch.Generator().manual_seed(3)
    for place in range(count):
        batch, length = torch.randint(2, 7, (), generator=draw), torch.randint(shortest, longest + 1, (), generator=draw)
        yield (7, shortest) if place == 0 else (int(batch), int(length))


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(length))


def mistral(implementation: str) -> nn.Module:
    from transformers import MistralConfig, MistralModel

    window = {"sliding_window": 8, "num_key_value_heads": 2, "use_cache": False}
    return MistralModel(MistralConfig(**SIZES, **window, attn_implementation=implementation))


def gemma(implementation: str) -> nn.Module:
    """One layer with a window, one without."""
    from transformers import Gemma3TextConfig, Gemma3TextModel

    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
    return Gemma3TextModel(Gemma3TextConfig(**{**SIZES, **layers, **heads}, attn_implementation=implementation))


def bert(implementation: str, **settings: object) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SIZES, attn_implementation=implementation, **settings), add_pooling_layer=False)


def t5(implementation: str) -> nn.Module:
    from transformers import T5Config, T5Model

    settings = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "use_cache": False}
    return T5Model(T5Config(**settings, dropout_rate=0.0, attn_implementation=implementation))


def deberta(implementation: str) -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2Model

    return DebertaV2Model(DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0))


def tokens_only(batch: int, length: int) -> Inputs:
    return {"input_ids": ids(batch, length)}


def padded(batch: int, length: int, *, left: bool = False) -> Inputs:
    valid = torch.arange(length) < length - torch.arange(batch)[:, None] % 5
    return {"input_ids": ids(batch, length), "attention_mask": (valid.flip(1) if left else valid).long()}


def two_lengths(batch: int, length: int) -> Inputs:
    return {"input_ids": ids(batch, length), "decoder_input_ids": ids(batch, length // 2 + 1)}


MODELS: dict[str, tuple[Callable[[str], nn.Module], str, Callable[[int, int], Inputs]]] = {
    "llama-eager": (llama, "eager", tokens_only),
    "llama-sdpa": (llama, "sdpa", tokens_only),
    "mistral-eager": (mistral, "eager", tokens_only),
    "gemma-sdpa": (gemma, "sdpa", tokens_only),
    "bert-sdpa": (bert, "sdpa", padded),
    "t5": (t5, "eager", two_lengths),
    "deberta": (deberta, "eager", tokens_only),
}


def made(name: str) -> tuple[nn.Module, Callable[[int, int], Inputs]]:
    build, implementation, inputs = MODELS[name]
    torch.manual_seed(0)
    return build(implementation).eval(), inputs


def hidden(model: nn.Module, given: Inputs) -> Tensor:
    """What a model makes of its inputs, where these are tokens."""
    out = model(**given).last_hidden_state
    assert isinstance(out, Tensor)
    valid = given.get("attention_mask")
    return out if valid is None or valid.ndim == 4 else out[valid.bool()]


def assert_computes(run: nn.Module, model: nn.Module, given: Inputs, by_hand: Run | None = None) -> None:
    """Check a compiled model against the eager one, which `by_hand` rewrites."""
    meant = by_hand or partial(hidden, given=given)
    with torch.no_grad():
        actual, exact = hidden(run, given), meant(copy.deepcopy(model).double())
        assert_all_within_budget([actual], [exact], lambda: [meant(model)], [str(list(given["input_ids"].shape))])


def assert_carried() -> None:
    """Nothing was left to Inductor alone, and nothing refused."""
    last = attn.reports()[-1]
    assert last.decisions
    assert not last.plan.warnings
    assert not any(decision.refused for decision in last.decisions)
    assert not last.near_misses


@pytest.mark.parametrize("name", MODELS)
def test_without_a_policy_one_compilation_serves_twenty_shapes(name: str, compiled: list[int]) -> None:
    model, inputs = made(name)
    run = torch.compile(model, backend="attn", dynamic=True)
    for shape in shapes(20, 6, 40):
        assert_computes(run, model, inputs(*shape))
    assert len(compiled) == 1
    assert_carried()
    assert all(decision.exact for decision in attn.reports()[-1].decisions)


@pytest.mark.parametrize("name", ["llama-sdpa", "gemma-sdpa", "bert-sdpa", "t5"])
def test_shapes_that_change_are_found_to_be_dynamic(name: str, compiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "TARGETS", {"torch": TARGETS["torch"]})
    model, inputs = made(name)
    run = torch.compile(model, backend="attn")
    for shape in shapes(20, 6, 40):
        assert_computes(run, model, inputs(*shape))
    assert len(compiled) == 2
    assert_carried()


def test_marked_dimensions_are_dynamic_and_no_others(compiled: list[int]) -> None:
    model, inputs = made("llama-eager")
    run = torch.compile(model, backend="attn")
    for shape in shapes(20, 6, 40):
        given = inputs(*shape)
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(given["input_ids"], dim)
        assert_computes(run, model, given)
    assert len(compiled) == 1
    assert_carried()


def distances(length: int) -> Tensor:
    return torch.arange(length)[:, None] - torch.arange(length)[None]


def band(valid: Tensor) -> Tensor:
    return distances(valid.shape[1]).abs()[None] < 6


def streaming(valid: Tensor) -> Tensor:
    """A window, and the first two tokens of each row."""
    first = valid.int().argmax(-1)[:, None, None]
    return band(valid) | (torch.arange(valid.shape[1]) - first < 2)


def dilated(valid: Tensor) -> Tensor:
    apart = distances(valid.shape[1])[None]
    return (apart % 3 == 0) & (apart.abs() < 12)


MASKS = {"window(6)": band, "window(6) | sinks(2)": streaming, "window(12) & dilated(3)": dilated}


def masked(mask: str) -> dict[str, object]:
    return {"policy": {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": {"mask": mask}}]}}


def rewritten(name: str, mask: str, given: Inputs) -> Run:
    """The model with what a policy means as a mask that the model adds to its own scores."""
    batch, length = given["input_ids"].shape
    valid = given.get("attention_mask", torch.ones(batch, length)).bool()
    seen = MASKS[mask](valid) & valid[:, None]
    seen = seen & (distances(length) >= 0) if name.startswith("llama") else seen
    seen = seen | torch.eye(length, dtype=torch.bool)  # only rows that are padding see nothing else

    def run(model: nn.Module) -> Tensor:
        added = additive(seen[:, None], next(model.parameters()).dtype)
        out = hidden(model, {**given, "attention_mask": added})
        return out[valid] if "attention_mask" in given else out

    return run


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["llama-eager", "bert-sdpa"])
def test_a_policy_holds_at_every_shape(name: str, mask: str, compiled: list[int]) -> None:
    model, _ = made(name)
    run = torch.compile(model, backend="attn", dynamic=True, options=masked(mask))
    for shape in shapes(20, 6, 30):
        given = padded(*shape, left=name.startswith("llama"))
        assert_computes(run, model, given, rewritten(name, mask, given))
    assert len(compiled) == 1
    assert_carried()
    assert all("mask" in decision.form for decision in attn.reports()[-1].decisions)


@pytest.mark.parametrize(("target", "mask"), [*(("cpp", mask) for mask in MASKS), ("torch", "window(6)")])
def test_long_sequences_in_blocks_and_kernels_hold_at_every_shape(
    target: str, mask: str, compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "TARGETS", {target: TARGETS[target]})
    model, _ = made("llama-sdpa")
    run = torch.compile(model, backend="attn", dynamic=True, options=masked(mask))
    for shape in shapes(6, 100, 120):
        given = tokens_only(*shape)
        assert_computes(run, model, given, rewritten("llama-sdpa", mask, given))
    assert len(compiled) == 1
    assert_carried()
    forms = {decision.form for decision in attn.reports()[-1].decisions}
    assert forms <= {"a generated kernel", "blocks of queries, each with the keys in reach"}
    short = tokens_only(2, 7)  # decided for long sequences, or decided again
    assert_computes(run, model, short, rewritten("llama-sdpa", mask, short))
    assert len(compiled) <= 2


def windowed_t5(given: Inputs) -> Run:
    """Encoder and decoder with a window; what the decoder reads of the encoder stays whole."""
    lengths = [x.shape[1] for x in given.values()]

    def run(model: nn.Module) -> Tensor:
        dtype, batch = next(model.parameters()).dtype, given["input_ids"].shape[0]
        source, target = (distances(n) for n in lengths)
        near = additive((source.abs() < 6).expand(batch, 1, -1, -1), dtype)
        own = additive(((target >= 0) & (target < 6)).expand(batch, 1, -1, -1), dtype)
        encoded = model.encoder(given["input_ids"], attention_mask=near).last_hidden_state
        out = model.decoder(given["decoder_input_ids"], attention_mask=own, encoder_hidden_states=encoded)
        return out.last_hidden_state

    return run


def test_a_window_in_encoder_and_decoder_holds_at_every_shape(compiled: list[int]) -> None:
    model, inputs = made("t5")
    run = torch.compile(model, backend="attn", dynamic=True, options=masked("window(6)"))
    for shape in shapes(20, 6, 30):
        assert_computes(run, model, inputs(*shape), windowed_t5(inputs(*shape)))
    assert len(compiled) == 1
    assert_carried()
    assert [decision.exact for decision in attn.reports()[-1].decisions] == [False, False, True]


@pytest.mark.parametrize("name", ["llama-eager", "t5"])
@pytest.mark.parametrize("policy", ["exact", "window(6)"])
def test_a_model_trains_at_every_shape(name: str, policy: str, compiled: list[int]) -> None:
    model, inputs = made(name)
    model.train()
    run = torch.compile(model, backend="attn", dynamic=True, options=None if policy == "exact" else masked(policy))
    for shape in shapes(6, 6, 24):
        given = inputs(*shape)
        by_hand = partial(hidden, given=given)
        if policy != "exact":
            by_hand = windowed_t5(given) if name == "t5" else rewritten(name, policy, given)
        assert_outcome(outcome(run, partial(hidden, given=given)), model, by_hand)
    assert len(compiled) == 1
    assert_carried()
    assert {decision.site.phase.value for decision in attn.reports()[-1].decisions} == {"train"}


def test_inductor_compiles_once_for_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    inductor, done = private.inductor(), []

    def counting(*args: object, **settings: object) -> Callable[..., object]:
        result = inductor(*args, **settings)
        done.append(result)
        return result

    monkeypatch.setattr(private, "inductor", lambda: counting)
    model, inputs = made("llama-eager")
    run = torch.compile(model, backend="attn", dynamic=True, options=masked("window(6) | sinks(2)"))
    for shape in shapes(6, 6, 30):
        assert_computes(run, model, inputs(*shape), rewritten("llama-eager", "window(6) | sinks(2)", inputs(*shape)))
    assert len(done) == 1
    assert_carried()
