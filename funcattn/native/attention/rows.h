// Rows of tensors of any floats, their sums, and whether they are finite. Included by contract.h, in
// its namespace.

static const float* row_of(const View& x, int64_t i) { return (const float*)x.data + i * x.row; }

// to += weight * (n numbers of row i of x, from column j on)
static void add_row(const View& x, int64_t i, int64_t j, float weight, int n, float* to) {
  const int bytes = x.kind == FLOAT32 ? 4 : 2;
  const char* from = x.data + (i * x.row + j * x.column) * bytes;
  alignas(64) char some[4 * VL] = {};
  const auto numbers = [&](int c, int count) {  // VL of them, of which `count` are there
    const char* at = from + c * x.column * bytes;
    if (x.column != 1 || count < VL) {
      for (int l = 0; l < count; l++)
        __builtin_memcpy(some + l * bytes, at + l * x.column * bytes, bytes);
      at = some;
    }
    if (x.kind == FLOAT32) return load((const float*)at);
    return x.kind == BFLOAT16 ? load_bf16((const uint16_t*)at) : load_f16((const uint16_t*)at);
  };
  for (int c = 0; c < n; c += VL) {
    const int count = n - c < VL ? n - c : VL;
    store_some(to + c, fma(all(weight), numbers(c, count), load_some(to + c, count)), count);
  }
}

// to = weight * from, n numbers
static void scaled_row(const float* from, int64_t n, float weight, float* to) {
  int d = 0;
  for (; d + VL <= n; d += VL) store(to + d, mul(all(weight), load(from + d)));
  for (; d < n; d++) to[d] = weight * from[d];
}

// to = weight * (row i of x)
static void read_row(const View& x, int64_t i, float weight, float* to) {
  if (x.kind == FLOAT32) return scaled_row(row_of(x, i), x.columns, weight, to);
  __builtin_memset(to, 0, sizeof(float) * x.columns);
  add_row(x, i, 0, weight, int(x.columns), to);
}

static float sum_of(const float* p, int64_t n) {
  Vec sums = zero();
  int64_t j = 0;
  for (; j + VL <= n; j += VL) sums = add(sums, load(p + j));
  float total = sum(sums);
  for (; j < n; j++) total += p[j];
  return total;
}

// to += weight * from, n numbers
static void add_scaled(const float* from, int64_t n, float weight, float* to) {
  int64_t d = 0;
  for (; d + VL <= n; d += VL) store(to + d, fma(all(weight), load(from + d), load(to + d)));
  for (; d < n; d++) to[d] += weight * from[d];
}

static bool all_finite(const float* x, int64_t n) {
  Vec odd = zero();
  int64_t i = 0;
  for (; i + VL <= n; i += VL) odd = fma(load(x + i), zero(), odd);
  for (; i < n; i++) odd = fma(all(x[i]), zero(), odd);
  return !has_nan(odd);
}
