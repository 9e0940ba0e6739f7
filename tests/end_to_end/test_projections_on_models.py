"""Layers around attentions in few bits, on whole models, beside the same models whose layers compute with integers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import attn_compiler as attn
from end_to_end.integers import Rounded, rounded
from end_to_end.projected import off

THRESHOLD = 2.0  # of small random models
POLICY = {"version": 1, "rules": [{"attn": {"storage": {"projections": {"type": "int8", "outliers": THRESHOLD}}}}]}

pytestmark = pytest.mark.usefixtures("quick")


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=97
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=97))


def bert() -> nn.Module:
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=64, vocab_size=97
    )
    return transformers.BertForMaskedLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        num_layers=2, d_model=64, d_kv=16, num_heads=4, d_ff=64, vocab_size=97, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


TEXT = {"input_ids": torch.arange(40).reshape(2, 20)}
PADDED = TEXT | {"attention_mask": torch.arange(20).expand(2, -1) < torch.tensor([[20], [13]])}
IMAGE = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
PAIR = TEXT | {"decoder_input_ids": torch.arange(14).reshape(2, 7)}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], tuple[str, ...], int]] = {
    "llama": (llama, TEXT, ("q_proj", "k_proj", "v_proj", "o_proj"), 8),
    "gpt2": (gpt2, TEXT, ("attn.c_attn", "attn.c_proj"), 4),
    "bert": (bert, PADDED, ("self.query", "self.key", "self.value", "attention.output.dense"), 8),
    "t5": (t5, PAIR, ("Attention.q", "Attention.k", "Attention.v", "Attention.o"), 24),
    "vit": (vit, IMAGE, ("q_proj", "k_proj", "v_proj", "o_proj"), 8),
}


def made(name: str) -> tuple[nn.Module, nn.Module]:
    """A model in float64, and the same one whose projections compute with integers; some channels of activations are large."""
    torch.manual_seed(0)
    build, _, names, count = MODELS[name]
    model = build().eval().double()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.ndim == 1 and path.endswith("weight"):
                weight[::16] *= 8
            elif weight.ndim == 2:
                weight.mul_(3)
    by_hand = copy.deepcopy(model)
    assert len(rounded(by_hand, names, THRESHOLD)) == count
    return model, by_hand


def logits(model: Any, name: str) -> Tensor:
    return model(**MODELS[name][1]).logits


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_projections_compute_what_integers_do(name: str) -> None:
    model, by_hand = made(name)
    found = logits(torch.compile(model, backend="attn", options={"policy": POLICY}), name)
    wanted, plain = logits(by_hand, name), logits(model, name)
    assert {d.outcome for d in attn.reports()[-1].decisions} == {"approximate"}
    assert off(plain, wanted) > 1e-4
    assert off(found, wanted) < 2**-18  # a code times its scale is a float32, half an ulp of which is 2 ** -25
    assert any((hook_largest(by_hand, name) > THRESHOLD).tolist())


def hook_largest(by_hand: nn.Module, name: str) -> Tensor:
    """The largest number that comes to each projection."""
    seen: list[Tensor] = []
    layers = [module for module in by_hand.modules() if isinstance(module, Rounded)]
    hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].abs().amax())) for layer in layers]
    logits(by_hand, name)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)
