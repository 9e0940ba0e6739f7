"""The attentions that are timed on a GPU: fixed before anything was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra.storage import Held
from attn_compiler.targets.rows import row_width
from attn_compiler.testing import variant_of


@dataclass(frozen=True)
class Shape:
    """One attention to be timed; `share` of all pairs see each other."""

    name: str
    variant: object
    length: int
    share: float
    dim: int = 128
    heads: int = 16
    kv_heads: int = 16
    queries: int | None = None  # the last ones, where they are fewer than the keys
    sees: Callable[[Tensor, Tensor], Tensor] | None = None  # the mask again, for flex_attention
    window: int | None = None  # the same for libraries that know causal windows; 0: only causal
    grid: tuple[int, int] | None = None  # sizes of the neighborhood and of a side of the grid
    trains: bool = False
    linear: str = ""  # what FLA calls it, if it is linear: each query meets a state instead of all pairs
    apart: Mapping[str, object] = field(default_factory=dict)  # the same in several calls, by the heads of each
    tables: Mapping[str, Callable[[int], Tensor]] = field(default_factory=dict)  # for so many tokens
    storage: Mapping[str, object] = field(default_factory=dict)  # how ours holds operands, or a cache; others: as they come

    @property
    def held(self) -> object:
        """What ours is asked for."""
        return {"mask": self.variant, "storage": self.storage} if self.storage and not self.cache else self.variant

    @property
    def cache(self) -> object:
        """How keys and values are held that were encoded before."""
        return self.storage.get("kv_cache")

    def work(self, *, backward: bool) -> float:
        """The operations of pairs that see each other, and no others, or of states; a backward pass counts 2.5 forward passes."""
        pairs = (self.queries or self.length) * (self.dim if self.linear else self.length * self.share)
        return 4 * self.heads * pairs * self.dim * (2.5 if backward else 1.0)

    def read(self) -> float:
        """The bytes of the keys and values that somebody sees."""
        seen = self.length * (self.share if self.queries else 1.0)
        return 2 * self.kv_heads * seen * (2 * self.dim if self.cache is None else row_width(self.dim, held_of(self.cache)))

    def tiny(self) -> Shape:
        """The same at a length that an interpreter bears, without what would need the real one: tables do not."""
        if self.linear:  # which pays from so many tokens on
            tables = {"gate": partial(gates, heads=2, dim=16)} if self.tables else {}
            return replace(self, length=256, dim=16, heads=2, kv_heads=2, tables=tables)
        variant, length = (self.variant, TILE) if self.tables else ("causal", 16)
        return replace(self, variant=variant, length=length, dim=16, heads=2, kv_heads=2, apart={}, grid=None)


def held_of(storage: object) -> Held:
    found = variant_of({"storage": {"kv_cache": storage}}).storage.kv_cache
    assert found is not None
    return found


def operands(shape: Shape, device: str, *, trained: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in bfloat16."""
    sizes = ((shape.heads, shape.queries or shape.length), *2 * ((shape.kv_heads, shape.length),))
    q, k, v = (torch.randn(1, heads, tokens, shape.dim, dtype=torch.bfloat16, device=device) for heads, tokens in sizes)
    return q.requires_grad_(trained), k.requires_grad_(trained), v.requires_grad_(trained)


def near(window: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda i, j: (i >= j) & (i - j < window)


def together(length: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Causal, in documents of one length."""
    return lambda i, j: (i >= j) & (i // length == j // length)


def chosen(blocks: int, some: int) -> Tensor:
    """For each block of queries some blocks of keys, by chance."""
    order = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0)).argsort(-1).argsort(-1)
    return order < max(1, some)


@lru_cache(maxsize=1)
def gates(length: int, heads: int = 16, dim: int = 128) -> Tensor:
    """Running logs of gates that close a feature to a half within some ten tokens, [batch, heads, tokens, features]."""
    drawn = torch.randn(1, heads, length, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return F.logsigmoid(drawn).div(16).cumsum(2)


def within(window: int, length: int) -> float:
    """The share of pairs that a causal window shows."""
    return window / length * (1 - window / (2 * length))


TILE = 128  # tokens of a block in a table
TWO = {"0:8": {"mask": "causal & window(256)"}, "8:16": {"mask": "causal & window(1024)"}}
BOTH = (within(256, 16384) + within(1024, 16384)) / 2
REACHES = {"reaches": lambda _: torch.tensor([256.0] * 8 + [1024.0] * 8)}
DOCUMENTS = {"documents": lambda n: torch.arange(n) // 2048}
QUARTER, HALF = ({"tokens": lambda n, part=part: torch.arange(n) < n // part} for part in (4, 2))
KEPT = {"kept": lambda n: chosen(n // TILE, n // TILE // 10)}
RETENTION = {
    "mask": "causal",
    "feature": "identity",
    "scale": "1 / sqrt(dim)",
    "state": "decay(-log(1 - 2 ** (-5 - h)))",
    "normalizer": "linear(none)",
}
GLA = {**RETENTION, "state": "gate(vector)"}
NEAR = "causal & window(1024)"
INT8 = {"qk": {"type": "int8", "smooth": True}}
SHAPES = (
    Shape("dense causal", "causal", 16384, 0.5, sees=near(1 << 30), window=0, trains=True),
    Shape("window 1024", "causal & window(1024)", 16384, within(1024, 16384), sees=near(1024), window=1024, trains=True),
    Shape("decoding", "causal", 32768, 1.0, kv_heads=4, queries=1),
    Shape("decoding, window 1024", "causal & window(1024)", 32768, 1024 / 32768, kv_heads=4, queries=1),
    Shape("decoding, window 1024 of 8192", "causal & window(1024)", 8192, 1024 / 8192, kv_heads=4, queries=1),
    Shape("decoding, a cache of int8", "causal", 32768, 1.0, kv_heads=4, queries=1, storage={"kv_cache": "int8"}),
    Shape("decoding, a cache of int4", "causal", 32768, 1.0, kv_heads=4, queries=1, storage={"kv_cache": "int4"}),
    Shape("dense causal, int8 q·k", "causal", 16384, 0.5, window=0, storage=INT8),
    Shape("dense causal, int8 q·k, e4m3 p·v", "causal", 16384, 0.5, window=0, storage=INT8 | {"pv": "fp8_e4m3"}),
    Shape("window 1024, int8 q·k, e4m3 p·v", NEAR, 16384, within(1024, 16384), window=1024, storage=INT8 | {"pv": "fp8_e4m3"}),
    Shape("neighborhood", {"geometry": [128, 128], "mask": "neighborhood([13, 13])"}, 16384, 169 / 16384, dim=64, grid=(13, 128)),
    Shape("every tenth block", "strided(128, 10)", 16384, 0.1),
    Shape("12 blocks of 128, a table", "blocks(kept, 128)", 16384, 12 / 128, tables=KEPT, trains=True),
    Shape("documents of 2048", "causal & same(documents)", 16384, 1 / 16, tables=DOCUMENTS, sees=together(2048), trains=True),
    Shape("half of it padding", "valid(tokens)", 16384, 0.5, tables=HALF, sees=lambda i, j: (i >= 0) & (j < 8192)),
    Shape("decoding, a quarter of it there", "valid(tokens)", 32768, 0.25, tables=QUARTER, kv_heads=4, queries=1),
    Shape("windows by head, a table", "causal & span(reaches, 0)", 16384, BOTH, tables=REACHES, apart=TWO),
    Shape("windows by head, two kinds", {"mask": "causal", "heads": TWO}, 16384, BOTH, apart=TWO),
    Shape("dense causal, heads of 64", "causal", 16384, 0.5, dim=64, sees=near(1 << 30), window=0, trains=True),
    Shape("window 4096", "causal & window(4096)", 32768, within(4096, 32768), sees=near(4096), window=4096),
    Shape("window 1024, 4 kv heads", "causal & window(1024)", 16384, within(1024, 16384), kv_heads=4, sees=near(1024)),
    Shape("window 1024, 4 sinks", "causal & (window(1024) | sinks(4))", 16384, within(1024, 16384)),
    Shape("dilated, 1024 keys 4 apart", "causal & dilated(4) & window(4096)", 16384, within(4096, 16384) / 4),
    Shape("linear", {"mask": "causal", "feature": "elu_one"}, 16384, 0.5, linear="linear_attn", trains=True),
    Shape("linear, heads of 64", {"mask": "causal", "feature": "elu_one"}, 16384, 0.5, dim=64, linear="linear_attn", trains=True),
    Shape("retention", RETENTION, 16384, 0.5, linear="retention", trains=True),
    Shape("gated linear attention", GLA, 16384, 0.5, linear="gla", tables={"gate": gates}, trains=True),
    Shape("ALiBi, causal", {"mask": "causal", "score": "score + alibi()"}, 8192, 0.5),
)
