"""What a report says that caches hold is what they hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.planning.kept import Caches
from end_to_end.by_hand import policy, with_weights

pytestmark = pytest.mark.usefixtures("quick")
BATCH, LENGTH, OWN = 1, 40, 9
NEAR, FAR = {"mask": "causal & window(6)"}, {"mask": "causal & ~window(6)", "feature": "elu_one"}
FADING = {"feature": "silu", "state": "decay(0.1)"}


def model(own: int | None = None) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=2, sliding_window=own, pad_token_id=0, bos_token_id=None, eos_token_id=None, attn_implementation="sdpa",
    )  # fmt: skip
    return with_weights(MistralForCausalLM(config))


def prompt() -> Tensor:
    return torch.randint(3, 64, (BATCH, LENGTH), generator=torch.Generator().manual_seed(5))


def said(of: nn.Module, asked: object) -> Caches:
    """What the report says of each layer, which are alike."""
    report = attn.explain(of, (prompt(),), {"use_cache": False}, asked)  # type: ignore[arg-type]
    caches = {decision.caches for decision in report.decisions}
    assert len(report.decisions) == 2
    found = caches.pop()
    assert found is not None
    assert not caches
    return found


def bytes_held(layer: object) -> int:
    """Of the tensors that a layer of a cache keeps."""
    held = [*(getattr(layer, name, None) for name in ("keys", "values")), *getattr(layer, "states", ())]
    return sum(x.nbytes for x in held if isinstance(x, Tensor))


def after(of: nn.Module, asked: object) -> list[int]:
    """Bytes in each layer of our cache once the prompt was read."""
    held = attn.cache(of, asked)  # type: ignore[arg-type]
    compiled = torch.compile(of, backend="attn", options={"policy": asked})
    with torch.no_grad():
        compiled(prompt(), past_key_values=held, use_cache=True)
    return [bytes_held(layer) for layer in held.layers]


@pytest.mark.parametrize("own", [None, OWN])
def test_transformers_own_caches_hold_what_is_said_of_them(own: int | None) -> None:
    from transformers import DynamicCache

    of = model(own)
    held = DynamicCache(config=of.config)
    with torch.no_grad():
        of(prompt(), past_key_values=held, use_cache=True)
    caches = said(of, "exact")
    assert caches.own == caches.decided
    assert [bytes_held(layer) for layer in held.layers] == [caches.own.most or caches.own.token * LENGTH] * 2
    assert (caches.own.most is None) == (own is None)


@pytest.mark.parametrize(
    "rule",
    [
        {"mask": "causal & (window(6) | sinks(2))"},
        {"feature": "taylor", "normalizer": "linear"},
        {"feature": "silu", "state": "decay((h + 1) / 8)", "normalizer": "linear(none)"},
        {"mix": {"how": "shared_denominator", "branches": {"near": NEAR, "far": FAR}}},
        {"heads": {"0:2": NEAR, "2": FADING, "rest": {"feature": "elu_one"}}},
        {"heads": {"0, 2": {"feature": "elu_one"}, "1, 3": NEAR}},
    ],
)
def test_our_caches_hold_what_is_said_of_them(rule: dict[str, object]) -> None:
    asked = {"version": 1, "rules": [{"attn": rule}]}
    of = model()
    decided = said(of, asked).decided
    assert decided.most is not None
    assert after(of, asked) == [decided.most] * 2


def test_states_of_long_floats_take_what_is_said_of_them() -> None:
    asked, of = {"version": 1, "rules": [{"attn": {"feature": "taylor", "normalizer": "linear"}}]}, model().double()
    assert after(of, asked) == [said(of, asked).decided.most] * 2


@pytest.mark.parametrize("held", ["int8", "int4"])
def test_codes_take_what_is_said_of_them(held: str) -> None:
    asked = {"version": 1, "rules": [{"attn": {"storage": {"kv_cache": held}}}]}
    of = model()
    caches = said(of, asked)
    assert caches.decided.token < caches.own.token
    assert after(of, asked) == [caches.decided.token * LENGTH] * 2


def test_the_report_says_it_in_bytes() -> None:
    text = " ".join(str(attn.explain(model(), (prompt(),), {"use_cache": False}, policy("causal & window(6)"))).split())
    assert "cache transformers' own holds 128 B a token, 5.12 kB at 40; attn.cache 640 B at most: the latest 5 tokens" in text


def test_the_report_says_what_is_held_beside_a_state() -> None:
    shared = {"version": 1, "rules": [{"attn": {"mix": {"how": "shared_denominator", "branches": {"near": NEAR, "far": FAR}}}}]}
    text = " ".join(str(attn.explain(model(), (prompt(),), {"use_cache": False}, shared)).split())
    assert "attn.cache 1.29 kB at most: a state and the latest 5 tokens" in text


def test_nothing_is_said_of_attention_that_does_not_generate() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)

    report = attn.explain(attend, tuple(torch.randn(3, 1, 2, 16, 8)))
    assert [decision.caches for decision in report.decisions] == [None]
