"""The attention modules that PyTorch ships."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from zoo.entry import BATCH, CROSS_TOKENS, HEADS, LAYERS, TOKENS, TORCH, WIDTH, Entry, Inputs


class Around(nn.Module):
    """A module called in a particular way."""

    def __init__(self, inner: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.call(self.inner, **inputs)


def module(name: str, build: Callable[[], nn.Module], inputs: Callable[[], Inputs], sites: int = 1) -> Entry:
    return Entry(name, lambda implementation: (build(), inputs()), sites, TORCH)


def states(length: int = TOKENS) -> Tensor:
    return torch.randn(BATCH, length, WIDTH)


def attention(call: Callable[..., Tensor], **settings: object) -> nn.Module:
    return Around(nn.MultiheadAttention(WIDTH, HEADS, **settings), call)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 96, batch_first=True), LAYERS)


def causal_decoder() -> nn.Module:
    def call(decoder: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return decoder(x, y, tgt_is_causal=True, tgt_mask=mask)

    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 96, batch_first=True)
    return Around(nn.TransformerDecoder(layer, LAYERS), call).eval()


ENTRIES = (
    module(
        "nn_mha_eval",
        lambda: attention(lambda mha, x: mha(x, x, x)[0], batch_first=True).eval(),
        lambda: {"x": states()},
    ),
    module(
        "nn_mha_noweights",
        lambda: attention(lambda mha, x: mha(x, x, x, need_weights=False)[0], batch_first=True).eval(),
        lambda: {"x": states()},
    ),
    module(
        "nn_mha_train_mask",
        lambda: attention(lambda mha, x, mask: mha(x, x, x, attn_mask=mask, need_weights=False)[0], dropout=0.1).train(),
        lambda: {
            "x": torch.randn(TOKENS, BATCH, WIDTH),
            "mask": nn.Transformer.generate_square_subsequent_mask(TOKENS),
        },
    ),
    module(
        "nn_mha_kpm_cross",
        lambda: attention(lambda mha, x, y, padded: mha(x, y, y, key_padding_mask=padded)[0], batch_first=True).train(),
        lambda: {
            "x": states(),
            "y": states(CROSS_TOKENS),
            "padded": torch.zeros(BATCH, CROSS_TOKENS, dtype=torch.bool),
        },
    ),
    module("nn_tenc_eval", lambda: encoder().eval(), lambda: {"src": states()}, LAYERS),
    module("nn_tenc_train", lambda: encoder().train(), lambda: {"src": states()}, LAYERS),
    module("nn_tdec", causal_decoder, lambda: {"x": states(), "y": states(CROSS_TOKENS)}, 2 * LAYERS),
)
