"""What makes a kernel a program of its own: its visits written out, and a call that tries it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.storage import Held, Scaling
from attn_compiler.planning.runs import Integers
from attn_compiler.targets.cpp.coded import K_MEAN, K_SCALE, Q_SCALE
from attn_compiler.targets.cpp.spec import Spec
from attn_compiler.targets.operands import PLACE
from attn_compiler.targets.triton import coded
from attn_compiler.targets.triton.skeleton import filled, joined, skeleton
from attn_compiler.targets.triton.source import Holes

_FORWARD = (
    "forward[triton.cdiv(Q_LEN, BLOCK_Q), MEMBERS, len(q)](",
    "    *operands, totals, None, visits(q.device), read, *SIZES, BLOCK_Q, BLOCK_K, num_warps=WARPS, num_stages=STAGES",
    ")",
)
_TASKS = (
    "*given, heads_of, rows_of, schedules = visits(q.device)",
    "orders = given[4:] if ORDERED else (None, None)",
    "spans, tiles, tasks = given[2], triton.cdiv(Q_LEN, BLOCK_Q), len(heads_of)",
    "of_tasks = (heads_of, rows_of, schedules)",
)
_CLIP = (
    "given[2] = spans.new_empty((tasks, tiles, 2 * spans.shape[1]))",
    "clip[tiles, tasks](spans, given[2], of_tasks, orders, read, *SIZES, BLOCK_Q, BLOCK_K, spans.shape[1] // 4, TILES)",
)
_SIFT = (
    "given[2:4] = spans.new_empty((tasks, tiles, 4)), spans.new_empty((tasks, tiles, triton.cdiv(K_LEN, BLOCK_K)))",
    "sizes = (*SIZES, BLOCK_Q, BLOCK_K, spans.shape[1] // 4, TILES, Q_ALIKE, K_ALIKE)",
    "sift[tiles, tasks](spans, *given[2:4], of_tasks, orders, read, *sizes)",
)
_FORWARD_AFTER = (
    "forward[tiles, MEMBERS, len(q)](",
    "    *operands, totals, None, tuple(given), read, *SIZES, BLOCK_Q, BLOCK_K, num_warps=WARPS, num_stages=STAGES",
    ")",
)
_STRETCHES = (
    '"""The heads, the schedule that each follows, and of each tile of queries the tiles of keys that it meets.',
    "",
    "These are stretches of neighbors, each from a start to a stop: those with hidden pairs, then those without.",
    '"""',
)
_SPANS = (
    '"""The heads, the task that each follows, and of each tile of queries what it visits whatever tables say.',
    "",
    "These are spans of neighbors: where they start, where those start and stop that need no mask besides the tables, the end.",
    "The last three arrays are tasks: schedules, each in a row of the batch and for a head.",
    '"""',
)
_GROUPS = ('"""The heads, the first of each group of them that shares its keys, and whose keys these are."""',)


def program(kernel: str, spec: Spec, constants: Mapping[str, object], visits: Mapping[str, Integers]) -> str:
    """A kernel and what launches it. `visits` are its arrays, in the order in which it takes them."""
    return _program(kernel, spec, constants, visits, {"launches": _FORWARD, "meaning": _STRETCHES})


def program_clipped(kernels: Sequence[str], spec: Spec, constants: Mapping[str, object], visits: Mapping[str, Integers]) -> str:
    """A kernel, the one that cuts what it visits to what tables show or lists it, and what launches them."""
    cut = _SIFT if "def sift(" in kernels[1] else _CLIP
    return _program(joined(*kernels), spec, constants, visits, {"launches": (*_TASKS, *cut, *_FORWARD_AFTER), "meaning": _SPANS})


def program_for_few(kernels: Sequence[str], spec: Spec, constants: Mapping[str, object], visits: Mapping[str, Integers]) -> str:
    """The kernels for few queries and what launches them: that for slices, the one that merges, and perhaps that for the rest."""
    slices, merge, *rest = kernels
    renamed = [text.replace("def decode(", "def decode_rest(") for text in rest]
    names = ("decode", "decode_rest")[: 1 + len(rest)]
    launches = [
        f"parts = {1 + len(rest)} * SLICES",
        "sums = q.new_empty((parts, *out.shape), dtype=torch.float32)",
        "peaks, masses = (q.new_empty((parts, *totals.shape), dtype=torch.float32) for _ in range(2))",
        "members, starts, owners = visits(q.device)",
        "given = (*operands[:3], sums, peaks, masses, members, starts, owners, None, read, *SIZES, BLOCK_Q, BLOCK_K)",
        *(f"{name}[SLICES, GROUPS, len(q)](*given, num_warps=WARPS, num_stages=STAGES)" for name in names),
        "merge[Q_LEN, MEMBERS, len(q)](sums, peaks, masses, operands[3], totals, members, read, *SIZES, parts, PARTS)",
    ]
    return _program(joined(slices, *renamed, merge), spec, constants, visits, {"launches": launches, "meaning": _GROUPS})


def program_of_states(kernels: Sequence[str], constants: Mapping[str, object]) -> str:
    """The kernels of linear attention, in the order in which they run, and what launches them."""
    whole = skeleton("launch_gather.py")
    lines = [f"{name} = {value}" for name, value in constants.items()]
    launcher = filled(whole[whole.index("# <constants>") :], {"constants": lines})
    return joined(*kernels).replace("import triton\n", "import torch\nimport triton\n", 1) + "\n\n" + launcher


def _program(kernel: str, spec: Spec, constants: Mapping[str, object], visits: Mapping[str, Integers], more: Holes) -> str:
    lines = [f"{name} = {value}" for name, value in constants.items()]
    arrays = [line for name, array in visits.items() for line in _written(name, array)]
    holes = {
        "constants": lines,
        "visits": [*arrays, f"numbers = {', '.join(visits)}"],
        "codes": list(_codes(spec)),
        "example": list(_example(spec)),
        **more,
    }
    whole = skeleton("launch.py")
    launcher = filled(whole[whole.index("# <constants>") :], holes)
    return kernel.replace("import triton\n", "import torch\nimport triton\n", 1) + "\n\n" + launcher


def _written(name: str, array: Integers) -> Iterator[str]:
    """An array as the evenly rising parts of its columns: those of structured masks are few."""
    columns = array.reshape(len(array), -1).T
    texts = [f"sequence({', '.join(str(part) for part in parts(column))})" for column in columns]
    if len(texts) == 1:
        yield f"{name} = {texts[0]}"
        return
    yield f"{name} = ["
    yield from (f"    {text}," for text in texts)
    yield "]"
    yield f"{name} = torch.stack({name}, dim=1)"


def parts(numbers: Sequence[int] | Integers) -> list[tuple[int, int, int]]:
    """The first number, the step and the length of each evenly rising part."""
    values = np.asarray(numbers, np.int64)
    found: list[tuple[int, int, int]] = []
    at = 0
    while at < len(values):
        steps = np.diff(values[at:])
        step = int(steps[0]) if len(steps) else 0
        other = np.flatnonzero(steps != step)
        count = int(other[0]) + 1 if len(other) else len(values) - at
        found.append((int(values[at]), step, count))
        at += count
    return found


def _codes(spec: Spec) -> Iterator[str]:
    """The statements that bring operands into what a kernel multiplies, and put scales among the tables."""
    storage = spec.variant.storage
    if storage.kv_cache:
        yield f"# k and v are what a cache gives back that holds them in {storage.kv_cache}."
    if storage.qk:
        smooth = storage.qk.smooth
        yield f"k, k_scale, {'mean' if smooth else '_'} = {_encoded('k', storage.qk, ', smooth=True' if smooth else '')}"
        yield f"q, q_scale, {'dots' if smooth else '_'} = {_encoded('q', storage.qk, ', others=mean' if smooth else '')}"
    if storage.pv and storage.pv.numbers.scaling is Scaling.NONE:
        most = storage.pv.numbers.largest
        yield f"v = v.clamp({-most!r}, {most!r}).to(torch.{coded.stored(storage.pv)})"
    elif storage.pv:
        yield f"v, v_scale, _ = {_encoded('v', storage.pv)}"
    scales = coded.tables(spec.variant)
    if scales:
        given = iter(range(len(spec.tables)))
        read = [_SCALES[name] if name in scales else f"tables[{next(given)}]" for name, _ in spec.tables]
        yield f"tables = ({', '.join(read)},)"


_SCALES = {Q_SCALE: "q_scale", K_SCALE: "k_scale", K_MEAN: "dots", coded.V_SCALE: "v_scale"}


def _encoded(operand: str, how: Held, more: str = "") -> str:
    most, dtype, per = coded.said(how)
    return f"codes_of({operand}, {most!r}, torch.{dtype}, {per!r}{more})"


def _example(spec: Spec) -> Iterator[str]:
    for name, shape in (("q", "HEADS, Q_LEN, DIM"), ("k", "KV_HEADS, K_LEN, DIM"), ("v", "KV_HEADS, K_LEN, VALUE_DIM")):
        yield f"{name} = torch.randn(BATCH, {shape}.value, dtype=DTYPE, device=device)"
    reads = {str(x.value): x.args for part in spec.parts() for x in part.walk() if x.op == "table"}
    sizes = {name: "".join(f"{_size(at)}, " for at in reads.get(name, ())) for name, _ in spec.tables}  # a seed is one number
    given = [(name, stored.dtype) for name, stored in spec.tables if name not in coded.tables(spec.variant)]
    made = (f"torch.ones(({sizes[name]}), dtype=torch.{dtype}, device=device)" for name, dtype in given)
    yield f"tables = ({''.join(f'{one}, ' for one in made)})".replace(", )", ",)")


def _size(at: Expr) -> str:
    """How many numbers a table has along an axis: whatever it is, an index outside is moved to the border."""
    sizes = [size for leaf, size in _SIZES.items() if at.mentions(leaf)]
    return " + ".join(sizes) or "1"


_SIZES = {e.b: "BATCH", e.h: "HEADS", e.kv: "KV_HEADS", e.i: "Q_LEN", PLACE: "K_LEN"}
