"""Whole models, without a policy or with one: `backend="attn"` beside `backend="inductor"`, interleaved in one process.

    python benchmarks/whole_models.py FOLDER [--threads 2] [--rounds 5] [--only llama,gpt2]

Cases that train are a step: forward, loss, and the gradients of all parameters; their error is that of these gradients.
With a policy the yardstick is the model as it is, so there is no error of inductor, and ours is that of the float64 reference.
Writes `whole_models.json` and `whole_models.md` to FOLDER. The shapes below were fixed before anything was measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from _tables import markdown, processor, write_json
from attn_compiler.backend import attn_eagerly

LENGTH = 4096
Run = Callable[[dict[str, Tensor]], Tensor]
Backend = Callable[..., Any]
DECODER = {
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "use_cache": False,
}
ENCODER = {
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Case:
    """One architecture, from its configuration with random weights."""

    name: str
    config: str
    model: str
    options: dict[str, object]
    length: int = LENGTH
    implementation: str = "sdpa"
    padded: bool = False
    trains: bool = False
    image: bool = False  # `length` is then that of its sides
    frames: int = 0  # of a video
    policy: Mapping[str, object] | None = None


def neighborhoods(size: Sequence[int], kernel: Sequence[int], before: int = 0) -> dict[str, object]:
    """Every token of a grid sees those around it; the tokens before the grid see all, and all see them."""
    mask = f"neighborhood(kernel={list(kernel)})" + (" | queries(first) | keys(first)" if before else "")
    rule = {"match": {"kind": "self"}, "attn": {"geometry": "grid", "mask": mask}}
    roles = {"roles": {"first": f":{before}"}} if before else {}
    return {"version": 1, "geometries": {"grid": {"size": list(size), "before": before}}, **roles, "rules": [rule]}


SEEING = {key: DECODER[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
CASES = (
    Case("llama", "LlamaConfig", "LlamaForCausalLM", DECODER),
    Case("llama eager", "LlamaConfig", "LlamaForCausalLM", DECODER, 2048, "eager"),
    Case("mistral, window 256", "MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": 256}),
    Case("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {**DECODER, "head_dim": 64}),
    Case("gemma3, window 256 in 3 of 4", "Gemma3TextConfig", "Gemma3ForCausalLM",
         {**DECODER, "head_dim": 64, "sliding_window": 256, "query_pre_attn_scalar": 64,
          "layer_types": [*["sliding_attention"] * 3, "full_attention"]}),
    Case("gpt2", "GPT2Config", "GPT2LMHeadModel",
         {"vocab_size": 256, "n_embd": 512, "n_layer": 4, "n_head": 8, "n_positions": 8192, "use_cache": False}),
    Case("phi3", "Phi3Config", "Phi3ForCausalLM", {**DECODER, "pad_token_id": 0}),
    Case("cohere2, window 256 in 3 of 4", "Cohere2Config", "Cohere2ForCausalLM",
         {**DECODER, "sliding_window": 256, "layer_types": [*["sliding_attention"] * 3, "full_attention"]}),
    Case("gpt neox", "GPTNeoXConfig", "GPTNeoXForCausalLM", {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}),
    Case("bert, padded", "BertConfig", "BertModel", ENCODER, 2048, "sdpa", True),
    Case("modernbert, window 128", "ModernBertConfig", "ModernBertModel",
         {**ENCODER, "local_attention": 128, "global_attn_every_n_layers": 3, "pad_token_id": 0, "cls_token_id": 1,
          "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}),
    Case("llama, 256 tokens", "LlamaConfig", "LlamaForCausalLM", DECODER, 256),
    Case("mistral, window 256, a training step", "MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": 256},
         trains=True),
    Case("llama, a training step", "LlamaConfig", "LlamaForCausalLM", DECODER, trains=True),
    Case("mistral, window 256, hidden 2048", "MistralConfig", "MistralForCausalLM",
         {**DECODER, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8,
          "sliding_window": 256}),
    Case("llama, hidden 2048", "LlamaConfig", "LlamaForCausalLM",
         {**DECODER, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8}),
    Case("vit, 56 × 56 patches, neighborhoods of 7 × 7", "ViTConfig", "ViTModel",
         {**SEEING, "image_size": 448, "patch_size": 8}, 448, image=True, policy=neighborhoods((56, 56), (7, 7), before=1)),
    Case("videomae, 8 × 14 × 14 patches, neighborhoods of 5 × 5 × 5", "VideoMAEConfig", "VideoMAEModel",
         {**SEEING, "image_size": 224, "patch_size": 16, "num_frames": 16, "tubelet_size": 2}, 224, image=True, frames=16,
         policy=neighborhoods((8, 14, 14), (5, 5, 5))),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Median times of one case, and how far the outputs are from each other and from float64."""

    name: str
    length: int
    inductor_ms: float
    attn_ms: float
    ratio: float
    bit_exact: bool
    inductor_error: float
    attn_error: float


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, case.config)(**case.options)
    model: nn.Module = getattr(transformers, case.model)._from_config(  # noqa: SLF001 (its public face does not take every implementation)
        config, attn_implementation=case.implementation
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.train(case.trains)


def compiled(model: nn.Module, backend: str | Backend, policy: Mapping[str, object] | None = None) -> Run:
    """A fresh function for each backend, so that their compilations stay apart."""
    scope: dict[str, object] = {"model": model}
    exec(compile("def run(inputs):\n    return model(**inputs)[0]\n", f"<{backend}>", "exec"), scope)
    return torch.compile(scope["run"], backend=backend, dynamic=False, options=policy and {"policy": policy})  # type: ignore[call-overload, no-any-return]


def stepping(model: nn.Module, run: Run) -> Run:
    """A training step, which answers with the gradients of all parameters."""

    def step(inputs: dict[str, Tensor]) -> Tensor:
        scores, tokens = run(inputs), inputs["input_ids"]
        loss = nn.functional.cross_entropy(scores[0, :-1].to(torch.float64), tokens[0, 1:])
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))])

    return step


def inputs_of(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if case.image:
        frames = [case.frames] if case.frames else []
        return {"pixel_values": torch.randn(1, *frames, 3, case.length, case.length, generator=generator)}
    inputs = {"input_ids": torch.randint(3, 250, (1, case.length), generator=generator)}
    if case.padded:
        inputs["attention_mask"] = (torch.arange(case.length) < case.length * 3 // 4).long()[None]
    return inputs


def measure(case: Case, rounds: int) -> Result:
    model, inputs = build(case), inputs_of(case)
    runs = {"inductor": compiled(model, "inductor"), "attn": compiled(model, "attn", case.policy)}
    runs["eager"] = compiled(model, attn_eagerly, case.policy) if case.policy else lambda inputs: model(**inputs)[0]
    if case.trains:
        runs = {name: stepping(model, run) for name, run in runs.items()}
    eager = runs.pop("eager")
    with torch.set_grad_enabled(case.trains):
        outputs = {backend: run(inputs) for backend, run in runs.items()}
        times: dict[str, list[float]] = {backend: [] for backend in runs}
        for _ in range(rounds):
            for backend, run in runs.items():
                start = time.perf_counter()
                run(inputs)
                times[backend].append(time.perf_counter() - start)
        model.double()
        exact = eager({name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
    shown = inputs["attention_mask"].bool() if case.padded else ...
    errors = {
        backend: ((out.double() - exact)[shown].abs().max() / exact[shown].abs().max()).item() for backend, out in outputs.items()
    }
    if case.policy:
        errors["inductor"] = math.nan
    ratios = [a / b for a, b in zip(times["inductor"], times["attn"], strict=True)]
    median = {backend: statistics.median(t) * 1e3 for backend, t in times.items()}
    same = torch.equal(outputs["inductor"], outputs["attn"])
    return Result(
        case.name, case.length, median["inductor"], median["attn"], statistics.median(ratios), same,
        errors["inductor"], errors["attn"],
    )  # fmt: skip


def row(result: Result) -> dict[str, object]:
    """What a person reads of a result."""
    return {
        "model": result.name,
        "tokens": result.length,
        "inductor": f"{result.inductor_ms:.0f} ms",
        "attn": f"{result.attn_ms:.0f} ms",
        "ratio": f"{result.ratio:.2f}",
        "bit-exact": "yes" if result.bit_exact else "no",
        "error of inductor": "" if math.isnan(result.inductor_error) else f"{result.inductor_error:.1e}",
        "error of attn": f"{result.attn_error:.1e}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = [case for case in CASES if not options.only or any(name in case.name for name in options.only.split(","))]
    results = []
    for case in wanted:
        results.append(measure(case, options.rounds))
        print(results[-1], flush=True)
        torch.compiler.reset()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_json(options.folder / "whole_models.json", {"results": [asdict(result) for result in results]})
    about = f"{processor()}, {options.threads} threads, torch {torch.__version__}, fp32; policies for neighborhoods only\n\n"
    (options.folder / "whole_models.md").write_text(about + markdown([row(result) for result in results]))


if __name__ == "__main__":
    main()
