struct Task {  // one head of one row of the batch
  const Context& call;
  index_t b, h, kv;
  float scale;  // 1 / √dim
  float x0;  // 2^(0.125·(60 − 8·h) if 8 ≤ h else 0.125·(−8 − 8·h))
  index_t first_query;
  index_t first_key;
};

struct Lanes {
  vindex lane[VECTORS];
  const Stored* data[TILE];
  vindex documents_value[VECTORS];  // documents[b, i + first_query]
  vindex position[VECTORS];  // i + first_query
};

struct Rows {
  int count = 0;
  index_t row[CHUNK];
  bool mixed[CHUNK];
  const Stored* data[CHUNK];
  index_t documents_value[CHUNK];  // documents[b, place + first_key]
  index_t position[CHUNK];  // place + first_key
};

INLINE void prepare(Task& task) {
  task.scale = 1.0f / root((float)DIM);
  const index_t x0 = 8 * task.h;
  task.x0 = power(2.0f, choose<float>(8 <= task.h, 0.125f * (float)(60 - x0), 0.125f * (float)(-8 - x0)));
  task.first_query = (index_t)task.call.first_query;
  task.first_key = (index_t)task.call.first_key;
}

INLINE void prepare(const Task& task, Lanes& lanes) {
  UNROLLED for (int n = 0; n < VECTORS; n++) {
    lanes.position[n] = lanes.lane[n] + task.first_query;
    lanes.documents_value[n] = read<vindex, int64_t>(task.call.tables[0], task.b, lanes.position[n]);
  }
}

INLINE void prepare(const Task& task, Rows& rows) {
  for (int j = 0; j < rows.count; j++) {
    rows.position[j] = rows.row[j] + task.first_key;
    rows.documents_value[j] = read<index_t, int64_t>(task.call.tables[0], task.b, rows.position[j]);
  }
}

INLINE vi visible(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j) {
  return truth(rows.documents_value[j] == lanes.documents_value[n])
      & truth(rows.position[j] <= lanes.position[n]);
}

INLINE vf score_of(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf dot) {
  return dot * task.scale - task.x0 * convert<vf>(magnitude(rows.position[j] - lanes.position[n]));
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
