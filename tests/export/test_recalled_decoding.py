"""`export_onnx(…, decode=True)` where states ask more of tokens than keys and values: beside the parallel form of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import attn_compiler as attn
from attn_compiler.backend import attn_eagerly
from attn_compiler.errors import ExportError
from attn_compiler.export import Decoder
from attn_compiler.testing import assert_within_budget
from attn_compiler.testing.budget import error_of, rounding_otherwise
from end_to_end.by_hand import with_weights
from end_to_end.test_state_traits import GATED, SIZES, UNROTATED, ready, trained

TOKENS = 100
PLAIN_RUNS = 5
SLOTS: Mapping[str, Mapping[str, object]] = {
    "gla": ready("gla"),
    "infinitevl": ready("infinitevl"),
    "gated": GATED,
    "unrotated": UNROTATED,
}


def llama(layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # a fixture of the module is made before each test has its random numbers
        return with_weights(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers)))


def text(rows: int = 2, length: int = TOKENS) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(5))


def in_parallel(model: nn.Module, policy: object, tokens: Tensor, there: Tensor | None = None) -> Tensor:
    """The logits of a text that is read at once, without a cache."""
    torch.compiler.reset()
    run = torch.compile(model, backend=attn_eagerly, options={"policy": policy})
    there = torch.ones_like(tokens) if there is None else there
    with torch.no_grad():
        return run(
            input_ids=tokens, attention_mask=there, position_ids=(there.cumsum(-1) - 1).clamp(min=0), use_cache=False
        ).logits  # fmt: skip


def with_neighbors(model: nn.Module, seed: int) -> nn.Module:
    """The same model, each weight rounded to a neighbor of what it is."""
    model = deepcopy(model)
    with rounding_otherwise(seed), torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter * 1
    return model


@dataclass(frozen=True)
class Exported:
    """A model with a policy, its file, and the logits of a text: exact, and in single precision.

    A norm behind an attention magnifies what a first token's product of q and k loses where its terms cancel. Whether one plain
    run loses it is luck, so there are several, each rounded otherwise: in the weights, since a mode of torch's keeps it from
    compiling.
    """

    policy: object
    model: nn.Module
    path: Path
    report: attn.ExportReport
    exact: Tensor
    plain: tuple[Tensor, ...]

    def assert_near(self, found: Tensor, ends: Tensor) -> None:
        """The budget of some tokens is that of the plain run that errs most there."""
        exact = self.exact[:, ends]
        assert_within_budget(found, exact, max((x[:, ends] for x in self.plain), key=lambda x: error_of(x, exact)))


@pytest.fixture(scope="module", params=list(SLOTS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    at = tmp_path_factory.mktemp("recalled")
    model = llama()
    policy = trained(model, SLOTS[request.param], at)
    report = attn.export_onnx(model, (text(1, 24),), at / "model.onnx", policy, decode=True)
    models = [model, *(with_neighbors(model, seed) for seed in range(1, PLAIN_RUNS))]
    plain = tuple(in_parallel(each, policy, text()) for each in models)
    exact = in_parallel(model.double(), policy, text())
    return Exported(policy, model.float(), at / "model.onnx", report, exact, plain)


@pytest.mark.parametrize("sizes", [(1,) * 12, (3, 1, 69, 1, 26), (TOKENS,)], ids=["token by token", "pieces", "at once"])
def test_a_text_may_be_read_in_pieces_of_any_size(exported: Exported, sizes: tuple[int, ...]) -> None:
    decoder, before, found = Decoder(exported.path), 0, []
    past = decoder.start(2)
    for size in sizes:
        logits, past = decoder.step(text()[:, before : before + size].numpy(), before, past)
        before += size
        found.append(torch.from_numpy(logits))
    exported.assert_near(torch.stack(found, dim=1), torch.tensor(sizes).cumsum(0) - 1)


def test_every_layer_is_a_state_that_no_length_changes(exported: Exported) -> None:
    graph = onnx.load(exported.path).graph
    sizes = {x.name: [d.dim_value for d in x.type.tensor_type.shape.dim[1:]] for x in [*graph.input, *graph.output]}
    for layer in range(2):
        assert sizes[f"past_key_values.{layer}.state"] == sizes[f"present.{layer}.state"]
        assert 0 not in sizes[f"past_key_values.{layer}.state"]
        assert exported.report.caches[f"past_key_values.{layer}.state"].startswith("the state of a linear attention")
    assert not any(name.endswith((".key", ".value")) for name in sizes)
    assert set(exported.report.strategies.values()) == {"states"}


def test_what_is_generated_is_what_a_cache_of_attn_generates(exported: Exported) -> None:
    model, prompt, new = exported.model, text(2, 7), 6
    torch.compiler.reset()
    forward, settings = model.forward, {"max_new_tokens": new, "do_sample": False, "disable_compile": True}
    held = attn.cache(model, exported.policy)  # type: ignore[arg-type]
    model.forward = torch.compile(forward, backend=attn_eagerly, options={"policy": exported.policy})  # type: ignore[method-assign]
    try:
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=held, **settings)
    finally:
        model.forward = forward  # type: ignore[method-assign]
    found = Decoder(exported.path).generate(prompt.numpy(), new)
    assert (torch.from_numpy(found) == expected).all()


def test_padding_never_joins_a_state(tmp_path: Path) -> None:
    model = llama()
    policy, there = trained(model, ready("infinitevl"), tmp_path), torch.ones(2, 20, dtype=torch.int64)
    there[0, :7] = 0
    given = {"attention_mask": torch.ones(1, 24, dtype=torch.int64)}
    attn.export_onnx(model, (text(1, 24),), tmp_path / "model.onnx", policy, kwargs=given, decode=True)
    decoder, found = Decoder(tmp_path / "model.onnx"), []
    past = decoder.start(2)
    for begin, end in ((0, 12), (12, 13), (13, 20)):
        logits, past = decoder.step(text()[:, begin:end].numpy(), begin, past, there[:, :end].numpy())
        found.append(torch.from_numpy(logits))
    plain = in_parallel(model, policy, text(2)[:, :20], there)
    exact = in_parallel(model.double(), policy, text(2)[:, :20], there)
    ends = [11, 12, 19]
    assert_within_budget(torch.stack(found, dim=1), exact[:, ends], plain[:, ends])


def test_states_stand_beside_windows(tmp_path: Path) -> None:
    """As in InfiniteVL, whose layers are of either kind."""
    model = llama()
    policy = dict(trained(model, ready("infinitevl"), tmp_path))
    policy["rules"] = [{"match": {"layers": "0"}, "attn": {"mask": "causal & window(6)"}}, *policy["rules"]]  # type: ignore[misc]
    report = attn.export_onnx(model, (text(1, 24),), tmp_path / "model.onnx", policy, decode=True)
    assert [*report.caches] == ["past_key_values.0.key", "past_key_values.1.state"]
    decoder, before = Decoder(tmp_path / "model.onnx"), 0
    past = decoder.start(2)
    for size in (9, 1, 30):
        logits, past = decoder.step(text()[:, before : before + size].numpy(), before, past)
        before += size
    plain = in_parallel(model, policy, text()[:, :40])[:, -1]
    exact = in_parallel(model.double(), policy, text()[:, :40])[:, -1]
    assert_within_budget(torch.from_numpy(logits), exact, plain)


def test_what_a_file_cannot_compute_behind_a_state_is_an_error_that_says_why(tmp_path: Path) -> None:
    model = llama(1)
    policy = trained(model, GATED, tmp_path)
    with pytest.raises(ExportError, match="onnxruntime's CPU computes in float32, float16, float64; found bfloat16"):
        attn.export_onnx(model.bfloat16(), (text(1, 24),), tmp_path / "model.onnx", policy, decode=True)
