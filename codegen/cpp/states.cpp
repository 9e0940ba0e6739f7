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

// What is added to the log of a weight for every token between query and key.
INLINE vf rate_of(const Task& task) {
  // <rate>
}

// What every sum of weight * v is multiplied with in the end.
INLINE vf factor_of(const Task& task, vf mass) {
  // <factor>
}

struct Call {  // every field has eight bytes; strides are those of batch, heads and tokens
  const Stored *q, *k, *v;
  Stored* out;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  int64_t parallel;         // whether there is work for threads
  int64_t offset, behind;   // query i sees keys up to i + offset, which stand at least so many tokens behind it
  Context context;
};

constexpr int PANELS = (VALUE_DIM + TILE - 1) / TILE;  // of the columns of v

struct alignas(64) Work {  // whole vectors come before pointers
  float state[PANELS][DIM * TILE], sums[padded(DIM)];  // of features * v, and of features
  float q[DIM * TILE], scores[(CHUNK + ROWS) * TILE], out[PANELS * TILE * TILE];
  float keys[CHUNK][padded(DIM)], values[PANELS][CHUNK * TILE];
  float fading[3 * TILE];  // what is left after m - TILE tokens; nothing where that is the future
  vf mass[VECTORS];
  const float *key_rows[CHUNK + ROWS], *state_rows[DIM];
};
static_assert(CHUNK == TILE, "queries of a tile meet the keys beside them");

// Up to CHUNK keys from `first` on: their features, and their values in panels.
INLINE int take(const Call& call, const Task& task, Work& work, int64_t first, int64_t stop) {
  const Stored* k = call.k + task.b * call.k_stride[0] + task.kv * call.k_stride[1];
  const Stored* v = call.v + task.b * call.v_stride[0] + task.kv * call.v_stride[1];
  const int count = std::min<int64_t>(CHUNK, stop - first);
  for (int j = 0; j < count; j++) {
    const Stored *key = k + (first + j) * call.k_stride[2], *value = v + (first + j) * call.v_stride[2];
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

// What has been taken joins the state, after which the next token is `passed` tokens behind the first of them.
INLINE void remember(Work& work, int count, int passed) {
  const float* left = work.fading + TILE;
  vf keep[VECTORS];
  UNROLLED for (int n = 0; n < VECTORS; n++) keep[n] = splat<vf>(left[passed]);
  for (int d = 0; d < DIM; d++) work.sums[d] *= left[passed];
  for (int j = 0; j < count; j++) {
    const float fade = left[passed - j];
    for (int d = 0; d < DIM; d++) work.sums[d] += work.keys[j][d] * fade;
    if (fade != 1.0f)
      for (int p = 0; p < PANELS; p++)
        for (int d = 0; d < TILE; d++) work.values[p][j * TILE + d] *= fade;
  }
  for (int p = 0; p < PANELS; p++) accumulate<DIM, 0, VECTORS>(work.key_rows, count, work.values[p], work.state[p], keep);
}

INLINE void pack_queries(const Call& call, const Task& task, Work& work, int64_t first, int count) {
  const Stored* q = call.q + task.b * call.q_stride[0] + task.h * call.q_stride[1];
  const Stored* rows[TILE];
  for (int m = 0; m < TILE; m++) rows[m] = q + (first + std::min(m, count - 1)) * call.q_stride[2];
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

// And the keys beside them, the first of which stands `behind` tokens behind the first query. The future is faded to nothing.
INLINE void meet_keys(Work& work, int count, int skipped) {
  products<0, VECTORS>(work.key_rows, count, DIM, work.q, work.scores);
  vf keep[VECTORS];
  UNROLLED for (int n = 0; n < VECTORS; n++) memcpy(&keep[n], work.fading + TILE + n * LANES, sizeof(vf));
  UNROLLED for (int n = 0; n < VECTORS; n++) work.mass[n] *= keep[n];
  for (int j = 0; j < count; j++) UNROLLED for (int n = 0; n < VECTORS; n++) {
    vf left;
    memcpy(&left, work.fading + TILE + n * LANES - j - skipped, sizeof(vf));
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

INLINE void finish(const Call& call, const Task& task, Work& work, int64_t first, int count, float lead) {
  UNROLLED for (int n = 0; n < VECTORS; n++) work.mass[n] = factor_of(task, work.mass[n] * lead) * lead;
  unpack<PANELS * TILE>(work.out);
  for (int m = 0; m < count; m++) {
    Stored* row = call.out + task.b * call.out_stride[0] + task.h * call.out_stride[1] + (first + m) * call.out_stride[2];
    const bool sees = first + m + call.offset >= 0 && call.context.k_len > 0;
    const float f = work.mass[m / LANES][m % LANES];
    for (int d = 0; d < VALUE_DIM; d += LANES) store(row + d, sees ? row_of(work.out, m, d) * f : vf{}, VALUE_DIM - d);
  }
}

// The state is always that of the query at the start of a tile: `fading` counts from there.
INLINE void attend(const Call& call, const Task& task, Work& work) {
  const int64_t q_len = call.context.q_len, k_len = call.context.k_len;
  const float rate = rate_of(task)[0];
  for (int m = 0; m < 3 * TILE; m++) work.fading[m] = m < TILE ? 0.0f : std::exp(rate * (m - TILE));
  const float lead = call.behind ? std::exp(rate * call.behind) : 1.0f;
  memset(work.state, 0, sizeof(work.state)), memset(work.sums, 0, sizeof(work.sums));
  const int64_t before = std::clamp<int64_t>(call.offset, 0, k_len);
  for (int64_t key = 0; key < before; key += CHUNK) {
    const int count = take(call, task, work, key, before);
    remember(work, count, count);
  }
  for (int64_t first = 0; first < q_len; first += TILE) {
    const int count = std::min<int64_t>(TILE, q_len - first);
    const int64_t start = std::max<int64_t>(first + call.offset, 0), stop = std::min(first + call.offset + TILE, k_len);
    pack_queries(call, task, work, first, count);
    meet_state(work);
    const int skipped = std::min<int64_t>(start - (first + call.offset), TILE);  // places without keys, since those begin later
    const int keys = start < stop ? take(call, task, work, start, stop) : 0;
    meet_keys(work, keys, skipped);
    finish(call, task, work, first, count, lead);
    if (first + TILE < q_len) remember(work, keys, TILE - skipped);
  }
}

extern "C" void states(const Call* given) {
  const Call& call = *given;
  const Context& sizes = call.context;
#pragma omp parallel if (call.parallel)
  {
    Work* work = new Work;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < sizes.batch * sizes.heads; n++) {
      const int64_t h = n % sizes.heads;
      Task task = {sizes, (index_t)(n / sizes.heads), (index_t)h, (index_t)(h / (sizes.heads / sizes.kv_heads))};
      prepare(task);
      attend(call, task, *work);
    }
    delete work;
  }
}
