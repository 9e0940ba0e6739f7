struct Call {  // every field has eight bytes; strides are those of batch, heads and tokens
  const Stored *q, *k;
  const Value* v;
  Output* out;
  const float* value_scale;  // of each channel, [batch, kv heads, channels], or null
  float* totals;             // what is kept of each query, or null
  int64_t gradients;         // what that is: 0 the log-sum-exp, 1 what gradients need, 2 both
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  int64_t parallel;          // whether there is work for threads
  Visits visits;
  Context context;

  Output* out_row(const Task& task, int64_t i) const {
    return out + task.b * out_stride[0] + task.h * out_stride[1] + i * out_stride[2];
  }
  const float* scale_of(const Task& task) const {
    return value_scale ? value_scale + (task.b * context.kv_heads + task.kv) * VALUE_DIM : nullptr;
  }
  // The log-sum-exps of all queries; behind them, or alone, for gradients: the peaks (-∞ if no key is seen), and then the masses.
  void keep(const Task& task, int64_t i, float total, float peak, float mass) const {
    if (!totals) return;
    const int64_t queries = context.batch * context.heads * context.q_len;
    float* of_query = totals + (task.b * context.heads + task.h) * context.q_len + i;
    if (gradients != 1) *of_query = total, of_query += queries;
    if (gradients) of_query[0] = peak, of_query[queries] = mass;
  }
};

INLINE vf weight_from(const Task& task, const Lanes& lanes, int n, vf score) {
  // <weight>
}

// What every sum of weight * v is multiplied with in the end.
INLINE vf factor_of(const Task& task, const Lanes& lanes, int n, vf mass, vf peak) {
  // <factor>
}

INLINE vf total_of(const Task& task, const Lanes& lanes, int n, vf mass, vf peak) {
  // <total>
}

struct alignas(64) Work {
  float q[deep(DIM) * TILE], out[padded(VALUE_DIM) * TILE], scores[(CHUNK + ROWS) * TILE];
  vf peak[VECTORS], mass[VECTORS];
  vi sees[VECTORS];
  Lanes queries;
  Rows keys[VECTORS][VECTORS + 1];  // collected for the vectors from … to
  const Value* values[VECTORS][VECTORS + 1][CHUNK];
  vi start[VECTORS];  // of sums of whole numbers
  Along<DIM> k;
  Across<VALUE_DIM> v;
};

// The keys that have been collected for some vectors of queries meet these.
template <int FROM, int TO> static void meet(const Task& task, Work& work) {
  Rows& keys = work.keys[FROM][TO];
  const int count = keys.count;
  prepare(task, keys);
  work.k.take(keys.data, count);
  work.v.take(work.values[FROM][TO], count);
  products<FROM, TO>(work.k.along(), count, DIM / STEP, work.q, work.scores, work.start);

  vf peak[VECTORS], keep[VECTORS], mass[VECTORS] = {};
  UNROLLED for (int n = FROM; n < TO; n++) peak[n] = work.peak[n], keep[n] = splat<vf>(1.0f);
  for (int j = 0; j < count; j++) UNROLLED for (int n = FROM; n < TO; n++) {
    vf* score = at(work.scores, j, n);
    vf x = score_of(task, work.queries, n, keys, j, *score);
    if (keys.mixed[j]) x = visible(task, work.queries, n, keys, j) ? x : splat<vf>(-INFINITY);
    *score = x;
    if (PEAK) peak[n] = most(peak[n], x);
    else work.sees[n] |= x != -INFINITY;
  }
  if (PEAK) {
    vf base[VECTORS];
    UNROLLED for (int n = FROM; n < TO; n++) {
      base[n] = peak[n] == -INFINITY ? vf{} : peak[n];
      keep[n] = weight_of(work.peak[n] - base[n]);
      work.peak[n] = peak[n];
    }
    for (int j = 0; j < count; j++) UNROLLED for (int n = FROM; n < TO; n++) {
      vf* score = at(work.scores, j, n);
      *score = weight_of(*score - base[n]);
      mass[n] += *score;
      // <drop>
    }
  } else {
    for (int j = 0; j < count; j++) UNROLLED for (int n = FROM; n < TO; n++) {
      vf* score = at(work.scores, j, n);
      *score = *score == -INFINITY ? vf{} : weight_from(task, work.queries, n, *score);
      mass[n] += *score;
      // <drop>
    }
  }
  UNROLLED for (int n = FROM; n < TO; n++) work.mass[n] = work.mass[n] * keep[n] + mass[n];
  const int steps = VALUE_STEP == 4 ? quad_up<FROM, TO>(work.scores, count) : pair_up<FROM, TO>(work.scores, count);
  accumulate<VALUE_DIM, FROM, TO>(work.v.across(), steps, work.scores, work.out, keep);
  keys.count = 0;
}

// Where the queries of a tile stand: those that are `wanted` are still to be written.
struct Places {
  int count;
  int64_t of[TILE];
  bool wanted[TILE];
};

// Write the queries that have seen a key. Returns whether some have not.
INLINE bool finish(const Call& call, const Task& task, Work& work, Places& places) {
  vf factor[VECTORS], total[VECTORS] = {};
  vi sees[VECTORS];
  UNROLLED for (int n = 0; n < VECTORS; n++) {
    work.peak[n] = work.mass[n] == work.mass[n] ? work.peak[n] : work.mass[n];  // no score of NaN is the largest
    sees[n] = PEAK ? work.peak[n] != -INFINITY : work.sees[n];
    factor[n] = factor_of(task, work.queries, n, work.mass[n], work.peak[n]);
    if (call.totals && call.gradients != 1) total[n] = total_of(task, work.queries, n, work.mass[n], work.peak[n]);
  }
  unpack<VALUE_DIM>(work.out);
  bool left = false;
  for (int m = 0; m < places.count; m++) {
    if (!places.wanted[m]) continue;
    if (!sees[m / LANES][m % LANES]) {
      left = true;
      continue;
    }
    places.wanted[m] = false;
    Output* row = call.out_row(task, places.of[m]);
    const float *scale = call.scale_of(task), f = factor[m / LANES][m % LANES] / (VALUE_STEP == 4 ? MOST_WEIGHT : 1.0f);
    for (int d = 0; d < VALUE_DIM; d += LANES) {
      vf x = row_of(work.out, m, d) * f;
      if (scale) x *= part<VALUE_DIM>(scale, d / LANES);
      store(row + d, x, VALUE_DIM - d);
    }
    const vf peak = PEAK ? work.peak[m / LANES] : vf{};
    call.keep(task, places.of[m], total[m / LANES][m % LANES], peak[m % LANES], work.mass[m / LANES][m % LANES]);
  }
  return left;
}

// What a query gets that sees no key.
INLINE void fill(const Call& call, const Task& task, const Work& work, const Places& places) {
  float filling[VALUE_DIM];
  fill(call, task, filling);
  const float* scale = call.scale_of(task);
  for (int d = 0; scale && d < VALUE_DIM; d++) filling[d] *= scale[d];
  for (int m = 0; m < places.count; m++) {
    if (!places.wanted[m]) continue;
    Output* row = call.out_row(task, places.of[m]);
    for (int d = 0; d < VALUE_DIM; d++) row[d] = (Output)filling[d];
    // A sink counts in a total although no key is seen.
    const vf total = call.totals ? total_of(task, work.queries, m / LANES, vf{}, vf{}) : vf{};
    call.keep(task, places.of[m], total[m % LANES], -INFINITY, 0.0f);
  }
}

// Let a tile of queries meet what `each` gives: calls of meet(first vector, last vector + 1, start, stop, mixed).
template <class F> INLINE void gather(const Call& call, const Task& task, Work& work, F each) {
  const Stored* k = call.k + task.b * call.k_stride[0] + task.kv * call.k_stride[1];
  const Value* v = call.v + task.b * call.v_stride[0] + task.kv * call.v_stride[1];
  memset(work.out, 0, sizeof(work.out));
  UNROLLED for (int n = 0; n < VECTORS; n++) work.peak[n] = splat<vf>(-INFINITY), work.mass[n] = vf{}, work.sees[n] = vi{};
  auto meet_them = [&](int from, int to) {
    with_vectors(from, to, [&](auto range) { meet<range.from, range.to>(task, work); });
  };
  each([&](int from, int to, int64_t start, int64_t stop, bool mixed) {
    Rows& keys = work.keys[from][to];
    for (int64_t j = start; j < stop; j++) {
      const int64_t place = call.visits.row(j);
      keys.row[keys.count] = place;
      keys.mixed[keys.count] = mixed;
      keys.data[keys.count] = k + place * call.k_stride[2];
      work.values[from][to][keys.count] = v + place * call.v_stride[2];
      fetch<DIM>(keys.data[keys.count]), fetch<VALUE_DIM>(work.values[from][to][keys.count]);
      if (++keys.count == CHUNK) meet_them(from, to);
    }
  });
  for (int from = 0; from < VECTORS; from++)
    for (int to = from + 1; to <= VECTORS; to++)
      if (work.keys[from][to].count) meet_them(from, to);
}

INLINE void attend(const Call& call, const Task& task, Work& work, int64_t member, int64_t tile) {
  const int64_t first = tile * TILE;
  const Stored* q = call.q + task.b * call.q_stride[0] + task.h * call.q_stride[1];
  Places places = {(int)std::min<int64_t>(TILE, call.context.q_len - first)};
  for (int m = 0; m < TILE; m++) {
    places.of[m] = call.visits.lane(first + std::min(m, places.count - 1));
    places.wanted[m] = true;
    work.queries.lane[m / LANES][m % LANES] = places.of[m];
    work.queries.data[m] = q + places.of[m] * call.q_stride[2];
  }
  pack<DIM>(work.queries.data, work.q);
  if (STEP == 4) sign<DIM>(work.q, work.start);
  prepare(task, work.queries);
  gather(call, task, work, [&](auto meet) { call.visits.each(task.b, member, tile, meet); });
  bool left = finish(call, task, work, places);
  if (left && EMPTY_ROWS == UNMASKED) {
    gather(call, task, work, [&](auto meet) { meet(0, VECTORS, 0, call.context.k_len, false); });
    left = finish(call, task, work, places);
  }
  if (left) fill(call, task, work, places);
}

extern "C" int64_t lanes() { return LANES; }

extern "C" void forward(const Call* given) {
  const Call& call = *given;
  const Context& sizes = call.context;
  const int64_t tiles = (sizes.q_len + TILE - 1) / TILE, members = call.visits.members;
  const int64_t tasks = sizes.batch * members * tiles;
#pragma omp parallel if (call.parallel)
  {
    Unit unit;
    Work* work = new Work;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < tasks; n++) {
      // The last tiles first: under a causal mask they are the long ones.
      const int64_t member = n / tiles % members, tile = tiles - 1 - n % tiles, h = call.visits.head_numbers[member];
      Task task = {sizes, (index_t)(n / tiles / members), (index_t)h, (index_t)(h / (sizes.heads / sizes.kv_heads))};
      prepare(task);
      attend(call, task, *work, member, tile);
    }
    delete work;
  }
}
