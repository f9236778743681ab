// Vectors of floats of both sets of instructions, and the products of gemm.h on them.
//
//     Vec      VL floats
//     PANEL    columns of a panel of packed rows, two vectors
//     TALL     rows of a tile of products, so many that sums, factors and a broadcast fill the registers
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../targets.h"

#define UNROLL _Pragma("GCC unroll 16")  // what has an index known to the compiler is a register

BEGIN_TARGET_AVX512
namespace avx512 {
using Vec = __m512;
constexpr int VL = 16, PANEL = 2 * VL, HEAD = VL, TALL = 12, WIDE = 4;
static inline Vec zero() { return _mm512_setzero_ps(); }
static inline Vec all(float x) { return _mm512_set1_ps(x); }
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
static inline Vec load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
static inline void store_some(float* p, Vec x, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), x); }
static inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline Vec least(Vec a, Vec b) { return _mm512_min_ps(a, b); }    // b where one is NaN
static inline Vec largest(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where one is NaN
static inline Vec whole(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec times_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }  // x 2^n for whole n
static inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
static inline float top(Vec x) { return _mm512_reduce_max_ps(x); }
static inline Vec low_pairs(Vec a, Vec b) { return _mm512_unpacklo_ps(a, b); }
static inline Vec high_pairs(Vec a, Vec b) { return _mm512_unpackhi_ps(a, b); }
static inline Vec low_halves(Vec a, Vec b) { return _mm512_shuffle_ps(a, b, 0x44); }
static inline Vec high_halves(Vec a, Vec b) { return _mm512_shuffle_ps(a, b, 0xee); }
// Lane l of x[g] becomes lane g of x[l], for lanes of four floats.
static inline void swap_lanes(Vec* x, int step) {
  const Vec a = _mm512_shuffle_f32x4(x[0], x[step], 0x44), b = _mm512_shuffle_f32x4(x[0], x[step], 0xee);
  const Vec c = _mm512_shuffle_f32x4(x[2 * step], x[3 * step], 0x44), d = _mm512_shuffle_f32x4(x[2 * step], x[3 * step], 0xee);
  x[0] = _mm512_shuffle_f32x4(a, c, 0x88);
  x[step] = _mm512_shuffle_f32x4(a, c, 0xdd);
  x[2 * step] = _mm512_shuffle_f32x4(b, d, 0x88);
  x[3 * step] = _mm512_shuffle_f32x4(b, d, 0xdd);
}
#include "gemm.h"
}  // namespace avx512
END_TARGET

BEGIN_TARGET_AVX2
namespace avx2 {
using Vec = __m256;
constexpr int VL = 8, PANEL = 2 * VL, HEAD = VL, TALL = 6, WIDE = 2;
static inline Vec zero() { return _mm256_setzero_ps(); }
static inline Vec all(float x) { return _mm256_set1_ps(x); }
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
static inline __m256i first(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
static inline Vec load_some(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
static inline void store_some(float* p, Vec x, int n) { _mm256_maskstore_ps(p, first(n), x); }
static inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
static inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec least(Vec a, Vec b) { return _mm256_min_ps(a, b); }
static inline Vec largest(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec whole(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vec power(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_add_ps(n, all(127.0f))), 23));
}
// By halves: n is from -250 to 250, and a number has exponents from -126 to 127.
static inline Vec times_power(Vec x, Vec n) {
  const Vec half = whole(mul(n, all(0.5f)));
  return mul(mul(x, power(half)), power(sub(n, half)));
}
static inline __m128 halved(Vec x, __m128 (*join)(__m128, __m128)) {
  __m128 half = join(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = join(half, _mm_movehl_ps(half, half));
  return join(half, _mm_movehdup_ps(half));
}
static inline float sum(Vec x) { return _mm_cvtss_f32(halved(x, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); })); }
static inline float top(Vec x) { return _mm_cvtss_f32(halved(x, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); })); }
static inline Vec low_pairs(Vec a, Vec b) { return _mm256_unpacklo_ps(a, b); }
static inline Vec high_pairs(Vec a, Vec b) { return _mm256_unpackhi_ps(a, b); }
static inline Vec low_halves(Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0x44); }
static inline Vec high_halves(Vec a, Vec b) { return _mm256_shuffle_ps(a, b, 0xee); }
static inline void swap_lanes(Vec* x, int step) {
  const Vec a = x[0], b = x[step];
  x[0] = _mm256_permute2f128_ps(a, b, 0x20);
  x[step] = _mm256_permute2f128_ps(a, b, 0x31);
}
#include "gemm.h"
}  // namespace avx2
END_TARGET
