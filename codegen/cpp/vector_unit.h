// Rows as vectors meet them: `along` the numbers of a row, for products with lanes, and `across` the rows, for sums over them.

// Rows as floats: where they lie, or converted.
INLINE const float* floats(const float* stored, float*, int) { return stored; }
template <class T> INLINE const float* floats(const T* stored, float* room, int dim) {
  for (int d = 0; d < dim; d++) room[d] = (float)stored[d];
  return room;
}

// Pointers to rows as floats, with as many more as `products` may read.
template <int WIDTH, class T = Stored> struct Data {
  const float* row[CHUNK + ROWS];
  alignas(64) float room[std::is_same_v<T, float> ? 0 : CHUNK * WIDTH];
  INLINE_METHOD void take(const T* const* stored, int count) {
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
  INLINE_METHOD const Pair* const* along() const { return row; }
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
  INLINE_METHOD const Pair* const* across() const { return row; }
};

template <int WIDTH> struct PairedBoth {
  PairedAlong<WIDTH> in_place;
  PairedAcross<WIDTH> copied;
  INLINE_METHOD void take(const Stored* const* stored, int count) { in_place.take(stored, count), copied.take(stored, count); }
  INLINE_METHOD const Pair* const* along() const { return in_place.along(); }
  INLINE_METHOD const Pair* const* across() const { return copied.across(); }
};

// In quads, too, K's rows are read where they lie, and V's are put together, from four rows.
template <int WIDTH> struct QuadsAlong {
  const Quad* row[CHUNK + ROWS];
  INLINE_METHOD void take(const biased* const* stored, int count) {
    for (int j = 0; j < count + ROWS; j++) row[j] = (const Quad*)stored[std::min(j, count - 1)];
  }
  INLINE_METHOD const Quad* const* along() const { return row; }
};

template <int WIDTH> struct QuadsAcross {
  const SignedQuad* row[CHUNK / 4 + 1];
  alignas(64) SignedQuad room[(CHUNK / 4 + 1) * WIDTH];
  INLINE_METHOD void take(const int8_t* const* stored, int count) {
    static const int8_t nothing[WIDTH] = {};
    for (int j = 0; j < count; j += 4) {
      const uint8_t* of[4];
      UNROLLED for (int r = 0; r < 4; r++) of[r] = (const uint8_t*)(j + r < count ? stored[j + r] : nothing);
      SignedQuad* to = room + j / 4 * WIDTH;
      row[j / 4] = to;
      for (int d = 0; d < WIDTH; d++)
        to[d].all = of[0][d] | (uint32_t)of[1][d] << 8 | (uint32_t)of[2][d] << 16 | (uint32_t)of[3][d] << 24;
    }
  }
  INLINE_METHOD const SignedQuad* const* across() const { return row; }
};

template <int WIDTH> using Along =
    std::conditional_t<STEP == 4, QuadsAlong<WIDTH>, std::conditional_t<STEP == 2, PairedAlong<WIDTH>, Data<WIDTH>>>;
template <int WIDTH> using Across = std::conditional_t<
    VALUE_STEP == 4, QuadsAcross<WIDTH>, std::conditional_t<VALUE_STEP == 2, PairedAcross<WIDTH>, Data<WIDTH, Value>>>;
template <int WIDTH> using Both = std::conditional_t<PAIRED, PairedBoth<WIDTH>, Data<WIDTH>>;

struct Unit {
  Unit() {}  // vectors are always ready
};
