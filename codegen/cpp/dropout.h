// Dropout: whether a weight is dropped follows from the call's seed and from the pair of tokens alone. So the kernels of the
// backward pass, which meet the pairs in another order, drop the same ones, and nothing has to be kept of them.

// A number of which every bit depends on all bits of x (splitmix64).
INLINE uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

// A query has two random words, a key has one; here the query's or the key's are vectors.
template <class Q, class K> INLINE vi dropped(Q first, Q second, K word) {
  vu x = (first ^ word) * 0x7feb352du;
  x = ((x ^ x >> 15) + second) * 0x846ca68bu;
  x = (x ^ x >> 16) * 0x9e3779b1u;
  return (vi)(x < DROPPED);
}
