// What a contraction makes of tensors of bfloat16, and of matrices that are rounded to it, for
// products of pairs. Included inside the namespace of the instructions that multiply them.

static const uint16_t* halves_of(const View& v, int64_t i) { return (const uint16_t*)v.data + i * v.row; }

// Rows as elements, the last of which may have one feature.
static void load_pairs(const View& v, int64_t first, int rows, float* to) {
  const int64_t E = elements(v.columns);
  for (int r = 0; r < rows; r++, to += E) {
    to[E - 1] = 0;
    __builtin_memcpy((void*)to, halves_of(v, first + r), 2 * size_t(v.columns));
  }
}

static void pack_pairs(const View& v, int64_t S, float* to, float* room) {
  const int E = int(elements(v.columns));
  for (int64_t j = 0; j < S; j += PANEL) {
    const int rows = int(S - j < PANEL ? S - j : PANEL);
    load_pairs(v, j, rows, room);
    pack(room, E, rows, E, to + j * E);
  }
}

static void zip_pairs(const View& v, int64_t first, int64_t rows, int width, float* to) {
  for (int64_t r = 0; r < rows; r += 2) {
    const char* const at = (const char*)halves_of(v, first + r);
    zip_rows(at, r + 1 < rows ? at + 2 * v.row : nullptr, 2, v.columns, width, to + r / 2 * width);
  }
}

static void halve(float* W, int step, int m, int n, float* to) {
  for (int r = 0; r < m; r++, W += step, to += step) {
    if (n % 2) W[n] = 0;  // it has no value
    for (int c = 0; c < n; c += 2 * VL) store(to + c / 2, pairs(load(W + c), load(W + c + VL)));
  }
}

static void turn(const float* W, int step, int m, int n, float weight, float* to) {
  const Vec by = all(weight);
  for (int r = 0; r < m; r += 2, W += 2 * step, to += step)
    for (int c = 0; c < n; c += VL)
      store(to + c, zipped(mul(by, load(W + c)), r + 1 < m ? mul(by, load(W + step + c)) : zero()));
}

constexpr Pairs pairs_of_bf16 = {pack_pairs, load_pairs, zip_pairs, halve, turn, {gemm_nt<false>, gemm_nt<true>}, gemm_nn, gemm_tn};
