"""Tiny models, the masks that policies mean for them, and the comparison with the same model rewritten by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attn_compiler.testing import assert_all_within_budget

WINDOW = {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": {"mask": "window(8)"}}]}
Run = Callable[[nn.Module], Tensor]


def llama(implementation: str = "sdpa", **changes: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    settings: dict[str, object] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "use_cache": False, "attn_implementation": implementation,
    }  # fmt: skip
    return LlamaModel(LlamaConfig(**{**settings, **changes}))


def tokens(batch: int = 2, length: int = 32) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def near(length: int, window: int, *, causal: bool = False) -> Tensor:
    """Which keys a query sees: the distance is less than `window`."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = distance.abs() < window
    return seen & (distance >= 0) if causal else seen


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as it is added to scores."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


def like_llama(ids: Tensor, window: int | None = None) -> Run:
    """Run a model on tokens; with a window, its attention is rewritten by hand."""

    def run(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        mask = None
        if window is not None:
            mask = additive(near(ids.shape[1], window, causal=True), dtype).expand(ids.shape[0], 1, -1, -1)
        out = model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert isinstance(out, Tensor)
        return out

    return run


def spread(out: Tensor) -> Tensor:
    """A loss in which every number counts differently."""
    return (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)).sum()


def outcome(model: nn.Module, run: Run, loss: Callable[[Tensor], Tensor] = spread) -> list[Tensor]:
    """What a model computes, and the gradients of its parameters."""
    model.zero_grad(set_to_none=True)
    out = run(model)
    loss(out).backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def assert_outcome(actual: Sequence[Tensor], model: nn.Module, by_hand: Run, loss: Callable[[Tensor], Tensor] = spread) -> None:
    """Check an outcome against that of the eager model, rewritten by hand, in float64."""
    exact = outcome(double(model), by_hand, loss)
    assert_all_within_budget(actual, exact, lambda: outcome(model, by_hand, loss))


def interpreted(gm: torch.fx.GraphModule, inputs: Sequence[object], config_patches: object = None) -> Callable[..., object]:
    """In place of Inductor: AOTAutograd as always, but its graphs run operator by operator, which costs no time to compile."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    compiled = aot_autograd(fw_compiler=boxed_nop)(gm, inputs)
    assert callable(compiled)
    return compiled
