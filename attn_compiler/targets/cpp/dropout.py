"""What a kernel does besides where weights are dropped: lines for the holes of its skeleton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attn_compiler.targets.cpp.spec import SEED, Spec, dropped

Lines = Mapping[str, Sequence[str]]


def constants(spec: Spec) -> tuple[str, ...]:
    """The rate: weights are dropped whose random word is smaller."""
    rate = spec.variant.dropout
    return (f"constexpr uint32_t DROPPED = {dropped(rate)}u;  // {rate:g} of 2^32",)


def scopes(spec: Spec, *, by_query: bool) -> Lines:
    """The random words of queries and keys, `by_query` the first of them in lanes, and the statements that draw them."""
    seed = [name for name, _ in spec.tables].index(SEED)
    lane, row = (_query, _key) if by_query else (_key, _query)
    in_lanes, of_lane = lane("vu", "VECTORS", "lanes.{}[n][m]", "lanes.lane[n][m]")
    in_rows, of_row = row("uint32_t", "CHUNK", "rows.{}[j]", "rows.row[j]")
    head = "task.b * task.call.heads + task.h"
    return {
        "per task: fields": ["uint64_t drawn;"],
        "per task: values": [f"task.drawn = mixed(*(const uint64_t*)task.call.tables[{seed}].data + mixed({head}));"],
        "per lane: fields": [in_lanes],
        "per lane: values": ["for (int m = 0; m < LANES; m++) {", *(f"  {line}" for line in of_lane), "}"],
        "per row: fields": [in_rows],
        "per row: values": of_row,
    }


def in_forward() -> Sequence[str]:
    """Drop a weight once it has been counted."""
    return ["*score = dropped(work.queries.first[n], work.queries.second[n], keys.word[j]) ? vf{} : *score;"]


def in_backward(*, by_query: bool) -> Sequence[str]:
    """What was dropped has no share in the output."""
    query, key = ("work.lanes.{}[n]", "rows.word[j]") if by_query else ("rows.{}[j]", "work.lanes.word[n]")
    words = ", ".join((query.format("first"), query.format("second"), key))
    return [f"const vi gone = dropped({words});", "weight = gone ? vf{} : weight, along = gone ? vf{} : along;"]


def _query(kind: str, size: str, field: str, token: str) -> tuple[str, list[str]]:
    first, second = field.format("first"), field.format("second")
    drawn = f"const uint64_t x = mixed(task.drawn + {token});"
    return f"{kind} first[{size}], second[{size}];", [drawn, f"{first} = x, {second} = x >> 32;"]


def _key(kind: str, size: str, field: str, token: str) -> tuple[str, list[str]]:
    return f"{kind} word[{size}];", [f"{field.format('word')} = mixed(~task.drawn - {token}) >> 32;"]
