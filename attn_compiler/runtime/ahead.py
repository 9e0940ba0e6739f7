"""Compiles Triton kernels ahead of time, for GPUs that need not be there, and reads what came of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attn_compiler.errors import CompilerError
from attn_compiler.runtime.triton_launch import load
from attn_compiler.targets.triton.blocks import Blocks
from attn_compiler.targets.triton.clip import ALIKE, TILES
from attn_compiler.targets.triton.precision import TF32
from attn_compiler.targets.triton.states import SCANNED

# What multiplies matrices on a machine, and how many KiB of shared memory a program may have there.
MACHINES: Mapping[str, tuple[str, int]] = {
    "sm_80": ("HMMA", 163),
    "sm_90": ("HGMMA", 227),
    "sm_100": ("UTCHMMA", 227),
    "gfx942": ("v_mfma", 64),
}
_OTHER = ("HMMA", 99)
# The same for bytes, where it is something else.
_BYTES: Mapping[str, Mapping[str, str]] = {
    "sm_90": {"int8": "IGMMA", "float8": "QGMMA"},
    "sm_100": {"int8": "IMMA", "float8": "UTCQMMA"},
    "gfx942": {"int8": "v_mfma_i32"},
}
_OTHER_BYTES = {"int8": "IMMA"}
_POINTERS = {
    "float32": "*fp32", TF32: "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "float64": "*fp64", "bool": "*i1",
    "uint8": "*u8", "float8_e4m3fn": "*fp8e4nv", "float8_e5m2": "*fp8e5",
}  # fmt: skip
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Order:
    """A kernel to be compiled. Rows are taken to start at multiples of 16 bytes, as those of whole heads do."""

    text: str
    dtype: str
    tables: tuple[tuple[str, int], ...]  # dtype and axes
    machine: str
    blocks: Blocks
    held: tuple[tuple[str, str], ...] = ()  # operands that are held otherwise, and the dtypes of their tensors
    multiplied: tuple[str, ...] = ()  # the dtypes of what is multiplied; nothing: as operands come
    constants: tuple[tuple[str, float | None], ...] = ()  # arguments that are known ahead
    sums: tuple[int, ...] = ()  # the axes of the tables that want gradients
    rows: tuple[str, ...] = ()  # other arguments whose rows start so


@dataclass(frozen=True)
class Compiled:
    """What a kernel is made of on one machine."""

    registers: int
    stack: int  # bytes that registers spill into
    shared: int  # bytes
    opcodes: Mapping[str, int]

    def count(self, *stems: str) -> int:
        """How many instructions begin with one of the stems."""
        return sum(count for name, count in self.opcodes.items() if name.startswith(stems))

    @property
    def spills(self) -> bool:
        """Whether registers do not suffice."""
        return self.stack > 0 or self.count("LDL", "STL", "scratch_") > 0

    @property
    def loads_in_whole(self) -> bool:
        """Whether all that is copied ahead into shared memory comes in steps of 16 bytes."""
        copies = [name for name in self.opcodes if name.startswith("LDGSTS")]
        return bool(copies) and all("128" in name for name in copies)

    @property
    def is_specialized(self) -> bool:
        """Whether some warps do nothing but copy whole tiles, and leave their registers to the others."""
        return self.count("USETMAXREG") > 0 and self.count("UTMALDG") > 0

    def on_tensor_cores(self, machine: str, of: str = "bfloat16", *, few: bool = False) -> bool:
        """Whether matrices of a dtype are multiplied as the machine does it best; by `few` rows no warps together can."""
        stem = _BYTES.get(machine, _OTHER_BYTES).get(of.split("_")[0], MACHINES.get(machine, _OTHER)[0])
        return self.count(stem, "HMMA") > 0 if few and machine.startswith("sm") else self.count(stem) > 0

    def fits(self, machine: str) -> bool:
        """Whether there is enough shared memory."""
        return self.shared <= 1024 * MACHINES.get(machine, _OTHER)[1]


def is_sound(found: Compiled, order: Order) -> bool:
    """Whether a kernel is worth being tried: it spills nothing, fits, multiplies where the machine is fast, and its warps
    are divided where they were to be."""
    few = order.blocks.queries < 64
    multiplied = set(order.multiplied or (order.dtype,)) - {"float32"}
    fast = all(found.on_tensor_cores(order.machine, of, few=few) for of in multiplied)
    divided = found.is_specialized or not order.blocks.specialized
    return not found.spills and found.fits(order.machine) and fast and divided


def compile_ahead(orders: Sequence[Order]) -> list[Compiled]:
    """Compile kernels, all of which must compile."""
    found = compile_each(orders)
    for one in found:
        if isinstance(one, CompilerError):
            raise one
    return [one for one in found if isinstance(one, Compiled)]


def compile_each(orders: Sequence[Order]) -> list[Compiled | CompilerError]:
    """Compile kernels in a process of its own: one that interprets cannot, and what Triton cannot compile may end it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"from {__name__} import main; main()"]
    found: list[Compiled | CompilerError] = []
    while len(found) < len(orders):
        given = json.dumps([asdict(order) for order in orders[len(found) :]])
        done = subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=False)
        found += [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]
        if done.returncode and len(found) < len(orders):  # the next ones get another process
            found.append(CompilerError(f"Triton cannot compile a kernel:\n{done.stderr[-2000:]}"))
    return found


def main() -> None:
    """Compile the orders that stand in the standard input, and print what came of each as a line."""
    for given in json.load(sys.stdin):
        print(json.dumps(asdict(_compiled(Order(**{**given, "blocks": Blocks(**given["blocks"])})))), flush=True)


def _compiled(order: Order) -> Compiled:
    from triton import compile as compile_
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, aligned = load(order.text), [["tt.divisibility", 16]]
    kernel = next(getattr(module, name) for name in _KERNELS if hasattr(module, name))
    names = list(kernel.arg_names)
    types = _signature(order, names)
    rows = [name for name, dtype in order.held if dtype == "uint8"]  # which end in a float, so that only the first is aligned
    attributes = {(at, n): aligned for at, name in enumerate(names) if name in _OPERANDS for n in range(1 if name in rows else 4)}
    attributes |= {(names.index(name), n): aligned for name in order.rows if name in names for n in range(5)}
    sizes = {**order.blocks.sizes(), "BLOCK": order.blocks.queries, **dict.fromkeys(ALIKE, 32)}
    sizes |= {"SPANS": 1, "TILES": TILES, "NUMBERS": SCANNED}
    constants = {name: size for name, size in {**sizes, **dict(order.constants)}.items() if name in names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": order.blocks.warps, "num_stages": order.blocks.stages}
    kind = ("cuda", int(order.machine[3:]), 32) if order.machine.startswith("sm_") else ("hip", order.machine, 64)
    return _read(compile_(source, target=GPUTarget(*kind), options=options))


_KERNELS = ("forward", "backward", "decode", "clip", "sift", "states", "scan", "gather", "encode")
_OPERANDS = ("q", "k", "v", "out", "above", "of_q", "of_k", "of_v", "x", "codes")


def _signature(order: Order, names: Sequence[str]) -> dict[str, Any]:
    """The types of a kernel's arguments."""
    tables = tuple((_pointer(dtype), ("i32",) * axes, ("i32",) * axes) for dtype, axes in order.tables)
    visits = (*("*i32",) * 8, "*fp32") if "of_k" in names else ("*i32",) * 6
    kinds = {
        **{name: (_pointer(dict(order.held).get(name, order.dtype)), "i32", "i32", "i32") for name in _OPERANDS},
        **dict.fromkeys(("totals", "of_totals", "kept", "numbers", "peaks", "masses"), "*fp32"),
        **dict.fromkeys(("scales", "means", "others", "dots", "largest"), "*fp32"),
        **dict.fromkeys(("members", "starts", "owners"), "*i32"),
        **dict.fromkeys((*order.blocks.sizes(), "BLOCK", "SPANS", "TILES", "NUMBERS", *ALIKE), "constexpr"),
        **dict.fromkeys(("spans", "clipped", "met", "listed", "limits"), "*i32"),
        **dict.fromkeys(("held", "mass"), "*fp32"),
        **dict.fromkeys(("at_query", "at_key", "before"), ("*fp32", "i32", "i32", "i32", "i32")),
        "places": ("*i64", "i32", "i32", "i32"),
        "past": ("*fp32", "i32", "i32", "i32"),
        "sharing": ("i32",) * 5,
        "tasks": ("*i32",) * 3,
        "orders": ("*i32",) * 2,
        "sums": "*fp32" if "peaks" in names else tuple(("*fp64", ("i32",) * axes, ("i32",) * axes) for axes in order.sums),
        "visits": visits,
        "tables": tables,
        **dict.fromkeys(dict(order.constants), "constexpr"),
    }
    return {name: kinds.get(name, "i32") for name in names}


def _pointer(dtype: str) -> str:
    return _POINTERS.get(dtype, f"*i{dtype[3:]}")


def _read(kernel: Any) -> Compiled:
    """What a compiled kernel is made of."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        wanted = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        registers, spilled, scratch = (int(_found(rf"\.{what}:\s*(\d+)", text)) for what in wanted)
        opcodes = dict(Counter(re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)))
        return Compiled(registers, max(scratch, 4 * spilled), kernel.metadata.shared, opcodes)
    usage, instructions = (_disassembled(kernel.asm["cubin"], flag) for flag in ("-res-usage", "-sass"))
    registers, stack = (int(_found(rf"{what}:(\d+)", usage)) for what in ("REG", "STACK"))
    return Compiled(registers, stack, kernel.metadata.shared, dict(Counter(_OPCODE.findall(instructions))))


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise CompilerError(f"what Triton compiled says nothing of `{pattern}`")
    return match[1]


def _disassembled(cubin: bytes, flag: str) -> str:
    """What the disassembler in Triton's wheel says; it looks for another tool beside it."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tools / "cuobjdump"), flag, file.name]
        environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise CompilerError(f"the disassembler cannot read what Triton compiled: {done.stderr.strip()}")
    return done.stdout + done.stderr
