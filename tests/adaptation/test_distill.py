"""Distilling: only the policy's parameters learn, from what each attention read and gave in the unchanged model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attn_compiler as attn
from adaptation.small import HEADS, VOCABULARY, WIDTH, Model
from attn_compiler.errors import PolicyError, ShapeError
from attn_compiler.planning.parameter_file import write_parameters

HEDGEHOG = {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": {"feature": "hedgehog"}}]}


def batches(seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(0, VOCABULARY, (2, 12), generator=generator)


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> None:
    torch.compiler.reset()


def test_every_attention_learns_and_the_model_stays_what_it_was() -> None:
    model = Model().train()
    before = copy.deepcopy(model.state_dict())
    distilled = attn.distill(model, HEDGEHOG, batches(), steps=20)
    assert list(distilled.curve) == ["layers.0", "layers.1"]
    assert all(len(losses) == 20 and losses[-1] < losses[0] for losses in distilled.curve.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert distilled.model.steps == 20


def test_the_first_loss_is_what_the_start_of_the_maps_gets_wrong() -> None:
    model, tokens = Model(), next(batches())
    losses = attn.distill(model, HEDGEHOG, [tokens], steps=1).curve
    tables = {name: torch.eye(WIDTH // HEADS) for name in ("hedgehog_q", "hedgehog_k")}
    x = model.embedding(tokens)
    for number, layer in enumerate(model.layers):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
        right = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        found = attn.reference(q, k, v, {"feature": "hedgehog", "mask": "causal"}, tables=tables)
        expected = (found - right).square().sum() / right.square().sum()
        torch.testing.assert_close(losses[f"layers.{number}"][0], expected.item())
        x = layer(x)


def test_what_can_be_learned_is_learned(tmp_path: Path) -> None:
    """A factor that was 1 and is 0.5 comes back."""
    write_parameters(tmp_path / "share.safetensors", {"share": torch.full((2, HEADS), 0.5).numpy()}, 0)
    path = tmp_path / "p.yaml"
    path.write_text('version: 1\nparameters: share.safetensors\nrules: [{match: {kind: self}, attn: {score: "score * share"}}]')
    distilled = attn.distill(Model(), path, [next(batches())] * 60, steps=60, rate=0.05)
    assert all(losses[-1] < losses[0] / 10 for losses in distilled.curve.values())


def test_training_that_was_broken_off_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    state = tmp_path / "training.pt"
    whole = attn.distill(Model(), HEDGEHOG, batches(), steps=6, logits=3)

    def breaking_off() -> Iterator[Tensor]:
        yield from islice(batches(), 7)
        raise KeyboardInterrupt

    for broken in (True, False):
        given = breaking_off() if broken else batches()
        try:
            again = attn.distill(Model(), HEDGEHOG, given, steps=6, logits=3, state=state, save_every=2)
        except KeyboardInterrupt:
            assert broken
    assert again.curve == whole.curve
    assert all(torch.equal(value, again.model.learned[name]) for name, value in whole.model.learned.items())
    assert [entry.name for entry in tmp_path.iterdir()] == ["training.pt"]


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "training.pt"
    attn.distill(Model(), HEDGEHOG, batches(), steps=1, state=state)
    other = {"version": 1, "parameters": "other.safetensors", "rules": [{"attn": {"normalizer": "softmax(sink=sink)"}}]}
    with pytest.raises(PolicyError, match=r"training\.pt is the training of other parameters"):
        attn.distill(Model(), other, batches(), steps=1, state=state)


def test_the_logits_of_the_whole_model_are_learned_behind_that() -> None:
    told: list[tuple[int, float]] = []
    model = Model()
    distilled = attn.distill(model, HEDGEHOG, [next(batches())] * 21, steps=1, logits=20, tell=lambda *said: told.append(said))
    losses = distilled.curve["logits"]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert [number for number, _ in told] == list(range(1, 22))
    assert all(parameter.grad is None for parameter in model.parameters())


def changed_by(distilled: attn.Distilled, model: Model) -> dict[str, Tensor]:
    before = model.state_dict()
    now = distilled.model.model.state_dict()
    assert now.keys() == before.keys()
    return {name: value - before[name] for name, value in now.items() if not torch.equal(value, before[name])}


def test_projections_change_by_as_many_ranks_as_asked() -> None:
    model, given = Model(), [next(batches())] * 41
    before = copy.deepcopy(model.state_dict())
    alone = attn.distill(model, HEDGEHOG, given, steps=1, logits=40).curve["logits"]
    distilled = attn.distill(model, HEDGEHOG, given, steps=1, logits=40, low_rank=2)
    changes = changed_by(distilled, model)
    assert list(changes) == ["layers.0.qkv.weight", "layers.1.qkv.weight"]
    assert all(torch.linalg.matrix_rank(change, atol=1e-5) == 2 for change in changes.values())
    assert distilled.curve["logits"][0] == pytest.approx(alone[0])
    assert distilled.curve["logits"][-1] < alone[-1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_returned_computes_what_was_trained() -> None:
    given = [next(batches())] * 12
    distilled = attn.distill(Model(), HEDGEHOG, given, steps=1, logits=10, low_rank=2)
    one_more = attn.distill(Model(), HEDGEHOG, given, steps=1, logits=11, low_rank=2)
    right = Model()(given[0]).log_softmax(-1)
    with torch.no_grad():
        wrong = (right.exp() * (right - distilled.model(given[0]).log_softmax(-1))).sum(-1).mean()
    assert wrong < distilled.curve["logits"][0]
    assert wrong.item() == pytest.approx(one_more.curve["logits"][-1], rel=0.05)


def test_changed_projections_go_on_where_training_was_broken_off(tmp_path: Path) -> None:
    model, asked = Model(), {"steps": 2, "logits": 3, "low_rank": 2}
    whole = attn.distill(model, HEDGEHOG, batches(), **asked)
    with pytest.raises(ShapeError, match="ended after 4 of 5"):
        attn.distill(model, HEDGEHOG, islice(batches(), 4), **asked, state=tmp_path / "training.pt")
    again = attn.distill(model, HEDGEHOG, batches(), **asked, state=tmp_path / "training.pt")
    expected = changed_by(whole, model)
    assert all(torch.equal(change, expected[name]) for name, change in changed_by(again, model).items())


def test_changes_of_projections_need_logits_to_learn_from() -> None:
    with pytest.raises(ShapeError, match="low_rank=4 learns from the model's logits: say for how many steps"):
        attn.distill(Model(), HEDGEHOG, batches(), steps=1, low_rank=4)


def test_a_projection_that_does_not_run_does_not_change() -> None:
    model = Model(layers=1)
    model.layers[0].idle = torch.nn.Linear(WIDTH, WIDTH)
    distilled = attn.distill(model, HEDGEHOG, [next(batches())] * 4, steps=1, logits=3, low_rank=2)
    assert list(changed_by(distilled, model)) == ["layers.0.qkv.weight"]


def test_fewer_than_no_ranks_are_refused() -> None:
    with pytest.raises(ShapeError, match="low_rank is a number of ranks, or 0 for none; found -1"):
        attn.distill(Model(), HEDGEHOG, batches(), steps=1, logits=1, low_rank=-1)


@pytest.mark.parametrize("damaged", [b"", b"not a training", b"PK\x03\x04 cut off"])
def test_a_file_that_is_no_training_is_refused(damaged: bytes, tmp_path: Path) -> None:
    state = tmp_path / "training.pt"
    state.write_bytes(damaged)
    with pytest.raises(PolicyError, match="is no training that could go on"):
        attn.distill(Model(), HEDGEHOG, batches(), steps=1, state=state)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "training.pt"
    torch.save({"weights": torch.zeros(2)}, state)
    with pytest.raises(PolicyError, match="is no training that could go on"):
        attn.distill(Model(), HEDGEHOG, batches(), steps=1, state=state)


def test_nothing_to_learn_from_is_said() -> None:
    with pytest.raises(ShapeError, match="`batches` is empty"):
        attn.distill(Model(), HEDGEHOG, [], steps=1)


def test_batches_that_end_early_are_said_and_what_was_learned_is_kept(tmp_path: Path) -> None:
    state = tmp_path / "training.pt"
    with pytest.raises(ShapeError, match=r"`batches` ended after 2 of 5 steps: give as many, or an endless iterator"):
        attn.distill(Model(), HEDGEHOG, islice(batches(), 2), steps=5, state=state)
    whole = attn.distill(Model(), HEDGEHOG, batches(), steps=5, state=state)
    assert len(whole.curve[next(iter(whole.curve))]) == 5


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"rate": 0.02}, "whose rate is 0.01, where this one has 0.02"), ({"steps": 2}, "whose steps is 1, where this one has 2")],
)
def test_the_state_of_a_training_with_other_settings_is_refused(asked: dict[str, float], said: str, tmp_path: Path) -> None:
    state = tmp_path / "training.pt"
    settings = {"steps": 1, "state": state}
    attn.distill(Model(), HEDGEHOG, batches(), **settings)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match=said):
        attn.distill(Model(), HEDGEHOG, batches(), **{**settings, **asked})  # type: ignore[arg-type]


def test_the_state_of_attentions_that_compute_something_else_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "training.pt"
    attn.distill(Model(), HEDGEHOG, batches(), steps=1, state=state)
    rules = [{"match": {}, "attn": {"feature": "hedgehog", "mask": "causal & window(3)"}, "untrained": "allow"}]
    with pytest.raises(PolicyError, match=r"whose attentions is .*: ask for the same, or remove it"):
        attn.distill(Model(), {"version": 1, "rules": rules}, batches(), steps=1, state=state)
