"""Linear attention step by step on Triton, in its interpreter: kernels that begin with a state, in calls and in models."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler import torch_private as private
from attn_compiler.errors import ShapeError
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Site
from attn_compiler.runtime import gather, triton_states, tuning
from attn_compiler.runtime.states import Call
from attn_compiler.runtime.triton import TritonTarget
from attn_compiler.targets.triton import states
from attn_compiler.targets.triton.blocks import Blocks
from attn_compiler.testing import assert_all_within_budget, assert_within_budget
from end_to_end import test_operands
from end_to_end.models import interpreted
from end_to_end.test_state_caches import EVERYWHERE, FADES, SHARED, generated, llama, prompt
from end_to_end.test_state_traits import llama as gated_llama
from end_to_end.test_state_traits import prompt as gated_prompt
from end_to_end.test_state_traits import ready, trained

pytest.importorskip("triton")

TOKENS = 44
GENERATOR = torch.Generator().manual_seed(4)
TABLES = {
    "padding": torch.arange(TOKENS) >= torch.tensor([[0], [11]]),
    "gate": torch.rand(2, 4, TOKENS, generator=GENERATOR).sigmoid().log().cumsum(-1),
    "gates": torch.rand(2, 4, TOKENS, 8, generator=GENERATOR).sigmoid().log().cumsum(2),
    "beta": torch.rand(2, 4, TOKENS, generator=GENERATOR),
    "hedgehog_q": torch.randn(4, 8, 4, generator=GENERATOR),
    "hedgehog_k": torch.randn(4, 8, 4, generator=GENERATOR),
}
ELU = {"mask": "causal", "feature": "elu_one"}
NEAR = {"mask": "causal & window(9)"}
FAR = {"mask": "causal & ~window(9)", "feature": "elu_one", "state": "gate(scalar)"}
VARIANTS: Mapping[str, tuple[Mapping[str, object], torch.dtype]] = {
    "elu": (ELU, torch.float32),
    "elu, in float16": (ELU, torch.float16),
    "padding and means": ({**ELU, "mask": "causal & valid(padding)", "normalizer": "linear(mean)"}, torch.float32),
    "decay": ({"feature": "silu", "mask": "causal", "state": "decay((h + 1) / 8)", "normalizer": "linear(none)"}, torch.float32),
    "gate, in bfloat16": ({**ELU, "mask": "causal & valid(padding)", "state": "gate(scalar)"}, torch.bfloat16),
    "gates of features": ({**ELU, "mask": "causal & valid(padding)", "state": "gate(vector, running=gates)"}, torch.float32),
    "gates of features, in bfloat16": ({**ELU, "state": "gate(vector, running=gates)"}, torch.bfloat16),
    "learned features": ({"feature": "hedgehog", "mask": "causal"}, torch.float32),
    "gated delta": ({"feature": "cosine", "mask": "causal", "state": "gated_delta"}, torch.float32),
    "shared denominator": (
        {"mix": {"how": "shared_denominator", "branches": {"near": NEAR, "far": FAR}}}, torch.float32
    ),
    "heads": ({"heads": {"0, 3": NEAR, "1": {"mask": "causal", "state": "decay(0.3)"}, "rest": ELU}}, torch.float32),
}  # fmt: skip
CUTS = [1, 5, 20, 15, 1, 1, 1]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """Short segments and small tiles; runs are kept."""
    monkeypatch.setattr(states, "SEGMENT", 16)
    monkeypatch.setattr(tuning, "INTERPRETED", (Blocks(16, 16, width=16),))
    told: list[Call] = []
    run = gather.run_on_triton
    monkeypatch.setattr(gather, "run_on_triton", lambda call, dtype: told.append(call) or run(call, dtype))
    triton_states.blocks_of.cache_clear()
    yield told
    triton_states.blocks_of.cache_clear()


def operands(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, TOKENS, 8), (2, 2, TOKENS, 8), (2, 2, TOKENS, 6)
    return [torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype).requires_grad_() for shape in shapes]


def tables(slots: Mapping[str, object], dtype: torch.dtype) -> dict[str, Tensor]:
    read = ("hedgehog_q", "hedgehog_k") if "hedgehog" in str(slots) else ("padding", "gate", "gates", "beta")
    return {name: TABLES[name].to(dtype) if TABLES[name].dtype.is_floating_point else TABLES[name] for name in read}


def by_steps(
    slots: Mapping[str, object], cuts: list[int], leaves: list[Tensor], given: Mapping[str, Tensor], target: str
) -> Tensor:
    parts, past, position = [], None, 0
    for cut in cuts:
        new = (x[:, :, position : position + cut] for x in leaves)
        out, past = attn.step(*new, slots, past, position=position, tables=given, target=target)  # type: ignore[arg-type]
        parts.append(out)
        position += cut
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("name", VARIANTS)
def test_steps_are_the_parallel_form(name: str, runs: list[Call]) -> None:
    slots, dtype = VARIANTS[name]
    with torch.no_grad():
        exact = attn.reference(*operands(torch.float64), slots, tables=tables(slots, torch.float64))
        found = by_steps(slots, CUTS, operands(dtype), tables(slots, torch.float32), "triton")
        plain = attn.attend(*operands(dtype), slots, tables=tables(slots, torch.float32), target="torch")
    assert isinstance(exact, Tensor)
    assert isinstance(plain, Tensor)
    assert_within_budget(found, exact, plain)
    assert any(told.past is not None for told in runs)


@pytest.mark.parametrize("name", ["decay", "gates of features", "shared denominator"])
def test_their_gradients_are_those_of_the_parallel_form(name: str, runs: list[Call]) -> None:
    slots, dtype = VARIANTS[name]

    def with_gradients(out: object, leaves: list[Tensor]) -> list[Tensor]:
        assert isinstance(out, Tensor)
        return [out.detach(), *torch.autograd.grad((out * out.detach().sin()).sum(), leaves)]

    leaves, wide = operands(dtype), operands(torch.float64)
    exact = with_gradients(attn.reference(*wide, slots, tables=tables(slots, torch.float64)), wide)
    found = with_gradients(by_steps(slots, [24, 12, 8], leaves, tables(slots, dtype), "triton"), leaves)
    assert_all_within_budget(
        found, exact, lambda: with_gradients(attn.attend(*leaves, slots, tables=tables(slots, dtype), target="torch"), leaves)
    )
    assert any(told.past is not None for told in runs)


def test_a_token_behind_a_state_is_one_launch(runs: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.detach() for x in operands(torch.float32))
    _, past = attn.step(q[:, :, :40], k[:, :, :40], v[:, :, :40], ELU, target="triton")
    launched = list[str]()
    start = triton_states.Run._start
    monkeypatch.setattr(
        triton_states.Run, "_start", lambda run, kernel, *more: launched.append(kernel) or start(run, kernel, *more)
    )
    attn.step(q[:, :, 40:41], k[:, :, 40:41], v[:, :, 40:41], ELU, past, position=40, target="triton")
    assert launched == ["step"]


@pytest.mark.parametrize("fades", ["", "whole", "rows"])
def test_the_operator_is_what_autograd_and_compiled_graphs_take_it_for(fades: str, runs: list[Call]) -> None:
    q, k, v = (x.detach()[:1, :, :7].requires_grad_() for x in operands(torch.float32))
    sums = torch.randn(1, 4 if fades else 2, 8, 7, generator=GENERATOR).requires_grad_()
    rate = torch.linspace(0.1, 0.3, 8).double() if fades == "rows" else torch.tensor([0.1]).double()
    log, before = -torch.arange(7)[:, None] * rate.expand(1, 4, 1, -1), (2 * rate).expand(1, 4, 1, -1)
    if fades != "rows":
        log, before = log[..., 0], before[..., 0]
    logs, state = ([log.clone().requires_grad_()] * 2, (sums, before.clone().requires_grad_())) if fades else ([], (sums,))
    given = (q, k, v, logs, 0, False, "float32", *state)
    torch.library.opcheck(torch.ops.attn_compiler.gather.default, given)
    now, then = (x.reshape(1, 4, x.shape[2], -1) if fades else torch.zeros(()) for x in (log, state[-1]))
    left = (now[:, :, :, None] - now[:, :, None]).clamp(max=0).exp() if fades else torch.ones(())
    weights = (q.double()[:, :, :, None] * k.double().repeat_interleave(2, 1)[:, :, None] * left).sum(-1).tril()
    met = (q.double() * (now - then).exp()) @ sums.double().repeat_interleave(4 // sums.shape[1], 1)
    exact = weights @ v.double().repeat_interleave(2, 1) + met[..., :-1], weights.sum(-1) + met[..., -1]
    found = torch.ops.attn_compiler.gather(*given)
    for one, meant in zip(found, exact, strict=True):
        assert torch.allclose(one.double(), meant, atol=1e-5)
    leaves = [q, sums, *state[1:]]
    for one, meant in zip(*(torch.autograd.grad(x[0].sin().sum() + x[1].sum(), leaves) for x in (found, exact)), strict=True):
        assert torch.allclose(one.double(), meant.double(), atol=1e-4)
    assert runs


def test_what_no_kernel_meets_is_refused() -> None:
    q, k, v = (x.detach() for x in operands(torch.float32))
    slots = {"feature": "silu", "mask": "causal", "state": "decay(slopes)"}
    rate = {"slopes": torch.ones(4)}
    parts = ((x[:, :, :30] for x in (q, k, v)), (x[:, :, 30:] for x in (q, k, v)))
    _, past = attn.step(*parts[0], slots, tables=rate, target="triton")
    with pytest.raises(ShapeError, match="the target triton: beside states its kernels know no gradient of a decay's rate"):
        attn.step(*parts[1], slots, past, position=30, tables={"slopes": rate["slopes"].requires_grad_()}, target="triton")
    one = [x[:, :, 30:31] for x in (q, k, v)]
    with pytest.raises(ShapeError, match="the target cpp: its kernels begin with an empty state"):
        attn.step(*one, slots, past, position=30, tables=rate, target="cpp")
    with pytest.raises(ShapeError, match='no target "trition" takes steps; did you mean "triton"'):
        attn.step(*one, slots, past, position=30, tables=rate, target="trition")  # type: ignore[arg-type]
    state = torch.zeros(2, 2, 8, 7)
    with pytest.raises(ShapeError, match="met by Triton's kernels, forwards"):
        torch.ops.attn_compiler.gather(q, k, v, [], 0, False, gather.CPP, state)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites are planned as those of a GPU, and their kernels are interpreted."""
    carry = TritonTarget.carry

    def planned(target: TritonTarget, site: Site, variant: attn.Variant) -> Carried | Refusal:
        return carry(target, replace(site, device="cuda"), variant)

    monkeypatch.setattr(TritonTarget, "carry", planned)
    monkeypatch.setattr(private, "inductor", lambda: interpreted)
    torch.compiler.reset()


@pytest.mark.usefixtures("on_a_gpu")
def test_a_model_whose_gates_follow_from_its_input_generates_what_it_does_on_torch(runs: list[Call], tmp_path: Path) -> None:
    model, (tokens, valid) = gated_llama(), gated_prompt(3)
    asked, forward, found = trained(model, ready("gla"), tmp_path), model.forward, []
    for target in ("torch", "triton"):
        torch.compiler.reset()
        model.forward = torch.compile(forward, backend="attn", options={"policy": asked, "target": target})  # type: ignore[method-assign]
        settings = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True, "past_key_values": attn.cache(model, asked)}
        found.append(model.generate(tokens, attention_mask=valid, **settings))
        assert bool(runs) == (target == "triton")
    assert torch.equal(*found)
    assert sum(told.past is not None for told in runs) == 4  # each token behind the prompt
    assert all(told.logs is not None and told.logs[0].ndim == 4 for told in runs)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_block_whose_gates_follow_from_its_input_is_trained_by_the_kernels(
    runs: list[Call], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What gates are made of learns through them: the block's norm."""
    from safetensors.torch import save_file

    monkeypatch.setattr(test_operands, "TOKENS", 21)
    of, x = test_operands.model()
    shapes = {"gate_x": (1, 4, x.shape[2], 8), "gate_bias": (1, 4, 8), "output_gate_x": (1, 4, x.shape[2], 8)}
    tables = {name: torch.randn(shape, generator=GENERATOR).div(3) for name, shape in shapes.items()}
    save_file(tables, tmp_path / "trained.safetensors")
    rule = {"match": {}, "attn": ready("gla"), "untrained": "allow", "fallback": "error"}
    policy = {"version": 1, "parameters": str(tmp_path / "trained.safetensors"), "rules": [rule]}
    compiled = torch.compile(of, backend="attn", options={"policy": policy, "target": "triton"})

    def gradients(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.square().sum(), list(of.parameters())))

    def written_out(real: torch.dtype) -> list[Tensor]:
        return gradients(test_operands.gla(of.to(real), x.to(real), {name: table[0].to(real) for name, table in tables.items()}))

    found = gradients(compiled(x))
    assert len(runs) == 4
    plain = written_out(torch.float32)
    assert_all_within_budget(found, written_out(torch.float64), lambda: plain)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(("asked", "padding"), [(EVERYWHERE, 3), (FADES, 0), (SHARED, 3)])
def test_models_generate_what_they_generate_on_torch(asked: Mapping[str, object], padding: int, runs: list[Call]) -> None:
    model, (tokens, valid) = llama(), prompt(padding)
    expected, _ = generated(copy.deepcopy(model), asked, padding)
    assert not runs
    torch.compiler.reset()
    held = attn.cache(model, asked)
    options = {"policy": asked, "target": "triton"}
    model.forward = torch.compile(model.forward, backend="attn", options=options)  # type: ignore[method-assign]
    settings = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    found = model.generate(tokens, attention_mask=valid, past_key_values=held, **settings)
    assert torch.equal(found, expected)
    assert sum(told.past is not None for told in runs) >= 2 * 10  # both layers, each token behind the prompt
