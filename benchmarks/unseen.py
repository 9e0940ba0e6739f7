"""Counts what is found in models of packages that nobody looked at while the matcher was written, and rebuilds it.

    pip install timm torchvision x-transformers vit-pytorch local-attention openai-whisper
    python benchmarks/unseen.py FOLDER [PART OF A NAME ...]

writes `unseen.md` into FOLDER. Every model is small and of random weights. How many attentions it has was counted in its source:
a weighted sum of values whose weights are normalized products of queries and keys. Heads that are mixed with each other
(talking heads), weights that come from one tensor alone (outlooks) and products of keys with values are counted apart.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # where the zoo lives

import torch
from torch import Tensor, nn

from _tables import Row, markdown, processor
from zoo.rebuilding import Rebuilt, rebuild

NOISE = 0.02  # parameters that start as zero would hide a term that got lost
SMALL = {"depth": 2}
SWIN = {"depths": (2, 2), "embed_dim": 24, "num_heads": (1, 2)}
NARROW = {**SMALL, "embed_dim": 64, "num_heads": 2}


@dataclass(frozen=True)
class Unseen:
    """A model, how many attentions it has, and how many of another kind."""

    package: str
    name: str
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    attentions: int
    others: int = 0


def timm_model(name: str, attentions: int, size: int, others: int = 0, **settings: Any) -> Unseen:
    """A model of timm, for images of `size` pixels."""

    def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
        model = importlib.import_module("timm").create_model(name, pretrained=False, **settings)
        return model, (torch.randn(1, 3, size, size),)

    return Unseen("timm", name, make, attentions, others)


def sized(name: str, attentions: int, size: int, others: int = 0, **settings: Any) -> Unseen:
    """A model of timm that is told how large its images are."""
    return timm_model(name, attentions, size, others, img_size=size, **settings)


TIMM = (
    sized("vit_tiny_patch16_224", 2, 64, **SMALL),
    sized("deit_tiny_distilled_patch16_224", 2, 64, **SMALL),
    sized("beit_base_patch16_224", 2, 64, **NARROW),
    sized("eva02_tiny_patch14_224", 2, 56, **SMALL),
    sized("vit_relpos_small_patch16_224", 2, 64, **SMALL),
    sized("vit_base_patch16_rope_224", 2, 64, **NARROW),
    sized("vit_so400m_patch14_siglip_224", 3, 56, **NARROW),
    sized("swin_tiny_patch4_window7_224", 4, 56, **SWIN),
    sized("swinv2_tiny_window8_256", 4, 64, **SWIN),
    sized("cait_xxs24_224", 2, 64, 2, **SMALL),
    sized("xcit_nano_12_p16_224", 4, 64, **SMALL),
    sized("twins_svt_small", 18, 64),
    sized("maxvit_nano_rw_256", 14, 64),
    sized("tnt_s_patch16_224", 4, 64, **SMALL),
    sized("convit_tiny", 2, 64, 10),
    sized("coat_tiny", 0, 64, 26),
    timm_model("pvt_v2_b0", 8, 64),
    timm_model("mvitv2_tiny", 10, 224),
    timm_model("levit_128s", 11, 224),
    timm_model("davit_tiny", 12, 64),
    timm_model("gcvit_xxtiny", 12, 224),
    timm_model("mobilevit_xxs", 9, 64),
    timm_model("hiera_tiny_224", 12, 224),
    timm_model("volo_d1_224", 16, 224, 4),
    timm_model("nest_tiny", 12, 224),
    timm_model("edgenext_xx_small", 3, 64),
    timm_model("fastvit_sa12", 2, 64),
    timm_model("visformer_tiny", 8, 224),
    timm_model("crossvit_tiny_240", 21, 240),
    timm_model("efficientformerv2_s0", 1, 224, 4),
)


def x_transformer(name: str, attentions: int = 2, others: int = 0, **settings: Any) -> Unseen:
    """A decoder of x-transformers with one of its many features."""

    def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
        x = importlib.import_module("x_transformers")
        layers = x.Decoder(dim=64, depth=2, heads=4, attn_dim_head=32, **settings)
        return x.TransformerWrapper(num_tokens=100, max_seq_len=64, attn_layers=layers), (torch.randint(0, 100, (2, 48)),)

    return Unseen("x-transformers", name, make, attentions, others)


X_TRANSFORMERS = (
    x_transformer("plain"),
    x_transformer("flash", attn_flash=True),
    x_transformer("rotary", rotary_pos_emb=True),
    x_transformer("alibi", alibi_pos_bias=True),
    x_transformer("relative bias", rel_pos_bias=True),
    x_transformer("shared keys", attn_kv_heads=2),
    x_transformer("softcap", attn_softclamp_logits=True),
    x_transformer("normalized", attn_qk_norm=True),
    x_transformer("zero key", attn_add_zero_kv=True),
    x_transformer("learned keys", attn_num_mem_kv=4),
    x_transformer("gated", attn_gate_values=True),
    x_transformer("best keys", attn_sparse_topk=8),
    x_transformer("talking heads", attn_pre_talking_heads=True),  # added to the scores, as any bias
)


def vision(name: str, builder: str, attentions: int, **settings: Any) -> Unseen:
    """A model of torchvision or vit-pytorch."""
    package, _, what = builder.partition(":")

    def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
        return getattr(importlib.import_module(package), what)(**settings), (torch.randn(2, 3, 64, 64),)

    return Unseen(package.partition(".")[0].replace("_", "-"), name, make, attentions)


IMAGES = {"image_size": 64, "patch_size": 16}
PLAIN = {**IMAGES, "num_classes": 10, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
WINDOWS = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
VISION = (
    vision("vit", "torchvision.models:VisionTransformer", 2, **IMAGES, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64),
    vision("swin", "torchvision.models:SwinTransformer", 4, **WINDOWS),
    vision("vit", "vit_pytorch:ViT", 2, **PLAIN),
    vision("simple vit", "vit_pytorch:SimpleViT", 2, **PLAIN),
)


def local() -> tuple[nn.Module, tuple[Tensor, ...]]:
    make = importlib.import_module("local_attention").LocalTransformer
    sizes = {"num_tokens": 100, "dim": 32, "depth": 2, "max_seq_len": 64, "dim_head": 8, "heads": 2}
    return make(causal=True, local_attn_window_size=16, **sizes), (torch.randint(0, 100, (2, 64)),)


def whisper() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model = importlib.import_module("whisper.model")
    return model.Whisper(model.ModelDimensions(8, 20, 32, 2, 2, 100, 12, 32, 2, 2)), (
        torch.randn(2, 8, 40),
        torch.randint(0, 100, (2, 12)),
    )


TEXT = (Unseen("local-attention", "decoder", local, 2), Unseen("openai-whisper", "whisper", whisper, 6))
MODELS = (*TIMM, *X_TRANSFORMERS, *VISION, *TEXT)


def measure(one: Unseen) -> tuple[Rebuilt, Row]:
    """What was found in a model, and what of it computes the same again."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, args = one.make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * NOISE)
    names = list(inspect.signature(model.forward).parameters)
    found = rebuild(model.eval(), dict(zip(names, args, strict=False)))
    row = {"package": one.package, "model": one.name, "attentions": one.attentions, "others": one.others}
    return found, {**row, "found": len(found.sites), "rebuilt": found.exact}


def measured(wanted: list[str]) -> Iterator[tuple[Rebuilt, Row]]:
    for one in MODELS:
        if wanted and not any(part in f"{one.package} {one.name}" for part in wanted):
            continue
        found, row = measure(one)
        print(*row.values(), found.reason, flush=True)
        yield found, row


def report(found: list[tuple[Rebuilt, Row]]) -> str:
    """All counts, their sums, and what is not as it was counted."""
    rows = [row for _, row in found]
    sums = {key: sum(int(str(row[key])) for row in rows) for key in ("attentions", "others", "found", "rebuilt")}
    versions = ", ".join(f"{name} {version(name)}" for name in sorted({str(row["package"]) for row in rows}))
    said = [f"- {row['package']} {row['model']}: {one.reason}\n" for one, row in found if one.reason]
    return (
        "# Models that nobody looked at\n\n"
        "Attentions as counted in the source of each model; *others* are of a kind that is left alone. *Rebuilt* as in\n"
        "`zoo.md`: computed again from what was recovered, with equal values. When this was first run, the ten of mvitv2 were\n"
        "missed, which write over their scores; all others were found.\n\n"
        f"{markdown([*rows, {'package': 'all', 'model': '', **sums}])}\n"
        f"With {versions}, torch {torch.__version__}, on {processor()}.\n\n## Why something was left alone\n\n{''.join(said)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", help="only models whose name contains one of these")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    (given.folder / "unseen.md").write_text(report(list(measured(given.models))))


if __name__ == "__main__":
    main()
