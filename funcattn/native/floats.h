// What stands between the products of a layer, on floats: norms, gates, attention over rows. Included as products.h is.

constexpr int QUERIES = MOST;  // that share what is loaded of keys and values

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

// Logits of one query with n <= 16 rows of keys, each `step` numbers behind the one before.
static inline Real logits_of(const float* q, const float* k, int64_t step, int n, int64_t D) {
  Real dots[16];
  UNROLLED
  for (int j = 0; j < 16; j++) dots[j] = zero_real();
  if (n == 16) {
    for (int64_t d = 0; d < D; d += 16) {
      const Real part = load_real((const uint8_t*)(q + d));
      _Pragma("GCC unroll 16")
      for (int j = 0; j < 16; j++) dots[j] = fma(part, load_real((const uint8_t*)(k + j * step + d)), dots[j]);
    }
  } else {
    for (int j = 0; j < n; j++)
      for (int64_t d = 0; d < D; d += 16) dots[j] = fma(load_real((const uint8_t*)(q + d)), load_real((const uint8_t*)(k + j * step + d)), dots[j]);
  }
  return sums_of(dots);
}

// In place: numbers to exp(number - greatest); gives one over their sum, NaN where a number is. There is room for 15 more.
static inline Real to_shares(float* x, int64_t count) {
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
  return broadcast(1.0f / sum_of(mass));
}

// sums[i] += shares of query i times `rows` rows of values, 16 features each.
template <int Q>
static inline void mix(float* const* share, const float* v, int64_t step, int64_t rows, int lanes, Real (*sums)[4]) {
  if (lanes == 4) {
    Real now[Q][4];
    UNROLLED
    for (int i = 0; i < Q; i++)
      for (int c = 0; c < 4; c++) now[i][c] = sums[i][c];
    for (int64_t s = 0; s < rows; s++, v += step) {
      Real part[4];
      UNROLLED
      for (int c = 0; c < 4; c++) part[c] = load_real((const uint8_t*)(v + 16 * c));
      UNROLLED
      for (int i = 0; i < Q; i++) {
        const Real p = broadcast(share[i][s]);
        UNROLLED
        for (int c = 0; c < 4; c++) now[i][c] = fma(p, part[c], now[i][c]);
      }
    }
    UNROLLED
    for (int i = 0; i < Q; i++)
      for (int c = 0; c < 4; c++) sums[i][c] = now[i][c];
  } else {
    for (int64_t s = 0; s < rows; s++, v += step)
      for (int i = 0; i < Q; i++)
        for (int c = 0; c < lanes; c++) sums[i][c] = fma(broadcast(share[i][s]), load_real((const uint8_t*)(v + 16 * c)), sums[i][c]);
  }
}

// Q <= QUERIES queries of one key head: y[i] = softmax(scale q[i] . k) v over the first seen[p] rows of each part; of the last part
// query i sees own[i]. D is a multiple of 16. `room` has for each query a place for every row, and 15 more, `room_step` apart.
static void attend(const Query* queries, int64_t Q, const Past* parts, const int64_t* seen, int64_t count, int64_t D, float scale, float* room, int64_t room_step) {
  float* share[QUERIES];
  Real by[QUERIES];
  int64_t first = 0;
  for (int64_t p = 0; p < count; p++) {
    const bool last = p + 1 == count;
    int64_t most = seen[p];
    for (int64_t i = 0; last && i < Q; i++) most = queries[i].own > most || !i ? queries[i].own : most;
    for (int64_t s = 0; s < most; s += 16)
      for (int64_t i = 0; i < Q; i++) {
        const int n = least(16, (last ? queries[i].own : most) - s);
        if (n <= 0) continue;
        const Real dots = logits_of(queries[i].q, parts[p].k + s * parts[p].k_step, parts[p].k_step, n, D);
        store_some(room + i * room_step + first + s, times(dots, broadcast(scale)), n);
      }
    first += last ? 0 : seen[p];
  }
  for (int64_t i = 0; i < Q; i++) {
    share[i] = room + i * room_step;
    by[i] = to_shares(share[i], first + queries[i].own);
  }
  for (int64_t d = 0; d < D; d += 64) {
    const int lanes = least(4, (D - d) / 16);
    Real sums[QUERIES][4];
    for (int64_t i = 0; i < Q; i++)
      for (int c = 0; c < 4; c++) sums[i][c] = zero_real();
    int64_t begin = 0;
    for (int64_t p = 0; p < count; p++) {
      const float* const v = parts[p].v + d;
      float* from[QUERIES];
      for (int64_t i = 0; i < Q; i++) from[i] = share[i] + begin;
      if (p + 1 == count) {
        for (int64_t i = 0; i < Q; i++) mix<1>(from + i, v, parts[p].v_step, queries[i].own, lanes, sums + i);
      } else {
        if constexpr (QUERIES == 4) {
          if (Q == 4) mix<4>(from, v, parts[p].v_step, seen[p], lanes, sums);
          if (Q == 3) mix<3>(from, v, parts[p].v_step, seen[p], lanes, sums);
        }
        if (Q == 2) mix<2>(from, v, parts[p].v_step, seen[p], lanes, sums);
        if (Q == 1) mix<1>(from, v, parts[p].v_step, seen[p], lanes, sums);
      }
      begin += seen[p];
    }
    for (int64_t i = 0; i < Q; i++)
      for (int c = 0; c < lanes; c++) store_some(queries[i].y + d + 16 * c, times(sums[i][c], by[i]), 16);
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
  constexpr int MANY = 2 * MOST;  // without digits there is a register a sum
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

constexpr Floats floats = {norm, gated, attend, float_rows, QUERIES};
