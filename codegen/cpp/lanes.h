// Vectors of tokens, and what expressions need of them: comparisons, rounding, exponentials, reads of tables.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // rows at work together: with two vectors 16 of 32 registers hold sums, with three 24
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;   // with three vectors 12 of 16
#else
constexpr int LANES = 4, ROWS = 8;   // NEON: 24 of 32
#endif
#if defined(__AVX512VNNI__)
constexpr bool BYTES = true;  // whether four bytes are multiplied at once
#elif defined(__AVXVNNI__)
constexpr bool BYTES = LANES == 8;
#else
constexpr bool BYTES = false;
#endif

template <int FROM, int TO> struct Vectors {  // some of the vectors of a tile
  static constexpr int from = FROM, to = TO;
};

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef double vd __attribute__((vector_size(LANES * 8)));
typedef int64_t vl __attribute__((vector_size(LANES * 8)));

#define INLINE static inline __attribute__((always_inline))
#define INLINE_METHOD inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 32")

template <class V> struct Element;
template <> struct Element<vf> { typedef float type; };
template <> struct Element<vi> { typedef int32_t type; };
template <> struct Element<vd> { typedef double type; };
template <> struct Element<vl> { typedef int64_t type; };

// A scalar in every lane; what is a vector already stays as it is.
template <class V> INLINE V splat(typename Element<V>::type x) { return V{} + x; }
template <class V> INLINE V splat(V x) { return x; }

// Truth values: 0 or -1 in the lanes of a vi, whatever was compared.
INLINE vi truth(vi x) { return x; }
INLINE vi truth(vl x) { return __builtin_convertvector(x, vi); }
INLINE vi truth(bool x) { return vi{} - (int)x; }

INLINE vf pick(vi c, vf a, vf b) { return c ? a : b; }
INLINE vi pick(vi c, vi a, vi b) { return c ? a : b; }
INLINE vd pick(vi c, vd a, vd b) { return __builtin_convertvector(c, vl) ? a : b; }
INLINE vl pick(vi c, vl a, vl b) { return __builtin_convertvector(c, vl) ? a : b; }
template <class T> INLINE T pick(bool c, T a, T b) { return c ? a : b; }
template <class T, class C, class A, class B> INLINE T choose(C c, A a, B b) {
  if constexpr (sizeof(T) <= 8) return c ? (T)a : (T)b;
  else return pick(truth(c), splat<T>(a), splat<T>(b));
}

template <class T> INLINE T least(T a, T b) { return a < b ? a : b; }
template <class T> INLINE T most(T a, T b) { return a > b ? a : b; }
// As least and most, but NaN stays NaN, at no cost where `b` is a constant.
template <class T> INLINE T lower(T a, T b) { return (b < a) | (b != b) ? b : a; }
template <class T> INLINE T higher(T a, T b) { return (b > a) | (b != b) ? b : a; }
template <class T> INLINE T magnitude(T a) { return a < 0 ? -a : a; }

// `//` and `%` round down, as Python's do.
template <class T> INLINE T quotient(T a, T b) {
  T whole = a / b;
  return whole * b == a || (a < 0) == (b < 0) ? whole : whole - 1;
}
INLINE float quotient(float a, float b) { return std::floor(a / b); }
INLINE double quotient(double a, double b) { return std::floor(a / b); }
template <class V, class F> INLINE V each(F f, V a, V b) {
  V r;
  for (int m = 0; m < LANES; m++) r[m] = f(a[m], b[m]);
  return r;
}
INLINE vi quotient(vi a, vi b) { return each([](int32_t x, int32_t y) { return quotient(x, y); }, a, b); }
INLINE vl quotient(vl a, vl b) { return each([](int64_t x, int64_t y) { return quotient(x, y); }, a, b); }
INLINE vf quotient(vf a, vf b) { return each([](float x, float y) { return quotient(x, y); }, a, b); }
INLINE vd quotient(vd a, vd b) { return each([](double x, double y) { return quotient(x, y); }, a, b); }
template <class T> INLINE T remainder_of(T a, T b) { return a - quotient(a, b) * b; }
template <class V> INLINE V lower(V a, typename Element<V>::type b) { return lower(a, splat<V>(b)); }
template <class V> INLINE V higher(V a, typename Element<V>::type b) { return higher(a, splat<V>(b)); }
template <class V> INLINE V quotient(V a, typename Element<V>::type b) { return quotient(a, splat<V>(b)); }
template <class V> INLINE V remainder_of(V a, typename Element<V>::type b) { return remainder_of(a, splat<V>(b)); }

template <class To, class From> INLINE To convert(From x) {
  if constexpr (sizeof(From) <= 8) return (To)x;
  else return __builtin_convertvector(x, To);
}

// 2^x for |x| <= 1/2, with a relative error below 1e-7.
INLINE vf fraction(vf x) {
  vf p = splat<vf>(1.32645908e-3f);
  p = p * x + 9.671619e-3f;
  p = p * x + 5.55073503e-2f;
  p = p * x + 2.40222405e-1f;
  p = p * x + 6.93146976e-1f;
  return p * x + 1.0f;
}

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

// e^x for x <= 0: exactly 0 below 2^-100, so that no product of a weight is subnormal; NaN stays NaN.
INLINE vf weight_of(vf x) {
  const vf rounding = splat<vf>(12582912.0f);
  vf shifted = x * LOG2E + rounding;
  vi power = (vi)fraction(x * LOG2E - (shifted - rounding)) + ((vi)shifted << 23);
  return x < -100.0f * LN2 ? vf{} : (vf)power;
}

INLINE vf exponential(vf x) {
  x = lower(higher(x * LOG2E, -150.0f), 129.0f);
  const vf rounding = splat<vf>(12582912.0f);
  vf shifted = x + rounding;
  vi n = (vi)shifted - (vi)rounding, half = n >> 1;
  vf p = fraction(x - (shifted - rounding));
  return p * (vf)((half + 127) << 23) * (vf)((n - half + 127) << 23);
}

// tanh by expm1, which keeps the precision of small arguments.
INLINE vf tangent(vf x) {
  vf y = 2.0f * lower(higher(x, -10.0f), 10.0f);
  const vf rounding = splat<vf>(12582912.0f);
  vf shifted = y * LOG2E + rounding, n = shifted - rounding;
  vf f = y - n * 0.693145752f - n * 1.42860677e-6f;
  vf p = splat<vf>(1.38888728e-3f);
  p = p * f + 8.36914004e-3f;
  p = p * f + 4.16671381e-2f;
  p = p * f + 1.66665056e-1f;
  p = p * f + 4.99999981e-1f;
  p = (p * f + 1.0f) * f;
  vf power = (vf)((vi)splat<vf>(1.0f) + ((vi)shifted << 23));
  vf e = power * p + (power - 1.0f);
  return e / (e + 2.0f);
}

#define ELEMENTWISE(name, function)                                                    \
  INLINE float name(float x) { return function(x); }                                   \
  INLINE double name(double x) { return function(x); }                                 \
  INLINE vd name(vd x) {                                                               \
    for (int m = 0; m < LANES; m++) x[m] = function(x[m]);                             \
    return x;                                                                          \
  }
#define ELEMENTWISE_LANES(name, function)                                              \
  ELEMENTWISE(name, function)                                                          \
  INLINE vf name(vf x) {                                                               \
    for (int m = 0; m < LANES; m++) x[m] = function(x[m]);                             \
    return x;                                                                          \
  }
ELEMENTWISE_LANES(root, std::sqrt)
ELEMENTWISE_LANES(logarithm, std::log)
ELEMENTWISE_LANES(rounded_up, std::ceil)
ELEMENTWISE_LANES(rounded_down, std::floor)
ELEMENTWISE(exponential, std::exp)
ELEMENTWISE(tangent, std::tanh)
template <class T> INLINE T logistic(T x) { return 1.0f / (1.0f + exponential(-x)); }
template <class T> INLINE T power(T a, T b) {
  if constexpr (sizeof(T) <= 8) return std::pow(a, b);
  else return each([](auto x, auto y) { return std::pow(x, y); }, a, b);
}
template <class V> INLINE V power(V a, typename Element<V>::type b) { return power(a, splat<V>(b)); }

// How numbers are stored.
struct bfloat16 {
  uint16_t bits;
  operator float() const {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
  }
  bfloat16() = default;
  bfloat16(float x) {
    uint32_t wide;
    memcpy(&wide, &x, 4);
    bits = x != x ? 0x7fc0 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  }
};
#if defined(__aarch64__)
typedef __fp16 float16;  // which GCC knows there before version 13
#else
typedef _Float16 float16;
#endif

// A whole number from -128 to 127, held 128 higher: without a sign.
struct biased {
  uint8_t bits;
  operator float() const { return (float)bits - 128.0f; }
};

// Rows of codes: numbers of few bits, and behind the last of them the float that all of them are multiplied with.
struct Code {
  uint8_t bits;
};
template <int NUMBERS, int UNIT> struct CodeOf : Code {
  float scale(int width) const {
    float scale;
    memcpy(&scale, (const char*)this + width / NUMBERS, sizeof(scale));
    return scale * UNIT;
  }
};
struct whole8 : CodeOf<1, 1> {};  // from -127 to 127
struct whole4 : CodeOf<2, 1> {};  // two numbers from -7 to 7, each 8 higher: one of the row's first half, one of its second
struct e4m3 : CodeOf<1, 256> {};  // bits of a half, whose exponents count from 8 less
struct e5m2 : CodeOf<1, 1> {};
template <class T> constexpr bool CODES = std::is_base_of_v<Code, T>;

template <class T> INLINE float norm_of(const T* row, int dim) {
  float sum = 0.0f;
  for (int d = 0; d < dim; d++) sum += (float)row[d] * (float)row[d];
  return std::sqrt(sum);
}
template <class T> INLINE vf norms_of(const T* const* rows, int dim) {
  vf r;
  for (int m = 0; m < LANES; m++) r[m] = norm_of(rows[m], dim);
  return r;
}

// A run-time tensor; an index outside is moved to the border.
struct Table {
  const char* data;
  int64_t size[4], stride[4];
  int64_t within(int axis, int64_t x) const { return std::clamp<int64_t>(x, 0, size[axis] - 1) * stride[axis]; }
  vl within(int axis, vl x) const { return least(most(x, vl{}), splat<vl>(size[axis] - 1)) * stride[axis]; }
  vl within(int axis, vi x) const { return within(axis, __builtin_convertvector(x, vl)); }
  int64_t at() const { return 0; }
  template <int AXIS = 0, class X, class... Rest> INLINE_METHOD auto at(X x, Rest... rest) const {
    if constexpr (sizeof...(rest) > 0) return within(AXIS, x) + at<AXIS + 1>(rest...);
    else return within(AXIS, x);
  }
};
template <class To, class Stored> INLINE To element(const Table& table, int64_t at) {
  return (To)((const Stored*)table.data)[at];
}
template <class To, class Stored> INLINE To element(const Table& table, vl at) {
  To r;
  for (int m = 0; m < LANES; m++) r[m] = (typename Element<To>::type)((const Stored*)table.data)[at[m]];
  return r;
}
template <class To, class Stored, class... Places> INLINE To read(const Table& table, Places... places) {
  return element<To, Stored>(table, table.at(places...));
}

// The sizes and tables of one call.
template <int TABLES> struct ContextOf {
  int64_t batch, heads, kv_heads, q_len, k_len, layer, layers, first_query, first_key;
  Table tables[TABLES];
};
