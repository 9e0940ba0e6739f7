// Few queries meet many keys: keys stand in lanes where scores are computed, the numbers of a row where rows are multiplied. All
// queries of the heads that share their keys are at work together, so that each row of K and V is read once. Which keys these are
// follows from positions known at run time; long runs are cut into slices, whose results are merged in the end.
#include <vector>

struct Call {  // every field has eight bytes; strides are those of batch, heads and tokens
  const Output* q;
  const Stored* k;
  const Value* v;
  Output* out;
  float* totals;  // the log-sum-exp, or null
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  int64_t parallel;  // whether there is work for threads
  int64_t groups;    // of heads that share their keys: `member_of[g]` to `member_of[g + 1]` of the heads of the launch
  const int32_t *member_of, *head_numbers;
  int64_t nearest, farthest, prefix;  // keys are seen by queries within these distances, and those of the first positions
  Context context;

  const Stored* key(int64_t b, int64_t kv) const { return k + b * k_stride[0] + kv * k_stride[1]; }
  const Value* value(int64_t b, int64_t kv) const { return v + b * v_stride[0] + kv * v_stride[1]; }
};

constexpr int KEYS = 4 * TILE;     // keys at work together
constexpr int SLICE = 16 * KEYS;   // keys that one task meets
// How many rows later those stand that are asked for while one is at work: what was fastest, not all of them at once.
template <class T> constexpr int AHEAD = CODES<T> ? 128 : 64 / sizeof(T);
constexpr int DIM_VECTORS = (DIM + LANES - 1) / LANES, VALUE_VECTORS = (VALUE_DIM + LANES - 1) / LANES;
constexpr int SUMS = LANES == 8 ? 8 : 16;  // registers that hold sums

INLINE vindex position_of(const Task& task, const Rows& rows, int j) {
  // <position>
}

INLINE vf weight_from(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf score) {
  // <weight>
}

// What every sum of weight * v is multiplied with in the end.
INLINE vf factor_of(const Task& task, const Rows& rows, int j, vf mass, vf peak) {
  // <factor>
}

INLINE vf total_of(const Task& task, const Rows& rows, int j, vf mass, vf peak) {
  // <total>
}

struct Head {  // a query head and its queries
  Task task;
  Rows queries;
};

// What a query has met so far: sums of weight and of weight * v, relative to the largest score.
struct Sums {
  float peak, mass;
  bool sees;
  vf out[VALUE_VECTORS];
};

struct Query {
  vf q[DIM_VECTORS], scores[KEYS / LANES], mass;
  Sums sums;
};

struct Work {
  std::vector<Head> heads;
  std::vector<Query> queries;  // those of the first head, those of the next
  int count = 0;               // keys that have been collected
  int64_t k_ahead, v_ahead;    // how far away the rows are to ask for while these are at work; 0: no others follow
  bool mixed = false;          // whether some query does not see some of them
  index_t place[KEYS];
  const Stored* k[KEYS];
  const Value* v[KEYS];
  alignas(vf) float k_scale[KEYS];  // where rows are codes
  Lanes lanes[KEYS / TILE], seen;
};

// Scores of COUNT queries and a vector of keys.
template <int COUNT> INLINE void products(const Stored* const* keys, Query* queries, int n) {
  constexpr int EACH = LANES / COUNT;
  UNROLLED for (int some = 0; some < COUNT; some++) {
    vf sum[LANES] = {};
    for (int d = 0; d < DIM_VECTORS; d++) {
      vf x[COUNT];
      UNROLLED for (int r = 0; r < COUNT; r++) x[r] = queries[r].q[d];
      UNROLLED for (int j = 0; j < EACH; j++) {
        const vf y = part<DIM>(keys[n * LANES + some * EACH + j], d);
        UNROLLED for (int r = 0; r < COUNT; r++) sum[r * EACH + j] += x[r] * y;
      }
    }
    const vf found = totals_of(sum);
    UNROLLED for (int r = 0; r < COUNT; r++)
      memcpy((float*)&queries[r].scores[n] + some * EACH, (const float*)&found + r * EACH, EACH * sizeof(float));
  }
}

template <int COUNT, int WIDE>
INLINE void accumulate_some(const Value* const* values, int count, Query* queries, int from, int64_t ahead) {
  vf sum[COUNT][WIDE] = {};  // from zero: what is added up over all keys would lose the small ones
  for (int j = 0; j < count; j++) {
    fetch<VALUE_DIM>(values[j] + ahead);
    float weight[COUNT];
    const float scale = scale_of<VALUE_DIM>(values[j]);
    UNROLLED for (int r = 0; r < COUNT; r++) weight[r] = ((const float*)queries[r].scores)[j] * scale;
    UNROLLED for (int n = 0; n < WIDE; n++) {
      const vf y = part<VALUE_DIM>(values[j], from + n);
      UNROLLED for (int r = 0; r < COUNT; r++) sum[r][n] += weight[r] * y;
    }
  }
  UNROLLED for (int r = 0; r < COUNT; r++) UNROLLED for (int n = 0; n < WIDE; n++) queries[r].sums.out[from + n] += sum[r][n];
}

// The weighted values of COUNT queries.
template <int COUNT> INLINE void accumulate(const Value* const* values, int count, Query* queries, int64_t ahead) {
  constexpr int WIDE = std::min(VALUE_VECTORS, SUMS / COUNT), LAST = VALUE_VECTORS % WIDE;
  for (int from = 0; from < VALUE_VECTORS - LAST; from += WIDE) accumulate_some<COUNT, WIDE>(values, count, queries, from, ahead);
  if constexpr (LAST > 0) accumulate_some<COUNT, LAST>(values, count, queries, VALUE_VECTORS - LAST, ahead);
}

// Calls f<count>(first) for as many queries at once as there are.
template <class F> INLINE void each_few(int queries, F f) {
  int at = 0;
  for (; at + 4 <= queries; at += 4) f(std::integral_constant<int, 4>{}, at);
  for (; at + 2 <= queries; at += 2) f(std::integral_constant<int, 2>{}, at);
  if (at < queries) f(std::integral_constant<int, 1>{}, at);
}

// The sums are from now on relative to another peak.
INLINE void rebase(Sums& sums, float peak) {
  const float keep = sums.peak == -INFINITY ? 0.0f : weight_of(splat<vf>(sums.peak - peak))[0];
  sums.peak = peak;
  if (keep == 1.0f) return;
  sums.mass *= keep;
  UNROLLED for (int n = 0; n < VALUE_VECTORS; n++) sums.out[n] *= keep;
}

// The scores of query j become weights: zero where it does not see a key.
INLINE void weigh(const Work& work, const Head& head, int j, Query& query, const Lanes* lanes) {
  const int vectors = (work.count + LANES - 1) / LANES;
  vf largest = splat<vf>(-INFINITY), mass = {};
  vi sees = {};
  for (int n = 0; n < vectors; n++) {
    const Lanes& keys = lanes[n / VECTORS];
    const vf dot = CODES<Stored> ? query.scores[n] * *(const vf*)(work.k_scale + n * LANES) : query.scores[n];
    vf x = score_of(head.task, keys, n % VECTORS, head.queries, j, dot);
    if (work.mixed) x = visible(head.task, keys, n % VECTORS, head.queries, j) ? x : splat<vf>(-INFINITY);
    if ((n + 1) * LANES > work.count) x = numbers() < work.count - n * LANES ? x : splat<vf>(-INFINITY);
    query.scores[n] = x;
    largest = most(largest, x);
    sees |= x != -INFINITY;
  }
  Sums& sums = query.sums;
  sums.sees |= any(sees);
  if (PEAK) {
    const float peak = std::max(sums.peak, greatest(largest));
    if (peak != sums.peak) rebase(sums, peak);
  }
  const float base = PEAK && sums.peak != -INFINITY ? sums.peak : 0.0f;
  for (int n = 0; n < vectors; n++) {
    vf& x = query.scores[n];
    if (PEAK) x = weight_of(x - base);
    else x = x == -INFINITY ? vf{} : weight_from(head.task, lanes[n / VECTORS], n % VECTORS, head.queries, j, x);
    mass += x;
  }
  sums.mass += total(mass);
}

// The keys that have been collected meet all queries.
static void meet(Work& work) {
  const int count = work.count, whole = (count + TILE - 1) / TILE * TILE;
  if (!count) return;
  for (int j = count; j < whole; j++) {
    work.place[j] = work.place[count - 1];
    work.k[j] = work.k[count - 1], work.v[j] = work.v[count - 1];
  }
  for (int n = 0; n < (count + LANES - 1) / LANES; n++) {
    const Stored* const* keys = work.k + n * LANES;
    UNROLLED for (int j = 0; j < LANES; j++) {
      fetch<DIM>(keys[j] + work.k_ahead);
      if (CODES<Stored>) work.k_scale[n * LANES + j] = scale_of<DIM>(keys[j]);
    }
    each_few(work.queries.size(), [&](auto few, int first) { products<few>(work.k, &work.queries[first], n); });
  }
  for (int n = 0; n < whole / TILE; n++) {
    memcpy(work.lanes[n].lane, work.place + n * TILE, TILE * sizeof(index_t));
    if (NORMS) memcpy(work.lanes[n].data, work.k + n * TILE, TILE * sizeof(work.k[0]));
  }
  Query* query = work.queries.data();
  for (const Head& head : work.heads) {
    for (int n = 0; n < whole / TILE; n++) prepare(head.task, work.lanes[n]);
    for (int j = 0; j < head.queries.count; j++) weigh(work, head, j, *query++, work.lanes);
  }
  each_few(work.queries.size(), [&](auto few, int first) {
    accumulate<few>(work.v, count, &work.queries[first], first ? 0 : work.v_ahead);
  });
  work.count = 0, work.mixed = false;
}

// Which keys of a tile any query sees, and which all of them do.
INLINE void look(Work& work, vi* some, vi* all) {
  UNROLLED for (int n = 0; n < VECTORS; n++) some[n] = vi{}, all[n] = truth(true);
  for (const Head& head : work.heads) {
    prepare(head.task, work.seen);
    for (int j = 0; j < head.queries.count; j++) UNROLLED for (int n = 0; n < VECTORS; n++) {
      const vi sees = visible(head.task, work.seen, n, head.queries, j);
      some[n] |= sees, all[n] &= sees;
    }
    if (!BY_HEAD) return;
  }
}

// Collect the keys from `start` to `stop` that some query sees; all of them, with `everything`.
static void collect(const Call& call, Work& work, int64_t b, int64_t kv, int64_t start, int64_t stop, bool everything) {
  const Stored* k = call.key(b, kv);
  const Value* v = call.value(b, kv);
  for (int64_t from = start; from < stop; from += TILE) {
    if (work.count > KEYS - TILE) meet(work);
    const int here = std::min<int64_t>(TILE, stop - from);
    vi some[VECTORS], all[VECTORS];
    bool none = false, whole = everything;
    if (!everything) {
      UNROLLED for (int n = 0; n < VECTORS; n++)
        work.seen.lane[n] = convert<vindex>(lower(numbers() + n * LANES, here - 1)) + (index_t)from;
      if (NORMS)
        for (int m = 0; m < TILE; m++) work.seen.data[m] = k + (from + std::min(m, here - 1)) * call.k_stride[2];
      look(work, some, all);
      vi seen = some[0], by_all = all[0];
      for (int n = 1; n < VECTORS; n++) seen |= some[n], by_all &= all[n];
      none = !any(seen), whole = !any(!by_all);
    }
    if (none) continue;
    const auto key = [&](int m) { return k + (from + m) * call.k_stride[2]; };
    const auto value = [&](int m) { return v + (from + m) * call.v_stride[2]; };
    const auto put = [&](int at, int m) { work.place[at] = from + m, work.k[at] = key(m), work.v[at] = value(m); };
    if (from < start + KEYS)  // nobody has asked for the first ones
      for (int m = 0; m < here; m++) fetch<DIM>(key(m)), fetch<VALUE_DIM>(value(m));
    const bool more = from + KEYS < stop;
    work.k_ahead = more ? AHEAD<Stored> * call.k_stride[2] : 0, work.v_ahead = more ? AHEAD<Value> * call.v_stride[2] : 0;
    if (whole) {
      for (int m = 0; m < here; m++) put(work.count + m, m);
      work.count += here;
      continue;
    }
    for (int m = 0; m < here; m++) {
      put(work.count, m);
      work.mixed |= !all[m / LANES][m % LANES];
      work.count += some[m / LANES][m % LANES] != 0;
    }
  }
}

// Get the heads of a group and their queries ready.
static void begin(const Call& call, Work& work, int64_t b, int64_t group) {
  const Context& sizes = call.context;
  work.heads.clear(), work.queries.clear(), work.count = 0, work.mixed = false;
  work.heads.reserve(call.member_of[group + 1] - call.member_of[group]);
  for (int64_t member = call.member_of[group]; member < call.member_of[group + 1]; member++) {
    const int64_t h = call.head_numbers[member];
    work.heads.push_back({{sizes, (index_t)b, (index_t)h, (index_t)(h / (sizes.heads / sizes.kv_heads))}});
    Head& head = work.heads.back();
    prepare(head.task);
    const Output* q = call.q + b * call.q_stride[0] + h * call.q_stride[1];
    for (int64_t i = 0; i < sizes.q_len; i++, head.queries.count++) {
      head.queries.row[i] = i;
      head.queries.data[i] = (const Stored*)(q + i * call.q_stride[2]);  // for norms, which nobody asks of codes
      work.queries.emplace_back();
      Query& query = work.queries.back();
      for (int d = 0; d < DIM_VECTORS; d++) query.q[d] = part<DIM>(q + i * call.q_stride[2], d);
      query.sums = {PEAK ? -INFINITY : 0.0f};
    }
    prepare(head.task, head.queries);
  }
}

struct Run {
  int64_t start, stop;
  int64_t size() const { return std::max<int64_t>(0, stop - start); }
};

// The places of keys that some query of a group may see: the first ones, and those within reach.
struct Reach {
  Run first, near;
  int64_t size() const { return first.size() + near.size(); }
};

static Reach reach_of(const Call& call, const Work& work) {
  const int64_t k_len = call.context.k_len, first_key = call.context.first_key;
  int64_t low = INT64_MAX, high = INT64_MIN;
  for (const Head& head : work.heads)
    for (int j = 0; j < head.queries.count; j++) {
      const int64_t position = position_of(head.task, head.queries, j)[0];
      low = std::min(low, position), high = std::max(high, position);
    }
  const auto within = [&](int64_t place) { return std::clamp<int64_t>(place, 0, k_len); };
  const int64_t prefix = within(call.prefix - first_key);
  return {{0, prefix}, {std::max(prefix, within(low - call.farthest - first_key)), within(high - call.nearest - first_key + 1)}};
}

// Let the queries of a group meet what is visible among some of the keys in reach.
static void attend(const Call& call, Work& work, int64_t b, const Reach& reach, int64_t start, int64_t stop, bool everything) {
  const int64_t kv = work.heads[0].task.kv, split = reach.first.size();
  const int64_t away = reach.near.start - split;
  collect(call, work, b, kv, std::min(start, split), std::min(stop, split), everything);
  collect(call, work, b, kv, std::max(start, split) + away, std::max(stop, split) + away, everything);
  meet(work);
}

// Several parts of what a query has met become one.
INLINE Sums merged(Sums* parts, int64_t count) {
  Sums& sums = parts[0];
  for (int64_t n = 1; n < count; n++) {
    Sums& other = parts[n];
    if (!other.sees) continue;
    if (PEAK && other.peak > sums.peak) rebase(sums, other.peak);
    else if (PEAK) rebase(other, sums.peak);
    sums.sees = true, sums.mass += other.mass;
    for (int d = 0; d < VALUE_VECTORS; d++) sums.out[d] += other.out[d];
  }
  return sums;
}

// Write what a query has met; what it gets that sees no key.
INLINE void finish(const Call& call, const Head& head, int j, const Sums& sums) {
  const Task& task = head.task;
  const int64_t i = head.queries.row[j];
  Output* row = call.out + task.b * call.out_stride[0] + task.h * call.out_stride[1] + i * call.out_stride[2];
  float filling[VALUE_DIM] = {};
  if (!sums.sees) fill(call, task, filling);
  // A sink counts in a total although no key is seen; its peak is zero then.
  const vf mass = splat<vf>(sums.sees ? sums.mass : 0.0f), peak = splat<vf>(sums.sees ? sums.peak : 0.0f);
  const float factor = factor_of(task, head.queries, j, mass, peak)[0];
  for (int d = 0; d < VALUE_DIM; d++) row[d] = (Output)(sums.sees ? ((const float*)sums.out)[d] * factor : filling[d]);
  if (!call.totals) return;
  float& total = call.totals[(task.b * call.context.heads + task.h) * call.context.q_len + i];
  total = total_of(task, head.queries, j, mass, peak)[0];
}

// Merge what the slices have found for a group, and write it.
static void finish(const Call& call, Work& work, int64_t b, int64_t group, std::vector<Sums>& parts, int64_t slices) {
  const int64_t q_len = call.context.q_len, members = call.member_of[call.groups];
  begin(call, work, b, group);
  bool left = false;
  for (size_t n = 0; n < work.queries.size(); n++) {
    const int64_t row = (b * members + call.member_of[group]) * q_len + n;
    work.queries[n].sums = merged(&parts[row * slices], slices);
    left |= !work.queries[n].sums.sees;
  }
  std::vector<Sums> found;
  for (const Query& query : work.queries) found.push_back(query.sums);
  if (left && EMPTY_ROWS == UNMASKED) {
    begin(call, work, b, group);
    attend(call, work, b, {{0, 0}, {0, call.context.k_len}}, 0, call.context.k_len, true);
    for (size_t n = 0; n < found.size(); n++)
      if (!found[n].sees) found[n] = work.queries[n].sums;
  }
  for (size_t n = 0; n < found.size(); n++) finish(call, work.heads[n / q_len], n % q_len, found[n]);
}

extern "C" void decode(const Call* given) {
  const Call& call = *given;
  const Context& sizes = call.context;
  const int64_t pairs = sizes.batch * call.groups, members = call.member_of[call.groups];
  std::vector<Reach> reach(pairs);
  int64_t slices = 1;
  Work first;
  for (int64_t n = 0; n < pairs; n++) {
    begin(call, first, n / call.groups, n % call.groups);
    reach[n] = reach_of(call, first);
    slices = std::max(slices, (reach[n].size() + SLICE - 1) / SLICE);
  }
  std::vector<Sums> parts(sizes.batch * members * sizes.q_len * slices);
#pragma omp parallel if (call.parallel)
  {
    Work* work = new Work;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < pairs * slices; n++) {
      const int64_t pair = n / slices, slice = n % slices, b = pair / call.groups, group = pair % call.groups;
      begin(call, *work, b, group);
      const int64_t stop = std::min((slice + 1) * SLICE, reach[pair].size());
      if (slice * SLICE < stop) attend(call, *work, b, reach[pair], slice * SLICE, stop, ALL);
      const int64_t row = (b * members + call.member_of[group]) * sizes.q_len;
      for (size_t m = 0; m < work->queries.size(); m++) parts[(row + m) * slices + slice] = work->queries[m].sums;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < pairs; n++) finish(call, *work, n / call.groups, n % call.groups, parts, slices);
    delete work;
  }
}
