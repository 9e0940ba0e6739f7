// The gradient of q, and those of tables in what is divided by: queries in lanes, keys in rows.

// What every sum of weight * v was multiplied with.
INLINE vf factor_of(const Task& task, const Lanes& lanes, int n, vf mass, vf peak) {
  // <factor>
}

INLINE vf pull_of(const Task& task, const Lanes& lanes, int n, vf mass, vf peak, vf along, vf of_total) {
  // <pull>
}

// What a query adds to the gradients of tables that stand in the factor, and in the log-sum-exp.
INLINE void add_query(const Call& given, const Task& task, const Lanes& lanes, int n, vf mass, vf peak, vf along, vf of_total) {
  // <query sums>
}

INLINE void number(const Call& call, const Task& task, Work& work, const Places& places) {
  const Stored* rows[TILE];
  vf peak[VECTORS], mass[VECTORS], of_total[VECTORS];
  for (int m = 0; m < TILE; m++) {
    rows[m] = call.out.row(task.b, task.h, places.of[m]);
    peak[m / LANES][m % LANES] = m < places.count ? call.peak(task, places.of[m]) : -INFINITY;
    mass[m / LANES][m % LANES] = call.mass(task, places.of[m]);
    of_total[m / LANES][m % LANES] = call.of_total(task, places.of[m]);
  }
  pack<VALUE_DIM>(rows, work.of_y);
  UNROLLED for (int n = 0; n < VECTORS; n++) {
    vf along = product<VALUE_DIM>(work.of_y, work.y, n);
    const vi sees = peak[n] != -INFINITY;
    along = sees ? along : vf{}, of_total[n] = sees ? of_total[n] : vf{};
    work.base[n] = sees ? peak[n] : vf{};
    work.factor[n] = sees ? factor_of(task, work.lanes, n, mass[n], peak[n]) : vf{};
    work.pull[n] = pull_of(task, work.lanes, n, mass[n], peak[n], along, of_total[n]);
    add_query(call, task, work.lanes, n, mass[n], peak[n], along, of_total[n]);
  }
  for (int m = 0; m < places.count; m++) {
    call.number(BASE, task, places.of[m]) = work.base[m / LANES][m % LANES];
    call.number(FACTOR, task, places.of[m]) = work.factor[m / LANES][m % LANES];
    call.number(PULL, task, places.of[m]) = work.pull[m / LANES][m % LANES];
  }
}

INLINE void differentiate(const Call& call, const Task& task, Work& work, int64_t member, int64_t tile) {
  Places places = take_lanes(call, work, task.b, task.h, tile * TILE, call.context.q_len);
  prepare(task, work.lanes);
  number(call, task, work, places);
  gather(call, task, work, [&](auto meet) { call.visits.each(task.b, member, tile, meet); });
  if (EMPTY_ROWS == UNMASKED) {
    bool left = false;
    for (int m = 0; m < places.count; m++) {
      const bool unseeing = !work.sees[m / LANES][m % LANES];
      call.number(UNSEEING, task, places.of[m]) = unseeing;
      left |= unseeing;
    }
    work.everything = true;
    if (left) gather(call, task, work, [&](auto meet) { meet(0, VECTORS, 0, call.context.k_len, true); });
  }
  write_x(call, work, places, task.b, task.h);
}

extern "C" void backward(const Call* given) {
  const Call& call = *given;
  const Context& sizes = call.context;
  const int64_t tiles = (sizes.q_len + TILE - 1) / TILE, members = call.visits.members;
#pragma omp parallel if (call.parallel)
  {
    Unit unit;
    Work* work = new Work;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < sizes.batch * members * tiles; n++) {
      const int64_t member = n / tiles % members, tile = tiles - 1 - n % tiles, h = call.visits.head_numbers[member];
      Task task = {sizes, (index_t)(n / tiles / members), (index_t)h, (index_t)(h / (sizes.heads / sizes.kv_heads))};
      prepare(task);
      differentiate(call, task, *work, member, tile);
    }
    delete work;
  }
}
