"""Generated Triton kernels on a GPU: first whether they are right there, then how fast they are beside all others.

    python benchmarks/gpu.py FOLDER [--minutes 10] [--rounds 20] [--only window]
    TRITON_INTERPRET=1 python benchmarks/gpu.py FOLDER --dry     on a CPU: every step at tiny shapes, no numbers worth reading
    python benchmarks/gpu.py --check 4                           only random calls, as the sanitizer runs them

Writes `gpu.json` and `gpu.md` to FOLDER. What is timed stands in `_gpu_shapes.py`, fixed before anything was measured. TFLOP/s
count pairs that see each other and nothing else, or states of linear attention; a backward pass counts 2.5 forward passes. Checks
come first, then single attentions, then whole models; what there was no time for is said.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _gpu_checks import correctness, of_codes, sanitized
from _gpu_clock import Clock, Run
from _gpu_graphs import replayed
from _gpu_models import timings as timings_of_models
from _gpu_peers import Attention, UnsuitableError, attentions
from _gpu_shapes import SHAPES, Shape, operands
from _tables import markdown, write_json
from attn_compiler.errors import AttnError

Row = dict[str, object]
SHARES = (0.25, 0.65, 1.0)  # of the time, by whose end checks, attentions and models are to be done
LIKELY = 30.0  # seconds that one attention may take, most of them to compile candidates
TARGETS = (  # of an H200: which row, what of it, at least how much
    ("dense causal", "TFLOP/s", 450.0),
    ("window 1024", "TFLOP/s", 300.0),
    ("window 1024", "cuDNN / ours", 4.0),
    ("window 1024", "flex / ours", 1.2),
    ("every tenth block", "cuDNN / ours", 6.0),
    ("neighborhood", "cuDNN / ours", 10.0),
    ("dense causal, backward", "TFLOP/s", 300.0),
    ("window 1024, backward", "TFLOP/s", 300.0),
    ("decoding", "of copy", 0.8),
    ("windows by head, a table", "apart / ours", 0.95),
)
PAYING = tuple(  # the same of whole models, by tokens: where knowing the mask must pay
    (f"model, window 1024, {tokens} tokens, {step}", "inductor / ours", least)
    for tokens, least in ((4096, 1.2), (16384, 2.0))
    for step in ("forward", "training")
)
SAYS = """# Kernels on a GPU

{device}. Ceilings: {ceilings}. Milliseconds, each run with an empty cache.

Random calls against float64: {right} of {carried} are right. compute-sanitizer: {sanitized}.

Calls of codes: {coded}.

CUDA graphs that are played again with other tables: {replayed}.

## Targets

{targets}
## Attentions

{attentions}
Left out: {left_out}.

## Models without a policy

{models}"""


def main() -> None:
    options = arguments()
    device, start = "cpu" if options.dry else "cuda", time.monotonic()
    until = [start + 60 * options.minutes * share for share in SHARES]
    clocks = [Clock(device, options.rounds, end) for end in until]
    checked = correctness(clocks[0], options.check or options.seeds)
    print(f"right in {checked['right']} of {checked['carried']} random calls on {device}", *checked["wrong"], sep="\n")
    if options.check:
        raise SystemExit(bool(checked["wrong"]))
    found: dict[str, Any] = {"device": "an interpreter: these are no timings" if options.dry else torch.cuda.get_device_name()}
    found |= {
        "checked": checked,
        "coded": of_codes(device),
        "replayed": replayed(device),
        "ceilings": clocks[0].ceilings(),
        "left out": {},
    }
    shapes = [shape.tiny() if options.dry else shape for shape in SHAPES if options.only in shape.name]
    found["attentions"] = list(timings(shapes, clocks[1], found))
    found["models"] = list(timings_of_models(clocks[2]))
    found["sanitized"] = {} if options.dry else sanitized()
    found["targets"] = [reached(*target, found["attentions"]) for target in TARGETS] + [steady(found["attentions"])]
    found["targets"] += [reached(*target, [named(row) for row in found["models"]]) for target in PAYING]
    write(Path(options.folder), found)


def timings(shapes: list[Shape], clock: Clock, found: dict[str, Any]) -> Iterator[Row]:
    """One row for the forward pass of each, and one for the backward pass of what trains; `found` says who was left out."""
    for shape in shapes:
        for backward in (False, True)[: 1 + shape.trains]:
            name = f"{shape.name}{', backward' if backward else ''}"
            if not clock.has(LIKELY):
                found["left out"][name] = "no time left"
                continue
            runs: dict[str, Run] = {}
            for peer, attention in attentions(shape, clock.device).items():
                run = step(attention, operands(shape, clock.device, trained=backward))
                reason = objection(run)
                runs |= {} if reason is not None else {peer: run}
                if reason:
                    found["left out"][f"{name}, {peer}"] = reason
            yield row(name, shape, clock.interleaved(runs), found["ceilings"], backward=backward)
            print(f"{name}: {time.monotonic() - clock.end:.0f} s to the end", flush=True)


def row(name: str, shape: Shape, times: dict[str, float], ceilings: dict[str, float], *, backward: bool) -> Row:
    """What was measured, and what follows of it."""
    found: Row = {"attention": name}
    found |= {peer: round(times[peer], 4) if peer in times else "–" for peer in attentions(shape, "cpu")}
    found |= dict.fromkeys(("TFLOP/s", "of matmul", "GB/s", "of copy", "best / ours"), "–")
    if "ours" not in times:
        return found
    mine, others = times["ours"], [ms for peer, ms in times.items() if peer not in ("ours", "apart")]
    rate, read = shape.work(backward=backward) / mine / 1e9, shape.read() / mine / 1e6
    found |= {"TFLOP/s": round(rate, 1), "GB/s": round(read, 1)}
    if ceilings:  # a copy reads and writes, so that it moves each byte twice; reading alone is held against that
        found |= {"of matmul": round(rate / ceilings["matmul"], 3), "of copy": round(read / ceilings["copy"], 3)}
    return found | ({"best / ours": round(min(others) / mine, 2)} if others else {})


def reached(name: str, what: str, least: float, rows: list[Row]) -> Row:
    """Whether a target was reached; what was not measured is said to be so."""
    here: Row = next((one for one in rows if one["attention"] == name), {})
    peer, _, ours = what.partition(" / ")
    values = [here.get(peer, "–"), here.get(ours, "–")] if ours else [here.get(what, "–")]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    target: Row = {"attention": name, "target": f"{what} ≥ {least:g}", "found": "unmeasured", "met": "unmeasured"}
    if len(numbers) < len(values):
        return target
    found = numbers[0] / numbers[1] if ours else numbers[0]
    return target | {"found": f"{found:.2f}", "met": "yes" if found >= least else "no"}


def named(model: Row) -> Row:
    """A row of a model as those of attentions are."""
    times = {by: float(str(model[by])) for by in ("inductor", "ours") if model[by] != "–"}
    return {"attention": f"model, {model['model']}, {model['tokens']} tokens, {model['step']}", **times}


def steady(rows: list[Row]) -> Row:
    """Whether decoding with a window takes the same time at any length."""
    name, least = "decoding, window 1024", 0.8
    times = {str(one["attention"]): one.get("ours", "–") for one in rows}
    long, short = (times.get(x, "–") for x in (name, f"{name} of 8192"))
    target: Row = {"attention": name, "target": f"at 8192 / ours ≥ {least:g}", "found": "unmeasured", "met": "unmeasured"}
    if not (isinstance(long, float) and isinstance(short, float)):
        return target
    return target | {"found": f"{short / long:.2f}", "met": "yes" if short / long >= least else "no"}


def step(attention: Attention, given: tuple[Tensor, Tensor, Tensor]) -> Run:
    """A forward pass, or the backward pass of one that was run before."""
    if not given[0].requires_grad:
        return lambda: attention(*given)
    held: list[Tensor] = []

    def differentiate() -> object:
        if not held:
            held.append(attention(*given))
        return torch.autograd.grad(held[0], given, held[0].detach(), retain_graph=True)

    return differentiate


def objection(run: Callable[[], object]) -> str | None:
    """Why a peer does not take a case, or None; the text is empty where it has no way to say it."""
    try:
        run()
    except (UnsuitableError, ImportError):
        return ""
    except (AttnError, RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError) as failure:
        return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:150] if str(failure).strip() else ''}"
    return None


def write(folder: Path, found: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "gpu.json", found)
    tables = {name: markdown(found[name]) for name in ("targets", "attentions", "models")}
    left_out = "; ".join(f"{name} ({why})" for name, why in found["left out"].items()) or "nothing"
    ceilings = ", ".join(f"{name} {value:.0f}" for name, value in found["ceilings"].items()) or "none"
    checks = {name: found["checked"][name] for name in ("right", "carried")}
    said = ", ".join(f"{tool} {what}" for tool, what in found["sanitized"].items()) or "not asked"
    listed = {one: "; ".join(f"{name}: {what}" for name, what in found[one].items()) for one in ("coded", "replayed")}
    text = SAYS.format(device=found["device"], ceilings=ceilings, left_out=left_out, sanitized=said, **checks, **tables, **listed)
    (folder / "gpu.md").write_text(text, encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="bench-output", help="where the results go")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=120, help="how many random variants are checked at most")
    parser.add_argument("--only", default="", help="only attentions with this in their name")
    parser.add_argument("--check", type=int, default=0, help="check so many random variants, and nothing else")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in Triton's interpreter, at tiny shapes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
