// Panels of a product of floats: see dense.cpp. Included inside a namespace that names the vectors, behind attention/gemm.h.

// Rows n .. n + rows of W, columns k .. k + depth, as a panel (depth, PANEL), zeros behind the last row.
static void pack_panel(const Product& p, int64_t n, int rows, int64_t k, int depth, float* to) {
  if (!p.by_columns) return pack_panels(p.w + n * p.w_step + k, p.w_step, rows, depth, to, 0);
  for (int j = 0; j < depth; j++) {
    const float* const from = p.w + (k + j) * p.w_step + n;
    for (int i = 0; i < PANEL; i += VL)
      store(to + j * PANEL + i, rows >= i + VL ? load(from + i) : rows > i ? load_some(from + i, rows - i) : zero());
  }
}

// ROWS vectors times a panel, added to y where ADD. Sums of a part are added to those before, not continued: the error of a sum of K
// products grows with DEPTH + K / DEPTH.
template <int ROWS, bool ADD>
static inline void some_rows(const float* x, int64_t x_step, const float* panel, int depth, float* y, int64_t step) {
  Vec sums[ROWS][2];
  UNROLL for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = zero();
  for (int k = 0; k < depth; k++) {
    const Vec a = load(panel + k * PANEL), b = load(panel + k * PANEL + VL);
    UNROLL for (int i = 0; i < ROWS; i++) {
      const Vec one = all(x[i * x_step + k]);
      sums[i][0] = fma(one, a, sums[i][0]);
      sums[i][1] = fma(one, b, sums[i][1]);
    }
  }
  UNROLL for (int i = 0; i < ROWS; i++) {
    UNROLL for (int n = 0; n < 2; n++) {
      float* const to = y + i * step + n * VL;
      store(to, ADD ? add(load(to), sums[i][n]) : sums[i][n]);
    }
  }
}

// All T vectors times a panel.
template <bool ADD>
static void all_rows(const float* x, int64_t x_step, const float* panel, int64_t T, int depth, float* y, int64_t step) {
  int64_t t = 0;
  const auto rows = [&](auto many) {
    constexpr int ROWS = decltype(many)::value;
    for (; t + ROWS <= T; t += ROWS) some_rows<ROWS, ADD>(x + t * x_step, x_step, panel, depth, y + t * step, step);
  };
  rows(std::integral_constant<int, TALL>());
  rows(std::integral_constant<int, TALL / 2>());
  rows(std::integral_constant<int, 2>());
  rows(std::integral_constant<int, 1>());
}

// Columns PANEL begin .. PANEL end of y.
static void panels(const Product& p, int64_t begin, int64_t end) {
  alignas(64) float panel[DEPTH * PANEL];
  const int64_t parts = (p.K + DEPTH - 1) / DEPTH;
  std::unique_ptr<float[]> last;  // where y has no room for a whole panel
  for (int64_t i = begin; i < end; i++) {
    const int64_t n = i * PANEL;
    const int rows = int(std::min(int64_t(PANEL), p.N - n));
    if (rows < PANEL) last.reset(new float[p.T * PANEL]);
    float* const y = rows < PANEL ? last.get() : p.y + n;
    const int64_t step = rows < PANEL ? PANEL : p.N;
    for (int64_t k = 0, part = 0; part < parts; part++) {  // of like sizes
      const int depth = int((p.K - k + parts - part - 1) / (parts - part));
      pack_panel(p, n, rows, k, depth, panel);
      (part ? all_rows<true> : all_rows<false>)(p.x + k, p.x_step, panel, p.T, depth, y, step);
      k += depth;
    }
    if (rows < PANEL)
      for (int64_t t = 0; t < p.T; t++) std::copy(y + t * PANEL, y + t * PANEL + rows, p.y + t * p.N + n);
  }
}
