// Rows of codes, a vector of numbers at a time. What widens bytes is spelled out: compilers take them one by one.
typedef uint8_t codes_of __attribute__((vector_size(LANES)));

INLINE codes_of codes_at(const Code* row) {
  codes_of codes;
  memcpy(&codes, row, sizeof(codes));
  return codes;
}

#if defined(__AVX512BW__)
INLINE vi widened(codes_of x) { return (vi)_mm512_cvtepu8_epi32((__m128i)x); }
INLINE vi widened_with_sign(codes_of x) { return (vi)_mm512_cvtepi8_epi32((__m128i)x); }
INLINE halves_of halves_with_sign(codes_of x) { return (halves_of)_mm256_cvtepi8_epi16((__m128i)x); }
INLINE vf floats_of(halves_of x) { return (vf)_mm512_cvtph_ps((__m256i)x); }
#elif defined(__AVX2__) && defined(__F16C__)
INLINE __m128i wide(codes_of x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return _mm_cvtsi64_si128(bits);
}
INLINE vi widened(codes_of x) { return (vi)_mm256_cvtepu8_epi32(wide(x)); }
INLINE vi widened_with_sign(codes_of x) { return (vi)_mm256_cvtepi8_epi32(wide(x)); }
INLINE halves_of halves_with_sign(codes_of x) { return (halves_of)_mm_cvtepi8_epi16(wide(x)); }
INLINE vf floats_of(halves_of x) { return (vf)_mm256_cvtph_ps((__m128i)x); }
#else
typedef int8_t signed_codes_of __attribute__((vector_size(LANES)));
typedef int16_t signed_halves_of __attribute__((vector_size(LANES * 2)));
INLINE vi widened(codes_of x) { return __builtin_convertvector(x, vi); }
INLINE vi widened_with_sign(codes_of x) { return __builtin_convertvector((signed_codes_of)x, vi); }
INLINE halves_of halves_with_sign(codes_of x) { return (halves_of)__builtin_convertvector((signed_codes_of)x, signed_halves_of); }
INLINE vf floats_of(halves_of x) {
  typedef float16 numbers __attribute__((vector_size(LANES * 2)));
  return __builtin_convertvector((numbers)x, vf);
}
#endif

INLINE vf load(const whole8* row) { return convert<vf>(widened_with_sign(codes_at(row))); }
INLINE vf load(const e4m3* row) { return floats_of((halves_with_sign(codes_at(row)) << 7) & 0xbfff); }
INLINE vf load(const e5m2* row) { return floats_of(halves_with_sign(codes_at(row)) << 8); }

template <int WIDTH> INLINE vf part(const whole4* row, int n) {
  constexpr int HALF = WIDTH / 2;
  vi bits;
  if constexpr (HALF % LANES == 0) {
    const bool second = n * LANES >= HALF;
    bits = widened(codes_at(row + n * LANES - (second ? HALF : 0)));
    bits = second ? bits >> 4 : bits & 15;
  } else {
    for (int m = 0; m < LANES; m++) {
      const int d = n * LANES + m;
      bits[m] = d < HALF ? row[d].bits & 15 : d < WIDTH ? row[d - HALF].bits >> 4 : 8;
    }
  }
  return convert<vf>(bits - 8);
}
