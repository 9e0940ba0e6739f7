// Gradients: a tile of lanes meets rows. Lanes hold queries and rows hold keys, or the other way around. With
//   out = factor · sum of weight · v,    above = the gradient of out,
//   pull = (above · out) · d log factor / d mass + the gradient of the log-sum-exp · d log-sum-exp / d mass
// every pair of tokens that sees each other has
//   gradient of the weight = factor · (above · v) + pull,    gradient of the score = that · d weight / d score.

struct Operand {
  const Stored* data;
  int64_t stride[3];  // of batch, heads and tokens
  const Stored* row(int64_t b, int64_t h, int64_t n) const { return data + b * stride[0] + h * stride[1] + n * stride[2]; }
};

struct Result {
  void* data;
  int64_t stride[3];
  // `value` gives a vector of numbers from d on. `adds`: several launches add to one result, which then holds floats.
  template <class F> INLINE_METHOD void write(int64_t b, int64_t h, int64_t n, int dim, bool adds, F value) const {
    const int64_t start = b * stride[0] + h * stride[1] + n * stride[2];
    for (int d = 0; d < dim; d += LANES) {
      const vf x = value(d);
      if (adds)
        for (int m = 0; m < std::min(LANES, dim - d); m++) ((float*)data)[start + d + m] += x[m];
      else store((Stored*)data + start + d, x, dim - d);
    }
  }
};

// What is known of a query once it has met its keys; the kernel with queries in lanes finds these, the other one reads them.
enum Number { BASE, FACTOR, PULL, UNSEEING, NUMBERS };

struct Call {  // every field has eight bytes
  Operand q, k, v, out, above;
  Result of_q, of_k, of_v;  // gradients
  const float* kept;        // by the forward kernel: the peaks of all queries, -∞ for those that see no key, and their masses
  const float* of_totals;   // gradients of the log-sum-exps, or null
  float* numbers;           // [NUMBERS][batch][heads][q_len]
  int64_t adds;             // whether the gradients of k and v are sums over launches
  int64_t parallel;         // whether there is work for threads
  Visits visits;
  Context context;
  Table sums[TABLES];      // gradients of tables, in double precision
  int64_t shared[TABLES];  // whether several threads may add to one number of it

  int64_t place(int which, const Task& task, int64_t i) const {
    return ((which * context.batch + task.b) * context.heads + task.h) * context.q_len + i;
  }
  float peak(const Task& task, int64_t i) const { return kept[place(0, task, i)]; }
  float mass(const Task& task, int64_t i) const { return kept[place(1, task, i)]; }
  float of_total(const Task& task, int64_t i) const { return of_totals ? of_totals[place(0, task, i)] : 0.0f; }
  float& number(Number which, const Task& task, int64_t i) const { return numbers[place(which, task, i)]; }
};

INLINE void add(const Call& given, int table, int64_t at, double x) {
  double* sum = (double*)given.sums[table].data + at;
  if (given.shared[table]) {
#pragma omp atomic
    *sum += x;
  } else {
    *sum += x;
  }
}
INLINE void add(const Call& given, int table, int64_t at, vf x) {
  double sum = 0.0;
  for (int m = 0; m < LANES; m++) sum += x[m];
  add(given, table, at, sum);
}
INLINE void add(const Call& given, int table, vl at, vf x) {
  int64_t away = given.shared[table];
  for (int m = 0; m < LANES; m++) away |= at[m] - at[0] - m;
  if (away == 0) {  // one after the other
    vd sum;
    double* start = (double*)given.sums[table].data + at[0];
    memcpy(&sum, start, sizeof(sum));
    sum += __builtin_convertvector(x, vd);
    memcpy(start, &sum, sizeof(sum));
  } else {
    for (int m = 0; m < LANES; m++) add(given, table, (int64_t)at[m], (double)x[m]);
  }
}

INLINE vf weight_from(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf score) {
  // <weight>
}

// d weight / d score
INLINE vf weight_slope(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf score) {
  // <weight slope>
}

// d score / d dot
INLINE vf score_slope(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf dot) {
  // <score slope>
}

// d score / d norm of the token in the lane
INLINE vf norm_slope(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf dot) {
  // <norm slope>
}

// What a pair of tokens adds to the gradients of tables.
INLINE void add_pair(const Call& given, const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf dot, vf score,
                     vf of_weight, vf of_score) {
  // <pair sums>
}

struct Queue {  // rows that wait for the vectors from … to
  Rows rows;
  const Stored* other[CHUNK];
};

struct alignas(64) Work {
  float x[deep(DIM) * TILE], y[deep(VALUE_DIM) * TILE];  // packed lanes: q and above, or k and v
  float of_x[padded(DIM) * TILE], of_y[padded(VALUE_DIM) * TILE];
  float scores[(CHUNK + ROWS) * TILE], along[(CHUNK + ROWS) * TILE];
  vf of_norm[VECTORS];
  std::conditional_t<BY_QUERY, vf, float> base[NUMBERED], factor[NUMBERED], pull[NUMBERED];
  vi alive[VECTORS];  // whether a lane holds a token of its own
  vi sees[VECTORS];   // whether a query has seen a key
  bool everything;    // queries that see no key meet all of them
  Lanes lanes;
  Queue queues[VECTORS][VECTORS + 1];
  Both<DIM> row_x;
  std::conditional_t<BY_QUERY, Along<VALUE_DIM>, Both<VALUE_DIM>> row_y;
};

// What only keys have: the gradient of v is a sum over queries.
template <int FROM, int TO, class R> INLINE void add_up(const R& above, int count, Work& work, const vf* keep) {
  const int steps = pair_up<FROM, TO>(work.along, count);
  accumulate<VALUE_DIM, FROM, TO>(above.across(), steps, work.along, work.of_y, keep);
}

template <int FROM, int TO> static void meet(const Call& call, const Task& task, Work& work) {
  Queue& queue = work.queues[FROM][TO];
  Rows& rows = queue.rows;
  const int count = rows.count;
  prepare(task, rows);
  work.row_x.take(rows.data, count);
  work.row_y.take(queue.other, count);
  products<FROM, TO>(work.row_x.along(), count, DIM / STEP, work.x, work.scores);
  products<FROM, TO>(work.row_y.along(), count, VALUE_DIM / STEP, work.y, work.along);
  if constexpr (!BY_QUERY)
    for (int j = 0; j < count; j++) {
      work.base[j] = call.number(BASE, task, rows.row[j]);
      work.factor[j] = call.number(FACTOR, task, rows.row[j]);
      work.pull[j] = call.number(PULL, task, rows.row[j]);
    }

  vf of_norm[VECTORS] = {};
  for (int j = 0; j < count; j++) UNROLLED for (int n = FROM; n < TO; n++) {
    const int numbered = BY_QUERY ? n : j;
    const vf dot = *at(work.scores, j, n), score = score_of(task, work.lanes, n, rows, j, dot);
    vf weight, slope;
    if (PEAK) weight = slope = weight_of(score - work.base[numbered]);
    else {
      weight = weight_from(task, work.lanes, n, rows, j, score);
      slope = weight_slope(task, work.lanes, n, rows, j, score);
    }
    vf along = *at(work.along, j, n);
    // <drop>
    vf of_weight = along * work.factor[numbered] + work.pull[numbered];
    vf of_score = slope * of_weight;
    weight *= work.factor[numbered];
    if (!PEAK || EMPTY_ROWS == UNMASKED || rows.mixed[j]) {
      vi seen = score != -INFINITY;
      if (rows.mixed[j]) seen &= work.everything ? ~work.sees[n] : visible(task, work.lanes, n, rows, j);
      if (BY_QUERY && EMPTY_ROWS == UNMASKED && !work.everything) work.sees[n] |= seen;
      weight = seen ? weight : vf{}, of_weight = seen ? of_weight : vf{}, of_score = seen ? of_score : vf{};
    }
    *at(work.scores, j, n) = of_score * score_slope(task, work.lanes, n, rows, j, dot);
    *at(work.along, j, n) = weight;
    if (NORMED) of_norm[n] += of_score * norm_slope(task, work.lanes, n, rows, j, dot);
    if (SUMS) add_pair(call, task, work.lanes, n, rows, j, dot, score, work.alive[n] ? of_weight : vf{},
                       work.alive[n] ? of_score : vf{});
  }
  vf keep[VECTORS];
  UNROLLED for (int n = FROM; n < TO; n++) keep[n] = splat<vf>(1.0f), work.of_norm[n] += of_norm[n];
  const int steps = pair_up<FROM, TO>(work.scores, count);
  accumulate<DIM, FROM, TO>(work.row_x.across(), steps, work.scores, work.of_x, keep);
  if constexpr (!BY_QUERY) add_up<FROM, TO>(work.row_y, count, work, keep);
  rows.count = 0;
}

INLINE void meet_waiting(const Call& call, const Task& task, Work& work, int from, int to) {
  with_vectors(from, to, [&](auto range) { meet<range.from, range.to>(call, task, work); });
}

// Let a tile of lanes meet what `each` gives: calls of meet(first vector, last vector + 1, start, stop, mixed).
template <class F> INLINE void gather(const Call& call, const Task& task, Work& work, F each) {
  const int64_t row_head = BY_QUERY ? task.kv : task.h;
  each([&](int from, int to, int64_t start, int64_t stop, bool mixed) {
    Queue& queue = work.queues[from][to];
    Rows& rows = queue.rows;
    for (int64_t j = start; j < stop; j++) {
      const int64_t place = call.visits.row(j);
      rows.row[rows.count] = place;
      rows.mixed[rows.count] = mixed;
      rows.data[rows.count] = (BY_QUERY ? call.k : call.q).row(task.b, row_head, place);
      queue.other[rows.count] = (BY_QUERY ? call.v : call.above).row(task.b, row_head, place);
      fetch<DIM>(rows.data[rows.count]), fetch<VALUE_DIM>(queue.other[rows.count]);
      if (++rows.count == CHUNK) meet_waiting(call, task, work, from, to);
    }
  });
  for (int from = 0; from < VECTORS; from++)
    for (int to = from + 1; to <= VECTORS; to++)
      if (work.queues[from][to].rows.count) meet_waiting(call, task, work, from, to);
}

// Where the tokens of a tile of lanes stand; lanes that are left over repeat the last one.
struct Places {
  int count;
  int64_t of[TILE];
};

INLINE Places take_lanes(const Call& call, Work& work, int64_t b, int64_t head, int64_t first, int64_t length) {
  Places places = {(int)std::min<int64_t>(TILE, length - first)};
  const Stored* other[TILE];
  for (int m = 0; m < TILE; m++) {
    places.of[m] = call.visits.lane(first + std::min(m, places.count - 1));
    work.lanes.lane[m / LANES][m % LANES] = places.of[m];
    work.alive[m / LANES][m % LANES] = m < places.count ? -1 : 0;
    work.lanes.data[m] = (BY_QUERY ? call.q : call.k).row(b, head, places.of[m]);
    other[m] = (BY_QUERY ? call.above : call.v).row(b, head, places.of[m]);
  }
  pack<DIM>(work.lanes.data, work.x);
  pack<VALUE_DIM>(other, work.y);
  memset(work.of_x, 0, sizeof(work.of_x));
  memset(work.of_y, 0, sizeof(work.of_y));
  UNROLLED for (int n = 0; n < VECTORS; n++) work.of_norm[n] = vf{}, work.sees[n] = vi{};
  work.everything = false;
  return places;
}

// The gradient of q or k: what the products give, and what the norm does.
INLINE void write_x(const Call& call, Work& work, const Places& places, int64_t b, int64_t head) {
  const Result& result = BY_QUERY ? call.of_q : call.of_k;
  unpack<DIM>(work.of_x);
  for (int m = 0; m < places.count; m++) {
    float along = 0.0f;
    if (NORMED) {
      const float norm = norm_of(work.lanes.data[m], DIM);
      along = norm == 0.0f ? 0.0f : work.of_norm[m / LANES][m % LANES] / norm;
    }
    result.write(b, head, places.of[m], DIM, !BY_QUERY && call.adds, [&](int d) {
      const vf x = row_of(work.of_x, m, d);
      return NORMED ? x + along * part<DIM>(work.lanes.data[m], d / LANES) : x;
    });
  }
}

extern "C" int64_t lanes() { return LANES; }
