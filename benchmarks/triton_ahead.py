"""What Triton kernels become on GPUs that need not be here: registers, spills, tensor cores, loads of 16 bytes.

    python benchmarks/triton_ahead.py FOLDER [--machine sm_90] [--kind forward] [--dtype bfloat16] [--dim 128]
    python benchmarks/triton_ahead.py FOLDER --codes     kernels of codes instead, into `triton_ahead_codes.md`

Compiles candidates of every kind of kernel ahead of time, each until one is sound, and writes `triton_ahead.md` to FOLDER.
Nothing is timed: that takes a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from _tables import markdown
from attn_compiler.algebra.storage import PLAIN
from attn_compiler.errors import CompilerError
from attn_compiler.runtime.ahead import MACHINES, Compiled, Order, compile_each, is_sound
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.kernels import Shape
from attn_compiler.runtime.triton_orders import cuts, order
from attn_compiler.runtime.triton_states import order as order_of_states
from attn_compiler.targets.triton.blocks import KINDS, STATES, Blocks, Kind, candidates
from attn_compiler.targets.triton.precision import TF32
from attn_compiler.targets.triton.states import Fades, is_apart
from attn_compiler.testing import variant_of

VARIANT = "causal & window(1024)"
BY_DISTANCE = {"mask": VARIANT, "score": "score + relative(bias, 1024)"}  # whose table wants gradients
HEADS = (*product((64, 128), ("bfloat16", "float16")), (64, "float32"), (128, "float32"), (96, "bfloat16"), (256, "bfloat16"))
LINEAR = tuple((dim, dtype) for dim, dtype in product((64, 128, 256), ("bfloat16", TF32, "float32")))
FADES: tuple[Fades, ...] = ("whole", "rows", "columns")
FADING = [one for one in product(STATES, FADES) if one != ("step", "columns")]  # gradients behind a state are plain operators
CONTROLS = {  # which must not be sound
    False: Blocks(128, 128, 4, 2),  # it spills
    True: Blocks(128, 64, 8, 2, specialized=True),  # so many warps are not divided
}
LAST: Mapping[Kind, Sequence[Kind]] = {"forward": KINDS, "gather": STATES}  # whose control stands behind which kernels
CODES: dict[str, dict[str, object]] = {
    "int8 q·k": {"qk": "int8"},
    "int8 q·k, int8 p·v": {"qk": {"type": "int8", "smooth": True}, "pv": "int8"},
    "int8 q·k, e4m3 p·v": {"qk": {"type": "int8", "smooth": True}, "pv": "fp8_e4m3"},
    "e4m3 q·k, e4m3 p·v": {"qk": "fp8_e4m3", "pv": "fp8_e4m3"},
    "a cache of int8": {"kv_cache": "int8"},
    "a cache of int4": {"kv_cache": "int4"},
    "a cache of e4m3": {"kv_cache": "fp8_e4m3"},
}
SAYS_OF_CODES = """# Triton kernels of codes compiled ahead of time

Triton {version}, `{variant}` in bfloat16; no GPU was there, nothing was timed. Candidates stand in the order in which they are
tried, up to the first that is *sound*: no stack and no spill instruction, each product by the machine's own instruction for its
type, shared memory that fits. sm_80 knows no e4m3, gfx942 multiplies it as float16. sm_100 multiplies int8 as
sm_80 does: Triton has no other instruction for it there.

{table}"""
SAYS = """# Triton kernels compiled ahead of time

Triton {version}, `{variant}`; no GPU was there, and nothing was timed. Candidates stand in the order in which they are tried, up
to the first that is *sound*: no stack and no spill instruction, the machine's own matrix instruction (float32 has none), shared
memory that fits, and warps that are divided where they were to be (`forward, specialized`): some do nothing but copy whole tiles
(`tensors`), the others take over their registers. The last kernel of each machine, and of this form, is a control, which must not
be sound. `diagonals` finds the gradients of a table that is read by distance. `states`, `gather` and, behind the state of earlier
tokens, `step` are linear attention with a decay, and have a control of their own; `tfloat32` is what calls in float16 are there.
Where each feature fades by a gate of its own, rows of a state do (`states, rows`) and, in the gradients of q and k, its columns.

{table}"""


@dataclass(frozen=True)
class Case:
    """A kernel for one machine."""

    machine: str
    kind: Kind
    dim: int
    dtype: str
    specialized: bool = False
    codes: str = ""
    fades: Fades = ""

    def shape(self) -> Shape:
        few, asked = self.kind == "decode", BY_DISTANCE if self.kind == "diagonals" else VARIANT
        shape = shape_of(
            asked, q_len=1 if few else 4096, k_len=4096, heads=8, kv_heads=2 if few else 8, head_dim=self.dim,
            dtype=self.dtype, target="triton",
        )  # fmt: skip
        storage = variant_of({"storage": CODES[self.codes]}).storage if self.codes else PLAIN
        return replace(shape, variant=replace(shape.variant, storage=storage))

    def tiles(self) -> tuple[Blocks, ...]:
        plain = candidates(self.kind, self.dtype, self.dim, self.machine, apart=is_apart(self.fades))
        some = cuts(self.shape(), self.kind, self.machine) if self.codes else plain
        return tuple(blocks for blocks in some if blocks.specialized == self.specialized)

    def order(self, blocks: Blocks) -> Order:
        if self.kind in STATES:
            return order_of_states(self.kind, self.dim, self.dtype, self.machine, blocks, self.fades)
        return order(self.shape(), self.kind, blocks, self.machine, wanted=("bias",))


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the table goes")
    parser.add_argument("--machine", choices=MACHINES, action="append", help="only these")
    parser.add_argument("--kind", choices=(*KINDS, *STATES), action="append", help="only these")
    parser.add_argument("--dtype", action="append", help="only these")
    parser.add_argument("--dim", type=int, action="append", help="only these")
    parser.add_argument("--fades", choices=FADES, action="append", help="of linear attention, only where states fade so")
    parser.add_argument("--codes", action="store_true", help="kernels of codes instead")
    options = parser.parse_args()
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    if options.codes:
        for machine in options.machine or MACHINES:
            rows += tried([case for case in of_codes(machine) if case.dim in (options.dim or [case.dim])])
            table = SAYS_OF_CODES.format(version=triton.__version__, variant=VARIANT, table=markdown(rows))
            (folder / "triton_ahead_codes.md").write_text(table, encoding="utf-8")
        return
    for machine in options.machine or MACHINES:
        kinds: Sequence[Kind] = options.kind or (*KINDS, *STATES)
        cases = [Case(machine, kind, *heads) for kind in kinds if kind not in STATES for heads in HEADS]
        fading = [one for one in FADING if one[0] in kinds and one[1] in (options.fades or FADES)]
        cases += [Case(machine, kind, *heads, fades=fades) for kind, fades in fading for heads in LINEAR]
        cases = [one for one in cases if one.dim in (options.dim or [one.dim]) and one.dtype in (options.dtype or [one.dtype])]
        rows += tried(cases)
        for control in [kind for kind, some in LAST.items() if {*some} & {*kinds}]:
            rows += tried([Case(machine, control, 128, "bfloat16", fades=FADES[0])], [CONTROLS[False]])
        divided = [one for one in (replace(case, specialized=True) for case in cases) if one.tiles()]
        rows += tried(divided)
        rows += tried([replace(one, dim=128, dtype="bfloat16") for one in divided[:1]], [CONTROLS[True]])
        print(markdown(rows), flush=True)
    table = SAYS.format(version=triton.__version__, variant=VARIANT, table=markdown(rows))
    (folder / "triton_ahead.md").write_text(table, encoding="utf-8")


def of_codes(machine: str) -> list[Case]:
    """Of prompts and of tokens; what the target refuses on a machine is left out."""
    names = [name for name in CODES if machine != "sm_80" or "e4m3" not in name or "cache" in name]
    return [
        Case(machine, "decode" if "cache" in x else "forward", dim, "bfloat16", codes=x) for x, dim in product(names, (64, 128))
    ]


def tried(cases: Sequence[Case], only: Sequence[Blocks] = ()) -> list[dict[str, object]]:
    """A row for each candidate of each case, until one is sound: all first ones are compiled together, then all second ones."""
    rows: dict[Case, list[dict[str, object]]] = {case: [] for case in cases}
    left = {case: iter(only or case.tiles()) for case in cases}
    while now := {case: blocks for case, some in left.items() if (blocks := next(some, None))}:
        orders = {case: case.order(blocks) for case, blocks in now.items()}
        for case, found in zip(orders, compile_each(list(orders.values())), strict=True):
            rows[case].append(row(case, now[case]) | dict(described(found, orders[case])))
            if isinstance(found, Compiled) and is_sound(found, orders[case]):
                left[case] = iter(())
    return [one for some in rows.values() for one in some]


def row(case: Case, blocks: Blocks) -> dict[str, object]:
    cut = f"{blocks.queries} × {blocks.keys}, {blocks.warps} warps, {blocks.stages} stages"
    empty = dict.fromkeys(("registers", "stack", "shared KiB", "multiplies by", "copies", "sound"), "–")
    apart = f", {case.fades}" if is_apart(case.fades) else ""
    kernel = f"{case.kind}{', specialized' if case.specialized else ''}{f': {case.codes}' if case.codes else ''}{apart}"
    return {"machine": case.machine, "kernel": kernel, "dim": case.dim, "dtype": case.dtype, "tile": cut, **empty}


def described(found: Compiled | CompilerError, given: Order) -> Iterator[tuple[str, object]]:
    if isinstance(found, CompilerError):
        yield "sound", f"no: {str(found).strip().splitlines()[-1][:80]}"
        return
    matrices = {name.split(".")[0] for name in found.opcodes if "MMA" in name and not name.startswith(("HFMA2", "UTCHMMA.S"))}
    matrices |= {name for name in found.opcodes if "mfma" in name}
    widths = {int(name.split(".")[-1]) if name[-1].isdigit() else 32 for name in found.opcodes if name.startswith("LDGSTS")}
    copies = [f"{bits} bit" for bits in sorted(widths, reverse=True)] + ["tensors"] * (found.count("UTMALDG") > 0)
    wide = found.count("global_load_dwordx4", "buffer_load_dwordx4")
    yield "registers", found.registers
    yield "stack", found.stack
    yield "shared KiB", found.shared // 1024
    yield "multiplies by", ", ".join(sorted(matrices)) or "–"
    yield "copies", ", ".join(copies) or (f"{wide} of 128 bit" if wide else "–")
    yield "sound", "yes" if is_sound(found, given) else "no"


if __name__ == "__main__":
    main()
