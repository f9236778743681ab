// What stands between the products of a layer, on floats: norms, gates, attention over rows. Included as products.h is.

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

// One query over the first seen[i] rows of each part: y = softmax(scale q . k) v. D is a multiple of 16. `room` has a place for each
// row, and 15 more.
static void attend(const float* q, const Past* parts, const int64_t* seen, int64_t count, int64_t D, float scale, float* room, float* y) {
  int64_t many = 0;
  float most = -__builtin_inff();
  bool is_number = true;
  for (int64_t i = 0; i < count; i++)
    for (int64_t s = 0; s < seen[i]; s++) {
      const float* const k = parts[i].k + s * parts[i].k_step;
      Real dot = zero_real();
      for (int64_t d = 0; d < D; d += 16) dot = fma(load_real((const uint8_t*)(q + d)), load_real((const uint8_t*)(k + d)), dot);
      const float logit = sum_of(dot) * scale;
      is_number = is_number && logit == logit;
      most = logit > most ? logit : most;
      room[many++] = logit;
    }
  if (!is_number) most = __builtin_nanf("");
  Real mass = zero_real();
  for (int64_t s = 0; s < many; s += 16) {
    const int n = least(16, many - s);
    const Real share = exponential(bounded(plus(load_some(room + s, n), broadcast(-most))));
    store_some(room + s, share, n);
    mass = plus(mass, load_some(room + s, n));  // lanes beyond n are 0
  }
  const Real by = broadcast(1.0f / sum_of(mass));
  for (int64_t d = 0; d < D; d += 64) {
    const int lanes = least(4, (D - d) / 16);
    Real sums[4] = {zero_real(), zero_real(), zero_real(), zero_real()};
    const float* share = room;
    for (int64_t i = 0; i < count; i++)
      for (int64_t s = 0; s < seen[i]; s++) {
        const float* const v = parts[i].v + s * parts[i].v_step + d;
        const Real p = broadcast(*share++);
        if (lanes == 4) {
          UNROLLED
          for (int c = 0; c < 4; c++) sums[c] = fma(p, load_real((const uint8_t*)(v + 16 * c)), sums[c]);
        } else {
          for (int c = 0; c < lanes; c++) sums[c] = fma(p, load_real((const uint8_t*)(v + 16 * c)), sums[c]);
        }
      }
    for (int c = 0; c < lanes; c++) store_some(y + d + 16 * c, times(sums[c], by), 16);
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
    __builtin_prefetch(at + 16 * k + AHEAD / 4);
    UNROLLED
    for (int c = 0; c < CHAINS; c++) {
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

constexpr Floats floats = {norm, gated, attend, float_rows};
