// A state each of whose rows fades by itself, or each of whose columns: logs are [tokens][APART]. A few tokens are at work
// together, in rows of numbers, and columns of v in lanes. What is left of something is always at a later token than it came
// from, so that nothing overflows however fast gates close: between two of the few, the product of what each token leaves.

constexpr int APART = COLUMNS ? VALUE_DIM : DIM;
constexpr int FADING = COLUMNS ? PANELS * VECTORS : padded(DIM) / LANES;  // vectors of what fades
constexpr int NUMBERS = padded(DIM) / LANES;                             // of a query or a key
constexpr float WORN = -1.0f;  // the log at which a state is faded: more often, its rounding errors would add up

struct alignas(64) State {
  float sums[PANELS][(DIM + CHUNK) * TILE];  // of features * v; below them, the values of the tokens at work
  vf of_features[NUMBERS];                   // their sums
  double since[FADING * LANES];              // the logs as of which that is
  const double* last;                        // those of the last key
  int64_t keys;                              // which a segment adds
};

struct alignas(64) Work {
  State state;
  vf q[CHUNK][NUMBERS], keys[CHUNK][NUMBERS];
  vf steps[CHUNK][FADING], left[CHUNK][FADING];  // from the token before: a log, and what it leaves
  vf gone[CHUNK][FADING];                        // a log, since that of the state
  vf pairs[CHUNK * CHUNK + padded(CHUNK)];       // products of queries and keys, and of queries and sums of features
  float totals[CHUNK * CHUNK + padded(CHUNK)];
  float rows[CHUNK][padded(DIM + CHUNK)];  // what meets sums, and the values below them
  float out[PANELS][CHUNK * TILE], mass[CHUNK];
  const double *at[CHUNK], *at_query[CHUNK];  // the logs at each place of a key, and those of queries
};

INLINE const double* logs_of(const Task& task, const Log& log, int64_t n) {
  return log.data + task.b * log.stride[0] + task.h * log.stride[1] + n * log.stride[2];
}
INLINE vd logs(const double* row, int n) {
  vd x = {};
  if ((n + 1) * LANES <= APART) memcpy(&x, row + n * LANES, sizeof(x));
  else if (n * LANES < APART) memcpy(&x, row + n * LANES, sizeof(double) * (APART % LANES));
  return x;
}
// How far logs went: never up, and NaN stays NaN.
INLINE vf went(const Call& call, const double* now, const double* before, int n) {
  return least(vf{}, convert<vf>(logs(now, n) - logs(before, n)) * (float)call.sign);
}

INLINE void clear(const Call& call, const Task& task, State& state, int64_t first) {
  static const double NOTHING[FADING * LANES] = {};
  memset(state.sums, 0, sizeof(state.sums)), memset(state.of_features, 0, sizeof(state.of_features));
  state.last = first < call.context.k_len ? logs_of(task, call.at_key, first) : NOTHING;
  UNROLLED for (int n = 0; n < FADING; n++) {
    const vd since = logs(state.last, n);
    memcpy(state.since + n * LANES, &since, sizeof(since));
  }
}

INLINE void join(const Call& call, State& state, const State& later) {
  float kept[FADING * LANES];
  for (int n = 0; n < FADING; n++) store(kept + n * LANES, weight_of(went(call, later.since, state.since, n)));
  for (int p = 0; p < PANELS; p++)
    for (int d = 0; d < DIM; d++)
      for (int lane = 0; lane < TILE; lane++) {
        float& sum = state.sums[p][d * TILE + lane];
        sum = sum * kept[COLUMNS ? p * TILE + lane : d] + later.sums[p][d * TILE + lane];
      }
  for (int n = 0; n < NUMBERS && !COLUMNS; n++) state.of_features[n] = state.of_features[n] * load(kept + n * LANES) + later.of_features[n];
  memcpy(state.since, later.since, sizeof(state.since));
  state.last = later.last;
}

// Features of a query or a key, with zeros behind them.
template <class F> INLINE void map_into(vf* to, const Stored* row, F feature) {
  UNROLLED for (int n = 0; n < NUMBERS; n++) {
    to[n] = feature(part<DIM>(row, n));
    if ((n + 1) * LANES > DIM) to[n] = pick(numbers() < DIM - n * LANES, to[n], vf{});
  }
}

// Up to CHUNK keys from `first` on, which stand behind `skipped` places; where nothing stands, nothing fades.
INLINE int take(const Call& call, const Task& task, Work& work, int64_t first, int64_t stop, int skipped = 0) {
  const Stored* k = call.k + task.b * call.k_stride[0] + task.h / call.sharing[1] * call.k_stride[1];
  const Stored* v = call.v + task.b * call.v_stride[0] + task.h / call.sharing[2] * call.v_stride[1];
  const int count = std::clamp<int64_t>(stop - first, 0, CHUNK - skipped);
  const double* before = work.state.last;
  vf gone[FADING];
  for (int n = 0; n < FADING; n++) gone[n] = went(call, before, work.state.since, n);
  for (int m = 0; m < CHUNK; m++) {
    const int64_t key = first + m - skipped;
    const bool stands = m >= skipped && m < skipped + count, shown = stands && exists(call, task, key);
    work.at[m] = stands ? logs_of(task, call.at_key, key) : before;
    UNROLLED for (int n = 0; n < FADING; n++) {
      const vf step = went(call, work.at[m], before, n);
      work.steps[m][n] = step, work.left[m][n] = weight_of(step), work.gone[m][n] = gone[n] = gone[n] + step;
    }
    before = work.at[m];
    if (shown) map_into(work.keys[m], k + key * call.k_stride[2], [&](vf x) { return feature_of_key(task, x); });
    else memset(work.keys[m], 0, sizeof(work.keys[m]));
    const Stored* value = v + key * call.v_stride[2];
    UNROLLED for (int n = 0; n < PANELS * VECTORS; n++)
      *at(work.state.sums[n / VECTORS], DIM + m, n % VECTORS) = shown && n * LANES < VALUE_DIM ? part<VALUE_DIM>(value, n) : vf{};
  }
  return count;
}

// What has been taken joins the state.
INLINE void remember(const Call& call, Work& work, int count) {
  if (!count) return;
  State& state = work.state;
  vf kept[FADING];
  UNROLLED for (int n = 0; n < FADING; n++) {
    const vf gone = work.gone[CHUNK - 1][n];
    const vi worn = gone < WORN;
    kept[n] = pick(worn, weight_of(gone), splat<vf>(1.0f));
    vf later = pick(worn, vf{}, -gone);
    for (int m = CHUNK - 1; m >= 0; m--) {
      vf& x = COLUMNS ? *at(state.sums[n / VECTORS], DIM + m, n % VECTORS) : work.keys[m][n];
      x *= weight_of(later);
      later += work.steps[m][n];
    }
    const vd since = pick(worn, logs(work.at[CHUNK - 1], n), logs(state.since, n));
    memcpy(state.since + n * LANES, &since, sizeof(since));
  }
  const float* rows[CHUNK];
  for (int m = 0; m < CHUNK; m++) rows[m] = (const float*)work.keys[m];
  for (int p = 0; p < PANELS; p++) {
    if constexpr (COLUMNS) accumulate<DIM, 0, VECTORS>(rows, CHUNK, state.sums[p] + DIM * TILE, state.sums[p], kept + p * VECTORS);
    else accumulate<DIM, 0, VECTORS>(rows, CHUNK, state.sums[p] + DIM * TILE, state.sums[p], (const float*)kept);
  }
  for (int n = 0; n < NUMBERS && !COLUMNS; n++) {
    state.of_features[n] *= kept[n];
    for (int m = 0; m < CHUNK; m++) state.of_features[n] += work.keys[m][n];
  }
  state.last = work.at[CHUNK - 1];
}

INLINE void pack_queries(const Call& call, const Task& task, Work& work, int64_t first, int count) {
  const Stored* q = call.q + task.b * call.q_stride[0] + task.h / call.sharing[0] * call.q_stride[1];
  const vf scale = scale_of(task);
  for (int m = 0; m < CHUNK; m++) {
    const int64_t query = first + std::min(m, count - 1);
    map_into(work.q[m], q + query * call.q_stride[2], [&](vf x) { return feature_of_query(task, x) * scale; });
    work.at_query[m] = logs_of(task, call.at_query, query);
    if (!COLUMNS && work.at_query[m] != work.at[m])
      UNROLLED for (int n = 0; n < NUMBERS; n++) work.q[m][n] *= weight_of(went(call, work.at_query[m], work.at[m], n));
  }
}

// The products of each query with the keys up to its own place.
INLINE void meet_keys(Work& work) {
  for (int m = 0; m < CHUNK; m++) {
    vf x[NUMBERS];
    UNROLLED for (int n = 0; n < NUMBERS; n++) x[n] = work.q[m][n];
    for (int j = CHUNK - 1; j >= 0; j--) {
      vf sum = {};
      if (j <= m) UNROLLED for (int n = 0; n < NUMBERS; n++) {
        sum += x[n] * work.keys[j][n];
        if constexpr (!COLUMNS) x[n] *= work.left[j][n];
      }
      work.pairs[m * CHUNK + j] = sum;
    }
  }
}

INLINE void total_pairs(Work& work) {
  for (int n = 0; n < CHUNK * CHUNK + padded(CHUNK); n += LANES) store(work.totals + n, totals_of(work.pairs + n));
}

// Queries meet the state, and beside it, by their products with keys, the values of the few.
INLINE void meet_rows(Work& work) {
  for (int m = 0; m < padded(CHUNK); m++) {
    vf sum = {};
    if (m < CHUNK) UNROLLED for (int n = 0; n < NUMBERS; n++) {
      const vf x = work.q[m][n] * weight_of(work.gone[m][n]);
      store(work.rows[m] + n * LANES, x);
      sum += x * work.state.of_features[n];
    }
    work.pairs[CHUNK * CHUNK + m] = sum;
  }
  total_pairs(work);
  const float* rows[CHUNK];
  for (int m = 0; m < CHUNK; m++) {
    rows[m] = work.rows[m];
    work.mass[m] = work.totals[CHUNK * CHUNK + m];
    for (int j = 0; j < CHUNK; j++) {
      const float weight = work.totals[m * CHUNK + j];
      work.rows[m][DIM + j] = weight, work.mass[m] += weight;
    }
  }
  for (int p = 0; p < PANELS; p++) products<0, VECTORS>(rows, CHUNK, DIM + CHUNK, work.state.sums[p], work.out[p]);
}

INLINE void meet_columns(const Call& call, Work& work) {
  for (int m = 0; m < padded(CHUNK); m++) work.pairs[CHUNK * CHUNK + m] = vf{};
  total_pairs(work);
  const float* rows[CHUNK];
  for (int m = 0; m < CHUNK; m++) rows[m] = (const float*)work.q[m];
  for (int p = 0; p < PANELS; p++) products<0, VECTORS>(rows, CHUNK, DIM, work.state.sums[p], work.out[p]);
  for (int m = 0; m < CHUNK; m++) UNROLLED for (int n = 0; n < FADING; n++) {
    vf near = {};
    for (int j = 0; j <= m; j++)
      near = near * work.left[j][n] + work.totals[m * CHUNK + j] * *at(work.state.sums[n / VECTORS], DIM + j, n % VECTORS);
    vf* out = at(work.out[n / VECTORS], m, n % VECTORS);
    *out = *out * weight_of(work.gone[m][n]) + near;
    if (work.at_query[m] != work.at[m]) *out *= weight_of(went(call, work.at_query[m], work.at[m], n));
  }
}

INLINE void meet(const Call& call, const Task& task, Work& work, int keys, int skipped) {
  meet_keys(work);
  if constexpr (COLUMNS) meet_columns(call, work);
  else meet_rows(work);
}

INLINE void finish(const Call& call, const Task& task, Work& work, int64_t first, int count, int64_t first_key) {
  float* mass = COLUMNS ? nullptr : mass_of(call, task, first);
  for (int m = 0; m < count; m++) {
    const bool sees = std::min(first + m + call.offset, call.context.k_len - 1) >= first_key;
    if (mass) mass[m] = sees ? work.mass[m] : 0.0f;
    Stored* row = call.out + task.b * call.out_stride[0] + task.h * call.out_stride[1] + (first + m) * call.out_stride[2];
    const vf factor = factor_of(task, splat<vf>(COLUMNS ? 1.0f : work.mass[m]));
    for (int d = 0; d < VALUE_DIM; d += LANES)
      store(row + d, sees ? *at(work.out[d / TILE], m, d % TILE / LANES) * factor : vf{}, VALUE_DIM - d);
  }
}
