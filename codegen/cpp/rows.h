// Rows of numbers in vectors, and what all lanes have together: their sum, the greatest of them, whether any is true.
#include <vector>

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
INLINE vf load(const bfloat16* row) {
  typedef uint16_t bits_of __attribute__((vector_size(LANES * 2)));
  bits_of bits;
  memcpy(&bits, row, sizeof(bits));
  return (vf)(__builtin_convertvector(bits, vi) << 16);
}
INLINE vf load(const float16* row) {
  typedef float16 halves __attribute__((vector_size(LANES * 2)));
  halves x;
  memcpy(&x, row, sizeof(x));
  return __builtin_convertvector(x, vf);
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
