// A state that fades as a whole: queries of a tile stand in lanes, beside as many keys, and what is left of a weight is a factor.

struct alignas(64) State {  // the sums of features * v, and of features, as of the log of the last key
  float sums[PANELS][DIM * TILE], of_features[padded(DIM)];
  double since;
  int64_t keys;  // which a segment adds
};

struct alignas(64) Work {  // whole vectors come before pointers
  State state;
  float q[DIM * TILE], scores[(CHUNK + ROWS) * TILE], out[PANELS * TILE * TILE];
  float keys[CHUNK][padded(DIM)], values[PANELS][CHUNK * TILE];
  int32_t past[3 * TILE];  // no bits for what is ahead, then all
  vf mass[VECTORS];
  double of_query[TILE], of_key[CHUNK];  // logs
  const float *key_rows[CHUNK + ROWS], *state_rows[DIM];
  Work() {
    for (int m = 0; m < 3 * TILE; m++) past[m] = m < TILE ? 0 : -1;
  }
};
static_assert(CHUNK == TILE, "queries of a tile meet the keys beside them");

INLINE double log_at(const Call& call, const Task& task, const Log& log, int64_t n) {
  if (!log.data) return 0.0;
  return call.sign * log.data[task.b * log.stride[0] + task.h * log.stride[1] + n * log.stride[2]];
}

// What is left after a log went from `before` to `now`: never more than there was, and NaN stays NaN.
INLINE float left_of(double now, double before) { return std::exp(std::min((float)(now - before), 0.0f)); }
INLINE vf left_of(const double* now, double before) {
  vd x;
  memcpy(&x, now, sizeof(x));
  return weight_of(least(vf{}, convert<vf>(x - before)));
}

// The state of no keys, of which this one will be the first.
INLINE void clear(const Call& call, const Task& task, State& state, int64_t first) {
  memset(state.sums, 0, sizeof(state.sums)), memset(state.of_features, 0, sizeof(state.of_features));
  state.since = first < call.context.k_len ? log_at(call, task, call.at_key, first) : 0.0;
}

// A state of later keys joins.
INLINE void join(const Call& call, State& state, const State& later) {
  const float kept = left_of(later.since, state.since);
  for (int p = 0; p < PANELS; p++)
    for (int d = 0; d < DIM * TILE; d++) state.sums[p][d] = state.sums[p][d] * kept + later.sums[p][d];
  for (int d = 0; d < DIM; d++) state.of_features[d] = state.of_features[d] * kept + later.of_features[d];
  state.since = later.since;
}

// Up to CHUNK keys from `first` on: their features, and their values in panels.
INLINE int take(const Call& call, const Task& task, Work& work, int64_t first, int64_t stop, int skipped = 0) {
  const Stored* k = call.k + task.b * call.k_stride[0] + task.h / call.sharing[1] * call.k_stride[1];
  const Stored* v = call.v + task.b * call.v_stride[0] + task.h / call.sharing[2] * call.v_stride[1];
  const int count = std::clamp<int64_t>(stop - first, 0, CHUNK);
  for (int j = 0; j < count; j++) {
    const Stored *key = k + (first + j) * call.k_stride[2], *value = v + (first + j) * call.v_stride[2];
    work.of_key[j] = log_at(call, task, call.at_key, first + j);
    if (!exists(call, task, first + j)) {
      memset(work.keys[j], 0, sizeof(work.keys[j]));
      for (int p = 0; p < PANELS; p++) memset(work.values[p] + j * TILE, 0, TILE * sizeof(float));
      continue;
    }
    float room[padded(DIM)] = {};
    for (int d = 0; d < DIM; d++) room[d] = (float)key[d];
    for (int d = 0; d < DIM; d += LANES) {
      vf x;
      memcpy(&x, room + d, sizeof(x));
      x = feature_of_key(task, x);
      memcpy(work.keys[j] + d, &x, sizeof(x));
    }
    for (int p = 0; p < PANELS; p++)
      for (int d = 0; d < TILE; d++) work.values[p][j * TILE + d] = p * TILE + d < VALUE_DIM ? (float)value[p * TILE + d] : 0.0f;
  }
  for (int j = 0; j < CHUNK + ROWS; j++) work.key_rows[j] = work.keys[std::clamp(count - 1, 0, j)];
  return count;
}

// What has been taken joins the state, which then is that of the last of these keys.
INLINE void remember(const Call& call, Work& work, int count) {
  if (!count) return;
  const double now = work.of_key[count - 1];
  const float kept = left_of(now, work.state.since);
  vf keep[VECTORS];
  UNROLLED for (int n = 0; n < VECTORS; n++) keep[n] = splat<vf>(kept);
  for (int d = 0; d < DIM; d++) work.state.of_features[d] *= kept;
  for (int j = 0; j < count; j++) {
    const float fade = call.at_key.data ? left_of(now, work.of_key[j]) : 1.0f;
    for (int d = 0; d < DIM; d++) work.state.of_features[d] += work.keys[j][d] * fade;
    if (fade != 1.0f)
      for (int p = 0; p < PANELS; p++)
        for (int d = 0; d < TILE; d++) work.values[p][j * TILE + d] *= fade;
  }
  for (int p = 0; p < PANELS; p++) accumulate<DIM, 0, VECTORS>(work.key_rows, count, work.values[p], work.state.sums[p], keep);
  work.state.since = now;
}

INLINE void pack_queries(const Call& call, const Task& task, Work& work, int64_t first, int count) {
  const Stored* q = call.q + task.b * call.q_stride[0] + task.h / call.sharing[0] * call.q_stride[1];
  const Stored* rows[TILE];
  for (int m = 0; m < TILE; m++) {
    const int64_t query = first + std::min(m, count - 1);
    rows[m] = q + query * call.q_stride[2];
    work.of_query[m] = log_at(call, task, call.at_query, query);
  }
  pack<DIM>(rows, work.q);
  const vf scale = scale_of(task);
  for (int d = 0; d < DIM; d++) UNROLLED for (int n = 0; n < VECTORS; n++) {
    vf* x = at(work.q, d, n);
    *x = feature_of_query(task, *x) * scale;
  }
}

// The queries of a tile meet the state.
INLINE void meet_state(Work& work) {
  const vf nothing[VECTORS] = {};
  for (int p = 0; p < PANELS; p++) {
    for (int d = 0; d < DIM; d++) work.state_rows[d] = work.state.sums[p] + d * TILE;
    accumulate<TILE, 0, VECTORS>(work.state_rows, DIM, work.q, work.out + p * TILE * TILE, nothing);
  }
  UNROLLED for (int n = 0; n < VECTORS; n++) work.mass[n] = vf{};
  for (int d = 0; d < DIM; d++) UNROLLED for (int n = 0; n < VECTORS; n++) work.mass[n] += work.state.of_features[d] * *at(work.q, d, n);
}

// And the keys beside them, the first of which stands `skipped` tokens ahead of the first query.
INLINE void meet_keys(const Call& call, Work& work, int count, int skipped) {
  products<0, VECTORS>(work.key_rows, count, DIM, work.q, work.scores);
  vf keep[VECTORS];
  UNROLLED for (int n = 0; n < VECTORS; n++) {
    keep[n] = call.at_key.data ? left_of(work.of_query + n * LANES, work.state.since) : splat<vf>(1.0f);
    work.mass[n] *= keep[n];
  }
  for (int j = 0; j < count; j++) UNROLLED for (int n = 0; n < VECTORS; n++) {
    vi past;
    memcpy(&past, work.past + TILE + n * LANES - j - skipped, sizeof(past));
    vf* score = at(work.scores, j, n);
    if (call.at_key.data) *score *= left_of(work.of_query + n * LANES, work.of_key[j]);
    *score = (vf)((vi)*score & past);
    work.mass[n] += *score;
  }
  const float* rows[CHUNK];
  for (int p = 0; p < PANELS; p++) {
    for (int j = 0; j < count; j++) rows[j] = work.values[p] + j * TILE;
    accumulate<TILE, 0, VECTORS>(rows, count, work.scores, work.out + p * TILE * TILE, keep);
  }
}

INLINE void meet(const Call& call, const Task& task, Work& work, int keys, int skipped) {
  meet_state(work);
  meet_keys(call, work, keys, skipped);
}

INLINE void finish(const Call& call, const Task& task, Work& work, int64_t first, int count, int64_t first_key) {
  unpack<PANELS * TILE>(work.out);
  float* mass = mass_of(call, task, first);
  vf factors[VECTORS];
  UNROLLED for (int n = 0; n < VECTORS; n++) factors[n] = factor_of(task, work.mass[n]);
  for (int m = 0; m < count; m++) {
    const bool sees = std::min(first + m + call.offset, call.context.k_len - 1) >= first_key;
    if (mass) mass[m] = sees ? work.mass[m / LANES][m % LANES] : 0.0f;
    Stored* row = call.out + task.b * call.out_stride[0] + task.h * call.out_stride[1] + (first + m) * call.out_stride[2];
    const float f = factors[m / LANES][m % LANES];
    for (int d = 0; d < VALUE_DIM; d += LANES) store(row + d, sees ? row_of(work.out, m, d) * f : vf{}, VALUE_DIM - d);
  }
}
