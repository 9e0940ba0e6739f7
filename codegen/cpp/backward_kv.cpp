// The gradients of k and v, and those of tables in scores and weights: keys in lanes, queries in rows, those of all heads that share the keys.

// What queries that see no key add to every row of v.
INLINE void add_means(const Call& call, const Task& task, float* mean) {
  const int64_t q_len = call.context.q_len;
  for (int64_t i = 0; i < q_len; i++) {
    if (call.peak(task, i) != -INFINITY) continue;
    const Stored* above = call.above.row(task.b, task.h, i);
    for (int d = 0; d < VALUE_DIM; d++) mean[d] += (float)above[d] / (float)call.context.k_len;
  }
}

INLINE void meet_queries(const Call& call, const Task& task, Work& work, int64_t member, int64_t tile) {
  prepare(task, work.lanes);
  gather(call, task, work, [&](auto meet) { call.visits.each(task.b, member, tile, meet); });
  if (EMPTY_ROWS == UNMASKED)
    gather(call, task, work, [&](auto meet) {
      for (int64_t n = 0; n < call.context.q_len; n++)
        if (call.number(UNSEEING, task, call.visits.row(n)) != 0.0f) meet(0, VECTORS, n, n + 1, false);
    });
}

INLINE void differentiate(const Call& call, Work& work, int64_t b, int64_t kv, int64_t tile) {
  const Context& sizes = call.context;
  Places places = take_lanes(call, work, b, kv, tile * TILE, sizes.k_len);
  float mean[padded(VALUE_DIM)] = {};
  for (int64_t member = 0; member < call.visits.members; member++) {
    const int64_t h = call.visits.head_numbers[member];
    if (h / (sizes.heads / sizes.kv_heads) != kv) continue;
    Task task = {sizes, (index_t)b, (index_t)h, (index_t)kv};
    prepare(task);
    meet_queries(call, task, work, member, tile);
    if (EMPTY_ROWS == MEAN) add_means(call, task, mean);
  }
  write_x(call, work, places, b, kv);
  unpack<VALUE_DIM>(work.of_y);
  for (int m = 0; m < places.count; m++)
    call.of_v.write(b, kv, places.of[m], VALUE_DIM, call.adds, [&](int d) { return row_of(work.of_y, m, d) + load(mean + d); });
}

extern "C" void backward(const Call* given) {
  const Call& call = *given;
  const Context& sizes = call.context;
  const int64_t tiles = (sizes.k_len + TILE - 1) / TILE;
#pragma omp parallel if (call.parallel)
  {
    Unit unit;
    Work* work = new Work;
    // Rows of the batch may add to the same numbers of a table: then one task takes all of them.
    const int64_t together = SUMS ? sizes.batch : 1;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < sizes.batch / together * sizes.kv_heads * tiles; n++)
      for (int64_t b = 0; b < together; b++)
        differentiate(call, *work, n / tiles / sizes.kv_heads + b, n / tiles % sizes.kv_heads, n % tiles);
    delete work;
  }
}
