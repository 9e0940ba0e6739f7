struct Task {  // one head of one row of the batch
  const Context& call;
  index_t b, h, kv;
  float scale;  // 1 / √dim
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
  bool padding_value[CHUNK];  // padding[b, place + first_key]
  index_t position[CHUNK];  // place + first_key
};

INLINE void prepare(Task& task) {
  task.scale = 1.0f / root((float)DIM);
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
    rows.padding_value[j] = read<bool, bool>(task.call.tables[0], task.b, rows.position[j]);
  }
}

INLINE vi visible(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j) {
  return truth(rows.padding_value[j]) & (rows.position[j] <= lanes.position[n]);
}

INLINE vf score_of(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf dot) {
  return dot * task.scale;
}

INLINE vf weight_from(const Task& task, const Lanes& lanes, int n, vf score) {
  return logistic(score);
}

INLINE vf factor_of(const Task& task, const Lanes& lanes, int n, vf mass, vf peak) {
  return splat<vf>(1.0f);
}

INLINE vf total_of(const Task& task, const Lanes& lanes, int n, vf mass, vf peak) {
  return splat<vf>(0.0f);
}
