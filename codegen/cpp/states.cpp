// Linear attention: who adds up what, and which state its queries begin with.

// The query that a segment begins with: the first one of a tile.
INLINE int64_t begins(const Call& call, int64_t segment) {
  const int64_t tiles = (call.context.q_len + CHUNK - 1) / CHUNK;
  return std::min(tiles * segment / call.segments * CHUNK, call.context.q_len);
}

// The state of some keys, from nothing.
INLINE void add_up(const Call& call, const Task& task, Work& work, int64_t first, int64_t stop) {
  clear(call, task, work.state, first);
  for (int64_t key = first; key < stop; key += CHUNK) remember(call, work, take(call, task, work, key, stop));
}

// The first phase: what the keys leave that the state holds at this segment, and not at the one before it.
INLINE void hold(const Call& call, const Task& task, Work& work, int64_t segment, State& held) {
  const int64_t first = segment ? keys_before(call, begins(call, segment - 1)) : 0;
  const int64_t stop = keys_before(call, begins(call, segment));
  add_up(call, task, work, first, stop);
  held = work.state;
  held.keys = stop - first;
}

// The state of all keys before a segment, from what the first phase left.
INLINE void join_before(const Call& call, const Task& task, State& state, int64_t segment, const State* held) {
  clear(call, task, state, 0);
  for (const State* one = held; one <= held + segment; one++)
    if (one->keys) join(call, state, *one);
}

// The queries of a segment, from the state of all keys before it.
INLINE void attend(const Call& call, const Task& task, Work& work, int64_t segment) {
  const int64_t stop_query = begins(call, segment + 1), k_len = call.context.k_len;
  int64_t first_key = 0;
  while (first_key < k_len && !exists(call, task, first_key)) first_key++;
  for (int64_t first = begins(call, segment); first < stop_query; first += CHUNK) {
    const int count = std::min<int64_t>(CHUNK, stop_query - first);
    const int64_t start = std::max<int64_t>(first + call.offset, 0), stop = std::min(first + call.offset + CHUNK, k_len);
    const int skipped = std::min<int64_t>(start - (first + call.offset), CHUNK);  // places without keys, since those begin later
    const int keys = take(call, task, work, start, stop, skipped);
    pack_queries(call, task, work, first, count);
    meet(call, task, work, keys, skipped);
    finish(call, task, work, first, count, first_key);
    if (first + CHUNK < stop_query) remember(call, work, keys);
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
  State* held = segments > 1 ? new State[work_items] : nullptr;
#pragma omp parallel if (call.parallel)
  {
    Work* work = new Work;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < (held ? work_items : 0); n++)
      hold(call, task_of(call.context, n / segments), *work, n % segments, held[n]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < work_items; n++) {
      const Task task = task_of(call.context, n / segments);
      if (held) join_before(call, task, work->state, n % segments, held + n / segments * segments);
      else add_up(call, task, *work, 0, keys_before(call, 0));
      attend(call, task, *work, n % segments);
    }
    delete work;
  }
  delete[] held;
}
