"""Text generation: with every cache the tokens are those of the model, or those that the policy means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler import Report
from attn_compiler.testing import assert_within_budget
from end_to_end.models import additive

WINDOW, STREAMING = "causal & window(6)", "causal & (window(6) | sinks(2))"
PADDING, NEW = 3, 8


def model(implementation: str, **changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, object] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "attn_implementation": implementation, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return made


def prompt() -> tuple[Tensor, Tensor]:
    """Two rows of tokens, the first padded on the left, and which of them are tokens."""
    tokens = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))
    valid = torch.ones_like(tokens)
    valid[0, :PADDING] = 0
    return tokens, valid


def generated(made: nn.Module, cache: str) -> Tensor:
    tokens, valid = prompt()
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    out = made.generate(tokens, attention_mask=valid, max_new_tokens=NEW, do_sample=False, disable_compile=True, **settings)
    assert isinstance(out, Tensor)
    return out


def since(before: tuple[Report, ...]) -> list[Report]:
    """The reports of what was compiled since then: the list is short, and other tests fill it too."""
    old = {(id(report.plan.decisions), id(report.plan.remarks)) for report in before}
    return [report for report in attn.reports() if (id(report.plan.decisions), id(report.plan.remarks)) not in old]


def policy(mask: str) -> dict[str, object]:
    return {"policy": {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": {"mask": mask}}]}}


def recomputed(made: nn.Module, sinks: int) -> Tensor:
    """Greedy tokens where each step computes the whole prefix with the mask that the policy means."""
    tokens, valid = prompt()
    for _ in range(NEW):
        length = tokens.shape[1]
        q, k = torch.arange(length)[:, None], torch.arange(length)[None]
        first = valid.argmax(-1)[:, None, None]
        seen = (k <= q) & valid.bool()[:, None] & ((q - k < 6) | (k - first < sinks))
        places = (valid.cumsum(-1) - 1).clamp(min=0)
        mask = additive(seen[:, None], torch.float32)
        with torch.no_grad():
            logits = made(input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        valid = torch.cat([valid, torch.ones_like(valid[:, :1])], dim=1)
    return tokens


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_without_a_policy_the_tokens_are_the_model_s(implementation: str, cache: str) -> None:
    made = model(implementation)
    expected, before = generated(made, cache), attn.reports()
    made.forward = torch.compile(made.forward, backend="attn")  # type: ignore[method-assign]
    assert torch.equal(generated(made, cache), expected)
    assert since(before)
    assert not any(report.plan.warnings for report in since(before))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("cache", "mask"), [("dynamic", WINDOW), ("dynamic", STREAMING), ("static", WINDOW)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_with_a_policy_the_tokens_are_what_the_policy_means(implementation: str, cache: str, mask: str) -> None:
    made = model(implementation)
    expected = recomputed(made, sinks=2 if mask == STREAMING else 0)
    plain = generated(made, cache)
    before = attn.reports()
    made.forward = torch.compile(made.forward, backend="attn", options=policy(mask))  # type: ignore[method-assign]
    assert torch.equal(generated(made, cache), expected)
    assert not torch.equal(plain, expected)
    decisions = [decision for report in since(before) for decision in report.decisions]
    assert decisions
    assert all(decision.target == "torch" and not decision.exact for decision in decisions)


@pytest.mark.usefixtures("quick")
def test_sinks_are_refused_where_padding_cannot_be_told_from_the_mask() -> None:
    made = model("sdpa")
    expected = generated(made, "static")
    before = attn.reports()
    made.forward = torch.compile(made.forward, backend="attn", options=policy(STREAMING))  # type: ignore[method-assign]
    assert torch.equal(generated(made, "static"), expected)
    refused = [reason for report in since(before) for _, reason in report.refusals]
    assert refused
    assert all("padding cannot be told" in refusal.reason for refusal in refused)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_loop_of_one_s_own_around_a_static_cache_has_the_policy_s_tokens(implementation: str) -> None:
    from transformers import StaticCache

    torch.compiler.reset()
    made, before = model(implementation), attn.reports()
    tokens = prompt()[0][1:]
    compiled = torch.compile(made, backend="attn", options=policy(WINDOW))
    cache = StaticCache(config=made.config, max_cache_len=32)
    with torch.no_grad():
        logits = [compiled(piece, past_key_values=cache).logits for piece in tokens.split((7, 2, 1, 1), dim=1)]
        between = torch.arange(tokens.shape[1])[:, None] - torch.arange(tokens.shape[1])
        mask = (between >= 0) & (between < 6)
        plain = made(tokens, attention_mask=additive(mask[None, None], torch.float32), use_cache=False).logits
        exact = made.double()(tokens, attention_mask=additive(mask[None, None], torch.float64), use_cache=False).logits
    assert_within_budget(torch.cat(logits, dim=1), exact, plain)
    decided = [decision for report in since(before) for decision in report.decisions]
    assert {decision.outcome for decision in decided} == {"approximate"}
    assert not [miss for report in since(before) for miss in report.plan.near_misses]
