// Attention over rows in codes of 8 or 4 bits, as funcattn/caches/codes.py makes them, and over rows of floats beside them; included as
// floats.h is, behind it.
//
// Codes of keys lie feature by feature, 32 rows beside each other; those of values row by row, 32 features beside each other. So both
// products, of queries with keys and of shares with values, are sums of numbers times 32 codes: no sum is taken across lanes. A scale
// is multiplied into the number, and a minimum added once a group.

// 32 codes as floats; of 4 bits the low nibbles, then the high ones.
template <int BITS, class R>
static inline void codes_at(const uint8_t* p, R& a, R& b) {
  if constexpr (__is_same(R, __m512)) {
    const __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    if constexpr (BITS == 4) {
      const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);  // by the low bits of an index
      a = _mm512_permutexvar_ps(first, table);
      b = _mm512_permutexvar_ps(_mm512_srli_epi32(first, 4), table);
    } else {
      a = _mm512_cvtepi32_ps(first);
      b = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(p + 16))));
    }
  } else {
    const auto eight = [](const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); };
    const __m256i first = eight(p), second = eight(p + 8);
    if constexpr (BITS == 4) {
      const __m256i low = _mm256_set1_epi32(15);
      a = {_mm256_cvtepi32_ps(_mm256_and_si256(first, low)), _mm256_cvtepi32_ps(_mm256_and_si256(second, low))};
      b = {_mm256_cvtepi32_ps(_mm256_srli_epi32(first, 4)), _mm256_cvtepi32_ps(_mm256_srli_epi32(second, 4))};
    } else {
      a = {_mm256_cvtepi32_ps(first), _mm256_cvtepi32_ps(second)};
      b = {_mm256_cvtepi32_ps(eight(p + 16)), _mm256_cvtepi32_ps(eight(p + 24))};
    }
  }
}

// sums[i] += w[i][0] codes[0] + ... + w[i][n - 1] codes[n - 1], of 32 codes each, `step` bytes apart.
template <int Q, int BITS>
static inline void add_codes(const uint8_t* at, int64_t step, int64_t n, float* const* w, Real (*sums)[2]) {
  Real now[Q][2];
  UNROLLED
  for (int i = 0; i < Q; i++)
    for (int c = 0; c < 2; c++) now[i][c] = sums[i][c];
  for (int64_t j = 0; j < n; j++, at += step) {
    Real a, b;
    codes_at<BITS>(at, a, b);
    UNROLLED
    for (int i = 0; i < Q; i++) {
      const Real by = broadcast(w[i][j]);
      now[i][0] = fma(by, a, now[i][0]);
      now[i][1] = fma(by, b, now[i][1]);
    }
  }
  UNROLLED
  for (int i = 0; i < Q; i++)
    for (int c = 0; c < 2; c++) sums[i][c] = now[i][c];
}

// w[j] = x[j] scale[j] for n numbers, a multiple of 16; gives the sum of x[j] low[j].
static inline float weighed(const float* x, const float* scale, const float* low, int64_t n, float* w) {
  Real sum = zero_real();
  for (int64_t j = 0; j < n; j += 16) {
    const Real v = load_real((const uint8_t*)(x + j));
    store_some(w + j, times(v, load_real((const uint8_t*)(scale + j))), 16);
    sum = fma(v, load_real((const uint8_t*)(low + j)), sum);
  }
  return sum_of(sum);
}

static inline void prefetch(const uint8_t* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// room[i]: the logits of query i, rotated and scaled, with the rows of blocks first .. last.
template <int Q, int BITS>
static void coded_logits(const Coded& c, int64_t first, int64_t last, float* const* q, int64_t D, float* const* room, float* const* w) {
  const int64_t step = c.rows * BITS / 8;
  for (int64_t b = first; b < last; b++) {
    const CodedBlock& block = c.blocks[b];
    if (b + 1 < last) prefetch(c.blocks[b + 1].k, D * step);
    for (int64_t g = 0; g < c.rows / 32; g++) {
      Real sums[Q][2];
      for (int i = 0; i < Q; i++) sums[i][0] = sums[i][1] = broadcast(weighed(q[i], block.k_scale + g * D, block.k_low + g * D, D, w[i]));
      add_codes<Q, BITS>(block.k + g * 4 * BITS, step, D, w, sums);
      for (int i = 0; i < Q; i++)
        for (int h = 0; h < 2; h++) store_some(room[i] + (b - first) * c.rows + 32 * g + 16 * h, sums[i][h], 16);
    }
  }
}

// sums[i] (D) += shares of query i times the rotated values of blocks first .. last.
template <int Q, int BITS>
static void coded_values(const Coded& c, int64_t first, int64_t last, float* const* share, int64_t D, float* const* sums, float* const* w) {
  const int64_t step = D * BITS / 8, size = c.features;
  for (int64_t b = first; b < last; b++) {
    const CodedBlock& block = c.blocks[b];
    if (b + 1 < last) prefetch(c.blocks[b + 1].v, c.rows * step);
    for (int64_t g = 0; g < D / size; g++) {
      float low[Q];
      for (int i = 0; i < Q; i++)
        low[i] = weighed(share[i] + (b - first) * c.rows, block.v_scale + g * c.rows, block.v_low + g * c.rows, c.rows, w[i]);
      for (int64_t n = 0; n < size / 32; n++) {
        // 32 codes of 8 bits are features beside each other, of 4 bits those of the two halves of the group
        const int64_t here = g * size + (BITS == 4 ? 16 : 32) * n, there = here + (BITS == 4 ? size / 2 : 16);
        Real now[Q][2];
        for (int i = 0; i < Q; i++) {
          now[i][0] = plus(load_real((const uint8_t*)(sums[i] + here)), broadcast(low[i]));
          now[i][1] = plus(load_real((const uint8_t*)(sums[i] + there)), broadcast(low[i]));
        }
        add_codes<Q, BITS>(block.v + g * size * BITS / 8 + 4 * BITS * n, step, c.rows, w, now);
        for (int i = 0; i < Q; i++) {
          store_some(sums[i] + here, now[i][0], 16);
          store_some(sums[i] + there, now[i][1], 16);
        }
      }
    }
  }
}

// In place: x H for Hadamard's matrix H of n features, a power of two.
static void rotate(float* x, int64_t D, int64_t n) {
  for (int64_t h = 1; h < n; h *= 2)
    for (int64_t i = 0; i < D; i += 2 * h)
      for (int64_t j = i; j < i + h; j++) {
        const float a = x[j], b = x[j + h];
        x[j] = a + b;
        x[j + h] = a - b;
      }
  const float by = 1.0f / __builtin_sqrtf(float(n));
  for (int64_t i = 0; i < D; i++) x[i] *= by;
}

template <int Q>
static void attend_some_coded(const CodedQuery* queries, const Coded& c, const Past* parts, int64_t count, int64_t D, float scale, float* room,
                              int64_t room_step, float* scratch) {
  const int64_t widest = D > c.rows ? D : c.rows;
  float *share[Q], *q[Q], *w[Q], *sums[Q];
  const auto least_of = [&](int64_t j) {
    int64_t least = queries[0].seen[j];
    for (int i = 1; i < Q; i++) least = queries[i].seen[j] < least ? queries[i].seen[j] : least;
    return least;
  };
  const auto most_of = [&](int64_t j) {
    int64_t most = queries[0].seen[j];
    for (int i = 1; i < Q; i++) most = queries[i].seen[j] > most ? queries[i].seen[j] : most;
    return most;
  };
  for (int i = 0; i < Q; i++) {
    share[i] = room + i * room_step;
    q[i] = scratch + i * (2 * D + widest);
    sums[i] = q[i] + D;
    w[i] = sums[i] + D;
    for (int64_t d = 0; d < D; d++) q[i][d] = queries[i].q[d] * scale, sums[i][d] = 0.0f;
  }
  const int64_t first = least_of(0) / c.rows, last = (most_of(1) + c.rows - 1) / c.rows;
  const auto hide = [&](int i, int64_t at, int64_t begin, int64_t end, int64_t j) {  // what query i does not see of rows begin .. end
    float* const x = share[i] + at - begin;
    for (int64_t s = begin; s < queries[i].seen[2 * j] && s < end; s++) x[s] = -__builtin_inff();
    for (int64_t s = queries[i].seen[2 * j + 1] > begin ? queries[i].seen[2 * j + 1] : begin; s < end; s++) x[s] = -__builtin_inff();
  };
  // The logits of floats first: queries are rotated behind them.
  int64_t total = last > first ? (last - first) * c.rows : 0;
  for (int64_t p = 0; p < count; p++) {
    const int64_t begin = least_of(2 * p + 2), end = most_of(2 * p + 3);
    for (int64_t s = begin; s < end; s += 16)
      for (int i = 0; i < Q; i++) {
        const int n = least(16, end - s);
        store_some(share[i] + total + s - begin, logits_of(q[i], parts[p].k + s * parts[p].k_step, parts[p].k_step, n, D), n);
      }
    for (int i = 0; i < Q; i++) hide(i, total, begin, end, p + 1);
    total += end > begin ? end - begin : 0;
  }
  if (last > first) {
    for (int i = 0; i < Q; i++) rotate(q[i], D, c.rotation);
    c.bits == 4 ? coded_logits<Q, 4>(c, first, last, q, D, share, w) : coded_logits<Q, 8>(c, first, last, q, D, share, w);
    for (int i = 0; i < Q; i++) hide(i, 0, first * c.rows, last * c.rows, 0);
  }
  float by[Q];
  for (int i = 0; i < Q; i++) by[i] = to_shares(share[i], total);
  if (last > first) {
    c.bits == 4 ? coded_values<Q, 4>(c, first, last, share, D, sums, w) : coded_values<Q, 8>(c, first, last, share, D, sums, w);
    for (int i = 0; i < Q; i++) rotate(sums[i], D, c.rotation);
  }
  int64_t at = last > first ? (last - first) * c.rows : 0;
  for (int64_t p = 0; p < count; p++) {
    const int64_t begin = least_of(2 * p + 2), end = most_of(2 * p + 3), step = parts[p].v_step;
    bool alike = true;
    for (int i = 0; i < Q; i++) alike = alike && queries[i].seen[2 * p + 2] == begin && queries[i].seen[2 * p + 3] == end;
    float* from[Q];
    for (int i = 0; i < Q; i++) from[i] = share[i] + at;
    if (alike) mix(from, sums, Q, parts[p].v + begin * step, step, end - begin, D);
    for (int i = 0; i < Q && !alike; i++) {  // each its own rows, since a value that is not seen may be NaN
      const int64_t own = queries[i].seen[2 * p + 2];
      float* const some = from[i] + own - begin;
      mix(&some, sums + i, 1, parts[p].v + own * step, step, queries[i].seen[2 * p + 3] - own, D);
    }
    at += end > begin ? end - begin : 0;
  }
  for (int i = 0; i < Q; i++)
    for (int64_t d = 0; d < D; d++) queries[i].y[d] = sums[i][d] * by[i];
}

// Q <= QUERIES queries of one key head, over the rows that each sees of the codes and of `count` parts in floats.
static void attend_coded(const CodedQuery* queries, int64_t Q, const Coded& c, const Past* parts, int64_t count, int64_t D, float scale,
                         float* room, int64_t room_step, float* scratch) {
  if (Q == 1) attend_some_coded<1>(queries, c, parts, count, D, scale, room, room_step, scratch);
  if (Q == 2) attend_some_coded<2>(queries, c, parts, count, D, scale, room, room_step, scratch);
  if constexpr (QUERIES == 4) {
    if (Q == 3) attend_some_coded<3>(queries, c, parts, count, D, scale, room, room_step, scratch);
    if (Q == 4) attend_some_coded<4>(queries, c, parts, count, D, scale, room, room_step, scratch);
  }
}

constexpr Coding coding = {attend_coded, QUERIES};
