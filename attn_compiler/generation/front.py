"""`attn.cache`: what a model has to remember while it generates under a policy, and no more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, fx, nn

from attn_compiler import library
from attn_compiler import torch_private as private
from attn_compiler.algebra.storage import Held
from attn_compiler.errors import ShapeError
from attn_compiler.generation.kept import held_at, kept_at
from attn_compiler.generation.remembered import Remembered, remembered_at
from attn_compiler.graph.analysis import analyze
from attn_compiler.graph.weights import fingerprints
from attn_compiler.planning.kept import Kept, together
from attn_compiler.planning.plan import Plan
from attn_compiler.planning.planner import plan
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.site import Kind, Site
from attn_compiler.targets.held import seen

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

MOST_TOKENS = 1 << 15  # of the prompt that a model is looked at with: longer than windows are
KINDS = ("full_attention", "sliding_attention")  # as transformers calls them

_KNOWN: WeakKeyDictionary[nn.Module, dict[str, list[Need]]] = WeakKeyDictionary()
_TELLING: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class Need:
    """What a layer holds: keys, None for all of them, or the state of what is `remembered`."""

    kept: Kept | None = None
    suffices: bool = True  # whether that is all that the model sees without a policy
    remembered: Remembered | None = None
    held: Held | None = None  # how keys are held; None: as they come


def cache(
    model: nn.Module,
    policy: str | Path | Mapping[str, object] | Policy | None = None,
    *,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int] | None = None,
) -> Cache:
    """A cache for `model.generate(past_key_values=…)` that holds the keys which the policy lets later tokens see.

    Each layer holds everything, or the latest tokens and the first ones of each row, in the few bits that the policy's storage
    gives its `kv_cache`; or the state of a linear attention. Compile the model with the same policy: a cache hides nothing from a
    prompt, and attention to tokens that it let go is an error. A model is looked at once for each policy; then, as by
    `attn.explain`, what torch.compile compiled before is forgotten.
    """
    read = library.load_policy(policy if policy is not None else "exact").with_values(dict(values or {}))
    inner = getattr(model, "_orig_mod", model)
    if getattr(inner, "config", None) is None or not hasattr(inner, "generate"):
        raise ShapeError(f"a cache is for models of transformers that generate; found {type(inner).__name__}")
    read = read.on(lambda: fingerprints(inner.named_parameters()))
    known = _KNOWN.setdefault(inner, {})
    given = sorted((name, id(table)) for name, table in (tables or {}).items())  # what a state reads of them is kept with it
    key = f"{read.digest} {read.measured and read.measured.foreign} {sorted((values or {}).items())} {given}"
    if key not in known:
        known[key] = _needs(inner, read, tables or {})
    _listen(inner)
    from transformers.cache_utils import Cache

    layers = [_layer(need) for need in known[key]]
    for layer in layers:
        if hasattr(layer, "first"):
            layer.first = layers[0]
    return Cache(layers)


def _layer(need: Need) -> Any:
    from attn_compiler.generation.grown import GrownLayer
    from attn_compiler.generation.layers import KeptLayer
    from attn_compiler.generation.states import StateLayer

    if need.remembered is not None:
        return StateLayer(need.remembered)
    return KeptLayer(need.kept, need.held, suffices=need.suffices) if need.kept else GrownLayer(need.held)


def _needs(model: Any, policy: Policy, tables: Mapping[str, Tensor]) -> list[Need]:
    """What each layer needs."""
    config = model.config.get_text_config(decoder=True)
    kinds = {*(getattr(config, "layer_types", None) or KINDS)}
    unknown = sorted(kinds - {*KINDS}) or (["an encoder"] if model.config.is_encoder_decoder else [])
    if unknown:
        raise ShapeError(f"a cache is for layers of {' and '.join(KINDS)}; {type(model).__name__} has {unknown[0]}: use its own")
    own: list[list[Site]] = [[] for _ in range(config.num_hidden_layers)]
    for site in _sites(model, config):
        if site.kind is Kind.SELF and site.layer is not None and site.layer < len(own):
            own[site.layer].append(site)
    return [_need(sites, policy, tables) for sites in own]


def _need(sites: Sequence[Site], policy: Policy, tables: Mapping[str, Tensor]) -> Need:
    """What the attentions of a layer need of it; where none was found, nobody knows that they need less than everything."""
    state = remembered_at(policy, sites[0], tables) if len(sites) == 1 else None
    if state:
        return Need(remembered=state)
    kept = together(kept_at(policy, site) for site in sites)
    suffices = kept is not None and all(kept.covers(seen(site.computes, site.heads)) for site in sites)
    return Need(kept, suffices, held=held_at(policy, sites[-1]) if sites else None)


def _sites(model: Any, config: Any) -> list[Site]:
    """The attentions of a model that reads a prompt; a twin on the meta device is looked at, which computes nothing."""
    with torch.device("meta"):
        twin: nn.Module = type(model)(copy.deepcopy(model.config)).to(model.dtype).eval()
        tokens = torch.zeros(1, min(MOST_TOKENS, getattr(config, "max_position_embeddings", MOST_TOKENS)), dtype=torch.int64)
    found: list[Site] = []

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def remember(sites: Sequence[Site], near_misses: Sequence[Any]) -> Plan:
            found.extend(sites)
            return plan(sites, library.load_policy("exact"), (), near_misses)

        analyze(gm, example_inputs, remember)
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(twin, backend=look, dynamic=False)(input_ids=tokens, use_cache=False)
    torch.compiler.reset()
    return found


def _listen(model: nn.Module) -> None:
    """Let the layers of our caches know what a call brings: where rows begin, which only the model's mask says, and how much."""
    if model not in _TELLING:
        _TELLING.add(model)
        model.register_forward_pre_hook(_tell, with_kwargs=True)


def _tell(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    held, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    if held is None:
        return
    if held.get_seq_length():
        _reserve(held, (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")))
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        _tell_padding(held, mask)


def _reserve(held: Any, inputs: Sequence[object]) -> None:
    tokens = next((x.shape[1] for x in inputs if isinstance(x, Tensor)), 0)
    for layer in held.layers:
        if hasattr(layer, "reserve"):
            layer.reserve(tokens)


def _tell_padding(held: Any, mask: Tensor) -> None:
    real = mask.to(torch.int64)
    begins = real.argmax(-1)
    told = [layer for layer in held.layers if getattr(layer, "tells_rows_apart", False)]
    if told:
        _must(real.amax(-1) > 0, "a row of the prompt is padding alone, and a cache has to know where rows begin: give it whole")
    if any(hasattr(layer, "states") for layer in told):
        _must(real.sum(-1) == real.shape[1] - begins, "padding behind a row's first token would join its state: pad on the left")
    for layer in told:
        layer.padding = begins


def _must(holds: Tensor, reason: str) -> None:
    """Raise unless it holds for every row; in a graph, when that runs."""
    if torch.compiler.is_compiling():
        private.ASSERT(holds.all(), reason)
    elif not holds.all():
        raise ShapeError(reason)
