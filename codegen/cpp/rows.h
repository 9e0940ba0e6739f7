// Rows of numbers in vectors, rows that become columns, and what all lanes have together: a sum, the greatest, is any true.

template <class T> INLINE vf load(const T* row) {
  vf x;
  for (int m = 0; m < LANES; m++) x[m] = (float)row[m];
  return x;
}
INLINE vf load(const float* row) {
  vf x;
  memcpy(&x, row, sizeof(x));
  return x;
}

// What widens halves is spelled out: compilers do it in parts. Masked by all, since GCC 12 warns of what is undefined otherwise.
typedef uint16_t halves_of __attribute__((vector_size(LANES * 2)));
#if defined(__AVX512F__)
INLINE vi widened(halves_of x) { return (vi)_mm512_maskz_cvtepu16_epi32((__mmask16)-1, (__m256i)x); }
#elif defined(__AVX2__)
INLINE vi widened(halves_of x) { return (vi)_mm256_cvtepu16_epi32((__m128i)x); }
#else
INLINE vi widened(halves_of x) { return __builtin_convertvector(x, vi); }
#endif
INLINE vf load(const bfloat16* row) {
  halves_of bits;
  memcpy(&bits, row, sizeof(bits));
  return (vf)(widened(bits) << 16);
}
INLINE vf load(const float16* row) {
  typedef float16 halves __attribute__((vector_size(LANES * 2)));
  halves x;
  memcpy(&x, row, sizeof(x));
  return __builtin_convertvector(x, vf);
}

// The numbers of a row from `n` vectors on; zeros behind its end.
template <int WIDTH, class T> INLINE vf part(const T* row, int n) {
  if ((n + 1) * LANES <= WIDTH) return load(row + n * LANES);
  T numbers[LANES] = {};
  memcpy(numbers, row + n * LANES, sizeof(T) * (WIDTH % LANES));
  return load(numbers);
}

// What the numbers of a row are multiplied with.
template <int WIDTH, class T> INLINE float scale_of(const T* row) {
  if constexpr (CODES<T>) return row->scale(WIDTH);
  else return 1.0f;
}

template <int WIDTH, class T> INLINE float number_of(const T* row, int d) {
  if constexpr (CODES<T>) return part<WIDTH>(row, d / LANES)[d % LANES] * scale_of<WIDTH>(row);
  else return (float)row[d];
}

// Ask for a row that will be read soon.
template <int WIDTH, class T> INLINE void fetch(const T* row) {
  for (int d = 0; d < WIDTH; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

template <class T> INLINE void store(T* row, vf x) {
  for (int m = 0; m < LANES; m++) row[m] = (T)x[m];
}
INLINE void store(float* row, vf x) { memcpy(row, &x, sizeof(x)); }
INLINE void store(bfloat16* row, vf x) {
  const vi wide = (vi)x, rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  const halves_of bits = __builtin_convertvector(x == x ? rounded : splat<vi>(0x7fc0), halves_of);
  memcpy(row, &bits, sizeof(bits));
}
template <class T> INLINE void store(T* row, vf x, int count) {
  if (count >= LANES) return store(row, x);
  for (int m = 0; m < count; m++) row[m] = (T)x[m];
}

// Lane m of row n becomes lane n of row m, a bit of these numbers at a time.
template <int STEP = LANES / 2> INLINE void transpose(vf* rows) {
  vi low, high;
  for (int m = 0; m < LANES; m++) {
    low[m] = m & STEP ? LANES + m - STEP : m;
    high[m] = m & STEP ? LANES + m : m + STEP;
  }
  UNROLLED for (int n = 0; n < LANES; n++) {
    if (n & STEP) continue;
    const vf a = rows[n], b = rows[n + STEP];
    rows[n] = __builtin_shuffle(a, b, low), rows[n + STEP] = __builtin_shuffle(a, b, high);
  }
  if constexpr (STEP > 1) transpose<STEP / 2>(rows);
}

// 0, 1, 2 …
INLINE vi numbers() {
  vi n;
  for (int m = 0; m < LANES; m++) n[m] = m;
  return n;
}

// Lanes of two vectors, in pairs that lie STEP apart: in lane m the sum of such a pair, of b where m has that bit, else of a.
template <int STEP> INLINE vf pair_sums(vf a, vf b) {
  vi mine, other;
  for (int m = 0; m < LANES; m++) {
    const int from = m & STEP ? LANES : 0;
    mine[m] = from + m, other[m] = from + (m ^ STEP);
  }
  return __builtin_shuffle(a, b, mine) + __builtin_shuffle(a, b, other);
}

// The totals of LANES vectors, one in each lane.
template <int STEP = LANES / 2> INLINE vf totals_of(const vf* x) {
  vf half[STEP];
  UNROLLED for (int n = 0; n < STEP; n++) half[n] = pair_sums<STEP>(x[n], x[n + STEP]);
  if constexpr (STEP == 1) return half[0];
  else return totals_of<STEP / 2>(half);
}

INLINE float total(vf x) {
  float sum = 0.0f;
  for (int m = 0; m < LANES; m++) sum += x[m];
  return sum;
}
INLINE float greatest(vf x) {
  float y = x[0];
  for (int m = 1; m < LANES; m++) y = std::max(y, x[m]);
  return y;
}
INLINE bool any(vi x) {
  int32_t y = 0;
  for (int m = 0; m < LANES; m++) y |= x[m];
  return y != 0;
}
