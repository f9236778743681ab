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

constexpr Floats floats = {norm, gated, attend};
