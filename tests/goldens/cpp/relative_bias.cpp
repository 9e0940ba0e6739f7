struct Task {  // one head of one row of the batch
  const Context& call;
  index_t b, h, kv;
  float scale;  // 1 / √dim
  float x0;  // log(16)
  index_t first_query;
  index_t first_key;
};

struct Lanes {
  vindex lane[VECTORS];
  const Stored* data[TILE];
  vindex position[VECTORS];  // i + first_query
};

struct Rows {
  int count = 0;
  index_t row[CHUNK];
  bool mixed[CHUNK];
  const Stored* data[CHUNK];
  index_t position[CHUNK];  // place + first_key
};

INLINE void prepare(Task& task) {
  task.scale = 1.0f / root((float)DIM);
  task.x0 = logarithm(16.0f);
  task.first_query = (index_t)task.call.first_query;
  task.first_key = (index_t)task.call.first_key;
}

INLINE void prepare(const Task& task, Lanes& lanes) {
  UNROLLED for (int n = 0; n < VECTORS; n++) {
    lanes.position[n] = lanes.lane[n] + task.first_query;
  }
}

INLINE void prepare(const Task& task, Rows& rows) {
  for (int j = 0; j < rows.count; j++) {
    rows.position[j] = rows.row[j] + task.first_key;
  }
}

INLINE vi visible(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j) {
  return truth(true);
}

INLINE vf score_of(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf dot) {
  const vindex x0 = magnitude(lanes.position[n] - rows.position[j]);
  const vindex x1 = convert<vindex>(rounded_down(logarithm(convert<vf>(higher(x0, 8)) / 8.0f) / task.x0 * 8.0f));
  const vindex x2 = choose<vindex>(x0 < 8, x0, lower(8 + x1, 15)) + choose<vindex>(lanes.position[n] < rows.position[j], 16, 0);
  return dot * task.scale + read<vf, float>(task.call.tables[0], task.h, x2);
}

INLINE vf weight_from(const Task& task, const Lanes& lanes, int n, vf score) {
  return splat<vf>(0.0f);
}

INLINE vf factor_of(const Task& task, const Lanes& lanes, int n, vf mass, vf peak) {
  return 1.0f / mass;
}

INLINE vf total_of(const Task& task, const Lanes& lanes, int n, vf mass, vf peak) {
  return logarithm(mass) + peak;
}
