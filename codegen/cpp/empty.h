// What a query gets that sees no key; those that then attend to all keys do not come here, unless there are none.

template <class Call> INLINE void mean_of_values(const Call& call, const Task& task, float* mean) {
  const auto* v = call.v + task.b * call.v_stride[0] + task.kv * call.v_stride[1];
  const int64_t k_len = call.context.k_len;
  double sum[VALUE_DIM] = {};
  for (int64_t j = 0; j < k_len; j++)
    for (int d = 0; d < VALUE_DIM; d++) sum[d] += number_of<VALUE_DIM>(v + j * call.v_stride[2], d);
  for (int d = 0; d < VALUE_DIM; d++) mean[d] = k_len ? (float)(sum[d] / k_len) : 0.0f;
}

template <class Call> INLINE void fill(const Call& call, const Task& task, float* row) {
  std::fill(row, row + VALUE_DIM, 0.0f);
  if (EMPTY_ROWS == MEAN) mean_of_values(call, task, row);
  if (EMPTY_ROWS == NOT_A_NUMBER || (EMPTY_ROWS == UNMASKED && call.context.k_len)) std::fill(row, row + VALUE_DIM, NAN);
}
