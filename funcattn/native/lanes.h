// 16 lanes of both sets of instructions, and the arithmetic of products.h, floats.h and codes.h on them.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "matrices.h"
#include "targets.h"

// What has an index known to the compiler is a register.
#define UNROLLED _Pragma("GCC unroll 8")
#if defined(__clang__)
#define VECTORIZED
#else
#define VECTORIZED __attribute__((optimize("O3")))
#endif
#define DIGITS 3  // of 8 bits each: a number of 24 bits, as the digits of a float32 are

static inline int least(int64_t a, int64_t b) { return int(a < b ? a : b); }

// Of the largest float of a block without its sign, as an integer: whether it is finite, not 0, and beyond 2^-64 .. 2^64.
static inline bool is_beyond(uint32_t most) { return most && most < 0x7f800000u && (most < 0x1f800000u || most > 0x5f800000u); }

BEGIN_TARGET_AVX512
namespace avx512 {
constexpr int MOST = 5, MOST_LIGHT = 8;
using Int = __m512i;
using Real = __m512;
static inline Int zero_int() { return _mm512_setzero_si512(); }
static inline Real zero_real() { return _mm512_setzero_ps(); }
static inline Int broadcast(int32_t v) { return _mm512_set1_epi32(v); }
static inline Real broadcast(float v) { return _mm512_set1_ps(v); }
static inline Int load(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline Int low_nibbles(Int c) { return _mm512_and_si512(c, _mm512_set1_epi8(15)); }
static inline Int high_nibbles(Int c) { return low_nibbles(_mm512_srli_epi32(c, 4)); }
static inline Int four(const int8_t* d) {
  int32_t v;
  __builtin_memcpy(&v, d, 4);
  return _mm512_set1_epi32(v);
}
static inline Int dot_nibbles(Int a, Int codes, const int8_t* d) { return _mm512_dpbusd_epi32(a, codes, four(d)); }
static inline Int dot_bytes(Int a, Int codes, const int8_t* d) { return _mm512_dpbusd_epi32(a, codes, four(d)); }
static inline Int shifted(Int a) { return _mm512_slli_epi32(a, 8); }
static inline Int sixteenth(Int a) { return _mm512_srai_epi32(a, 4); }
static inline Int plus(Int a, Int b) { return _mm512_add_epi32(a, b); }
static inline Real to_real(Int a) { return _mm512_cvtepi32_ps(a); }
static inline Real fma(Real a, Real b, Real c) { return _mm512_fmadd_ps(a, b, c); }
static inline Real times(Real a, Real b) { return _mm512_mul_ps(a, b); }
static inline Real load_half(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline Real load_real(const uint8_t* p) { return _mm512_loadu_ps((const float*)p); }
static inline Real load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
static inline void store_some(float* p, Real v, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
static inline void round_all(const float* v, int32_t* to) {
  for (int i = 0; i < 32; i += 16) _mm512_store_si512(to + i, _mm512_cvtps_epi32(_mm512_load_ps(v + i)));
}
static inline uint32_t most_in(const float* v) {
  const Int sizes = broadcast(0x7fffffff);
  return _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_and_si512(_mm512_load_si512(v), sizes), _mm512_and_si512(_mm512_load_si512(v + 16), sizes)));
}
static inline int32_t split_last(int32_t* whole, int8_t* to) {
  __m128i bytes[2];
  UNROLLED
  for (int i = 0; i < 2; i++) {
    const Int w = _mm512_load_si512(whole + 16 * i), last = _mm512_srai_epi32(_mm512_slli_epi32(w, 24), 24);
    _mm512_store_si512(whole + 16 * i, _mm512_srai_epi32(_mm512_sub_epi32(w, last), 8));
    bytes[i] = _mm512_cvtepi32_epi8(last);
  }
  const __m256i all = _mm256_set_m128i(bytes[1], bytes[0]);
  _mm256_storeu_si256((__m256i*)to, all);
  const __m256i sums = _mm256_sad_epu8(_mm256_xor_si256(all, _mm256_set1_epi8(-128)), _mm256_setzero_si256());  // of digits and 128
  const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  return int32_t(_mm_extract_epi64(half, 0) + _mm_extract_epi64(half, 1)) - 32 * 128;
}
static inline Real plus(Real a, Real b) { return _mm512_add_ps(a, b); }
static inline Real over(Real a, Real b) { return _mm512_div_ps(a, b); }
static inline float sum_of(Real a) { return _mm512_reduce_add_ps(a); }
static inline Real greater(Real a, Real b) { return _mm512_max_ps(a, b); }
static inline bool has_nan(Real a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
// The sums over the lanes of 16 vectors.
static inline Real sums_of(const Real* v) {
  Real fours[4];
  UNROLLED
  for (int i = 0; i < 4; i++) {
    Real pairs[2];
    UNROLLED
    for (int j = 0; j < 2; j++) {
      const Real a = v[4 * i + 2 * j], b = v[4 * i + 2 * j + 1];
      pairs[j] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    const __m512d a = _mm512_castps_pd(pairs[0]), b = _mm512_castps_pd(pairs[1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const auto halves = [](Real a, Real b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); };
  return halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
}
static inline Real bounded(Real a) { return _mm512_min_ps(broadcast(105.0f), _mm512_max_ps(broadcast(-105.0f), a)); }  // NaN stays
static inline Real whole_part(Real a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Real times_power(Real a, Real n) { return _mm512_scalef_ps(a, n); }
#include "products.h"
#include "floats.h"
#include "codes.h"
}  // namespace avx512
END_TARGET

BEGIN_TARGET_AVX2
namespace avx2 {
constexpr int MOST = 2, MOST_LIGHT = 4;
struct Int {
  __m256i a, b;
};
struct Real {
  __m256 a, b;
};
static inline Int zero_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
static inline Real zero_real() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline Int broadcast(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
static inline Real broadcast(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
static inline Int load(const uint8_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}; }
static inline __m256i low(__m256i c) { return _mm256_and_si256(c, _mm256_set1_epi8(15)); }
static inline Int low_nibbles(Int c) { return {low(c.a), low(c.b)}; }
static inline Int high_nibbles(Int c) { return {low(_mm256_srli_epi32(c.a, 4)), low(_mm256_srli_epi32(c.b, 4))}; }
static inline __m256i four(const int8_t* d) {
  int32_t v;
  __builtin_memcpy(&v, d, 4);
  return _mm256_set1_epi32(v);
}
// Pairs of products have 16 bits there: 2 * 15 * 128 fits, and what is less than 16 times that does after a second multiplication.
static inline __m256i weighed(__m256i codes, __m256i d, int by) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(codes, d), _mm256_set1_epi16(short(by)));
}
static inline Int dot_nibbles(Int a, Int codes, const int8_t* at) {
  const __m256i d = four(at);
  return {_mm256_add_epi32(a.a, weighed(codes.a, d, 1)), _mm256_add_epi32(a.b, weighed(codes.b, d, 1))};
}
static inline __m256i dot_byte(__m256i a, __m256i codes, __m256i d) {
  return _mm256_add_epi32(a, _mm256_add_epi32(weighed(low(codes), d, 1), weighed(low(_mm256_srli_epi32(codes, 4)), d, 16)));
}
static inline Int dot_bytes(Int a, Int codes, const int8_t* at) {
  const __m256i d = four(at);
  return {dot_byte(a.a, codes.a, d), dot_byte(a.b, codes.b, d)};
}
static inline Int shifted(Int a) { return {_mm256_slli_epi32(a.a, 8), _mm256_slli_epi32(a.b, 8)}; }
static inline Int sixteenth(Int a) { return {_mm256_srai_epi32(a.a, 4), _mm256_srai_epi32(a.b, 4)}; }
static inline Int plus(Int a, Int b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
static inline Real to_real(Int a) { return {_mm256_cvtepi32_ps(a.a), _mm256_cvtepi32_ps(a.b)}; }
static inline Real fma(Real a, Real b, Real c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
static inline Real times(Real a, Real b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
static inline Real load_half(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
static inline Real load_real(const uint8_t* p) { return {_mm256_loadu_ps((const float*)p), _mm256_loadu_ps((const float*)(p + 32))}; }
static inline Real load_some(const float* p, int n) {
  float v[16] = {};
  __builtin_memcpy(v, p, 4 * size_t(n));
  return load_real((const uint8_t*)v);
}
static inline void store_some(float* p, Real r, int n) {
  float v[16];
  _mm256_storeu_ps(v, r.a);
  _mm256_storeu_ps(v + 8, r.b);
  __builtin_memcpy(p, v, 4 * size_t(n));
}
static inline void round_all(const float* v, int32_t* to) {
  for (int i = 0; i < 32; i += 8) _mm256_store_si256((__m256i*)(to + i), _mm256_cvtps_epi32(_mm256_load_ps(v + i)));
}
VECTORIZED static inline uint32_t most_in(const float* v) {
  uint32_t most = 0;
  for (int j = 0; j < 32; j++) {
    uint32_t as_integer;
    __builtin_memcpy(&as_integer, v + j, 4);
    as_integer &= 0x7fffffffu;
    most = as_integer > most ? as_integer : most;
  }
  return most;
}
VECTORIZED static inline int32_t split_last(int32_t* whole, int8_t* to) {
  int32_t sum = 0;
  for (int j = 0; j < 32; j++) {
    const int32_t digit = int32_t(int8_t(whole[j]));
    whole[j] = (whole[j] - digit) >> 8;
    to[j] = int8_t(digit);
    sum += digit;
  }
  return sum;
}
static inline Real plus(Real a, Real b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
static inline Real over(Real a, Real b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
static inline float sum_of(Real r) {
  const __m256 both = _mm256_add_ps(r.a, r.b);
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
static inline Real greater(Real a, Real b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
static inline bool has_nan(Real r) {
  return _mm256_movemask_ps(_mm256_cmp_ps(r.a, r.a, _CMP_UNORD_Q)) || _mm256_movemask_ps(_mm256_cmp_ps(r.b, r.b, _CMP_UNORD_Q));
}
static inline Real sums_of(const Real* v) {
  float sums[16];
  for (int j = 0; j < 16; j++) sums[j] = sum_of(v[j]);
  return load_real((const uint8_t*)sums);
}
static inline __m256 within(__m256 a) { return _mm256_min_ps(_mm256_set1_ps(105.0f), _mm256_max_ps(_mm256_set1_ps(-105.0f), a)); }
static inline Real bounded(Real a) { return {within(a.a), within(a.b)}; }  // NaN stays
static inline __m256 rounded(__m256 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Real whole_part(Real a) { return {rounded(a.a), rounded(a.b)}; }
static inline __m256 power(__m256 n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_add_ps(n, _mm256_set1_ps(127.0f))), 23)); }
// 2^n by halves: n is from -152 to 152, and a number has exponents from -126 to 127.
static inline __m256 scaled(__m256 a, __m256 n) {
  const __m256 half = rounded(_mm256_mul_ps(n, _mm256_set1_ps(0.5f)));
  return _mm256_mul_ps(_mm256_mul_ps(a, power(half)), power(_mm256_sub_ps(n, half)));
}
static inline Real times_power(Real a, Real n) { return {scaled(a.a, n.a), scaled(a.b, n.b)}; }
#include "products.h"
#include "floats.h"
#include "codes.h"
}  // namespace avx2
END_TARGET
