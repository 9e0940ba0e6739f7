"""Whole models on a GPU, compiled without any policy: Inductor's attentions beside our kernels, which know the masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from _gpu_clock import Clock, Run

SIZES: Mapping[str, int | bool] = {
    "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 5632,
    "num_hidden_layers": 4, "vocab_size": 32000, "max_position_embeddings": 16384, "use_cache": False,
}  # fmt: skip
TINY = {**SIZES, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64,
        "num_hidden_layers": 1, "vocab_size": 64}  # fmt: skip
MODELS: Mapping[str, tuple[str, Mapping[str, int]]] = {
    "window 1024": ("Mistral", {"sliding_window": 1024}),
    "dense causal": ("Llama", {}),
}
LENGTHS = (16384, 4096)
LIKELY = 60.0  # seconds that one case may take, most of them to compile
BACKENDS: Mapping[str, Mapping[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "ours": {"backend": "attn", "options": {"target": "triton"}},
}
Row = dict[str, object]


def timings(clock: Clock) -> Iterator[Row]:
    """A row for each model, length and step, as far as there is time: the longest first, where masks matter most."""
    tiny = clock.device == "cpu"
    for length, trains, name in product((16,) if tiny else LENGTHS, (False, True), MODELS):
        row: Row = {"model": name, "tokens": length, "step": "training" if trains else "forward"}
        if not clock.has(LIKELY):
            yield {**row, "inductor": "–", "ours": "–", "inductor / ours": "no time left"}
            continue
        model, tokens = built(name, clock.device, tiny=tiny), torch.randint(3, 60, (1, length), device=clock.device)
        runs = {backend: step(model, tokens, by, tiny=tiny, trains=trains) for backend, by in BACKENDS.items()}
        for run in runs.values():
            run()  # compiles
        times = clock.interleaved(runs)
        ratio = f"{times['inductor'] / times['ours']:.2f}"
        yield {**row, **{backend: f"{ms:.2f}" for backend, ms in times.items()}, "inductor / ours": ratio}


def built(name: str, device: str, *, tiny: bool) -> nn.Module:
    family, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**(TINY if tiny else SIZES), **more})
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.to(device, torch.bfloat16)


def step(model: nn.Module, tokens: Tensor, by: Mapping[str, Any], *, tiny: bool, trains: bool) -> Run:
    """A forward pass, or one with the gradients of all parameters."""
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=False, **({"backend": "eager"} if tiny else by))

    def forward() -> object:
        with torch.no_grad():
            return compiled(tokens).logits

    def train() -> object:
        scores = compiled(tokens).logits[0, :-1]
        return torch.autograd.grad(nn.functional.cross_entropy(scores, tokens[0, 1:]), list(model.parameters()))

    return train if trains else forward
