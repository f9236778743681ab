// Attention over rows in codes of 8 or 4 bits, as funcattn/caches/codes.py makes them; included as floats.h is, behind it.
//
// Codes of keys lie feature by feature, 32 rows beside each other; those of values row by row, 32 features beside each other. So both
// products, of queries with keys and of shares with values, are sums of numbers times 32 codes: no sum is taken across lanes. A scale
// is multiplied into the number, and a minimum added once a group.

constexpr int64_t PIECE = 64;  // rows whose scaled shares a cache holds

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

// to[i]: the logits of query i, rotated, with the rows of blocks first .. last.
template <int Q, int BITS>
static void score_some_coded(const Coded& c, int64_t first, int64_t last, const float* const* q, float* const* to, int64_t D, float scale) {
  const int64_t step = c.rows * BITS / 8;
  float room[Q][MOST_FEATURES], *w[Q];
  for (int i = 0; i < Q; i++) w[i] = room[i];
  for (int64_t b = first; b < last; b++) {
    const CodedBlock& block = c.blocks[b];
    if (b + 1 < last) prefetch(c.blocks[b + 1].k, D * step);
    for (int64_t g = 0; g < c.rows / 32; g++) {
      Real sums[Q][2];
      for (int i = 0; i < Q; i++) sums[i][0] = sums[i][1] = broadcast(weighed(q[i], block.k_scale + g * D, block.k_low + g * D, D, w[i]));
      add_codes<Q, BITS>(block.k + g * 4 * BITS, step, D, w, sums);
      for (int i = 0; i < Q; i++)
        for (int h = 0; h < 2; h++) store_some(to[i] + (b - first) * c.rows + 32 * g + 16 * h, times(sums[i][h], broadcast(scale)), 16);
    }
  }
}

// y[i] (D) += shares of query i times the rotated values of blocks first .. last.
template <int Q, int BITS>
static void mix_some_coded(const Coded& c, int64_t first, int64_t last, const float* const* share, float* const* y, int64_t D) {
  const int64_t step = D * BITS / 8, size = c.features;
  float room[Q][PIECE], *w[Q];
  for (int i = 0; i < Q; i++) w[i] = room[i];
  for (int64_t b = first; b < last; b++) {
    const CodedBlock& block = c.blocks[b];
    if (b + 1 < last) prefetch(c.blocks[b + 1].v, c.rows * step);
    for (int64_t g = 0; g < D / size; g++)
      for (int64_t r = 0; r < c.rows; r += PIECE) {
        const int64_t rows = least(PIECE, c.rows - r), at = g * c.rows + r;
        float low[Q];
        for (int i = 0; i < Q; i++) low[i] = weighed(share[i] + (b - first) * c.rows + r, block.v_scale + at, block.v_low + at, rows, w[i]);
        for (int64_t n = 0; n < size / 32; n++) {
          // 32 codes of 8 bits are features beside each other, of 4 bits those of the two halves of the group
          const int64_t here = g * size + (BITS == 4 ? 16 : 32) * n, there = here + (BITS == 4 ? size / 2 : 16);
          Real now[Q][2];
          for (int i = 0; i < Q; i++) {
            now[i][0] = plus(load_real((const uint8_t*)(y[i] + here)), broadcast(low[i]));
            now[i][1] = plus(load_real((const uint8_t*)(y[i] + there)), broadcast(low[i]));
          }
          add_codes<Q, BITS>(block.v + r * step + g * size * BITS / 8 + 4 * BITS * n, step, rows, w, now);
          for (int i = 0; i < Q; i++) {
            store_some(y[i] + here, now[i][0], 16);
            store_some(y[i] + there, now[i][1], 16);
          }
        }
      }
  }
}

// f<queries, bits>(first query) of all Q queries, as many at once as there are registers for.
#define BY_QUERIES(f)                                                        \
  for (int64_t i = 0; i < Q; i += QUERIES) {                                 \
    const int64_t some = least(QUERIES, Q - i);                              \
    if (some == 1) c.bits == 4 ? f(1, 4) : f(1, 8);                          \
    if (some == 2) c.bits == 4 ? f(2, 4) : f(2, 8);                          \
    if constexpr (QUERIES == 4) {                                            \
      if (some == 3) c.bits == 4 ? f(3, 4) : f(3, 8);                        \
      if (some == 4) c.bits == 4 ? f(4, 4) : f(4, 8);                        \
    }                                                                        \
  }

static void score_coded(const Coded& c, int64_t first, int64_t last, const float* const* q, float* const* to, int64_t Q, int64_t D, float scale) {
#define SCORE(N, BITS) score_some_coded<N, BITS>(c, first, last, q + i, to + i, D, scale)
  BY_QUERIES(SCORE)
#undef SCORE
}

static void mix_coded(const Coded& c, int64_t first, int64_t last, const float* const* share, float* const* y, int64_t Q, int64_t D) {
#define MIX(N, BITS) mix_some_coded<N, BITS>(c, first, last, share + i, y + i, D)
  BY_QUERIES(MIX)
#undef MIX
}
#undef BY_QUERIES

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

constexpr Coding coding = {score_coded, mix_coded, rotate};
