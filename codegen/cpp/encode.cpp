// Makes codes of the rows of one operand: whole numbers up to LARGEST, and the scales that bring them back.

struct Encoding {  // every field has eight bytes; strides are those of batch, heads and tokens
  const Stored* x;
  uint8_t* codes;         // [batch, heads, tokens, DIM]
  float* scales;          // [batch, heads, tokens], or, by channel, [batch, heads, DIM]
  float* means;           // [batch, heads, DIM], which rows lose first; or null
  const float* others;    // such means of other rows, [batch, other_heads, DIM]; or null
  float* dots;            // [batch, heads, tokens]: what comes back of a row, times these
  const int64_t* places;  // where the tokens stand that share scales, one after the other; or null: as they come
  int64_t batch, heads, tokens, stride[3], place_stride[3];
  int64_t group;          // tokens that share a scale
  int64_t by_channel;     // whether each channel has a scale for all tokens instead
  int64_t other_heads;
  int64_t biased;         // whether codes are held without a sign
  int64_t parallel;
  double fixed;           // the largest number that codes are made for, what is beyond being cut off; or 0: what comes
  int64_t* cut;           // set where that happened
};

constexpr float LEAST = 7.8886090522101181e-31f;  // 2^-100
constexpr int PARTS = (DIM + LANES - 1) / LANES;
typedef int8_t bytes __attribute__((vector_size(LANES)));

struct Row {
  vf part_of[PARTS];
};

INLINE Row row_at(const Stored* x, const Row& mean) {
  Row row;
  UNROLLED for (int n = 0; n < PARTS; n++) row.part_of[n] = part<DIM>(x, n) - mean.part_of[n];
  return row;
}

// Magnitudes are compared by their bits, by which NaN is the greatest.
INLINE vf larger(vf a, vf b) { return (vf)most((vi)a, (vi)b); }
INLINE float largest_of(vf x) {
  const vi bits = (vi)x;
  int32_t found = bits[0];
  for (int m = 1; m < LANES; m++) found = std::max(found, bits[m]);
  return ((vf)splat<vi>(found))[0];
}

INLINE void enlarge(Row& largest, const Row& row) {
  UNROLLED for (int n = 0; n < PARTS; n++)
    largest.part_of[n] = larger(largest.part_of[n], (vf)((vi)row.part_of[n] & INT32_MAX));
}

// Numbers that are not all finite have NaN for a scale, which whatever reads them meets.
template <class T> INLINE T finite(T largest) { return largest < INFINITY ? largest : largest - largest; }

INLINE vf nearest(vf x) {
  for (int m = 0; m < LANES; m++) x[m] = std::nearbyint(x[m]);
  return x;
}

// Writes the codes of a row, of NaN zero. Returns what comes back, before it is scaled, times another row.
template <bool WITHIN> INLINE float encode_row(const Row& row, const Row& inverse, const Row& other, int bias, uint8_t* codes) {
  vf dot = {};
  UNROLLED for (int n = 0; n < PARTS; n++) {
    vf number = row.part_of[n] * inverse.part_of[n];
    if (!WITHIN) {
      number = number == number ? number : vf{};
      number = number > LARGEST ? splat<vf>(LARGEST) : number < -LARGEST ? splat<vf>(-LARGEST) : number;
    }
    const vf code = nearest(number);
    const bytes found = __builtin_convertvector(convert<vi>(code) ^ bias, bytes);
    memcpy(codes + n * LANES, &found, std::min(LANES, DIM - n * LANES));
    dot += code * other.part_of[n];
  }
  return total(dot);
}

INLINE Row row_of(const float* numbers) {
  Row row = {};
  if (numbers) memcpy(&row, numbers, DIM * sizeof(float));
  return row;
}

struct Head {
  const Encoding& call;
  const int64_t number;
  const Stored* x;
  const int64_t* places;
  Row mean, other;
  const Stored* row(int64_t j) const { return x + j * call.stride[2]; }
  int64_t place(int64_t n) const { return places ? places[n * call.place_stride[2]] : n; }
  template <bool WITHIN> INLINE_METHOD void encode(int64_t j, const Row& inverse, float scale) const {
    const int64_t at = number * call.tokens + j;
    const float dot = encode_row<WITHIN>(row_at(row(j), mean), inverse, other, call.biased ? 128 : 0, call.codes + at * DIM);
    if (call.others) call.dots[at] = dot * scale;
  }
};

// In parts, so that a float holds the sum of many rows.
static Row mean_of(const Head& head) {
  constexpr int64_t SOME = 256;
  double sum[DIM] = {};
  for (int64_t start = 0; start < head.call.tokens; start += SOME) {
    Row here = {};
    for (int64_t j = start; j < std::min(start + SOME, head.call.tokens); j++)
      UNROLLED for (int n = 0; n < PARTS; n++) here.part_of[n] += part<DIM>(head.row(j), n);
    for (int d = 0; d < DIM; d++) sum[d] += here.part_of[d / LANES][d % LANES];
  }
  Row mean = {};
  for (int d = 0; d < DIM; d++) mean.part_of[d / LANES][d % LANES] = (float)(sum[d] / head.call.tokens);
  return mean;
}

static void encode_channels(const Head& head) {
  const Encoding& call = head.call;
  Row largest = {}, inverse, scale;
  vi bad = {};
  for (int64_t j = 0; j < call.tokens; j++) enlarge(largest, row_at(head.row(j), head.mean));
  UNROLLED for (int n = 0; n < PARTS; n++) {
    const vf size = finite(larger(largest.part_of[n], splat<vf>(LEAST)));
    inverse.part_of[n] = LARGEST / size, scale.part_of[n] = size / LARGEST;
    bad |= size != size;
  }
  memcpy(call.scales + head.number * DIM, &scale, DIM * sizeof(float));
  const bool whole = !any(bad);
  for (int64_t j = 0; j < call.tokens; j++) {
    if (whole) head.encode<true>(j, inverse, 0.0f);
    else head.encode<false>(j, inverse, 0.0f);
  }
}

// The number that the scale of a group is made for; not of NaN, which nothing cuts off.
static float made_for(const Encoding& call, float largest) {
  if (!call.fixed) return finite(largest);
  if (!(largest <= (float)call.fixed)) __atomic_store_n(call.cut, 1, __ATOMIC_RELAXED);
  return largest == largest ? (float)call.fixed : largest;
}

static void encode_tokens(const Head& head) {
  const Encoding& call = head.call;
  for (int64_t start = 0; start < call.tokens; start += call.group) {
    const int64_t stop = std::min(start + call.group, call.tokens);
    Row largest = {}, inverse;
    for (int64_t n = start; n < stop; n++) enlarge(largest, row_at(head.row(head.place(n)), head.mean));
    vf size = splat<vf>(LEAST);
    UNROLLED for (int n = 0; n < PARTS; n++) size = larger(size, largest.part_of[n]);
    const float all = made_for(call, largest_of(size)), scale = all / LARGEST;
    const bool within = !call.fixed && scale == scale;
    UNROLLED for (int n = 0; n < PARTS; n++) inverse.part_of[n] = splat<vf>(LARGEST / all);
    for (int64_t n = start; n < stop; n++) {
      const int64_t j = head.place(n);
      if (within) head.encode<true>(j, inverse, scale);
      else head.encode<false>(j, inverse, scale);
      call.scales[head.number * call.tokens + j] = scale;
    }
  }
}

static void encode_head(const Encoding& call, int64_t b, int64_t h) {
  const float* others = call.others;
  if (others) others += (b * call.other_heads + h / (call.heads / call.other_heads)) * DIM;
  const int64_t* places = call.places;
  if (places) places += b * call.place_stride[0] + h * call.place_stride[1];
  Head head = {call, b * call.heads + h, call.x + b * call.stride[0] + h * call.stride[1], places, {}, row_of(others)};
  if (call.means) {
    head.mean = mean_of(head);
    memcpy(call.means + head.number * DIM, &head.mean, DIM * sizeof(float));
  }
  if (call.by_channel) encode_channels(head);
  else encode_tokens(head);
}

extern "C" void encode(const Encoding* given) {
  const Encoding& call = *given;
#pragma omp parallel for schedule(dynamic, 1) if (call.parallel)
  for (int64_t n = 0; n < call.batch * call.heads; n++) encode_head(call, n / call.heads, n % call.heads);
}
