// Products with matrices in tiles, and the operator funcattn::products, for the CPU: see products.h for the arithmetic, and building.py
// for who compiles this.
//
// Both sets of instructions are compiled, and the processor is asked at run time. Only the stable ABI of torch is used, which takes
// seconds to compile where all of its headers take a minute.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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
constexpr int MOST = 4;
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
constexpr int MOST = 2;
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

namespace {

using torch::stable::Tensor;

int of_processor() {
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return AVX512;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? AVX2 : NONE;
}

int chosen = of_processor();

// Which instructions run: those asked for (-1: the best), or as many of them as there are.
int64_t instructions(int64_t wanted) {
  const int best = of_processor();
  return chosen = wanted < 0 || wanted > best ? best : int(wanted);
}

int kind_of(int64_t bytes) {
  for (int kind = 0; kind < avx2::KINDS; kind++)
    if (avx2::bytes_of(kind) == bytes) return kind;
  STD_TORCH_CHECK(false, "funcattn::products: blocks of ", bytes, " bytes are of no kind");
}

void* aligned(std::unique_ptr<char[]>& room, size_t bytes) {
  room.reset(new char[bytes + 64]);
  return (void*)((uintptr_t(room.get()) + 63) / 64 * 64);
}

// Several matrices times the same vectors: x (T, K) float32 to (T, N1 + N2 + ...). N are their rows; scales are of those that have
// one a row, in order.
Tensor products(Tensors blocks, Tensors scales, std::vector<int64_t> rows, Tensor x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == torch::headeronly::ScalarType::Float,
                  "funcattn::products: x should be contiguous float32 (T, K)");
  const auto all = matrices(blocks, scales, rows, std::vector<int64_t>(blocks.size(), x.size(1)));
  int64_t N = 0;
  for (const Matrix& one : all) N += one.rows;
  Tensor y = torch::stable::new_empty(x, {x.size(0), N});
  multiply(all.data(), int64_t(all.size()), (const float*)x.data_ptr(), x.size(0), x.size(1), (float*)y.data_ptr(), N);
  return y;
}

}  // namespace

int instructions_that_run() { return chosen; }

const Coding& coding() { return chosen == AVX512 ? avx512::coding : avx2::coding; }

const Floats& floats() { return chosen == AVX512 ? avx512::floats : avx2::floats; }

std::vector<Matrix> matrices(const Tensors& blocks, const Tensors& scales, const std::vector<int64_t>& rows, const std::vector<int64_t>& K) {
  STD_TORCH_CHECK(chosen != NONE, "funcattn::products: the processor has no AVX2");
  STD_TORCH_CHECK(blocks.size() == rows.size() && blocks.size() == K.size(), "funcattn::products: as many rows as blocks");
  std::vector<Matrix> all;
  size_t taken = 0;
  for (size_t i = 0; i < blocks.size(); i++) {
    const Tensor& w = blocks[i];
    const bool of_floats = w.scalar_type() == torch::headeronly::ScalarType::Float;
    STD_TORCH_CHECK(rows[i] >= 0 && w.dim() == 3 && w.size(0) == (rows[i] + 15) / 16, "funcattn::products: rows should be as many as the tiles have");
    if (of_floats) {
      STD_TORCH_CHECK(w.is_contiguous() && w.size(1) == K[i] && w.size(2) == 16, "funcattn::products: floats should be contiguous (tiles, K, 16)");
      all.push_back({w.data_ptr(), nullptr, FLOATS, rows[i], w.size(0), 4 * w.numel()});
      continue;
    }
    STD_TORCH_CHECK(w.dim() == 3 && w.is_contiguous() && w.scalar_type() == torch::headeronly::ScalarType::Byte && w.size(1) == (K[i] + 31) / 32,
                    "funcattn::products: blocks should be contiguous uint8 (tiles, blocks of K, bytes)");
    Matrix one = {w.data_ptr(), nullptr, kind_of(w.size(2)), rows[i], w.size(0), w.numel()};
    if (one.kind == avx2::ROW8) {
      STD_TORCH_CHECK(taken < scales.size(), "funcattn::products: a scale for each row");
      const Tensor& s = scales[taken++];
      STD_TORCH_CHECK(s.is_contiguous() && s.scalar_type() == torch::headeronly::ScalarType::Float && s.numel() == rows[i],
                      "funcattn::products: scales should be contiguous float32, one for each row");
      one.scale = (const float*)s.data_ptr();
    }
    all.push_back(one);
  }
  return all;
}

// What products.h leaves out: blocks of a vector whose numbers are beyond its units, in order of their vectors.
struct Beyond {
  int64_t t, b;
};

uint32_t most_of(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t j = 0; j < count; j++) {
    uint32_t as_integer;
    std::memcpy(&as_integer, x + j, 4);
    most = std::max(most, as_integer & 0x7fffffffu);
  }
  return most;
}

double half_of(const uint8_t* at) {
  uint16_t h;
  std::memcpy(&h, at, 2);
  const int exponent = h >> 10 & 31, digits = h & 1023;
  const double size = exponent == 31 ? (digits ? std::nan("") : HUGE_VAL)
                                     : exponent ? std::ldexp(1024 + digits, exponent - 25) : std::ldexp(digits, -24);
  return h >> 15 ? -size : size;
}

double real_of(const uint8_t* at) {
  float v;
  std::memcpy(&v, at, 4);
  return v;
}

// y (a vector each `step` numbers) plus rows 16 begin .. 16 end of a matrix times those blocks of x, in double precision.
void add_beyond(const Matrix& w, const std::vector<Beyond>& beyond, const float* x, int64_t K, int64_t begin, int64_t end, float* y, int64_t step) {
  using namespace avx2;
  const int64_t B = (K + 31) / 32;
  const bool is_half = w.kind == HALF8 || w.kind == HALF4 || w.kind == CENTERED4, is_eight = bits_of(w.kind) == 8;
  const auto number = [&](const uint8_t* at, int i) { return is_half ? half_of(at + 2 * i) : real_of(at + 4 * i); };
  const auto product = [&](int64_t t, int64_t b, int64_t row) {
    const int64_t lane = row % 16;
    const uint8_t *const at = (const uint8_t*)w.blocks + (row / 16 * B + b) * bytes_of(w.kind), *const after = at + codes_of(w.kind);
    const float* const v = x + t * K + 32 * b;
    double sum = 0, all = 0;
    for (int j = 0; j < least(columns_of(w.kind), K - 32 * b); j++) {
      const int byte = at[(is_eight ? j / 4 : j % 16 / 4) * 64 + lane * 4 + j % 4];
      const int code = is_eight ? byte : j < 16 ? byte & 15 : byte >> 4;
      sum += double(code - offset_of(w.kind)) * v[j];
      all += v[j];
    }
    const double scale = w.kind == ROW8 ? w.scale[row] : number(after, lane);
    return scale * sum + (has_zero(w.kind) ? number(after, 16 + lane) * all : 0);
  };
  for (size_t from = 0, to; from < beyond.size(); from = to) {
    const int64_t t = beyond[from].t;
    for (to = from; to < beyond.size() && beyond[to].t == t;) to++;
    for (int64_t row = 16 * begin; row < std::min(16 * end, w.rows); row++) {
      double sum = y[t * step + row];  // rounded once: a denormal float has few digits
      for (size_t i = from; i < to; i++) sum += product(t, beyond[i].b, row);
      y[t * step + row] = float(sum);
    }
  }
}

void multiply(const Matrix* which, int64_t count, const float* x, int64_t T, int64_t K, float* y, int64_t step) {
  const int64_t B = (K + 31) / 32;
  std::vector<int64_t> first(count + 1, 0), tiles(count + 1, 0);  // row of the result, and tile, at which a matrix begins
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; i++) {
    first[i + 1] = first[i] + which[i].rows;
    tiles[i + 1] = tiles[i] + which[i].tiles;
    bytes += which[i].bytes;
  }
  if (T == 0 || first[count] == 0) return;

  const bool has_codes = std::any_of(which, which + count, [](const Matrix& w) { return w.kind != FLOATS; });
  std::unique_ptr<char[]> room;
  const int64_t many = has_codes ? T * B : 0;
  int8_t* const digits = (int8_t*)aligned(room, size_t(many * (32 * DIGITS + 4 * DIGITS + 8)));
  int32_t* const sums = (int32_t*)(digits + many * 32 * DIGITS);
  float* const unit = (float*)(sums + many * DIGITS);
  float* const total = unit + many;
  const auto digits_of = chosen == AVX512 ? avx512::digits_of : avx2::digits_of;
  std::vector<Beyond> beyond;
  for (int64_t t = 0; has_codes && t < T; t++)
    if (digits_of(x + t * K, K, B, digits + 32 * DIGITS * t * B, sums + DIGITS * t * B, unit + t * B, total + t * B))
      for (int64_t b = 0; b < B; b++)
        if (is_beyond(most_of(x + t * K + 32 * b, least(32, K - 32 * b)))) beyond.push_back({t, b});

  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t low = begin > tiles[i] ? begin - tiles[i] : 0;
      const int64_t high = (end < tiles[i + 1] ? end : tiles[i + 1]) - tiles[i];
      if (low >= high) continue;
      const Matrix& w = which[i];
      if (w.kind == FLOATS) {
        floats().rows((const float*)w.blocks, x, T, K, w.rows, low, high, y + first[i], step);
        continue;
      }
      const uint8_t* const codes = (const uint8_t*)w.blocks;
      if (chosen == AVX512)
        avx512::rows_of[w.kind](codes, w.scale, {digits, sums, unit, total, B}, T, w.rows, low, high, y + first[i], step);
      else
        avx2::rows_of[w.kind](codes, w.scale, {digits, sums, unit, total, B}, T, w.rows, low, high, y + first[i], step);
      if (!beyond.empty()) add_beyond(w, beyond, x, K, low, high, y + first[i], step);
    }
  };
  const int64_t share = 1 + 65536 * tiles[count] / (1 + bytes * T);  // of tiles that is worth waking a thread for
  torch::stable::parallel_for(0, tiles[count], share, run);
}

STABLE_TORCH_LIBRARY(funcattn, m) {
  m.def("products(Tensor[] blocks, Tensor[] scales, int[] rows, Tensor x) -> Tensor");
  m.def("instructions(int wanted) -> int");
  m.def("words(Tensor keys, int first, int n) -> (Tensor, Tensor)");
  m.def("native_attend(Tensor q, Tensor k, Tensor v, Tensor[] mask, Tensor? bias, float scale) -> (Tensor, Tensor, bool)");
  m.def(
      "native_attend_jvp(Tensor q, Tensor k, Tensor v, Tensor? dq, Tensor? dk, Tensor? dv, Tensor[] mask, float scale) -> "
      "(Tensor, Tensor, Tensor, Tensor, bool)");
  m.def(
      "layers(Tensor[] blocks, Tensor[] scales, int[] rows, Tensor[] norms, Tensor x, Tensor cos, Tensor sin, Tensor[] keys, Tensor[] values, "
      "Tensor[] lengths, Tensor? among, int heads, int kv_heads, float scale, float epsilon, Tensor[] codes, int coded_rows, int bits) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("products", TORCH_BOX(&products)); }

STABLE_TORCH_LIBRARY_IMPL(funcattn, CompositeExplicitAutograd, m) { m.impl("instructions", TORCH_BOX(&instructions)); }
