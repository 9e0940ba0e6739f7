// Measures whether this machine multiplies pairs of bfloat16 faster than single floats.
#include <chrono>

#if defined(__AVX512BF16__)
template <class Step> static double seconds(const Step* const* rows, int steps, const float* packed, float* scores) {
  const auto start = std::chrono::steady_clock::now();
  for (int again = 0; again < 200; again++) products_of<ROWS, 0, VECTORS>(rows, steps, packed, scores);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
#endif

extern "C" int64_t pairs_are_faster() {
#if defined(__AVX512BF16__)
  alignas(64) static float packed[DIM * TILE], scores[ROWS * TILE];
  static bfloat16 paired[ROWS][DIM];
  static float single[ROWS][DIM];
  const Pair* pairs[ROWS];
  const float* floats[ROWS];
  for (int r = 0; r < ROWS; r++) pairs[r] = (const Pair*)paired[r], floats[r] = single[r];
  double by_pairs = INFINITY, by_floats = INFINITY;
  for (int again = 0; again < 20; again++) {
    by_pairs = std::min(by_pairs, seconds(pairs, DIM / 2, packed, scores));
    by_floats = std::min(by_floats, seconds(floats, DIM, packed, scores));
  }
  return by_pairs < 0.9 * by_floats;
#else
  return 0;
#endif
}
