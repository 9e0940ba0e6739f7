// Linear attention: keys and values are added up to a state that stays in the cache, and that a tile of queries meets at once.

struct Task {  // one head of one row of the batch
  const Context& call;
  index_t b, h, kv;
  // <per task: fields>
};

INLINE void prepare(Task& task) {
  // <per task: values>
}

INLINE vf feature_of_query(const Task& task, vf x) {
  // <feature of a query>
}

INLINE vf feature_of_key(const Task& task, vf x) {
  // <feature of a key>
}

INLINE vf scale_of(const Task& task) {
  // <scale>
}

// What every sum of weight * v is multiplied with in the end.
INLINE vf factor_of(const Task& task, vf mass) {
  // <factor>
}

struct Log {  // running, of a decay; null where nothing decays
  const double* data;
  int64_t stride[3];  // of batch, heads and tokens
};

struct Call {  // every field has eight bytes; strides are those of batch, heads and tokens
  const Stored *q, *k, *v;
  Stored* out;
  float* mass;  // [batch][heads][q_len]; null where nobody asks
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  int64_t sharing[3];       // heads that share one of q, of k, of v
  Log at_query, at_key;
  int64_t sign;             // of the logs
  const uint8_t* shown;     // keys that exist; null: all
  int64_t shown_stride[3];
  int64_t parallel;         // whether there is work for threads
  int64_t segments;         // into which the queries of a head are cut, where heads are fewer than threads
  int64_t offset;           // query i sees keys up to i + offset
  Context context;
};

constexpr int PANELS = (VALUE_DIM + TILE - 1) / TILE;  // of the columns of v

struct alignas(64) Work {  // whole vectors come before pointers
  float state[PANELS][DIM * TILE], sums[padded(DIM)];  // of features * v, and of features
  float q[DIM * TILE], scores[(CHUNK + ROWS) * TILE], out[PANELS * TILE * TILE];
  float keys[CHUNK][padded(DIM)], values[PANELS][CHUNK * TILE];
  float past[3 * TILE];  // 0 for what is ahead, then 1
  vf mass[VECTORS];
  double since, of_query[TILE], of_key[CHUNK];  // logs, of which the first is that of the state
  const float *key_rows[CHUNK + ROWS], *state_rows[DIM];
};
struct alignas(64) Held {  // the state that the keys of a segment leave
  float state[PANELS][DIM * TILE], sums[padded(DIM)];
  double since;
  int64_t keys;  // how many these are
};
static_assert(CHUNK == TILE, "queries of a tile meet the keys beside them");

INLINE double log_at(const Call& call, const Task& task, const Log& log, int64_t n) {
  if (!log.data) return 0.0;
  return call.sign * log.data[task.b * log.stride[0] + task.h * log.stride[1] + n * log.stride[2]];
}
INLINE bool exists(const Call& call, const Task& task, int64_t key) {
  const int64_t* stride = call.shown_stride;
  return !call.shown || call.shown[task.b * stride[0] + task.h * stride[1] + key * stride[2]];
}

// What is left after a log went from `before` to `now`: never more than there was.
INLINE float left_of(double now, double before) { return std::exp(std::min((float)(now - before), 0.0f)); }
INLINE vf left_of(const double* now, double before) {
  vd x;
  memcpy(&x, now, sizeof(x));
  return weight_of(least(convert<vf>(x - before), vf{}));
}

// Up to CHUNK keys from `first` on: their features, and their values in panels.
INLINE int take(const Call& call, const Task& task, Work& work, int64_t first, int64_t stop) {
  const Stored* k = call.k + task.b * call.k_stride[0] + task.h / call.sharing[1] * call.k_stride[1];
  const Stored* v = call.v + task.b * call.v_stride[0] + task.h / call.sharing[2] * call.v_stride[1];
  const int count = std::min<int64_t>(CHUNK, stop - first);
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
  for (int j = 0; j < CHUNK + ROWS; j++) work.key_rows[j] = work.keys[std::min(j, count - 1)];
  return count;
}

// What has been taken joins the state, which then is that of the last of these keys.
INLINE void remember(const Call& call, Work& work, int count) {
  if (!count) return;
  const double now = work.of_key[count - 1];
  const float kept = left_of(now, work.since);
  vf keep[VECTORS];
  UNROLLED for (int n = 0; n < VECTORS; n++) keep[n] = splat<vf>(kept);
  for (int d = 0; d < DIM; d++) work.sums[d] *= kept;
  for (int j = 0; j < count; j++) {
    const float fade = call.at_key.data ? left_of(now, work.of_key[j]) : 1.0f;
    for (int d = 0; d < DIM; d++) work.sums[d] += work.keys[j][d] * fade;
    if (fade != 1.0f)
      for (int p = 0; p < PANELS; p++)
        for (int d = 0; d < TILE; d++) work.values[p][j * TILE + d] *= fade;
  }
  for (int p = 0; p < PANELS; p++) accumulate<DIM, 0, VECTORS>(work.key_rows, count, work.values[p], work.state[p], keep);
  work.since = now;
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
    for (int d = 0; d < DIM; d++) work.state_rows[d] = work.state[p] + d * TILE;
    accumulate<TILE, 0, VECTORS>(work.state_rows, DIM, work.q, work.out + p * TILE * TILE, nothing);
  }
  UNROLLED for (int n = 0; n < VECTORS; n++) work.mass[n] = vf{};
  for (int d = 0; d < DIM; d++) UNROLLED for (int n = 0; n < VECTORS; n++) work.mass[n] += work.sums[d] * *at(work.q, d, n);
}

// And the keys beside them, the first of which stands `skipped` tokens ahead of the first query.
INLINE void meet_keys(const Call& call, Work& work, int count, int skipped) {
  products<0, VECTORS>(work.key_rows, count, DIM, work.q, work.scores);
  vf keep[VECTORS];
  UNROLLED for (int n = 0; n < VECTORS; n++) {
    keep[n] = call.at_key.data ? left_of(work.of_query + n * LANES, work.since) : splat<vf>(1.0f);
    work.mass[n] *= keep[n];
  }
  for (int j = 0; j < count; j++) UNROLLED for (int n = 0; n < VECTORS; n++) {
    vf left;
    memcpy(&left, work.past + TILE + n * LANES - j - skipped, sizeof(vf));
    if (call.at_key.data) left *= left_of(work.of_query + n * LANES, work.of_key[j]);
    vf* score = at(work.scores, j, n);
    *score *= left;
    work.mass[n] += *score;
  }
  const float* rows[CHUNK];
  for (int p = 0; p < PANELS; p++) {
    for (int j = 0; j < count; j++) rows[j] = work.values[p] + j * TILE;
    accumulate<TILE, 0, VECTORS>(rows, count, work.scores, work.out + p * TILE * TILE, keep);
  }
}

INLINE void finish(const Call& call, const Task& task, Work& work, int64_t first, int count, int64_t first_key) {
  unpack<PANELS * TILE>(work.out);
  float* mass = call.mass ? call.mass + ((int64_t)task.b * call.context.heads + task.h) * call.context.q_len + first : nullptr;
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

// How many keys the state holds that the tile meets which begins with this query.
INLINE int64_t keys_before(const Call& call, int64_t first) {
  return std::clamp<int64_t>(first + call.offset, 0, call.context.k_len);
}

// The query that a segment begins with: the first one of a tile.
INLINE int64_t begins(const Call& call, int64_t segment) {
  const int64_t tiles = (call.context.q_len + TILE - 1) / TILE;
  return std::min(tiles * segment / call.segments * TILE, call.context.q_len);
}

// The state of some keys, from nothing.
INLINE void add_up(const Call& call, const Task& task, Work& work, int64_t first, int64_t stop) {
  memset(work.state, 0, sizeof(work.state)), memset(work.sums, 0, sizeof(work.sums));
  work.since = first < call.context.k_len ? log_at(call, task, call.at_key, first) : 0.0;
  for (int64_t key = first; key < stop; key += CHUNK) remember(call, work, take(call, task, work, key, stop));
}

// The first phase: what the keys leave that the state holds at this segment, and not at the one before it.
INLINE void hold(const Call& call, const Task& task, Work& work, int64_t segment, Held& held) {
  const int64_t first = segment ? keys_before(call, begins(call, segment - 1)) : 0;
  const int64_t stop = keys_before(call, begins(call, segment));
  add_up(call, task, work, first, stop);
  memcpy(held.state, work.state, sizeof(work.state)), memcpy(held.sums, work.sums, sizeof(work.sums));
  held.since = work.since, held.keys = stop - first;
}

// The state of all keys before a segment, from what the first phase left.
INLINE void join(const Call& call, const Task& task, Work& work, int64_t segment, const Held* held) {
  add_up(call, task, work, 0, 0);
  for (const Held* one = held; one <= held + segment; one++) {
    if (!one->keys) continue;
    const float kept = left_of(one->since, work.since);
    for (int p = 0; p < PANELS; p++)
      for (int d = 0; d < DIM * TILE; d++) work.state[p][d] = work.state[p][d] * kept + one->state[p][d];
    for (int d = 0; d < DIM; d++) work.sums[d] = work.sums[d] * kept + one->sums[d];
    work.since = one->since;
  }
}

// The queries of a segment, from the state of all keys before it.
INLINE void attend(const Call& call, const Task& task, Work& work, int64_t segment) {
  const int64_t stop_query = begins(call, segment + 1), k_len = call.context.k_len;
  for (int m = 0; m < 3 * TILE; m++) work.past[m] = m < TILE ? 0.0f : 1.0f;
  int64_t first_key = 0;
  while (first_key < k_len && !exists(call, task, first_key)) first_key++;
  for (int64_t first = begins(call, segment); first < stop_query; first += TILE) {
    const int count = std::min<int64_t>(TILE, stop_query - first);
    const int64_t start = std::max<int64_t>(first + call.offset, 0), stop = std::min(first + call.offset + TILE, k_len);
    pack_queries(call, task, work, first, count);
    meet_state(work);
    const int skipped = std::min<int64_t>(start - (first + call.offset), TILE);  // places without keys, since those begin later
    const int keys = start < stop ? take(call, task, work, start, stop) : 0;
    meet_keys(call, work, keys, skipped);
    finish(call, task, work, first, count, first_key);
    if (first + TILE < stop_query) remember(call, work, keys);
  }
}

INLINE Task task_of(const Context& sizes, int64_t n) {
  const int64_t h = n % sizes.heads;
  Task task = {sizes, (index_t)(n / sizes.heads), (index_t)h, (index_t)(h / (sizes.heads / sizes.kv_heads))};
  prepare(task);
  return task;
}

extern "C" void states(const Call* given) {
  const Call& call = *given;
  const int64_t segments = call.segments, work_items = call.context.batch * call.context.heads * segments;
  Held* held = segments > 1 ? new Held[work_items] : nullptr;
#pragma omp parallel if (call.parallel)
  {
    Work* work = new Work;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < (held ? work_items : 0); n++)
      hold(call, task_of(call.context, n / segments), *work, n % segments, held[n]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < work_items; n++) {
      const Task task = task_of(call.context, n / segments);
      if (held) join(call, task, *work, n % segments, held + n / segments * segments);
      else add_up(call, task, *work, 0, keys_before(call, 0));
      attend(call, task, *work, n % segments);
    }
    delete work;
  }
  delete[] held;
}
