"""`export_onnx(…, decode=True)` where attentions are linear: a state goes in and comes out, whatever the length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.export import Decoder
from attn_compiler.testing.budget import assert_all_within_budget
from end_to_end.by_hand import ByHand, by_hand, with_weights
from end_to_end.models import double, tokens
from end_to_end.test_state_caches import ELU, FADING, Fading, Windowed
from export.test_decoding import llama


@dataclass(frozen=True)
class Linear:
    """How a first layer is linear, what it means, and for how many heads there is a state: a decay is that of one head."""

    slots: Mapping[str, str]
    means: type[ByHand]
    heads: int


KINDS = {"features": Linear(ELU, Windowed, 2), "fading": Linear(FADING, Fading, 4)}


@dataclass(frozen=True)
class Exported:
    """A model with a policy, and its file."""

    of: Linear
    model: nn.Module
    path: Path
    report: attn.ExportReport


@pytest.fixture(scope="module", params=list(KINDS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    of, path = KINDS[request.param], tmp_path_factory.mktemp("states") / "model.onnx"
    second = {"mask": "causal & window(6)"} if of.means is Windowed else of.slots
    rules = [{"match": {"layers": "0"}, "attn": of.slots}, {"match": {}, "attn": second}]
    model = with_weights(llama())
    report = attn.export_onnx(model, (tokens(1, 24),), path, {"version": 1, "rules": rules}, decode=True)
    return Exported(of, model, path, report)


def test_a_text_may_be_read_in_pieces_of_any_size(exported: Exported) -> None:
    text, decoder, before = tokens(2, 110), Decoder(exported.path), 0
    past = decoder.start(2)
    for size in (3, 1, 80, 1, 25):
        logits, past = decoder.step(text[:, before : before + size].numpy(), before, past)
        before += size
    run = by_hand(lambda model: model(input_ids=text, use_cache=False).logits[:, -1], lambda *_: None, exported.of.means)
    with torch.no_grad():
        exact: Tensor = run(double(exported.model))
        assert_all_within_budget([torch.from_numpy(logits)], [exact], lambda: [run(exported.model)])


def test_states_have_names_and_do_not_grow(exported: Exported) -> None:
    graph, heads = onnx.load(exported.path).graph, exported.of.heads
    shapes = {x.name: [d.dim_value for d in x.type.tensor_type.shape.dim[1:]] for x in [*graph.input, *graph.output]}
    assert shapes["past_key_values.0.state"] == shapes["present.0.state"] == [heads, 8, 9]
    assert shapes["past_key_values.0.seen"] == shapes["present.0.seen"] == [heads, 1, 9]


def test_the_report_says_what_is_a_state(exported: Exported) -> None:
    said = f"the state of a linear attention, 9 x 9 numbers for each of {exported.of.heads} heads"
    assert exported.report.caches["past_key_values.0.state"] == said
    assert exported.report.strategies["model.layers.0.self_attn"] == "states"
