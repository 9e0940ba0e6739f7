// Tiles of lanes against rows that are read where they lie: for every row, `lanes` numbers at once.
//   products:    scores[row][lane] = sum over d of data[row][d] * packed[d][lane]      (data[row][d] is broadcast)
//   accumulate:  sums[d][lane] += sum over rows of data[row][d] * weights[row][lane]
// Nothing but the tokens in the lanes is ever transposed. Sums go in steps of one float, or of two bfloat16 where the machine
// multiplies those faster.

struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t both;
};

INLINE vf fused(vf sum, float y, vf x) { return sum + y * x; }
#if defined(__AVX512BF16__)
INLINE vf fused_pairs(vf sum, vf y, vf x) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)y, (__m512bh)x); }
INLINE vf fused(vf sum, Pair y, vf x) { return fused_pairs(sum, (vf)splat<vi>(y.both), x); }
#else
INLINE vf fused_pairs(vf sum, vf, vf) { return sum; }  // has to be there, and is never called
#endif

INLINE vf* at(float* rows, int row, int n) { return (vf*)(rows + row * TILE + n * LANES); }
INLINE const vf* at(const float* rows, int row, int n) { return (const vf*)(rows + row * TILE + n * LANES); }

template <int COUNT, int FROM, int TO, class Step>
INLINE void products_of(const Step* const* data, int steps, const float* packed, float* scores) {
  vf sum[COUNT][VECTORS] = {};
  const Step* row[COUNT];
  UNROLLED for (int r = 0; r < COUNT; r++) row[r] = data[r];
#pragma GCC unroll 2
  for (int d = 0; d < steps; d++) {
    vf x[VECTORS];
    UNROLLED for (int n = FROM; n < TO; n++) x[n] = *at(packed, d, n);
    UNROLLED for (int r = 0; r < COUNT; r++) {
      const Step y = row[r][d];
      UNROLLED for (int n = FROM; n < TO; n++) sum[r][n] = fused(sum[r][n], y, x[n]);
    }
  }
  UNROLLED for (int r = 0; r < COUNT; r++) UNROLLED for (int n = FROM; n < TO; n++) *at(scores, r, n) = sum[r][n];
}

// `data` may be read up to the next multiple of ROWS.
template <int FROM, int TO, class Step>
INLINE void products(const Step* const* data, int count, int steps, const float* packed, float* scores) {
  for (int j = 0; j < count; j += ROWS) products_of<ROWS, FROM, TO>(data + j, steps, packed, scores + j * TILE);
}

template <int COUNT, int FROM, int TO, class Step>
INLINE void accumulate_some(const Step* const* data, int steps, int d, const float* weights, float* sums, const vf* keep) {
  vf sum[COUNT][VECTORS];
  UNROLLED for (int r = 0; r < COUNT; r++) UNROLLED for (int n = FROM; n < TO; n++) sum[r][n] = *at(sums, d + r, n) * keep[n];
  for (int j = 0; j < steps; j++) {
    const Step* row = data[j] + d;
    vf w[VECTORS];
    UNROLLED for (int n = FROM; n < TO; n++) w[n] = *at(weights, j, n);
    UNROLLED for (int r = 0; r < COUNT; r++) UNROLLED for (int n = FROM; n < TO; n++) sum[r][n] = fused(sum[r][n], row[r], w[n]);
  }
  UNROLLED for (int r = 0; r < COUNT; r++) UNROLLED for (int n = FROM; n < TO; n++) *at(sums, d + r, n) = sum[r][n];
}

// What was there before is multiplied by `keep`.
template <int WIDTH, int FROM, int TO, class Step>
INLINE void accumulate(const Step* const* data, int steps, const float* weights, float* sums, const vf* keep) {
  constexpr int LAST = WIDTH % ROWS;
  for (int d = 0; d < WIDTH - LAST; d += ROWS) accumulate_some<ROWS, FROM, TO>(data, steps, d, weights, sums, keep);
  if constexpr (LAST > 0) accumulate_some<LAST, FROM, TO>(data, steps, WIDTH - LAST, weights, sums, keep);
}

// Rows as floats: where they lie, or converted.
INLINE const float* floats(const float* stored, float*, int) { return stored; }
template <class T> INLINE const float* floats(const T* stored, float* room, int dim) {
  for (int d = 0; d < dim; d++) room[d] = (float)stored[d];
  return room;
}

// Pointers to rows as floats, with as many more as `products` may read.
template <int WIDTH> struct Data {
  const float* row[CHUNK + ROWS];
  alignas(64) float room[CONVERTED * WIDTH];
  INLINE_METHOD void take(const Stored* const* stored, int count) {
    for (int j = 0; j < count; j++) row[j] = floats(stored[j], room + j * WIDTH, WIDTH);
    for (int j = count; j < count + ROWS; j++) row[j] = row[count - 1];
  }
  INLINE_METHOD const float* const* along() const { return row; }
  INLINE_METHOD const float* const* across() const { return row; }
};

// The same three in pairs. Rows of K hold their pairs already; V's are put together from two rows, a last one with zeros.
template <int WIDTH> struct PairedAlong {
  const Pair* row[CHUNK + ROWS];
  INLINE_METHOD void take(const Stored* const* stored, int count) {
    for (int j = 0; j < count + ROWS; j++) row[j] = (const Pair*)stored[std::min(j, count - 1)];
  }
};

template <int WIDTH> struct PairedAcross {
  const Pair* row[CHUNK / 2 + 1];
  alignas(64) Pair room[(CHUNK / 2 + 1) * WIDTH];
  INLINE_METHOD void take(const bfloat16* const* stored, int count) {
    static const bfloat16 nothing[WIDTH] = {};
    for (int j = 0; j < count; j += 2) {
      const bfloat16 *low = stored[j], *high = j + 1 < count ? stored[j + 1] : nothing;
      Pair* to = room + j / 2 * WIDTH;
      row[j / 2] = to;
      for (int d = 0; d < WIDTH; d++) to[d].both = low[d].bits | (uint32_t)high[d].bits << 16;
    }
  }
};

template <int WIDTH> struct PairedBoth {
  PairedAlong<WIDTH> in_place;
  PairedAcross<WIDTH> copied;
  INLINE_METHOD void take(const Stored* const* stored, int count) { in_place.take(stored, count), copied.take(stored, count); }
  INLINE_METHOD const Pair* const* along() const { return in_place.row; }
  INLINE_METHOD const Pair* const* across() const { return copied.row; }
};

// The tokens in the lanes, transposed: numbers or pairs of them.
template <int WIDTH> INLINE void pack(const Stored* const* stored, float* packed) {
  constexpr int BLOCK = LANES * STEP, WHOLE = WIDTH / BLOCK * BLOCK;
  for (int n = 0; n < VECTORS; n++)
    for (int d = 0; d < WHOLE; d += BLOCK) {
      vf x[LANES];
      UNROLLED for (int m = 0; m < LANES; m++) {
        const Stored* row = stored[n * LANES + m] + d;
        if constexpr (PAIRED) memcpy(&x[m], row, sizeof(vf));
        else x[m] = load(row);
      }
      transpose(x);
      UNROLLED for (int m = 0; m < LANES; m++) *at(packed, d / STEP + m, n) = x[m];
    }
  for (int m = 0; m < TILE; m++)
    for (int d = WHOLE; d < WIDTH; d += STEP) {
      if constexpr (PAIRED) memcpy(packed + d / STEP * TILE + m, stored[m] + d, 4);
      else packed[d * TILE + m] = (float)stored[m][d];
    }
}

// Sums for the tokens in the lanes become rows again, in place: `row_of(sums, m, d)` holds LANES numbers of token m from d on.
constexpr int padded(int width) { return (width + LANES - 1) / LANES * LANES; }
template <int WIDTH> INLINE void unpack(float* sums) {
  for (int n = 0; n < VECTORS; n++)
    for (int d = 0; d < WIDTH; d += LANES) {
      vf x[LANES];
      UNROLLED for (int m = 0; m < LANES; m++) x[m] = *at(sums, d + m, n);
      transpose(x);
      UNROLLED for (int m = 0; m < LANES; m++) *at(sums, d + m, n) = x[m];
    }
}
INLINE vf row_of(const float* sums, int m, int d) { return *at(sums, d + m % LANES, m / LANES); }

// Of each lane: the product of two packed tokens.
template <int WIDTH> INLINE vf product(const float* a, const float* b, int n) {
  vf sum = {};
  for (int d = 0; d < WIDTH / STEP; d++) {
    if constexpr (PAIRED) sum = fused_pairs(sum, *at(a, d, n), *at(b, d, n));
    else sum += *at(a, d, n) * *at(b, d, n);
  }
  return sum;
}

// Two rows of weights become one of pairs; returns how many there are.
template <int FROM, int TO> INLINE int pair_up(float* weights, int count) {
  if constexpr (!PAIRED) return count;
  for (int j = 0; j < count; j += 2) UNROLLED for (int n = FROM; n < TO; n++) {
    const vi low = (vi)*at(weights, j, n) + 0x8000, high = j + 1 < count ? (vi)*at(weights, j + 1, n) + 0x8000 : vi{};
    *at(weights, j / 2, n) = (vf)(((low >> 16) & 0xffff) | (high & (int)0xffff0000));
  }
  return (count + 1) / 2;
}

// Which rows the lanes of a launch meet. A schedule lists, for each vector of lanes, runs of rows.
struct Visits {
  const int32_t *lane_order, *row_order;  // the tokens in the order in which they are scheduled; null: as they come
  int64_t members;                        // the heads of the launch, and which of the schedules each of them follows
  const int32_t *head_numbers, *schedule_of;  // the second for each row of the batch
  int64_t vectors;                        // of each schedule
  const int64_t* offsets;                 // [schedules][vectors + 1]: the runs of each vector
  const int32_t *start, *stop;            // a run of rows
  const uint8_t* full;                    // whether every lane sees all of them

  INLINE_METHOD int64_t lane(int64_t n) const { return lane_order ? lane_order[n] : n; }
  INLINE_METHOD int64_t row(int64_t n) const { return row_order ? row_order[n] : n; }

  // Calls meet(first vector, last vector + 1, start, stop, mixed) for stretches of rows that the same vectors of a tile meet.
  template <class F> INLINE_METHOD void each(int64_t b, int64_t member, int64_t tile, F meet) const {
    const int64_t* of = offsets + schedule_of[b * members + member] * (vectors + 1);
    int64_t run[VECTORS], end[VECTORS], here = 0;
    for (int n = 0; n < VECTORS; n++) {
      const int64_t vector = std::min(tile * VECTORS + n, vectors);
      run[n] = of[vector], end[n] = of[std::min(vector + 1, vectors)];
    }
    for (;;) {
      int from = VECTORS, to = 0;
      bool mixed = false;
      int64_t next = INT64_MAX, begin = INT64_MAX;
      for (int n = 0; n < VECTORS; n++) {
        if (run[n] < end[n] && stop[run[n]] <= here) run[n]++;
        if (run[n] < end[n]) begin = std::min(begin, std::max<int64_t>(here, start[run[n]]));
      }
      if (begin == INT64_MAX) return;
      here = begin;
      for (int n = 0; n < VECTORS; n++) {
        if (run[n] == end[n]) continue;
        if (start[run[n]] > here) {
          next = std::min<int64_t>(next, start[run[n]]);
          continue;
        }
        next = std::min<int64_t>(next, stop[run[n]]);
        mixed |= !full[run[n]] || (to && to < n);  // a vector in between that meets nothing here
        from = std::min(from, n), to = n + 1;
      }
      meet(from, to, here, next, mixed);
      here = next;
    }
  }
};

// Calls f<from, to>() for numbers that are only known at run time.
template <class F> INLINE void with_vectors(int from, int to, F f) {
  if (from == 0 && to == VECTORS) return f(Vectors<0, VECTORS>{});
  if constexpr (VECTORS == 2) return from ? f(Vectors<1, 2>{}) : f(Vectors<0, 1>{});
  if constexpr (VECTORS == 3) {
    if (from == 0) return to == 1 ? f(Vectors<0, 1>{}) : f(Vectors<0, 2>{});
    if (from == 1) return to == 2 ? f(Vectors<1, 2>{}) : f(Vectors<1, 3>{});
    return f(Vectors<2, 3>{});
  }
}
