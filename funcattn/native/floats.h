// What stands between the products of a layer, on floats: norms, gates, attention over rows. Included as products.h is.

constexpr int QUERIES = MOST_LIGHT / 2;  // that share what is loaded of values
constexpr int64_t NEAR = 64;             // rows of keys or values that a cache holds
constexpr int64_t LATER = 32;            // rows ahead that are asked for

// x / sqrt(mean x^2 + epsilon) * weight
static void norm(const float* x, const float* weight, int64_t E, float epsilon, float* y) {
  Real squares = zero_real();
  for (int64_t i = 0; i < E; i += 16) {
    const Real v = load_some(x + i, least(16, E - i));
    squares = fma(v, v, squares);
  }
  const Real by = broadcast(1.0f / __builtin_sqrtf(sum_of(squares) / float(E) + epsilon));
  for (int64_t i = 0; i < E; i += 16) {
    const int n = least(16, E - i);
    store_some(y + i, times(times(load_some(x + i, n), by), load_some(weight + i, n)), n);
  }
}

// exp, off by 2e-7 of itself at most; 0 below -104, infinite above 89. Source: the polynomial of Moshier's Cephes, expf.
static inline Real exponential(Real x) {
  const Real by = whole_part(times(x, broadcast(1.44269504f)));
  const Real rest = fma(by, broadcast(2.12194440e-4f), fma(by, broadcast(-0.693359375f), x));
  Real y = broadcast(1.9875691500e-4f);
  y = fma(y, rest, broadcast(1.3981999507e-3f));
  y = fma(y, rest, broadcast(8.3334519073e-3f));
  y = fma(y, rest, broadcast(4.1665795894e-2f));
  y = fma(y, rest, broadcast(1.6666665459e-1f));
  y = fma(y, rest, broadcast(5.0000001201e-1f));
  return times_power(fma(y, times(rest, rest), plus(rest, broadcast(1.0f))), by);
}

// gate / (1 + exp(-gate)) * up
static void gated(const float* gate, const float* up, int64_t F, float* y) {
  for (int64_t i = 0; i < F; i += 16) {
    const int n = least(16, F - i);
    const Real g = load_some(gate + i, n);
    const Real below = plus(broadcast(1.0f), exponential(bounded(times(g, broadcast(-1.0f)))));
    store_some(y + i, times(over(g, below), load_some(up + i, n)), n);
  }
}

// Products of Q queries with R rows of keys, `step` numbers apart, lane by lane: of query i and row j at dots[16 i + j].
template <int Q, int R>
static inline void products_of(const float* const* q, const float* k, int64_t step, int64_t D, Real* dots) {
  Real sums[Q][R];
  UNROLLED
  for (int i = 0; i < Q; i++)
    _Pragma("GCC unroll 16")
    for (int j = 0; j < R; j++) sums[i][j] = zero_real();
  for (int64_t d = 0; d < D; d += 16) {
    Real query[Q];
    UNROLLED
    for (int i = 0; i < Q; i++) query[i] = load_real((const uint8_t*)(q[i] + d));
    _Pragma("GCC unroll 16")
    for (int j = 0; j < R; j++) {
      const float* const at = k + j * step + d;
      __builtin_prefetch(at + LATER * step);  // rows are read beside each other, which no prefetcher of a processor foresees
      const Real row = load_real((const uint8_t*)at);
      UNROLLED
      for (int i = 0; i < Q; i++) sums[i][j] = fma(query[i], row, sums[i][j]);
    }
  }
  UNROLLED
  for (int i = 0; i < Q; i++)
    _Pragma("GCC unroll 16")
    for (int j = 0; j < R; j++) dots[16 * i + j] = sums[i][j];
}

// Logits of Q queries with some rows of keys; as many rows at once as there are registers for.
template <int Q>
static inline void score_some(const float* const* q, float* const* to, const float* k, int64_t step, int64_t rows, int64_t D, float scale) {
  constexpr int R = 16 * MOST_LIGHT / 8 / (Q == 1 ? 1 : Q < 4 ? 2 : 4);
  for (int64_t s = 0; s < rows; s += 16) {
    const int n = least(16, rows - s);
    Real dots[16 * Q];
    if (n == 16)
      for (int j = 0; j < 16; j += R) products_of<Q, R>(q, k + (s + j) * step, step, D, dots + j);
    else {
      for (int i = 0; i < 16 * Q; i++) dots[i] = zero_real();
      for (int j = 0; j < n; j++) products_of<Q, 1>(q, k + (s + j) * step, step, D, dots + j);
    }
    UNROLLED
    for (int i = 0; i < Q; i++) store_some(to[i] + s, times(sums_of(dots + 16 * i), broadcast(scale)), n);
  }
}

// Logits of Q queries with some rows of keys, each `step` numbers behind the one before; D is a multiple of 16.
static void score(const float* const* q, float* const* to, int64_t Q, const float* k, int64_t step, int64_t rows, int64_t D, float scale) {
  for (int64_t s = 0; s < rows; s += NEAR) {
    const int64_t some = least(NEAR, rows - s);
    const float* const from = k + s * step;
    for (int64_t i = 0; i < Q;) {
      float* at[QUERIES];
      const int many = least(QUERIES, Q - i);
      for (int j = 0; j < many; j++) at[j] = to[i + j] + s;
      if (many == QUERIES) score_some<QUERIES>(q + i, at, from, step, some, D, scale);
      if (QUERIES == 4 && many == 3) score_some<3>(q + i, at, from, step, some, D, scale);
      if (QUERIES == 4 && many == 2) score_some<2>(q + i, at, from, step, some, D, scale);
      if (many == 1) score_some<1>(q + i, at, from, step, some, D, scale);
      i += many;
    }
  }
}

// In place: numbers to exp(number - greatest); gives one over their sum, NaN where a number is, and 0 of no numbers.
static float to_shares(float* x, int64_t count) {
  if (!count) return 0.0f;
  float most = -__builtin_inff();
  bool is_number = true;
  int64_t s = 0;
  if (count >= 16) {
    Real greatest = load_real((const uint8_t*)x);
    for (; s + 16 <= count; s += 16) {
      const Real v = load_real((const uint8_t*)(x + s));
      greatest = greater(greatest, v);
      is_number = is_number && !has_nan(v);
    }
    float each[16];
    store_some(each, greatest, 16);
    for (int j = 0; j < 16; j++) most = each[j] > most ? each[j] : most;
  }
  for (; s < count; s++) {
    is_number = is_number && x[s] == x[s];
    most = x[s] > most ? x[s] : most;
  }
  const Real down = broadcast(is_number ? -most : __builtin_nanf(""));
  Real mass = zero_real();
  for (s = 0; s < count; s += 16) {
    const int n = least(16, count - s);
    const Real share = exponential(bounded(plus(load_some(x + s, n), down)));
    store_some(x + s, share, n);
    mass = plus(mass, n == 16 ? share : load_some(x + s, n));  // lanes beyond n are 0
  }
  return 1.0f / sum_of(mass);
}

// y[i] += shares of query i times `rows` rows of values, of which the first 16 `lanes` features are taken.
template <int Q>
static inline void mix_some(const float* const* share, float* const* y, const float* v, int64_t step, int64_t rows, int64_t begin, int64_t d, int lanes) {
  v += begin * step + d;
  if (lanes == 4) {
    Real now[Q][4];
    UNROLLED
    for (int i = 0; i < Q; i++)
      for (int c = 0; c < 4; c++) now[i][c] = load_real((const uint8_t*)(y[i] + d + 16 * c));
    for (int64_t s = begin; s < begin + rows; s++, v += step) {
      Real part[4];
      UNROLLED
      for (int c = 0; c < 4; c++) {
        __builtin_prefetch(v + LATER * step + 16 * c);
        part[c] = load_real((const uint8_t*)(v + 16 * c));
      }
      UNROLLED
      for (int i = 0; i < Q; i++) {
        const Real p = broadcast(share[i][s]);
        UNROLLED
        for (int c = 0; c < 4; c++) now[i][c] = fma(p, part[c], now[i][c]);
      }
    }
    UNROLLED
    for (int i = 0; i < Q; i++)
      for (int c = 0; c < 4; c++) store_some(y[i] + d + 16 * c, now[i][c], 16);
  } else {
    for (int i = 0; i < Q; i++)
      for (int c = 0; c < lanes; c++) {
        float* const to = y[i] + d + 16 * c;
        Real now = load_real((const uint8_t*)to);
        for (int64_t s = 0; s < rows; s++) now = fma(broadcast(share[i][begin + s]), load_real((const uint8_t*)(v + s * step + 16 * c)), now);
        store_some(to, now, 16);
      }
  }
}

// y[i] (D,) += shares of query i times some rows of values, for Q queries; rows stay near while all of these read them.
static void mix(const float* const* share, float* const* y, int64_t Q, const float* v, int64_t step, int64_t rows, int64_t D) {
  for (int64_t s = 0; s < rows; s += NEAR) {
    const int64_t some = least(NEAR, rows - s);
    for (int64_t d = 0; d < D; d += 64) {
      const int lanes = least(4, (D - d) / 16);
      int64_t i = 0;
      for (; i + QUERIES <= Q; i += QUERIES) mix_some<QUERIES>(share + i, y + i, v, step, some, s, d, lanes);
      if constexpr (QUERIES == 4) {
        if (Q - i == 3) mix_some<3>(share + i, y + i, v, step, some, s, d, lanes);
        if (Q - i == 2) mix_some<2>(share + i, y + i, v, step, some, s, d, lanes);
      }
      if (Q - i == 1) mix_some<1>(share + i, y + i, v, step, some, s, d, lanes);
    }
  }
}

// The first K columns of a tile of floats times T vectors; the chains of sums hide the latency of a multiplication.
template <int T>
static inline void tile_of_floats(const float* at, const float* x, int64_t K, Real* to) {
  constexpr int CHAINS = T == 1 ? 4 : T == 2 ? 2 : 1;
  Real sums[CHAINS][T];
  UNROLLED
  for (int c = 0; c < CHAINS; c++)
    UNROLLED
    for (int t = 0; t < T; t++) sums[c][t] = zero_real();
  int64_t k = 0;
  for (; k + CHAINS <= K; k += CHAINS) {
    UNROLLED
    for (int c = 0; c < CHAINS; c++) {
      __builtin_prefetch(at + 16 * (k + c) + AHEAD / 4);
      const Real column = load_real((const uint8_t*)(at + 16 * (k + c)));
      UNROLLED
      for (int t = 0; t < T; t++) sums[c][t] = fma(column, broadcast(x[t * K + k + c]), sums[c][t]);
    }
  }
  for (; k < K; k++)
    for (int t = 0; t < T; t++) sums[0][t] = fma(load_real((const uint8_t*)(at + 16 * k)), broadcast(x[t * K + k]), sums[0][t]);
  UNROLLED
  for (int t = 0; t < T; t++) {
    to[t] = sums[0][t];
    for (int c = 1; c < CHAINS; c++) to[t] = plus(to[t], sums[c][t]);
  }
}

// Rows 16 begin .. 16 end of a matrix in tiles of floats (K, 16) times T vectors; see `rows` in products.h.
static void float_rows(const float* w, const float* x, int64_t T, int64_t K, int64_t N, int64_t begin, int64_t end, float* y, int64_t step) {
  constexpr int MANY = MOST_LIGHT;  // without digits there is a register a sum
  for (int64_t n = begin; n < end; n++) {
    const float* const at = w + 16 * n * K;
    const int count = least(16, N - 16 * n);
    for (int64_t t = 0, left = (T + MANY - 1) / MANY; t < T; left--) {  // parts of like sizes
      Real out[MANY];
      const int many = int((T - t + left - 1) / left);
      const float* const part = x + t * K;
      switch (many) {
        case 1: tile_of_floats<1>(at, part, K, out); break;
        case 2: tile_of_floats<2>(at, part, K, out); break;
        case 3: tile_of_floats<3>(at, part, K, out); break;
        case 4: tile_of_floats<4>(at, part, K, out); break;
        case 5: tile_of_floats<MANY < 5 ? MANY : 5>(at, part, K, out); break;
        case 6: tile_of_floats<MANY < 6 ? MANY : 6>(at, part, K, out); break;
        case 7: tile_of_floats<MANY < 7 ? MANY : 7>(at, part, K, out); break;
        default: tile_of_floats<MANY>(at, part, K, out);
      }
      for (int i = 0; i < many; i++, t++) store_some(y + t * step + 16 * n, out[i], count);
    }
  }
}

constexpr Floats floats = {norm, gated, score, to_shares, mix, float_rows};
