"""Real models with policies, for files of every format: how each is built and called, and what its policy means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from end_to_end.by_hand import Seen, by_hand, everywhere, policy, with_weights
from end_to_end.grids import SIDE, image, neighbors, noise
from end_to_end.models import near

TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**TINY, "num_key_value_heads": 2, "use_cache": False}
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Exported:
    """A model, its inputs for a number of rows and tokens, and a policy with the mask that it means."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    seen: Seen
    policy: Mapping[str, object] = field(default_factory=lambda: policy("window(8)"))
    out: str = "last_hidden_state"

    def made(self) -> nn.Module:
        """A model whose attention can be seen in its results."""
        return with_weights(self.build())

    def eager(self, inputs: Inputs) -> Callable[[nn.Module], Tensor]:
        """How a model runs as it is."""
        return lambda model: _out(self, model, inputs)

    def rewritten(self, inputs: Inputs) -> Callable[[nn.Module], Tensor]:
        """How a model runs with its attention rewritten by hand."""
        return by_hand(self.eager(inputs), self.seen)


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralModel

    return MistralModel(MistralConfig(**DECODER, sliding_window=16))


def gemma() -> nn.Module:
    from transformers import Gemma3TextConfig, Gemma3TextModel

    return Gemma3TextModel(Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=16))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2Model(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=512, use_cache=False, **special))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**TINY), add_pooling_layer=False)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**SMALL, image_size=4 * SIDE, patch_size=4), add_pooling_layer=False)


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperModel

    layers = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 50, "max_target_positions": 512}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperModel(WhisperConfig(vocab_size=64, d_model=32, num_mel_bins=8, use_cache=False, **layers, **heads, **ids))


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        in_channels=4, sample_size=2 * SIDE, patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        out_channels=4, norm_num_groups=4, num_embeds_ada_norm=10,
    )  # fmt: skip


def ids(rows: int, length: int) -> Inputs:
    return {"input_ids": torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))}


def padded(rows: int, length: int) -> Inputs:
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -3:] = 0
    return {**ids(rows, length), "attention_mask": mask}


def spoken(rows: int, length: int) -> Inputs:
    return {"input_features": noise(rows, 8, 100), "decoder_input_ids": ids(rows, length)["input_ids"]}


def pixels(rows: int, _: int) -> Inputs:
    return {"pixel_values": noise(rows, 3, 4 * SIDE, 4 * SIDE)}


def latent(rows: int, _: int) -> Inputs:
    labels = torch.arange(rows)
    return {"hidden_states": noise(rows, 4, 2 * SIDE, 2 * SIDE), "timestep": labels, "class_labels": labels, "return_dict": False}


def within(number: int, q: Tensor, k: Tensor) -> Tensor | None:
    """Itself and the seven tokens to either side; where other tokens are attended to, all."""
    return near(q.shape[2], 8) if q.shape[2] == k.shape[2] else None


PATCHES = policy("neighborhood([3, 3])", geometries=image())
CLASS = policy("queries(cls) | keys(cls) | neighborhood([3, 3])", geometries=image(before=1), roles={"cls": "0:1"})
MODELS = {
    "bert": Exported(bert, padded, within),
    "mistral": Exported(mistral, ids, within),
    "gemma": Exported(gemma, ids, within),
    "gpt2": Exported(gpt2, ids, within),
    "vit": Exported(vit, pixels, everywhere(neighbors(3, before=1)), CLASS),
    "whisper": Exported(whisper, spoken, within),
    "dit": Exported(dit, latent, everywhere(neighbors(3)), PATCHES, out="sample"),
}


def _out(case: Exported, model: nn.Module, inputs: Inputs) -> Tensor:
    dtype = next(model.parameters()).dtype
    held = {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    out = getattr(model(**{**held, "return_dict": True}), case.out)
    assert isinstance(out, Tensor)
    return out
