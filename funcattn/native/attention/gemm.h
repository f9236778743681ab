// Products whose small side is a head, and the exponential. Included by vectors.h inside a namespace that names the vectors.
//
//     pack      rows B (N, K) as panels of PANEL of them, each K x PANEL, so that a vector has one feature of VL rows
//     gemm_nt   C (M, N) (+)= A (M, K) B^T    B packed; C has room for N rounded up to whole panels, and is written there
//     gemm_nn   O (M, D) += P (M, N) V (N, D)
//     gemm_tn   O (N, D) += P (M, N)^T C (M, D)
//
// D is a multiple of HEAD there; rows of O beyond M or N are not touched, and nothing needs to be aligned. Leading sizes (ld) are
// distances of rows. Each product is made of tiles of up to TALL x 2 or TALL / 2 x WIDE vectors of sums, in registers.

// A tile of C (ROWS, VECS * VL): C (+)= the sum over k < K of a(i, k) B[k], where a(i, k) is A[i * lda + k], or A[k * lda + i] if TURNED.
template <int ROWS, int VECS, bool ADD, bool TURNED>
static inline void tile(const float* A, int64_t lda, const float* B, int64_t ldb, int K, float* C, int64_t ldc) {
  Vec c[ROWS][VECS];
  UNROLL for (int i = 0; i < ROWS; i++) {
    UNROLL for (int n = 0; n < VECS; n++) c[i][n] = ADD ? load(C + i * ldc + n * VL) : zero();
  }
  for (int k = 0; k < K; k++) {
    Vec b[VECS];
    UNROLL for (int n = 0; n < VECS; n++) b[n] = load(B + k * ldb + n * VL);
    UNROLL for (int i = 0; i < ROWS; i++) {
      const Vec a = all(TURNED ? A[k * lda + i] : A[i * lda + k]);
      UNROLL for (int n = 0; n < VECS; n++) c[i][n] = dot(a, b[n], c[i][n]);
    }
  }
  UNROLL for (int i = 0; i < ROWS; i++) {
    UNROLL for (int n = 0; n < VECS; n++) store(C + i * ldc + n * VL, c[i][n]);
  }
}

// A column of tiles, VECS vectors wide and M rows high.
template <int TALLEST, int VECS, bool ADD, bool TURNED>
static void tiles(const float* A, int64_t lda, const float* B, int64_t ldb, int M, int K, float* C, int64_t ldc) {
  const int64_t down = TURNED ? 1 : lda;
  int m = 0;
  for (; m + TALLEST <= M; m += TALLEST) tile<TALLEST, VECS, ADD, TURNED>(A + m * down, lda, B, ldb, K, C + m * ldc, ldc);
  if constexpr (TALLEST > 8)
    for (; m + 8 <= M; m += 8) tile<8, VECS, ADD, TURNED>(A + m * down, lda, B, ldb, K, C + m * ldc, ldc);
  if constexpr (TALLEST > 4)
    for (; m + 4 <= M; m += 4) tile<4, VECS, ADD, TURNED>(A + m * down, lda, B, ldb, K, C + m * ldc, ldc);
  for (; m + 2 <= M; m += 2) tile<2, VECS, ADD, TURNED>(A + m * down, lda, B, ldb, K, C + m * ldc, ldc);
  if (m < M) tile<1, VECS, ADD, TURNED>(A + m * down, lda, B, ldb, K, C + m * ldc, ldc);
}

// O (M, D) += the sum over k < K of a(i, k) V[k]
template <bool TURNED>
static void gemm_wide(const float* A, int64_t lda, const float* V, int64_t ldv, int M, int K, int D, float* O, int64_t ldo) {
  constexpr int SHORT = 2 * TALL / WIDE;
  int d = 0;
  for (; d + WIDE * VL <= D; d += WIDE * VL) tiles<SHORT, WIDE, true, TURNED>(A, lda, V + d, ldv, M, K, O + d, ldo);
  if constexpr (WIDE > 2)
    for (; d + 2 * VL <= D; d += 2 * VL) tiles<TALL, 2, true, TURNED>(A, lda, V + d, ldv, M, K, O + d, ldo);
  if (d < D) tiles<TALL, 1, true, TURNED>(A, lda, V + d, ldv, M, K, O + d, ldo);
}

template <bool ADD>
static void gemm_nt(const float* A, int lda, const float* packedB, int M, int N, int K, float* C, int ldc) {
  for (int n = 0; n < N; n += PANEL) tiles<TALL, 2, ADD, false>(A, lda, packedB + int64_t(n) * K, PANEL, M, K, C + n, ldc);
}

static void gemm_nn(const float* P, int ldp, const float* V, int ldv, int M, int N, int D, float* O, int ldo) {
  gemm_wide<false>(P, ldp, V, ldv, M, N, D, O, ldo);
}

static void gemm_tn(const float* P, int ldp, const float* C, int ldc, int M, int N, int D, float* O, int ldo) {
  gemm_wide<true>(P, ldp, C, ldc, N, M, D, O, ldo);
}

// x[i][j] becomes x[j][i]; rows come out in the order of `turned_row`.
static inline void transpose(Vec* x) {
  UNROLL for (int g = 0; g < VL; g += 4) {
    const Vec a = low_pairs(x[g], x[g + 1]), b = high_pairs(x[g], x[g + 1]);
    const Vec c = low_pairs(x[g + 2], x[g + 3]), d = high_pairs(x[g + 2], x[g + 3]);
    x[g] = low_halves(a, c);
    x[g + 1] = high_halves(a, c);
    x[g + 2] = low_halves(b, d);
    x[g + 3] = high_halves(b, d);
  }
  UNROLL for (int c = 0; c < 4; c++) swap_lanes(x + c, 4);
}

// Panels `step` floats apart.
static void pack_panels(const float* B, int64_t ldb, int N, int K, float* to, int64_t step) {
  for (int n = 0; n < N; n += VL) {
    float* const panel = to + n / PANEL * step + n % PANEL;
    const int rows = N - n < VL ? N - n : VL;
    for (int k = 0; k < K; k += VL) {
      const int some = K - k < VL ? K - k : VL;
      Vec x[VL];
      UNROLL for (int i = 0; i < VL; i++) {
        const float* const row = B + int64_t(n + i) * ldb + k;
        x[i] = i >= rows ? zero() : some == VL ? load(row) : load_some(row, some);
      }
      transpose(x);
      UNROLL for (int i = 0; i < VL; i++)
        if (i < some) store(panel + int64_t(k + i) * PANEL, x[i]);
    }
  }
  if (N % PANEL && N % PANEL <= VL)  // the rest of the last panel
    for (int k = 0; k < K; k++) store(to + N / PANEL * step + k * PANEL + VL, zero());
}

static void pack(const float* B, int ldb, int N, int K, float* to) { pack_panels(B, ldb, N, K, to, int64_t(PANEL) * K); }

// 2^x of |x| up to 152, or NaN, from x and k, x to the nearest VL-th part: 2^k is in a table but for a power of two, and 2^rest a
// polynomial. The lowest bits of k + ROUND are the place in the table.
constexpr float ROUND = 1.5f * (1 << 23) / VL, REST = 0.5f / VL;  // rest is from -REST to REST

static inline Vec exp2_of(Vec rounded, Vec k, Vec rest) {
  alignas(64) static constexpr float powers[] = {1.0f, 1.0442737824f, 1.0905077327f, 1.1387886348f, 1.1892071150f, 1.2418578121f,
                                                 1.2968395547f, 1.3542555469f, 1.4142135624f, 1.4768261459f, 1.5422108254f, 1.6104903320f,
                                                 1.6817928305f, 1.7562521604f, 1.8340080864f, 1.9152065614f};
  const Vec power = lookup(table(powers), rounded);
  Vec y = fma(all(5.5504109e-2f), rest, all(2.4022651e-1f + 8.0e-3f * REST * REST));  // the Taylor series, its end spread over |rest|
  y = fma(y, rest, all(6.9314718e-1f));
  return times_power(fma(mul(power, rest), y, power), k);
}

// 2^x, off by 2e-7 of itself at most (and by 2^-149, where it is that small): 0 from -151 down and for -inf, inf from 128 up, NaN for
// NaN.
static inline Vec exp2_below(Vec x) {  // of x below 128, or NaN
  x = largest(all(-152.0f), x);
  const Vec rounded = add(x, all(ROUND)), k = sub(rounded, all(ROUND));
  return exp2_of(rounded, k, sub(x, k));
}

static inline Vec exp2v(Vec x) { return exp2_below(least(all(129.0f), x)); }

// e^x, off by 2e-7 of itself at most (and by 2^-149, where it is that small): 0 from -104 down and for -inf, inf from 89 up, NaN for
// NaN. log2 e has two parts, so that the rest is as exact for large x as for small ones.
static inline Vec exp_below(Vec x) {  // of x below 88.7, or NaN
  x = largest(all(-105.0f), x);
  const Vec rounded = fma(x, all(1.44269504f), all(ROUND)), k = sub(rounded, all(ROUND));
  return exp2_of(rounded, k, fma(x, all(1.92596303e-8f), fms(x, all(1.44269502f), k)));
}

static inline Vec expv(Vec x) { return exp_below(least(all(89.0f), x)); }

// Whether a product overflowed downwards: after a mask it would look as if it were hidden. Upwards it ends as NaN.
static inline bool is_lost(const float* s, int n) {
  Vec smallest = zero();
  for (int i = 0; i < n; i += VL) smallest = least(load(s + i), smallest);
  return is_above(all(-3.40282347e38f), smallest);
}
