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
  vi holds0[VECTORS];  // 0 ≤ i + first_query ∧ i + first_query ≤ 3135
  vindex x0[VECTORS];  // ⌊(i + first_query) / 56⌋
  vindex x1[VECTORS];  // (i + first_query) mod 56
  vindex x2[VECTORS];  // ⌊(i + first_query) / 56⌋ + 3
  vindex x3[VECTORS];  // (i + first_query) mod 56 + 3
};

struct Rows {
  int count = 0;
  index_t row[CHUNK];
  bool mixed[CHUNK];
  const Stored* data[CHUNK];
  bool holds0[CHUNK];
  bool holds1[CHUNK];  // 49 ≤ ⌊(place + first_key) / 56⌋
  bool holds2[CHUNK];  // 0 ≤ ⌊(place + first_key) / 56⌋
  index_t x0[CHUNK];  // ⌊(place + first_key) / 56⌋ + 3
  bool holds3[CHUNK];  // 49 ≤ (place + first_key) mod 56
  index_t x1[CHUNK];  // (place + first_key) mod 56 + 3
  bool holds4[CHUNK];  // ⌊(place + first_key) / 56⌋ ≤ 6
  index_t x2[CHUNK];  // ⌊(place + first_key) / 56⌋
  bool holds5[CHUNK];  // (place + first_key) mod 56 ≤ 6
  index_t x3[CHUNK];  // (place + first_key) mod 56
};

INLINE void prepare(Task& task) {
  task.scale = 1.0f / root((float)DIM);
  task.first_query = (index_t)task.call.first_query;
  task.first_key = (index_t)task.call.first_key;
}

INLINE void prepare(const Task& task, Lanes& lanes) {
  UNROLLED for (int n = 0; n < VECTORS; n++) {
    const vindex position = lanes.lane[n] + task.first_query;
    lanes.holds0[n] = (0 <= position) & (position <= 3135);
    lanes.x0[n] = quotient(position, 56);
    lanes.x1[n] = remainder_of(position, 56);
    lanes.x2[n] = lanes.x0[n] + 3;
    lanes.x3[n] = lanes.x1[n] + 3;
  }
}

INLINE void prepare(const Task& task, Rows& rows) {
  for (int j = 0; j < rows.count; j++) {
    const index_t position = rows.row[j] + task.first_key;
    rows.x2[j] = quotient(position, 56);
    rows.holds0[j] = (0 <= position) & (rows.x2[j] <= 55) & (position <= 3135);
    rows.holds1[j] = 49 <= rows.x2[j];
    rows.holds2[j] = 0 <= rows.x2[j];
    rows.x0[j] = rows.x2[j] + 3;
    rows.x3[j] = remainder_of(position, 56);
    rows.holds3[j] = 49 <= rows.x3[j];
    rows.x1[j] = rows.x3[j] + 3;
    rows.holds4[j] = rows.x2[j] <= 6;
    rows.holds5[j] = rows.x3[j] <= 6;
  }
}

INLINE vi visible(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j) {
  return lanes.holds0[n]
      & truth(rows.holds0[j])
      & (truth(rows.holds1[j]) | (truth(rows.holds2[j]) & (lanes.x0[n] <= rows.x0[j])))
      & (truth(rows.holds3[j]) | (lanes.x1[n] <= rows.x1[j]))
      & (truth(rows.holds4[j]) | (rows.x2[j] <= lanes.x2[n]))
      & (truth(rows.holds5[j]) | (rows.x3[j] <= lanes.x3[n]));
}

INLINE vf score_of(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf dot) {
  return dot * task.scale;
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
