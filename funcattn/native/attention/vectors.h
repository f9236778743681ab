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
static inline Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }  // a b - c
static inline Vec least(Vec a, Vec b) { return _mm512_min_ps(a, b); }    // b where one is NaN
static inline Vec largest(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where one is NaN
static inline Vec times_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }  // x 2^(the whole number below n)
static inline Vec table(const float* p) { return load(p); }                       // VL of the 16, evenly apart
static inline Vec lookup(Vec table, Vec at) { return _mm512_permutexvar_ps(_mm512_castps_si512(at), table); }  // by the lowest bits
static inline float sum(Vec x) { return _mm512_reduce_add_ps(x); }
static inline float top(Vec x) { return _mm512_reduce_max_ps(x); }
static inline Vec low_pairs(Vec a, Vec b) { return _mm512_unpacklo_ps(a, b); }
static inline Vec high_pairs(Vec a, Vec b) { return _mm512_unpackhi_ps(a, b); }
static inline Vec low_halves(Vec a, Vec b) { return _mm512_shuffle_ps(a, b, 0x44); }
static inline Vec high_halves(Vec a, Vec b) { return _mm512_shuffle_ps(a, b, 0xee); }
static inline Vec load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline Vec load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store_bf16(uint16_t* p, Vec x) {  // to nearest, ties to even; a NaN keeps its sign
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1), high = _mm512_srli_epi32(bits, 16);
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), _mm512_and_si512(high, one));
  const __m512i to = _mm512_mask_or_epi32(_mm512_srli_epi32(up, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), high, _mm512_set1_epi32(64));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(to));
}
static inline void store_f16(uint16_t* p, Vec x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
static inline Vec only(const uint8_t* seen, Vec x) {  // -inf elsewhere
  const __m128i bytes = _mm_loadu_si128((const __m128i*)seen);
  return _mm512_mask_mov_ps(all(-__builtin_inff()), _mm_test_epi8_mask(bytes, bytes), x);
}
static inline bool is_above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }  // somewhere
static inline bool has_nan(Vec x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
// Lane l of x[g] becomes lane g of x[l], for lanes of four floats.
static inline void swap_lanes(Vec* x, int step) {
  const Vec a = _mm512_shuffle_f32x4(x[0], x[step], 0x44), b = _mm512_shuffle_f32x4(x[0], x[step], 0xee);
  const Vec c = _mm512_shuffle_f32x4(x[2 * step], x[3 * step], 0x44), d = _mm512_shuffle_f32x4(x[2 * step], x[3 * step], 0xee);
  x[0] = _mm512_shuffle_f32x4(a, c, 0x88);
  x[step] = _mm512_shuffle_f32x4(a, c, 0xdd);
  x[2 * step] = _mm512_shuffle_f32x4(b, d, 0x88);
  x[3 * step] = _mm512_shuffle_f32x4(b, d, 0xdd);
}
static inline Vec dot(Vec a, Vec b, Vec c) { return fma(a, b, c); }
#include "gemm.h"
}  // namespace avx512
END_TARGET

// Where a float of a factor is a pair of bfloat16, and a product of two pairs adds two numbers.
BEGIN_TARGET_BF16
namespace avx512bf16 {
using namespace avx512;
static inline Vec dot(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
static inline Vec pairs(Vec low, Vec high) { return (Vec)_mm512_cvtne2ps_pbh(high, low); }  // of floats in order, rounded
static inline Vec zipped(Vec low, Vec high) {  // of each lane, rounded
  const __m512i lanes = _mm512_cvtepu16_epi32(_mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i at = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(at, _mm512_castps_si512(pairs(low, high))));
}
// Two rows of n bfloat16, `step` bytes apart, as pairs padded to `width`; without b, of a and zeros.
static void zip_rows(const char* a, const char* b, int64_t step, int64_t n, int64_t width, float* to) {
  uint16_t* const pair = (uint16_t*)to;
  int64_t d = 0;
  for (; step == 2 && b && d + VL <= n; d += VL) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + 2 * d)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(b + 2 * d)));
    _mm512_storeu_si512(pair + 2 * d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  for (; d < width; d++) {
    pair[2 * d] = pair[2 * d + 1] = 0;
    if (d < n) __builtin_memcpy(pair + 2 * d, a + d * step, 2);
    if (d < n && b) __builtin_memcpy(pair + 2 * d + 1, b + d * step, 2);
  }
}
#include "gemm.h"
}  // namespace avx512bf16
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
static inline Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
static inline Vec least(Vec a, Vec b) { return _mm256_min_ps(a, b); }
static inline Vec largest(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec whole(Vec x) { return _mm256_floor_ps(x); }
static inline Vec table(const float* p) { return _mm256_setr_ps(p[0], p[2], p[4], p[6], p[8], p[10], p[12], p[14]); }
static inline Vec lookup(Vec table, Vec at) { return _mm256_permutevar8x32_ps(table, _mm256_castps_si256(at)); }
static inline Vec power(Vec n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_add_ps(n, all(127.0f))), 23));
}
// By halves: n is from -250 to 250, and a number has exponents from -126 to 127.
static inline Vec times_power(Vec x, Vec n) {
  n = whole(n);
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
static inline __m256i wide(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
static inline Vec load_bf16(const uint16_t* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(wide(p), 16)); }
static inline Vec load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store_bf16(uint16_t* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1), high = _mm256_srli_epi32(bits, 16);
  const __m256i up = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), _mm256_and_si256(high, one)), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i to = _mm256_blendv_epi8(up, _mm256_or_si256(high, _mm256_set1_epi32(64)), is_nan);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi32(_mm256_castsi256_si128(to), _mm256_extracti128_si256(to, 1)));
}
static inline void store_f16(uint16_t* p, Vec x) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
static inline Vec only(const uint8_t* seen, Vec x) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)seen));
  return _mm256_blendv_ps(x, all(-__builtin_inff()), _mm256_castsi256_ps(_mm256_cmpeq_epi32(wide, _mm256_setzero_si256())));
}
static inline bool is_above(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
static inline bool has_nan(Vec x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
static inline void swap_lanes(Vec* x, int step) {
  const Vec a = x[0], b = x[step];
  x[0] = _mm256_permute2f128_ps(a, b, 0x20);
  x[step] = _mm256_permute2f128_ps(a, b, 0x31);
}
static inline Vec dot(Vec a, Vec b, Vec c) { return fma(a, b, c); }
#include "gemm.h"
}  // namespace avx2
END_TARGET
