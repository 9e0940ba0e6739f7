"""Linear attention, states: one program goes from segment to segment, and each state gets what is left of those before it."""

import triton
import triton.language as tl
from apart import logs, one_of
from tiles import left, logged, state_of

# <constants>
DIM, VALUE_DIM = tl.constexpr(64), tl.constexpr(64)  # numbers of a key, and of a value
SEGMENT = tl.constexpr(256)  # keys between two states
FADES = False
APART, ROWS_FADE, COLUMNS_FADE = False, False, False  # parts of a state fade each by itself: which ones
# </constants>


@triton.jit(do_not_specialize=["count"])
def scan(held, at_key, sharing, count, NUMBERS: tl.constexpr):
    """Each program has NUMBERS of a state, whichever these are; the rest is said in `states`."""
    b, member = tl.program_id(2), tl.program_id(1)
    n = tl.program_id(0) * NUMBERS + tl.arange(0, NUMBERS)
    inside = n < DIM * VALUE_DIM + DIM
    place = state_of(held, b * tl.num_programs(1) + member, count, 0, DIM * VALUE_DIM + DIM) + n
    state = tl.load(place, mask=inside, other=0.0)
    if FADES:
        before = logged(at_key, b, member * sharing[3], SEGMENT - 1)
    if ROWS_FADE:
        faded = tl.where(n < DIM * VALUE_DIM, n // VALUE_DIM, tl.minimum(n - DIM * VALUE_DIM, DIM - 1))
    if COLUMNS_FADE:
        faded = n % VALUE_DIM
    if APART:
        before = one_of(logs(at_key, b, member * sharing[3], SEGMENT - 1), faded)
    for segment in tl.range(1, count):
        place += DIM * VALUE_DIM + DIM
        if FADES:
            now = logged(at_key, b, member * sharing[3], segment * SEGMENT + SEGMENT - 1)
            state *= left(now, before)
            before = now
        if APART:
            now = one_of(logs(at_key, b, member * sharing[3], segment * SEGMENT + SEGMENT - 1), faded)
            state *= left(now, before)
            before = now
        state += tl.load(place, mask=inside, other=0.0)
        tl.store(place, state, mask=inside)
