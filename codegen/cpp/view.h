// What the variant says of a pair of tokens, one of which stands in a lane, while the other one's row is met by all lanes.

struct Task {  // one head of one row of the batch
  const Context& call;
  index_t b, h, kv;
  // <per task: fields>
};

struct Lanes {
  vindex lane[VECTORS];
  const Stored* data[TILE];
  // <per lane: fields>
};

struct Rows {
  int count = 0;
  index_t row[CHUNK];
  bool mixed[CHUNK];
  const Stored* data[CHUNK];
  // <per row: fields>
};

INLINE void prepare(Task& task) {
  // <per task: values>
}

INLINE void prepare(const Task& task, Lanes& lanes) {
  UNROLLED for (int n = 0; n < VECTORS; n++) {
    // <per lane: values>
  }
}

INLINE void prepare(const Task& task, Rows& rows) {
  for (int j = 0; j < rows.count; j++) {
    // <per row: values>
  }
}

INLINE vi visible(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j) {
  // <visible>
}

INLINE vf score_of(const Task& task, const Lanes& lanes, int n, const Rows& rows, int j, vf dot) {
  // <score>
}
