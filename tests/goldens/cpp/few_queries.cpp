struct Task {  // one head of one row of the batch
  const Context& call;
  index_t b, h, kv;
  float scale;  // 1 / √dim
  float x0;  // 2^(0.125·(60 − 8·h) if 8 ≤ h else 0.125·(−8 − 8·h))
  index_t first_key;
  index_t first_query;
};

struct Lanes {
  vindex lane[VECTORS];
  const Stored* data[TILE];
  vindex position[VECTORS];  // place + first_key
  vi holds0[VECTORS];  // place + first_key ≤ 3
  vindex x0[VECTORS];  // place + first_key + 255
};

struct Rows {
  int count = 0;
  index_t row[CHUNK];
  bool mixed[CHUNK];
  const Stored* data[CHUNK];
  index_t position[CHUNK];  // i + first_query
  index_t x0[CHUNK];  // i + first_query + 255
};

INLINE void prepare(Task& task) {
  task.scale = 1.0f / root((float)DIM);
  const index_t x0 = 8 * task.h;
  task.x0 = power(2.0f, choose<float>(8 <= task.h, 0.125f * (float)(60 - x0), 0.125f * (float)(-8 - x0)));
  task.first_key = (index_t)task.call.first_key;
  task.first_query = (index_t)task.call.first_query;
}

INLINE void prepare(const Task& task, Lanes& lanes) {
  UNROLLED for (int n = 0; n < VECTORS; n++) {
    lanes.position[n] = lanes.lane[n] + task.first_key;
    lanes.holds0[n] = lanes.position[n] <= 3;
    lanes.x0[n] = lanes.position[n] + 255;
  }
}

INLINE void prepare(const Task& task, Rows& rows) {
  for (int j = 0; j < rows.count; j++) {
    rows.position[j] = rows.row[j] + task.first_query;
    rows.x0[j] = rows.position[j] + 255;
  }
}

INLINE vi visible(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j) {
  return (lanes.position[n] <= rows.position[j])
      & (lanes.holds0[n] | ((lanes.position[n] <= rows.x0[j]) & (rows.position[j] <= lanes.x0[n])));
}

INLINE vf score_of(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf dot) {
  return dot * task.scale - task.x0 * convert<vf>(magnitude(lanes.position[n] - rows.position[j]));
}

INLINE vindex position_of(const Task& task, const Rows& rows, int j) {
  return splat<vindex>(rows.position[j]);
}

INLINE vf weight_from(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf score) {
  return splat<vf>(0.0f);
}

INLINE vf factor_of(const Task& task, const Rows& rows, int j, vf mass, vf peak) {
  return 1.0f / mass;
}

INLINE vf total_of(const Task& task, const Rows& rows, int j, vf mass, vf peak) {
  return logarithm(mass) + peak;
}
