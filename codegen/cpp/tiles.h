// Tiles of lanes against rows that are read where they lie: for every row, `lanes` numbers at once.
//   products:    scores[row][lane] = sum over d of data[row][d] * packed[d][lane]      (data[row][d] is broadcast)
//   accumulate:  sums[d][lane] += sum over rows of data[row][d] * weights[row][lane]
// Nothing but the tokens in the lanes is ever transposed. Sums go in steps of one float, of two bfloat16 where the machine
// multiplies those faster, or of four whole numbers of a byte, whose sums are whole numbers, too.

struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t both;
};

INLINE vf fused(vf sum, float y, vf x) { return sum + y * x; }
#if defined(__AVX512BF16__)
INLINE vf fused_pairs(vf sum, vf y, vf x) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)y, (__m512bh)x); }
INLINE vf fused(vf sum, Pair y, vf x) { return fused_pairs(sum, (vf)splat<vi>(y.both), x); }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
INLINE vf fused_pairs(vf sum, vf y, vf x) { return (vf)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)y, (bfloat16x8_t)x); }
INLINE vf fused(vf sum, Pair y, vf x) { return fused_pairs(sum, (vf)splat<vi>(y.both), x); }
#else
INLINE vf fused_pairs(vf sum, vf, vf) { return sum; }  // has to be there, and is never called
#endif

// Four bytes of a row: of K, without a sign, beside signed ones in the lanes; of V, the other way round.
struct __attribute__((packed, aligned(1), may_alias)) Quad {
  uint32_t all;
};
struct __attribute__((packed, aligned(1), may_alias)) SignedQuad {
  uint32_t all;
};
#if defined(__AVX512VNNI__)
INLINE vi fused_bytes(vi sum, vi plain, vi with_sign) {
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)plain, (__m512i)with_sign);
}
#elif defined(__AVXVNNI__)
INLINE vi fused_bytes(vi sum, vi plain, vi with_sign) {
  return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)plain, (__m256i)with_sign);
}
#else
INLINE vi fused_bytes(vi sum, vi, vi) { return sum; }  // never called
#endif
INLINE vi fused(vi sum, Quad y, vf x) { return fused_bytes(sum, splat<vi>(y.all), (vi)x); }
INLINE vi fused(vi sum, SignedQuad y, vf x) { return fused_bytes(sum, (vi)x, splat<vi>(y.all)); }
template <class Step> constexpr bool WHOLE = std::is_same_v<Step, Quad> || std::is_same_v<Step, SignedQuad>;
template <class Step> using Sum = std::conditional_t<WHOLE<Step>, vi, vf>;

// As many rows of lanes as are multiplied: whole tiles of them where a matrix unit does.
constexpr int deep(int rows) { return (rows + DEPTH - 1) / DEPTH * DEPTH; }

INLINE vf* at(float* rows, int row, int n) { return (vf*)(rows + row * TILE + n * LANES); }
INLINE const vf* at(const float* rows, int row, int n) { return (const vf*)(rows + row * TILE + n * LANES); }

template <int COUNT, int FROM, int TO, class Step>
INLINE void products_of(const Step* const* data, int steps, const float* packed, float* scores, const vi* start = nullptr) {
  Sum<Step> sum[COUNT][VECTORS] = {};
  if constexpr (WHOLE<Step>)
    UNROLLED for (int r = 0; r < COUNT; r++) UNROLLED for (int n = FROM; n < TO; n++) sum[r][n] = start[n];
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
  UNROLLED for (int r = 0; r < COUNT; r++) UNROLLED for (int n = FROM; n < TO; n++)
    *at(scores, r, n) = convert<vf>(sum[r][n]);
}

// `data` may be read up to the next multiple of ROWS; sums of quads begin at `start`.
template <int FROM, int TO, class Step>
INLINE void products(
    const Step* const* data, int count, int steps, const float* packed, float* scores, const vi* start = nullptr) {
  for (int j = 0; j < count; j += ROWS) products_of<ROWS, FROM, TO>(data + j, steps, packed, scores + j * TILE, start);
}

// What is kept of a sum: by its lane, or by its row.
INLINE vf kept_of(const vf* keep, int, int n) { return keep[n]; }
INLINE float kept_of(const float* keep, int row, int) { return keep[row]; }

template <int COUNT, int FROM, int TO, class Step, class Keep>
INLINE void accumulate_some(const Step* const* data, int steps, int d, const float* weights, float* sums, const Keep* keep) {
  Sum<Step> sum[COUNT][VECTORS] = {};
  if constexpr (!WHOLE<Step>)
    UNROLLED for (int r = 0; r < COUNT; r++) UNROLLED for (int n = FROM; n < TO; n++)
      sum[r][n] = *at(sums, d + r, n) * kept_of(keep, d + r, n);
  for (int j = 0; j < steps; j++) {
    const Step* row = data[j] + d;
    vf w[VECTORS];
    UNROLLED for (int n = FROM; n < TO; n++) w[n] = *at(weights, j, n);
    UNROLLED for (int r = 0; r < COUNT; r++) UNROLLED for (int n = FROM; n < TO; n++) sum[r][n] = fused(sum[r][n], row[r], w[n]);
  }
  UNROLLED for (int r = 0; r < COUNT; r++) UNROLLED for (int n = FROM; n < TO; n++)
    *at(sums, d + r, n) = convert<vf>(sum[r][n]) + (WHOLE<Step> ? *at(sums, d + r, n) * kept_of(keep, d + r, n) : vf{});
}

// What was there before is multiplied by `keep`.
template <int WIDTH, int FROM, int TO, class Step, class Keep>
INLINE void accumulate(const Step* const* data, int steps, const float* weights, float* sums, const Keep* keep) {
  constexpr int LAST = WIDTH % ROWS;
  for (int d = 0; d < WIDTH - LAST; d += ROWS) accumulate_some<ROWS, FROM, TO>(data, steps, d, weights, sums, keep);
  if constexpr (LAST > 0) accumulate_some<LAST, FROM, TO>(data, steps, WIDTH - LAST, weights, sums, keep);
}

// The tokens in the lanes, transposed: numbers, pairs or quads of them.
template <int WIDTH> INLINE void pack(const Stored* const* stored, float* packed) {
  constexpr int BLOCK = LANES * STEP, WHOLE = WIDTH / BLOCK * BLOCK;
  for (int n = 0; n < VECTORS; n++)
    for (int d = 0; d < WHOLE; d += BLOCK) {
      vf x[LANES];
      UNROLLED for (int m = 0; m < LANES; m++) {
        const Stored* row = stored[n * LANES + m] + d;
        if constexpr (STEP > 1) memcpy(&x[m], row, sizeof(vf));
        else x[m] = load(row);
      }
      transpose(x);
      UNROLLED for (int m = 0; m < LANES; m++) *at(packed, d / STEP + m, n) = x[m];
    }
  for (int m = 0; m < TILE; m++)
    for (int d = WHOLE; d < WIDTH; d += STEP) {
      if constexpr (STEP > 1) memcpy(packed + d / STEP * TILE + m, stored[m] + d, 4);
      else packed[d * TILE + m] = (float)stored[m][d];
    }
  constexpr int FILLED = WIDTH / STEP, REST = deep(FILLED) - FILLED;
  memset(packed + FILLED * TILE, 0, REST * TILE * sizeof(float));
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

// Quads in the lanes get their signs. Where their sums begin: rows are without a sign, 128 too high.
template <int WIDTH> INLINE void sign(float* packed, vi* start) {
  for (int n = 0; n < VECTORS; n++) {
    vi sum = {};
    for (int d = 0; d < WIDTH / 4; d++) {
      const vi x = (vi)*at(packed, d, n) ^ (int)0x80808080;
      *at(packed, d, n) = (vf)x;
      sum += (x << 24 >> 24) + (x << 16 >> 24) + (x << 8 >> 24) + (x >> 24);
    }
    start[n] = sum * -128;
  }
}

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
  if constexpr (VALUE_STEP != 2) return count;
  for (int j = 0; j < count; j += 2) UNROLLED for (int n = FROM; n < TO; n++) {
    const vi low = (vi)*at(weights, j, n) + 0x8000, high = j + 1 < count ? (vi)*at(weights, j + 1, n) + 0x8000 : vi{};
    *at(weights, j / 2, n) = (vf)(((low >> 16) & 0xffff) | (high & (int)0xffff0000));
  }
  const int pairs = (count + 1) / 2;
  for (int j = pairs; j < deep(pairs); j++) UNROLLED for (int n = FROM; n < TO; n++) *at(weights, j, n) = vf{};
  return pairs;
}

// Four rows of weights, none above one, become one of whole numbers up to MOST_WEIGHT.
template <int FROM, int TO> INLINE int quad_up(float* weights, int count) {
  const vf rounding = splat<vf>(12582912.0f);  // behind which the last byte is the nearest whole number
  for (int j = 0; j < count; j += 4) UNROLLED for (int n = FROM; n < TO; n++) {
    vi x[4];
    UNROLLED for (int r = 0; r < 4; r++) x[r] = j + r < count ? (vi)(*at(weights, j + r, n) * MOST_WEIGHT + rounding) : vi{};
    const vi low = (x[0] & 0xff) | (x[1] << 8 & 0xff00), high = (x[2] << 16 & 0xff0000) | x[3] << 24;
    *at(weights, j / 4, n) = (vf)(low | high);
  }
  return (count + 3) / 4;
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
template <int FROM = 0, int TO = VECTORS, class F> INLINE void with_vectors(int from, int to, F f) {
  if (from == FROM && to == TO) return f(Vectors<FROM, TO>{});
  if constexpr (TO > FROM + 1) return with_vectors<FROM, TO - 1>(from, to, f);
  else if constexpr (FROM + 1 < VECTORS) return with_vectors<FROM + 1, VECTORS>(from, to, f);
}
