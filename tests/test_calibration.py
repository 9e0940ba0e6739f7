"""What a policy costs a model, measured; and the tolerance that a rule promises."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import attn_compiler as attn
from attn_compiler.backend import attn_eagerly
from attn_compiler.calibration import write
from attn_compiler.errors import PolicyError, ShapeError
from attn_compiler.graph.weights import fingerprints
from attn_compiler.planning.measured import Cost, beside

FP8 = {"qk": "fp8_e4m3"}
POLICY = """
version: 1
rules:
  - {{match: {{}}, attn: {{storage: {{qk: fp8_e4m3}}}}, tolerance: {{site: {site}, logits: {logits}}}}}
"""


class Attention(nn.Module):
    """Four heads, two of which share their keys with their neighbors; head 0 is scaled up, so that it bears less."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(32, n, generator=generator)) for n in (64, 32, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = ((x @ w).unflatten(-1, (-1, 16)).transpose(1, 2) for w in (self.q, self.k, self.v))
        strong = torch.tensor([8.0, 1.0, 1.0, 1.0])[:, None, None]
        out = nn.functional.scaled_dot_product_attention(q * strong / 6, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat(1, 1, 2) + self.attention(x)


@pytest.fixture
def model() -> nn.Module:
    return Model().eval()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 24, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_error_of_a_site_is_that_of_its_output(model: nn.Module, x: torch.Tensor) -> None:
    measured = attn.calibrate(model, {"version": 1, "rules": [{"match": {}, "attn": {"storage": FP8}}]}, [[x]]).measured
    assert measured is not None
    [(name, cost)] = measured.sites.items()
    attention = model.get_submodule("attention")
    q, k, v = ((x @ w).unflatten(-1, (-1, 16)).transpose(1, 2) for w in attention.parameters())
    q = q * torch.tensor([8.0, 1.0, 1.0, 1.0])[:, None, None] / 6
    exact, held = (attn.attend(q, k, v, what, target="torch") for what in ("causal", {"mask": "causal", "storage": FP8}))
    assert isinstance(exact, torch.Tensor)
    assert isinstance(held, torch.Tensor)
    difference, size = (torch.linalg.vector_norm(of, dim=(0, 2, 3)) for of in (exact - held, exact))
    of_heads = (difference / size).tolist()
    assert name == "attention"
    assert cost.whole.relative == pytest.approx(float((exact - held).norm() / exact.norm()), rel=1e-4)
    assert [head.relative for head in cost.heads] == pytest.approx(of_heads, rel=1e-4)
    assert cost.whole.largest == pytest.approx(float((exact - held).abs().max()), rel=1e-4)
    assert measured.logits is not None
    assert 0 < measured.logits.relative < cost.whole.relative  # what the model adds to it is exact


def test_a_tolerance_is_kept_or_refused_with_the_figures(model: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "held.yaml"
    path.write_text(POLICY.format(site=0.5, logits=0.5))
    refused = attn.explain(model, (x,), policy=path).decisions[0]
    assert refused.outcome == "refused"
    assert "was not measured: run `attn calibrate" in refused.refusals[0].reason
    kept = attn.calibrate(model, path, [[x]])
    assert kept.measured is not None
    write(kept.measured, beside(path))
    report = attn.explain(model, (x,), policy=path)
    assert report.decisions[0].outcome == "approximate"
    assert "as calibration measured it" in str(report)
    assert json.loads(report.to_json())["sites"][0]["error"] == kept.measured.sites["attention"].whole.relative
    strict = replace(kept, rules=tuple(replace(rule, tolerance={"site": 1e-4}) for rule in kept.rules))
    reason = attn.explain(model, (x,), policy=strict).decisions[0].refusals[0].reason
    relative = kept.measured.sites["attention"].whole.relative
    assert reason == f"the error of this attention is {relative:.3g}, beyond its `tolerance` of 0.0001"


def test_measurements_belong_to_the_policy_that_was_measured(tmp_path: Path, model: nn.Module, x: torch.Tensor) -> None:
    path = tmp_path / "held.yaml"
    path.write_text(POLICY.format(site=0.5, logits=0.5))
    found = attn.calibrate(model, path, [[x]])
    assert found.measured is not None
    write(found.measured, beside(path))
    again = attn.load_policy(path)
    assert again.measured == found.measured
    assert again.digest == found.digest != found.without_measurements().digest
    path.write_text(POLICY.format(site=0.4, logits=0.5))
    assert attn.load_policy(path).measured is None
    beside(path).write_text("{")
    with pytest.raises(PolicyError, match="run `attn calibrate` again"):
        attn.load_policy(path)


def test_what_was_not_measured_keeps_no_tolerance() -> None:
    from attn_compiler.planning.measured import Measured, SiteCost

    cost = Cost(0.01, 1.0, 0.1)
    measured = Measured("", {"a": SiteCost(cost, (cost,), 1)})
    assert measured.beyond("a", {"site": 0.01}) == ""
    assert "the model's result, which was not measured" in measured.beyond("a", {"logits": 1.0})
    assert "this attention, which was not measured" in measured.beyond("b", {"site": 1.0})
    broken = Measured("", {"a": SiteCost(Cost(float("nan"), 1.0, 0.1), (cost,), 1)})
    assert "beyond" in broken.beyond("a", {"site": 1.0})


def test_each_head_gets_the_cheapest_storage_that_it_bears(model: nn.Module, x: torch.Tensor) -> None:
    candidates = {"four": {"storage": {"qk": "nvfp4"}}, "eight": {"storage": {"qk": "fp8_e4m3"}}}
    costs = {
        name: attn.calibrate(model, {"version": 1, "rules": [{"match": {}, "attn": slots}]}, [[x]]).measured
        for name, slots in candidates.items()
    }
    worst = {name: max(h.relative for h in of.sites["attention"].heads[:2]) for name, of in costs.items() if of}
    weak = {name: max(h.relative for h in of.sites["attention"].heads[2:]) for name, of in costs.items() if of}
    assert max(weak["four"], worst["eight"]) < worst["four"]
    chosen = attn.choose(model, candidates, [[x]], within=max(weak["four"], worst["eight"]))
    assert chosen["rules"] == [{"match": {"module": "attention"}, "attn": {"heads": {"0, 1": "eight", "2, 3": "four"}}}]
    assert attn.explain(model, (x,), policy=chosen).decisions[0].outcome == "approximate"
    none = attn.choose(model, candidates, [[x]], within=1e-6)
    assert none["rules"] == [{"match": {"module": "attention"}, "attn": "exact"}]


def test_a_model_in_training_and_no_inputs_are_refused(model: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="at least one input"):
        attn.calibrate(model, "exact", [])
    with pytest.raises(ShapeError, match="training mode"):
        attn.calibrate(model.train(), "exact", [[x]])


def test_what_was_measured_on_other_weights_keeps_no_tolerance(model: nn.Module, x: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "held.yaml"
    path.write_text(POLICY.format(site=0.5, logits=0.5))
    found = attn.calibrate(model, path, [[x]]).measured
    assert found is not None
    write(found, beside(path))
    other = Model().eval()
    with torch.no_grad():
        other.attention.v += 1e-3
    for of, outcome in ((model, "approximate"), (Model().eval(), "approximate"), (other, "refused")):
        explained = attn.explain(of, (x,), policy=path).decisions[0]
        torch.compile(of, backend=partial(attn_eagerly, options={"policy": path}))(x)
        compiled = attn.reports()[-1].decisions[0]
        for decision in (explained, compiled):
            assert decision.outcome == outcome
            assert (decision.error is None) == (outcome == "refused")
    assert compiled.refusals[0].reason == "its `tolerance` was measured on other weights: run `attn calibrate` again"


def test_each_weight_tells_itself_from_others_by_type_shape_and_numbers() -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    others = [weight, weight.T, weight.double(), weight + 1e-6, weight[:-1], weight[:0], weight[:0].double(), weight.sum()]
    assert len(fingerprints(("w", x) for x in others)) == len(others)
    assert fingerprints([("w", weight.clone()), ("w", weight)]) == fingerprints([("w", weight.T.contiguous().T)])
    assert fingerprints([("w", weight.to("meta"))]) == {("w", "")}  # nothing is computed with it, so nothing can go wrong


class Stack(nn.Module):
    """Two models, one behind the other, that differ in nothing but numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Model(), Model()])
        with torch.no_grad():
            self.layers[1].attention.v += 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)[..., :32]
        return x


class Broken(Attention):
    """Dynamo sees its products with weights in one graph, and the attention in another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = ((x @ w).unflatten(-1, (-1, 16)).transpose(1, 2) for w in (self.q, self.k, self.v))
        torch._dynamo.graph_break()
        out = nn.functional.scaled_dot_product_attention(q / 2, k, v, is_causal=True, enable_gqa=True)
        torch._dynamo.graph_break()
        return out.transpose(1, 2).flatten(2)


KEPT = {"version": 1, "rules": [{"match": {}, "attn": {"storage": FP8}, "tolerance": {"site": 0.5}}]}


@torch.no_grad()
def test_weights_in_each_others_places_are_others(x: torch.Tensor) -> None:
    found = attn.calibrate(Stack().eval(), KEPT, [[x]])
    swapped, part = Stack().eval(), Stack().eval().layers[1]
    swapped.layers = nn.ModuleList([swapped.layers[1], swapped.layers[0]])
    assert found.measured is not None
    for of, foreign in ((Stack().eval(), False), (swapped, True)):
        decisions = attn.explain(of, (x,), policy=found).decisions
        assert [decision.outcome for decision in decisions] == ["refused" if foreign else "approximate"] * 2
    for same in (part, nn.Sequential(Stack()), Stack().to("meta")):  # a graph may know names from within, or from around
        assert not found.measured.on(fingerprints(same.named_parameters())).foreign


@torch.no_grad()
def test_a_graph_that_reads_no_weights_keeps_no_tolerance(x: torch.Tensor) -> None:
    model = Broken().eval()
    found = attn.calibrate(model, KEPT, [[x]])
    assert found.measured is not None
    assert len(found.measured.sites) == 1
    (decision,) = attn.explain(model, (x,), policy=found).decisions
    assert decision.outcome == "refused"
    assert "which this graph reads none of" in decision.refusals[0].reason
    assert not replace(found.measured, weights={}).on(frozenset()).foreign  # nothing that could be another's


def test_scales_are_fixed_by_what_inputs_bring(model: nn.Module, x: torch.Tensor) -> None:
    slots = {"storage": {"qk": "int8", "pv": {"type": "int8", "smooth": True}}}
    policy = {"version": 1, "rules": [{"match": {"kind": "self"}, "attn": slots, "tolerance": {"site": 0.1}}]}
    fixed = attn.fix_scales(model, policy, [[x / 2], [x]])
    attention = model.get_submodule("attention")
    q, k, _ = ((x @ w).unflatten(-1, (-1, 16)).transpose(1, 2).detach() for w in attention.parameters())
    q = q * torch.tensor([8.0, 1.0, 1.0, 1.0])[:, None, None]  # the sixth of it is a factor of the score
    largest = fixed["rules"][0]["attn"]["storage"]["qk"].pop("largest")
    assert largest == pytest.approx([float(q.abs().max()), float(k.abs().max())], rel=1e-5)
    storage = {"qk": {"type": "int8"}, "pv": {"type": "int8", "smooth": True}}
    assert fixed["rules"] == [
        {"match": {"module": "attention"}, "attn": {"storage": storage}, "tolerance": {"site": 0.1}},
        *policy["rules"],
    ]
    storage["qk"]["largest"] = largest
    found = attn.calibrate(model, {**fixed, "rules": [{**fixed["rules"][0], "attn": {"storage": storage}}]}, [[x]])
    assert attn.explain(model, (x,), policy=found).decisions[0].outcome == "approximate"
    with pytest.warns(RuntimeWarning, match="that a policy fixes were cut off"):
        attn.calibrate(model, found, [[2 * x]])
    named = {"version": 1, "variants": {"held": slots}, "rules": [{"match": {}, "attn": "held"}]}
    with pytest.raises(PolicyError, match="has to stand in one rule"):
        attn.fix_scales(model, named, [[x]])
