// Rows as a matrix unit (AMX) meets them: 16 rows of 16 pairs of bfloat16 at once, against 16 tokens in lanes.
//   along:  a tile is 16 rows, 32 numbers of each: they are read where they lie, if they lie evenly
//   across: a tile is 16 columns of 32 rows, which are transposed for it
// In lanes stand pairs, as everywhere; so a tile of them is 16 rows of one vector.
#include <immintrin.h>

constexpr int SIDE = 16, DEEP = 2 * SIDE;  // of a tile: its rows, and the numbers in each
static_assert(LANES == SIDE && VECTORS <= 4 && CHUNK % DEEP == 0, "four tiles hold sums");

// What one thread has to ask of the unit before it multiplies, and to give back in the end.
struct Unit {
  Unit() {
    struct alignas(64) {
      uint8_t palette = 1, first_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int n = 0; n < 6; n++) shapes.bytes[n] = 4 * SIDE, shapes.rows[n] = SIDE;
    _tile_loadconfig(&shapes);
  }
  ~Unit() { _tile_release(); }
};

struct Tiles {
  const bfloat16* data;
  int64_t apart;  // numbers from one row to the next
};

// Compilers know a tile by its number in the source only, and GCC 12 moves stores behind the loads of tiles that read them.
#define MEMORY_IS_UP_TO_DATE asm volatile("" ::: "memory")
#define FOR_EACH_SUM(step)            \
  { step(0); }                        \
  if constexpr (COUNT > 1) { step(1); } \
  if constexpr (COUNT > 2) { step(2); } \
  if constexpr (COUNT > 3) { step(3); }
#define CLEAR(n) _tile_zero(n)
#define TAKE_UP(n) _tile_loadd(n, at(sums, 0, n), TILE * sizeof(float))
#define PUT_DOWN(n) _tile_stored(n, at(sums, 0, n), TILE * sizeof(float))
#define MULTIPLY(n)                                              \
  _tile_loadd(5, at(lanes, j * SIDE, n), TILE * sizeof(float)); \
  _tile_dpbf16ps(n, 4, 5)

// To 16 rows of sums: the products of `count` tiles, `tile(j)` being the j-th of them, with as many of COUNT vectors of lanes.
template <int COUNT, bool FRESH, class F> INLINE void multiply(F tile, int count, const float* lanes, float* sums) {
  if constexpr (FRESH) {
    FOR_EACH_SUM(CLEAR)
  } else {
    FOR_EACH_SUM(TAKE_UP)
  }
  for (int j = 0; j < count; j++) {
    const Tiles rows = tile(j);
    _tile_loadd(4, rows.data, rows.apart * sizeof(bfloat16));
    FOR_EACH_SUM(MULTIPLY)
  }
  FOR_EACH_SUM(PUT_DOWN)
}

template <int COUNT> static void multiply_along(const Tiles* rows, int count, int depth, const float* packed, float* scores) {
  MEMORY_IS_UP_TO_DATE;
  for (int j = 0; j < count; j += SIDE) {
    const Tiles here = rows[j / SIDE];
    auto tile = [&](int d) { return Tiles{here.data + d * DEEP, here.apart}; };
    multiply<COUNT, true>(tile, depth, packed, scores + j * TILE);
  }
  MEMORY_IS_UP_TO_DATE;
}
template <int FROM, int TO>
INLINE void products(const Tiles* rows, int count, int steps, const float* packed, float* scores, const vi* = nullptr) {
  multiply_along<TO - FROM>(rows, count, deep(steps) / SIDE, packed + FROM * LANES, scores + FROM * LANES);
}

template <int WIDTH, int COUNT> static void multiply_across(const Tiles* columns, int depth, const float* weights, float* sums) {
  MEMORY_IS_UP_TO_DATE;
  for (int d = 0; d < WIDTH; d += SIDE) {
    auto tile = [&](int j) { return Tiles{columns[j].data + d * DEEP, DEEP}; };
    multiply<COUNT, false>(tile, depth, weights, sums + d * TILE);
  }
  MEMORY_IS_UP_TO_DATE;
}
template <int WIDTH, int FROM, int TO>
INLINE void accumulate(const Tiles* columns, int steps, const float* weights, float* sums, const vf* keep) {
  vi changes = {};
  UNROLLED for (int n = FROM; n < TO; n++) changes |= keep[n] != 1.0f;
  if (any(changes))
    for (int d = 0; d < WIDTH; d++) UNROLLED for (int n = FROM; n < TO; n++) *at(sums, d, n) *= keep[n];
  multiply_across<WIDTH, TO - FROM>(columns, deep(steps) / SIDE, weights + FROM * LANES, sums + FROM * LANES);
}

template <int WIDTH> struct Along {
  static constexpr int PADDED = (WIDTH + DEEP - 1) / DEEP * DEEP;
  Tiles rows[CHUNK / SIDE];
  alignas(64) bfloat16 room[CHUNK * PADDED];

  // Rows that are a multiple of 1 KiB apart would all want the same few lines of the first cache.
  static INLINE_METHOD bool lie_well(const bfloat16* const* stored) {
    const int64_t apart = stored[1] - stored[0];
    bool evenly = apart % (1024 / sizeof(bfloat16)) != 0;
    for (int r = 2; r < SIDE; r++) evenly &= stored[r] - stored[0] == r * apart;
    return evenly;
  }
  void take(const bfloat16* const* stored, int count) {
    for (int j = 0; j < count; j += SIDE) {
      Tiles& here = rows[j / SIDE];
      if (WIDTH == PADDED && j + SIDE <= count && lie_well(stored + j)) {
        here = {stored[j], stored[j + 1] - stored[j]};
        continue;
      }
      bfloat16* to = room + j * PADDED;
      here = {to, PADDED};
      for (int r = 0; r < SIDE; r++, to += PADDED) {
        const int filled = j + r < count ? WIDTH : 0;
        if (filled) memcpy(to, stored[j + r], sizeof(bfloat16[WIDTH]));
        memset((void*)(to + filled), 0, sizeof(bfloat16) * (PADDED - filled));
      }
    }
  }
  INLINE_METHOD const Tiles* along() const { return rows; }
};

template <int WIDTH> struct Across {
  Tiles columns[CHUNK / DEEP];
  alignas(64) float room[CHUNK / DEEP][padded(WIDTH) * SIDE];
  void take(const bfloat16* const* stored, int count) {
    for (int j = 0; j < count; j += DEEP) {
      float* to = room[j / DEEP];
      columns[j / DEEP] = {(const bfloat16*)to, DEEP};
      for (int d = 0; d < WIDTH; d += SIDE, to += SIDE * SIDE) {
        vf pairs[SIDE];
        auto numbers_of = [&](int n) { return n < count ? (vu)part<WIDTH>(stored[n], d / SIDE) : vu{}; };
        for (int r = 0; r < SIDE; r++) pairs[r] = (vf)(numbers_of(j + 2 * r) >> 16 | numbers_of(j + 2 * r + 1));
        transpose(pairs);
        memcpy(to, pairs, sizeof(pairs));
      }
    }
  }
  INLINE_METHOD const Tiles* across() const { return columns; }
};

template <int WIDTH> struct Both {
  Along<WIDTH> in_place;
  Across<WIDTH> copied;
  INLINE_METHOD void take(const bfloat16* const* stored, int count) { in_place.take(stored, count), copied.take(stored, count); }
  INLINE_METHOD const Tiles* along() const { return in_place.along(); }
  INLINE_METHOD const Tiles* across() const { return copied.across(); }
};
