"""Many architectures without any policy, in both spellings of transformers: `backend="attn"` beside `backend="inductor"`.

    python benchmarks/architectures.py FOLDER [--threads 1] [--rounds 5] [--length 2048] [--only llama,vit]

Text has `--length` tokens, images have their own size. Adds to `architectures.json` and `architectures.md` in FOLDER: a run
may be continued. The shapes below were fixed before anything was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported

import torch

from _tables import Row, markdown, processor, write_json
from whole_models import Case, Result, measure

SHARED = {"vocab_size": 256, "hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
DECODER = {**SHARED, "intermediate_size": 1408, "max_position_embeddings": 4096, "use_cache": False}
GROUPED = {**DECODER, "num_key_value_heads": 4}
ENCODER = {**SHARED, "intermediate_size": 1408, "max_position_embeddings": 4104}
IMAGE = {name: size for name, size in SHARED.items() if name != "vocab_size"} | {"intermediate_size": 1408, "image_size": 224}
ALTERNATING = ["sliding_attention", "full_attention"]


def text(name: str, options: Mapping[str, object], *, head: str = "ForCausalLM") -> Case:
    return Case(name.lower(), f"{name}Config", f"{name}{head}", dict(options))


CASES = (
    text("Llama", GROUPED),
    text("Mistral", {**GROUPED, "sliding_window": 256}),
    text("Qwen2", GROUPED),
    text("Qwen3", {**GROUPED, "head_dim": 64}),
    text("Gemma", {**GROUPED, "head_dim": 64}),
    text("Gemma2", {**GROUPED, "head_dim": 64, "sliding_window": 256, "query_pre_attn_scalar": 64, "layer_types": ALTERNATING}),
    text("Phi", {**GROUPED}),
    text("Phi3", {**GROUPED, "pad_token_id": 0}),
    text("Cohere", {**GROUPED, "pad_token_id": 0}),
    text("Cohere2", {**GROUPED, "sliding_window": 256, "layer_types": ALTERNATING}),
    text("Olmo2", GROUPED),
    text("Granite", GROUPED),
    text("StableLm", GROUPED),
    text("Starcoder2", {**GROUPED, "sliding_window": 256}),
    text("GPTNeoX", DECODER),
    text("OPT", {**DECODER, "ffn_dim": 1408, "word_embed_proj_dim": 512, "pad_token_id": 1}),
    Case("gpt2", "GPT2Config", "GPT2LMHeadModel",
         {"vocab_size": 256, "n_embd": 512, "n_layer": 2, "n_head": 8, "n_positions": 4096, "use_cache": False}),
    text("Bert", ENCODER, head="Model"),
    text("Roberta", {**ENCODER, "pad_token_id": 1}, head="Model"),
    text("Electra", {**ENCODER, "embedding_size": 512}, head="Model"),
    text("Albert", {**ENCODER, "embedding_size": 128}, head="Model"),
    text("MPNet", ENCODER, head="Model"),
    Case("distilbert", "DistilBertConfig", "DistilBertModel",
         {"vocab_size": 256, "dim": 512, "n_layers": 2, "n_heads": 8, "hidden_dim": 1408, "max_position_embeddings": 4096}),
    text("ModernBert", {**ENCODER, "local_attention": 128, "global_attn_every_n_layers": 2, "pad_token_id": 0, "cls_token_id": 1,
                        "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}, head="Model"),
    text("ViT", IMAGE, head="Model"),
    text("DeiT", IMAGE, head="Model"),
    text("Dinov2", {**IMAGE, "patch_size": 14}, head="Model"),
    text("SiglipVision", IMAGE, head="Model"),
    Case("swin", "SwinConfig", "SwinModel", {"image_size": 224, "embed_dim": 96, "depths": [2, 2], "num_heads": [3, 6]}),
)  # fmt: skip
PICTURED = ("vit", "deit", "dinov2", "siglipvision", "swin")
NO_SDPA = ("gemma2", "mpnet", "swin")  # transformers has one spelling of them only


def configurations(length: int) -> Sequence[Case]:
    """Every architecture in every spelling."""
    cases = [replace(case, length=224 if case.name in PICTURED else length) for case in CASES]
    return [
        replace(case, name=f"{case.name}, {spelling}", implementation=spelling, image=case.name in PICTURED)
        for case in cases
        for spelling in ("sdpa", "eager")
        if spelling == "eager" or case.name not in NO_SDPA
    ]


def row(result: Result) -> Row:
    """What a person reads of a result."""
    size = {"model": result.name, "tokens or pixels": result.length}
    times = {"inductor": f"{result.inductor_ms:.1f} ms", "attn": f"{result.attn_ms:.1f} ms", "ratio": f"{result.ratio:.2f}"}
    return {**size, **times, "error of inductor": f"{result.inductor_error:.1e}", "error of attn": f"{result.attn_error:.1e}"}


def write(folder: Path, results: Sequence[Result], threads: int) -> None:
    """Everything measured so far, and the mean of all ratios at each length of text; images keep their size, and count once."""
    write_json(folder / "architectures.json", {"results": [asdict(result) for result in results]})
    about = f"{processor()}, {threads} thread(s), torch {torch.__version__}, fp32, no policy, hidden size 512, 2 layers"
    summary = "\n".join(f"- {said(of_length, at)}" for at, of_length in by_length(results).items())
    (folder / "architectures.md").write_text(f"{about}\n\n{summary}\n\n{markdown([row(result) for result in results])}")


def by_length(results: Sequence[Result]) -> dict[int, list[Result]]:
    """Text by its length; images belong to the longest."""
    longest = max(result.length for result in results)
    found: dict[int, list[Result]] = {}
    for result in results:
        pictured = result.name.split(",")[0] in PICTURED
        found.setdefault(longest if pictured else result.length, []).append(result)
    return dict(sorted(found.items()))


def said(results: Sequence[Result], length: int) -> str:
    mean = math.exp(sum(math.log(result.ratio) for result in results) / len(results))
    least = min(results, key=lambda result: result.ratio)
    return f"{length} tokens: {len(results)} configurations, geometric mean {mean:.2f}x, least {least.ratio:.2f}x ({least.name})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "architectures.json"
    results = [Result(**one) for one in json.loads(path.read_text())["results"]] if path.exists() else []
    known = {(result.name, result.length) for result in results}
    for case in configurations(options.length):
        if (case.name, case.length) in known or not any(name in case.name for name in options.only.split(",")):
            continue
        results.append(measure(case, options.rounds))
        print(results[-1], flush=True)
        write(options.folder, results, options.threads)
        torch.compiler.reset()


if __name__ == "__main__":
    main()
