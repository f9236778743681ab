// Products of floats with many vectors: see dense.cpp. Included inside a namespace that names the vectors, behind attention/gemm.h.
//
// Vectors are packed by parts of columns, and in each by blocks of TALL of them: a block is (depth, TALL), so that what a tile reads is
// one stream.

// Vectors t on, of a count of TALL, TALL / 2, 2 or 1, as long as there are some before `end`.
template <class F>
static inline void each_block(int64_t t, int64_t end, const F& f) {
  const auto blocks = [&](auto many) {
    for (constexpr int ROWS = decltype(many)::value; t + ROWS <= end; t += ROWS) f(t, many);
  };
  blocks(std::integral_constant<int, TALL>());
  blocks(std::integral_constant<int, TALL / 2>());
  blocks(std::integral_constant<int, 2>());
  blocks(std::integral_constant<int, 1>());
}

// ROWS vectors, as a block (depth, ROWS).
template <int ROWS>
static void pack_block(const float* x, int64_t step, int depth, float* to) {
  for (int k = 0; k < depth; k += VL) {
    const int some = depth - k < VL ? depth - k : VL;
    Vec v[VL];
    UNROLL for (int i = 0; i < VL; i++) v[i] = i >= ROWS ? zero() : some == VL ? load(x + i * step + k) : load_some(x + i * step + k, some);
    transpose(v);
    UNROLL for (int i = 0; i < VL; i++) {
      if (i >= some) continue;
      float* const at = to + (k + i) * ROWS;  // the next column is written over what lies behind this one
      (k + i) * ROWS + VL <= depth * ROWS ? store(at, v[i]) : store_some(at, v[i], ROWS);
    }
  }
}

// Vectors TALL begin .. TALL end, of all columns; the last of these indices takes the rest.
static void pack_vectors(const Products& p, int64_t begin, int64_t end) {
  const int64_t last = end * TALL > p.T ? p.T : end * TALL;
  for (const Piece& piece : p.pieces)
    each_block(begin * TALL, last, [&](int64_t t, auto many) {
      pack_block<decltype(many)::value>(p.x + t * p.x_step + piece.first, p.x_step, piece.depth, p.vectors_at(piece, t));
    });
}

// Rows n .. n + rows of W, columns k .. k + depth, as a panel (depth, PANEL), zeros behind the last row.
static void pack_panel(const Dense& m, int64_t n, int rows, int64_t k, int depth, float* to) {
  if (!m.by_columns) return pack_panels(m.w + n * m.step + k, m.step, rows, depth, to, 0);
  for (int j = 0; j < depth; j++) {
    const float* const from = m.w + (k + j) * m.step + n;
    for (int i = 0; i < PANEL; i += VL)
      store(to + j * PANEL + i, rows >= i + VL ? load(from + i) : rows > i ? load_some(from + i, rows - i) : zero());
  }
}

// A block of ROWS vectors times a panel, added to y where ADD. Sums of a part are added to those before, not continued: the error of a
// sum of K products grows with DEPTH + K / DEPTH.
template <int ROWS, bool ADD>
static inline void some_rows(const float* x, const float* panel, int depth, float* y, int64_t step) {
  Vec sums[ROWS][2];
  UNROLL for (int i = 0; i < ROWS; i++) sums[i][0] = sums[i][1] = zero();
  for (int k = 0; k < depth; k++) {
    const Vec a = load(panel + k * PANEL), b = load(panel + k * PANEL + VL);
    UNROLL for (int i = 0; i < ROWS; i++) {
      const Vec one = all(x[k * ROWS + i]);
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

// Vectors t .. end times the panel of rows n of W, to y.
static void panel_times(const Products& p, const Dense& m, int64_t n, int64_t t, int64_t end, float* y, int64_t step) {
  alignas(64) float panel[DEPTH * PANEL];
  const int rows = int(std::min(int64_t(PANEL), m.N - n));
  for (const Piece& piece : p.pieces) {
    pack_panel(m, n, rows, piece.first, piece.depth, panel);
    each_block(t, end, [&](int64_t i, auto many) {
      constexpr int ROWS = decltype(many)::value;
      (piece.first ? some_rows<ROWS, true> : some_rows<ROWS, false>)(p.vectors_at(piece, i), panel, piece.depth, y + (i - t) * step, step);
    });
  }
}

static inline Vec silu(Vec x) { return x / add(all(1.0f), expv(sub(zero(), x))); }

// What the product was taken for: y becomes the product, y + the product, or silu(product) * that with `up`.
template <class F>
static void to_rows(float* y, int64_t step, int64_t count, int columns, const F& f) {
  for (int64_t i = 0; i < count; i++)
    for (int n = 0; n < columns; n += VL) {
      float* const to = y + i * step + n;
      const int some = columns - n < VL ? columns - n : VL;
      store_some(to, f(i * PANEL + n, to, some), some);
    }
}

// Panel i of matrix m.
static void panel(const Products& p, const Dense& m, int64_t i, float* room) {
  const int64_t n = i * PANEL;
  const int columns = int(std::min(int64_t(PANEL), m.N - n));
  for (int64_t t = 0; t < p.T; t += CHUNK) {
    const int64_t end = std::min(p.T, t + CHUNK);
    float* const y = m.y + t * p.y_step + n;
    if (p.finish == STORE && columns == PANEL) {
      panel_times(p, m, n, t, end, y, p.y_step);
      continue;
    }
    panel_times(p, m, n, t, end, room, PANEL);
    if (p.finish == GATE) {
      float* const up = room + std::min(p.T, CHUNK) * PANEL;
      panel_times(p, p.which[1], n, t, end, up, PANEL);
      to_rows(y, p.y_step, end - t, columns, [&](int64_t at, float*, int) { return mul(silu(load(room + at)), load(up + at)); });
    } else if (p.finish == ADD) {
      to_rows(y, p.y_step, end - t, columns, [&](int64_t at, float* to, int some) { return add(load_some(to, some), load(room + at)); });
    } else {
      to_rows(y, p.y_step, end - t, columns, [&](int64_t at, float*, int) { return load(room + at); });
    }
  }
}

// Plane i of a head turns features i and i + R / 2, of each head of D features.
static void rotate(float* row, int64_t heads, int64_t D, const float* cos, const float* sin, int64_t R) {
  const int64_t half = R / 2;
  for (int64_t h = 0; h < heads; h++, row += D) {
    int64_t i = 0;
    for (; i + VL <= half; i += VL) {
      const Vec a = load(row + i), b = load(row + i + half);
      store(row + i, fma(b, load(sin + i), mul(a, load(cos + i))));
      store(row + i + half, fma(a, load(sin + i + half), mul(b, load(cos + i + half))));
    }
    for (; i < half; i++) {
      const float a = row[i], b = row[i + half];
      row[i] = a * cos[i] + b * sin[i];
      row[i + half] = b * cos[i + half] + a * sin[i + half];
    }
  }
}
