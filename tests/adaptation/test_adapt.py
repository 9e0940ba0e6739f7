"""Models adapted to a policy: its parameters are theirs, are read where they are, and go to the policy's file and back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import attn_compiler as attn
from adaptation.small import VOCABULARY, Model
from attn_compiler import torch_private as private
from attn_compiler.errors import PolicyError, RefusedError
from attn_compiler.testing import assert_all_within_budget
from end_to_end.models import interpreted

WINDOW = 4
ARGS = (torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1)),)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(private, "inductor", lambda: interpreted)


def lolcats(folder: Path, rule: str = "") -> Path:
    path = folder / "lolcats.yaml"
    path.write_text(
        f"version: 1\nparameters: trained.safetensors\nrules:\n  - match: {{kind: self}}\n{rule}    attn:\n      mix:\n"
        "        how: shared_denominator\n        weights: {near: sigmoid(share)}\n        branches:\n"
        f"          near: {{mask: causal & window({WINDOW})}}\n"
        f"          far: {{mask: causal & ~window({WINDOW}), feature: hedgehog}}\n"
    )
    return path


def changed(adapted: attn.Adapted, seed: int = 0) -> attn.Adapted:
    """The same, as if somebody had trained it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapted.learned.values():
            value.add_(torch.randn(value.shape, generator=generator) * 0.5)
    adapted.steps = 5
    return adapted


def test_an_adapted_model_owns_the_parameters_of_its_policy(tmp_path: Path) -> None:
    adapted = attn.adapt(Model(), lolcats(tmp_path), ARGS)
    shapes = {name: list(value.shape) for name, value in adapted.learned.items()}
    assert shapes == {"hedgehog_k": [2, 2, 8, 8], "hedgehog_q": [2, 2, 8, 8], "share": [2, 2]}
    assert {name for name in adapted.state_dict() if "model." not in name} == {f"learned.{name}" for name in shapes}


def test_an_adapted_model_compiled_or_not_is_what_the_policy_means_with_its_parameters(tmp_path: Path) -> None:
    """The gradients of the parameters, too, against a model whose policy holds them, in float64."""
    torch.manual_seed(0)
    adapted = changed(attn.adapt(Model(), lolcats(tmp_path), ARGS))
    exact = outcome(attn.adapt(copy.deepcopy(adapted.model).double(), saved(adapted, tmp_path), ARGS).double(), compiled=False)
    eager, compiled = outcome(adapted, compiled=False), outcome(adapted, compiled=True)
    assert all(gradient.abs().max() > 0 for gradient in exact[1:])
    assert_all_within_budget(compiled, exact, lambda: eager)


def outcome(adapted: attn.Adapted, *, compiled: bool) -> list[torch.Tensor]:
    adapted.zero_grad()
    model = torch.compile(adapted.model, backend="attn", options=adapted.options) if compiled else adapted
    out = model(*ARGS)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    return [out.detach(), *(value.grad.clone() for value in adapted.learned.values() if value.grad is not None)]


def saved(adapted: attn.Adapted, folder: Path) -> Path:
    assert adapted.save() == folder / "trained.safetensors"
    return folder / "lolcats.yaml"


def test_what_is_written_into_the_parameters_counts_at_the_next_call(tmp_path: Path) -> None:
    adapted = attn.adapt(Model(), lolcats(tmp_path), ARGS)
    compiled = torch.compile(adapted.model, backend="attn", options=adapted.options)
    with torch.no_grad():
        before = compiled(*ARGS)
        changed(adapted)
        assert not torch.equal(compiled(*ARGS), before)
        assert torch.equal(compiled(*ARGS), adapted(*ARGS))


def test_saved_parameters_are_those_of_the_policy_from_then_on(tmp_path: Path) -> None:
    adapted = changed(attn.adapt(Model(), lolcats(tmp_path), ARGS))
    policy = saved(adapted, tmp_path)
    again = attn.adapt(adapted.model, policy, ARGS)
    assert again.steps == 5
    with torch.no_grad():
        expected = adapted(*ARGS)
        assert torch.equal(torch.compile(adapted.model, backend="attn", options={"policy": policy})(*ARGS), expected)
        assert torch.equal(again(*ARGS), expected)


def test_parameters_that_nobody_trained_need_leave_to_run(tmp_path: Path) -> None:
    adapted = attn.adapt(Model(), lolcats(tmp_path), ARGS)
    policy = saved(adapted, tmp_path)
    refusals = attn.explain(adapted.model, ARGS, policy=policy).refusals
    assert {reason.reason.split(":")[0] for _, reason in refusals} == {
        "it has parameters, hedgehog_k, hedgehog_q, share, that nobody trained since trained.safetensors was made"
    }
    allowed = lolcats(tmp_path, "    untrained: allow\n")
    with torch.no_grad():
        from_file = torch.compile(adapted.model, backend="attn", options={"policy": allowed})(*ARGS)
        (tmp_path / "trained.safetensors").unlink()
        without = torch.compile(adapted.model, backend="attn", options={"policy": allowed})(*ARGS)
        assert torch.equal(from_file, adapted(*ARGS))
        assert torch.equal(without, from_file)


def test_a_table_that_is_given_is_never_passed_over(tmp_path: Path) -> None:
    adapted = changed(attn.adapt(Model(), lolcats(tmp_path), ARGS))
    tables = {name: value.detach() for name, value in adapted.learned.items()}
    allowed = lolcats(tmp_path, "    untrained: allow\n")
    with pytest.raises(Exception, match='the policy reads no table "hedgehog_k" from the option "tables"'):
        torch.compile(adapted.model, backend="attn", options={"policy": allowed, "tables": tables})(*ARGS)
    labels = "".join(f"  {name}: {{given: {name}}}\n" for name in tables)
    allowed.write_text(f"{allowed.read_text()}labels:\n{labels}")
    torch.compiler.reset()
    with torch.no_grad():
        given = torch.compile(adapted.model, backend="attn", options={"policy": allowed, "tables": tables})(*ARGS)
        assert torch.equal(given, adapted(*ARGS))


def test_a_copy_has_parameters_of_its_own(tmp_path: Path) -> None:
    adapted = attn.adapt(Model(), lolcats(tmp_path), ARGS)
    with torch.no_grad():
        before = adapted(*ARGS)
        twin = changed(copy.deepcopy(adapted))
        assert torch.equal(adapted(*ARGS), before)
        assert not torch.equal(twin(*ARGS), before)


def test_a_policy_without_parameters_adapts_nothing() -> None:
    policy = {"version": 1, "rules": [{"attn": {"mask": "window(8)"}}]}
    with pytest.raises(RefusedError, match=r"adds no parameter to any attention of this model$"):
        attn.adapt(Model(), policy, ARGS)


def test_a_policy_that_names_no_file_needs_a_path_to_be_saved(tmp_path: Path) -> None:
    adapted = attn.adapt(Model(), {"version": 1, "rules": [{"attn": {"feature": "hedgehog"}}]}, ARGS)
    with pytest.raises(PolicyError, match="names no file: add `parameters:"):
        adapted.save()
    assert adapted.save(tmp_path / "p.safetensors").is_file()


def test_parameters_of_another_model_are_refused_when_they_are_loaded(tmp_path: Path) -> None:
    policy = lolcats(tmp_path)
    attn.adapt(Model(), policy, ARGS).save()
    with pytest.raises(RefusedError, match=r'"hedgehog_k" is \[2, 2, 8, 8\], and this model needs \[3, 2, 8, features\]'):
        attn.adapt(Model(layers=3), policy, ARGS)


def test_an_adapted_model_is_exported_with_its_parameters_where_onnx_carries_them(tmp_path: Path) -> None:
    policy = tmp_path / "scored.yaml"
    policy.write_text(
        'version: 1\nparameters: s.safetensors\nrules: [{match: {kind: self}, attn: {score: "score * (1 + share)"}}]'
    )
    adapted = changed(attn.adapt(Model().eval(), policy, ARGS))
    adapted.save()
    written = attn.export_onnx(adapted.model, ARGS, tmp_path / "m.onnx", policy)
    assert [decision.outcome for decision in written.report.plan.decisions] == ["approximate", "approximate"]


def test_a_factor_of_each_head_starts_as_one_and_reaches_the_result() -> None:
    model, rule = Model().eval(), {"match": {}, "attn": {"output": "head_scale"}}
    tokens = torch.arange(12).reshape(1, 12)
    adapted = attn.adapt(model, {"version": 1, "rules": [rule]}, (tokens,))
    assert "o·head_scale[layer, h]" in str(adapted.report)
    with torch.no_grad():
        torch.testing.assert_close(adapted(tokens), model(tokens))
        adapted.learned["head_scale"].zero_()
        torch.testing.assert_close(adapted(tokens), model.head(model.embedding(tokens)))
