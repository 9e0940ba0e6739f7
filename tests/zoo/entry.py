"""One model of the zoo: how it is built, and what should be found in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

BATCH, TOKENS, VOCABULARY = 2, 24, 99
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 16, 2
WIDTH = HEADS * HEAD_DIM
CROSS_TOKENS = 20

BOTH, EAGER, SDPA, TORCH = ("eager", "sdpa"), ("eager",), ("sdpa",), ("torch",)

# Zero-initialized biases, sinks and tables would hide a term that got lost.
NOISE = 0.15

Inputs = dict[str, Tensor]
Build = Callable[[str], tuple[nn.Module, Inputs]]


class Outcome(Enum):
    """What becomes of the attentions that a model has."""

    FOUND = "found"
    REFUSED = "refused"  # a trap: something is written in place, and a rewrite that trusts the data flow is wrong
    FRAGMENTS = "fragments"  # one attention made of several contractions: reported piecewise, left alone


@dataclass(frozen=True)
class Entry:
    """A model with random weights. `sites` counts its attentions, `outcome` says what must become of them."""

    name: str
    build: Build
    sites: int = LAYERS
    implementations: tuple[str, ...] = BOTH
    outcome: Outcome = Outcome.FOUND

    @property
    def found(self) -> int | None:
        """How many sites a matcher should report; None where any number of fragments will do."""
        return {Outcome.FOUND: self.sites, Outcome.REFUSED: 0, Outcome.FRAGMENTS: None}[self.outcome]

    def make(self, implementation: str) -> tuple[nn.Module, Inputs]:
        """Build the model and its inputs; the same numbers every time, and no zero among its parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = self.build(implementation)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        parameter.add_(torch.randn_like(parameter) * NOISE)
        return model, inputs


def tokens(batch: int = BATCH, length: int = TOKENS) -> Tensor:
    """Random token ids, none of which is special."""
    return torch.randint(3, VOCABULARY - 1, (batch, length))


def padding(left: int = 0, right: int = 0) -> Tensor:
    """A mask of ones, with zeros at the ends of its first row."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    mask[0, :left] = 0
    mask[0, TOKENS - right :] = 0
    return mask


def only_tokens() -> Inputs:
    return {"input_ids": tokens()}


def padded_tokens() -> Inputs:
    return {"input_ids": tokens(), "attention_mask": padding(right=5)}


def hugging_face(
    name: str,
    model_class: str,
    config_class: str,
    settings: Mapping[str, object],
    inputs: Callable[[], Inputs],
    sites: int = LAYERS,
    implementations: tuple[str, ...] = BOTH,
    outcome: Outcome = Outcome.FOUND,
) -> Entry:
    """A model of transformers, from its configuration."""

    def build(implementation: str) -> tuple[nn.Module, Inputs]:
        import transformers

        config = getattr(transformers, config_class)(**settings)
        model = getattr(transformers, model_class)._from_config(config, attn_implementation=implementation)
        return model.eval(), inputs()

    return Entry(name, build, sites, implementations, outcome)
