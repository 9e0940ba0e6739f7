"""Prepares a model that generates text: caches are inputs and outputs, which hold no more than later tokens see."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir
import torch
from torch import Tensor

from attn_compiler import torch_private as private
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import ExportError
from attn_compiler.export.caches import fold
from attn_compiler.export.coding import check_coded, check_kept, seen, with_scales
from attn_compiler.export.decoder import PADDING
from attn_compiler.export.kept import kept
from attn_compiler.export.prepared import Inputs, Prepared
from attn_compiler.export.program import module_of, renamed, results, rewritten, traced
from attn_compiler.export.recalling import check_recalled, handed_on
from attn_compiler.export.states import Remembering, remember
from attn_compiler.export.stepwise import WRAPPED, Stepwise
from attn_compiler.planning.kept import FAR, Kept
from attn_compiler.planning.planner import agreed, promised
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.site import Phase, Site
from attn_compiler.runtime.exported import OnnxTarget
from attn_compiler.targets.held_past import is_state
from attn_compiler.targets.onnx.codes import Codes

_LENGTHS = (2, FAR)  # the shortest and the longest text that a policy is asked about
_WHOLE = "and holds every token: its cache, or how long that is, is read elsewhere too"
_TRIALS = ((2, 300, 0), (1, 1, 2048), (2, 5, 40))  # rows, new tokens and those before them: a prompt, a token, a piece of text


Hold = Callable[[Variant, int], Kept | None]  # what must be kept for a variant of so many heads; None for everything
Remembers = Callable[[Variant], bool]  # whether a state may take the place of a cache


def decoding(
    step: Stepwise,
    policy: Policy,
    given: Mapping[str, Tensor],
    hold: Hold = kept,
    remembering: Remembers = is_state,
    *,
    codes: bool = True,
) -> Prepared:
    """Rewrite the model. One graph serves prompts and single tokens, so a policy has to want the same of both.

    `codes`: whether caches may hold them, where a policy wants that.
    """
    program = traced(step.module, step.args, {}, step.dynamic_shapes)
    result = rewritten(program, policy, given, partial(OnnxTarget, decodes=codes), partial(at_any_length, policy))
    check_recalled(result.plan.decisions)
    decided = {name: one for name, one in zip(result.names, result.plan.decisions, strict=True) if one.target}
    linear = {name: one.variant for name, one in decided.items() if remembering(one.variant)}
    needs = {name: need for name, one in decided.items() if (need := hold(one.variant, one.site.heads)) is not None}
    coded = seen(result.module, [name for name, one in decided.items() if one.variant.storage.kv_cache], step.example)
    check_kept(coded, {name: most for name in coded if (most := promised(policy, decided[name].site).get("site")) is not None})
    before = results(program)
    private.drop_claims(program)
    scales = with_scales(program, coded)
    remembered = handed_on(program.graph) | remember(program.graph, linear)
    folded = fold(program.graph, dict.fromkeys(coded, Kept(0, FAR)) | needs, scales)
    program.graph_module.recompile()
    renamed(program, before)
    check_coded(coded, folded)
    called = dict(zip(program.graph_signature.user_inputs, step.inputs, strict=True))
    states = {called[x]: one for one in remembered.values() for x in one.inputs}
    named = _with_states(step, states)
    holding = _Holding(
        {called[x]: needs[name] for name, inputs in folded.items() for x in inputs if name in needs},
        {new: states[old] for new, old in zip(named.inputs, step.inputs, strict=True) if old in states},
        {called[x]: one.codes for name, one in coded.items() for x in folded[name]},
    )
    wishes = {name: f"needs {need}" for name, need in needs.items()} | dict.fromkeys(linear, "is linear")
    wholes = [f"{name} {why}, {_WHOLE}" for name, why in wishes.items() if name not in (*remembered, *folded)]
    remarks = (*result.plan.remarks, *wholes, *(f"{name} {one}" for name, one in coded.items()))
    plan = replace(result.plan, remarks=remarks)
    return Prepared(
        replace(result, module=module_of(program), plan=plan),
        lambda: list(_runs(named, holding)),
        partial(_named, step=named, held=holding.held),
        caches=holding.words(named.inputs),
    )


@dataclass(frozen=True)
class _Holding:
    """What the inputs of a file hold of the past: some tokens, a state in their place, numbers or codes."""

    held: Mapping[str, Kept]
    states: Mapping[str, Remembering]
    codes: Mapping[str, Codes]

    def words(self, inputs: Sequence[str]) -> Mapping[str, str]:
        """What each cache holds, in words."""
        found = {name: str(self.held.get(name, "every token")) for name in inputs if name.endswith(".key")}
        found = {name: f"{what}, in {self.codes[name]}" if name in self.codes else what for name, what in found.items()}
        return found | {name: str(one) for name, one in self.states.items() if name.endswith(".state")}


def _with_states(step: Stepwise, states: Mapping[str, Remembering]) -> Stepwise:
    """The same where the keys of some layers are called a state, and their values what that has seen."""
    names = {name: name.replace(".key", ".state").replace(".value", ".seen") for name in states}
    outputs = {
        name.replace("past_key_values", "present"): new.replace("past_key_values", "present") for name, new in names.items()
    }
    inputs = tuple(names.get(name, name) for name in step.inputs)
    return replace(step, inputs=inputs, outputs=tuple(outputs.get(name, name) for name in step.outputs))


def at_any_length(policy: Policy, site: Site) -> Site:
    """The site, for which a policy must want the same whatever is generated."""
    plain = replace(site.likely(), name=site.name.removeprefix(WRAPPED))
    asked = [
        agreed(policy, replace(plain, phase=phase, q_hint=1 if phase is Phase.DECODE else keys, k_hint=keys))
        for phase in (Phase.PREFILL, Phase.DECODE)
        for keys in _LENGTHS
    ]
    if any(one.variant != asked[0].variant for one in asked):
        rules = " and ".join(sorted({one.rule for one in asked}))
        raise ExportError(
            f"{site.name}: the policy wants something else for prompts than for single tokens, or for some lengths ({rules}); "
            "one graph serves them all: leave out `phase` and conditions on lengths"
        )
    return plain


def _named(model: ir.Model, step: Stepwise, held: Mapping[str, Kept]) -> None:
    """Give inputs and outputs their names; the lengths of caches that let go have names of their own."""
    for value, name in zip(model.graph.inputs, step.inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, step.outputs, strict=True):
        value.name = name
    for past, present in zip(model.graph.inputs[step.before :], model.graph.outputs[1:], strict=True):
        need = held.get(str(past.name))
        if need:
            for value, name in ((past, f"at_most_{need.most}"), (present, f"at_most_{need.most}_then")):
                assert value.shape is not None
                value.shape = ir.Shape([*value.shape[:2], name, value.shape[3]])


def _runs(step: Stepwise, holding: _Holding) -> Iterator[Inputs]:
    """Random tokens behind a random past; onnxruntime reads several of them behind codes for one row alone."""
    generator = torch.Generator().manual_seed(0)
    for most, tokens, before in _TRIALS:
        rows = 1 if holding.codes and before and tokens > 1 else most
        new = min(tokens, step.positions)
        past = min(before, step.positions - new)
        ids = torch.randint(0, step.vocabulary, (rows, new), generator=generator)
        inputs = {"input_ids": ids, "position_ids": torch.arange(past, past + new).expand(rows, -1)}
        if PADDING in step.inputs:
            inputs[PADDING] = _padding(rows, past + new).to(step.args[2].dtype)
        for name, x in zip(step.inputs[step.before :], step.args[step.before :], strict=True):
            inputs[name] = _random(holding, name, x, rows, past, generator)
        yield inputs


def _padding(rows: int, length: int) -> Tensor:
    """Every row begins three tokens after the one before it, if the text is that long."""
    starts = (3 * torch.arange(rows)).clamp(max=length - 1)
    return torch.arange(length) >= starts[:, None]


def _random(holding: _Holding, name: str, x: Tensor, rows: int, past: int, generator: torch.Generator) -> Tensor:
    """What a cache may hold of so many tokens."""
    if name in holding.states:
        heads, features, width = holding.states[name].shape
        sums = torch.rand(rows, heads, features if name.endswith(".state") else 1, width, generator=generator)
        return (sums * past).to(torch.promote_types(x.dtype, torch.float32))
    length = min(past, holding.held[name].most) if name in holding.held else past
    shape = (rows, x.shape[1], length, x.shape[3])
    drawn = torch.randn(shape, generator=generator).to(x.dtype)
    codes = holding.codes.get(name)
    return drawn if codes is None else codes.encode(drawn, drawn.new_tensor(3.0 / codes.largest))
