// Linear attention: keys and values are added up to a state that stays in the cache, and that a tile of queries meets at once.

struct Task {  // one head of one row of the batch
  const Context& call;
  index_t b, h, kv;
  // <per task: fields>
};

INLINE void prepare(Task& task) {
  // <per task: values>
}

INLINE vf feature_of_query(const Task& task, vf x) {
  // <feature of a query>
}

INLINE vf feature_of_key(const Task& task, vf x) {
  // <feature of a key>
}

INLINE vf scale_of(const Task& task) {
  // <scale>
}

// What every sum of weight * v is multiplied with in the end.
INLINE vf factor_of(const Task& task, vf mass) {
  // <factor>
}

struct Log {  // running, of a decay; null where nothing decays
  const double* data;
  int64_t stride[3];  // of batch, heads and tokens
};

struct Call {  // every field has eight bytes; strides are those of batch, heads and tokens
  const Stored *q, *k, *v;
  Stored* out;
  float* mass;  // [batch][heads][q_len]; null where nobody asks
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  int64_t sharing[3];       // heads that share one of q, of k, of v
  Log at_query, at_key;
  int64_t sign;             // of the logs
  const uint8_t* shown;     // keys that exist; null: all
  int64_t shown_stride[3];
  int64_t parallel;         // whether there is work for threads
  int64_t segments;         // into which the queries of a head are cut, where heads are fewer than threads
  int64_t offset;           // query i sees keys up to i + offset
  Context context;
};

constexpr int PANELS = (VALUE_DIM + TILE - 1) / TILE;  // of the columns of v

INLINE bool exists(const Call& call, const Task& task, int64_t key) {
  const int64_t* stride = call.shown_stride;
  return !call.shown || call.shown[task.b * stride[0] + task.h * stride[1] + key * stride[2]];
}

// How many keys the state holds that the tile meets which begins with this query.
INLINE int64_t keys_before(const Call& call, int64_t first) {
  return std::clamp<int64_t>(first + call.offset, 0, call.context.k_len);
}

INLINE float* mass_of(const Call& call, const Task& task, int64_t query) {
  return call.mass ? call.mass + ((int64_t)task.b * call.context.heads + task.h) * call.context.q_len + query : nullptr;
}
