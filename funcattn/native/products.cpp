// Products with matrices in tiles, and the operator funcattn::products, for the CPU: see products.h for the arithmetic, and building.py
// for who compiles this.
//
// Both sets of instructions are compiled, and the processor is asked at run time. Only the stable ABI of torch is used, which takes
// seconds to compile where all of its headers take a minute.

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

#include "lanes.h"
#include "many.h"
#include "matrices.h"

constexpr int64_t DIGIT_BYTES = 1 << 18;  // a part of the second cache

namespace {

using torch::stable::Tensor;

#define WANTED(condition, what) STD_TORCH_CHECK(condition, "funcattn::products: ", what)

constexpr const char* OF_FLOATS = "floats should be contiguous (tiles, K, 16)";
constexpr const char* OF_CODES = "blocks should be contiguous uint8 or int8 (tiles, blocks of K, bytes)";

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

int64_t blocks_of(int kind, int64_t K) {
  const int columns = avx2::columns_of(kind);
  return (K + columns - 1) / columns;
}

void* aligned(std::unique_ptr<char[]>& room, size_t bytes) {
  room.reset(new char[bytes + 64]);
  return (void*)((uintptr_t(room.get()) + 63) / 64 * 64);
}

// Several matrices times the same vectors: x (T, K) float32 to (T, N1 + N2 + ...). N are their rows; scales are of those that have
// one a row, in order.
Tensor products(Tensors blocks, Tensors scales, std::vector<int64_t> rows, Tensor x) {
  WANTED(chosen != NONE, "the processor has no AVX2");
  WANTED(x.dim() == 2 && x.is_contiguous() && is_float(x), "x should be contiguous float32 (T, K)");
  const auto all = matrices(blocks, scales, rows);
  int64_t N = 0;
  for (const Matrix& one : all) {
    WANTED(one.kind >= FLOATS, "matrices should be in tiles");
    WANTED(has_columns(one, x.size(1)), one.kind == FLOATS ? OF_FLOATS : OF_CODES);
    N += one.rows;
  }
  Tensor y = torch::stable::new_empty(x, {x.size(0), N});
  multiply(all.data(), int64_t(all.size()), (const float*)x.data_ptr(), x.size(0), x.size(1), (float*)y.data_ptr(), N);
  return y;
}

}  // namespace

int instructions_that_run() { return chosen; }

const Coding& coding() { return chosen == AVX512 ? avx512::coding : avx2::coding; }

const Floats& floats() { return chosen == AVX512 ? avx512::floats : avx2::floats; }

std::vector<Matrix> matrices(const Tensors& blocks, const Tensors& scales, const std::vector<int64_t>& rows) {
  WANTED(blocks.size() == rows.size(), "as many rows as blocks");
  std::vector<Matrix> all;
  size_t taken = 0;
  for (size_t i = 0; i < blocks.size(); i++) {
    const Tensor& w = blocks[i];
    if (w.dim() == 2) {
      WANTED(is_float(w) && w.size(0) == rows[i], "matrices should be float32 (rows, columns), or in tiles");
      const Dense one = dense_of(w);
      all.push_back({one.w, nullptr, one.N, w.size(1), 0, 4 * w.numel(), one.step, one.by_columns ? BY_COLUMNS : BY_ROWS, 0});
      continue;
    }
    WANTED(rows[i] >= 0 && w.dim() == 3 && w.size(0) == (rows[i] + 15) / 16, "rows should be as many as the tiles have");
    if (is_float(w)) {
      WANTED(w.is_contiguous() && w.size(2) == 16, OF_FLOATS);
      all.push_back({w.data_ptr(), nullptr, rows[i], w.size(1), w.size(0), 4 * w.numel(), 0, FLOATS, 0});
      continue;
    }
    const bool rounds = w.scalar_type() == torch::headeronly::ScalarType::Char;
    WANTED(w.is_contiguous() && (rounds || w.scalar_type() == torch::headeronly::ScalarType::Byte), OF_CODES);
    Matrix one = {w.data_ptr(), nullptr, rows[i], w.size(1), w.size(0), w.numel(), 0, kind_of(w.size(2)), rounds ? 1 : DIGITS};
    WANTED(!rounds || avx2::columns_of(one.kind) == 32, "vectors are rounded in blocks of 32");
    if (one.kind == avx2::ROW8) {
      WANTED(taken < scales.size(), "a scale for each row");
      const Tensor& s = scales[taken++];
      WANTED(s.is_contiguous() && is_float(s) && s.numel() == rows[i], "scales should be contiguous float32, one for each row");
      one.scale = (const float*)s.data_ptr();
    }
    all.push_back(one);
  }
  return all;
}

bool has_columns(const Matrix& w, int64_t K) { return w.depth == (w.kind < 0 ? K : blocks_of(w.kind, K)); }

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

// As `packed.rounded`: to multiples of the 127th part of the largest.
void round_bytes(float* v, int count) {
  const uint32_t most = most_of(v, count);
  float unit;
  std::memcpy(&unit, &most, 4);
  unit /= 127;
  for (int j = 0; j < count; j++) v[j] = unit ? std::nearbyint(v[j] / unit) * unit : 0.0f;
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
  const int64_t B = blocks_of(w.kind, K), columns = columns_of(w.kind);
  const bool is_half = w.kind == HALF8 || w.kind == HALF4 || w.kind == CENTERED4, is_eight = bits_of(w.kind) == 8;
  const auto number = [&](const uint8_t* at, int i) { return is_half ? half_of(at + 2 * i) : real_of(at + 4 * i); };
  const auto product = [&](int64_t t, int64_t b, int64_t row) {
    const int64_t lane = row % 16;
    const uint8_t *const at = (const uint8_t*)w.blocks + (row / 16 * B + b) * bytes_of(w.kind), *const after = at + codes_of(w.kind);
    const float* const from = x + t * K + columns * b;
    const int count = least(columns, K - columns * b);
    float v[32];
    std::copy(from, from + count, v);
    if (w.digits == 1) round_bytes(v, count);
    double sum = 0, all = 0;
    for (int j = 0; j < count; j++) {
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

// The digits of T vectors x (T, K) in blocks of `columns`, where one of the matrices multiplies so many.
struct Digits {
  const int P, columns;
  const float* const x;
  const int64_t T, K, B;
  std::unique_ptr<char[]> room;
  int8_t* digits;
  int32_t* sums;
  float *unit, *total;
  std::vector<Beyond> beyond;

  Digits(const Matrix* which, int64_t count, int P, int columns, const float* x, int64_t T, int64_t K)
      : P(P), columns(columns), x(x), T(T), K(K), B((K + columns - 1) / columns) {
    if (std::none_of(which, which + count, [this](const Matrix& w) { return are_of(w); })) return;
    const int64_t many = T * B;
    digits = (int8_t*)aligned(room, size_t(many * (32 * P + 4 * P + 8)));
    sums = (int32_t*)(digits + many * 32 * P);
    unit = (float*)(sums + many * P);
    total = unit + many;
    const auto digits_of = chosen == AVX512 ? avx512::digits_of(P) : avx2::digits_of(P);
    std::vector<int64_t> odd(T);
    torch::stable::parallel_for(0, T, 1 + 65536 / (K + 1), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        odd[t] = digits_of(x + t * K, K, B, columns, digits + 32 * P * t * B, sums + P * t * B, unit + t * B, total + t * B);
    });
    for (int64_t t = 0; t < T; t++)
      for (int64_t b = 0; odd[t] && b < B; b++)
        if (is_beyond(most_of(x + t * K + columns * b, least(columns, K - columns * b)))) beyond.push_back({t, b});
  }

  bool are_of(const Matrix& w) const { return w.digits == P && avx2::columns_of(w.kind) == columns; }

  void times(const Matrix& w, int64_t begin, int64_t end, float* y, int64_t step) const {
    const auto* const codes = (const uint8_t*)w.blocks;
    if (chosen == AVX512)
      avx512::rows_of(P, w.kind)(codes, w.scale, {digits, sums, unit, total, B}, T, w.rows, begin, end, y, step);
    else
      avx2::rows_of(P, w.kind)(codes, w.scale, {digits, sums, unit, total, B}, T, w.rows, begin, end, y, step);
    if (!beyond.empty()) add_beyond(w, beyond, x, K, begin, end, y, step);
  }
};

void multiply(const Matrix* which, int64_t count, const float* x, int64_t T, int64_t K, float* y, int64_t step) {
  std::vector<int64_t> first(count + 1, 0), tiles(count + 1, 0);  // row of the result, and tile, at which a matrix begins
  int64_t bytes = 0, digits = 1;
  for (int64_t i = 0; i < count; i++) {
    first[i + 1] = first[i] + which[i].rows;
    tiles[i + 1] = tiles[i] + which[i].tiles;
    bytes += which[i].bytes;
    digits = std::max(digits, int64_t(which[i].digits));
  }
  if (first[count] == 0) return;

  const int64_t most = std::max(int64_t(16), DIGIT_BYTES / (digits * (K + 1)));  // vectors whose digits stay near while the matrices are read
  for (int64_t t = 0, some; t < T; t += some) {
    some = std::min(most, T - t);
    const float* const from = x + t * K;
    float* const to = y + t * step;
    const Digits three(which, count, DIGITS, 32, from, some, K), one(which, count, 1, 32, from, some, K), narrow(which, count, DIGITS, 16, from, some, K);
    const auto run = [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < count; i++) {
        const int64_t low = begin > tiles[i] ? begin - tiles[i] : 0;
        const int64_t high = (end < tiles[i + 1] ? end : tiles[i + 1]) - tiles[i];
        if (low >= high) continue;
        const Matrix& w = which[i];
        if (w.kind == FLOATS)
          floats().rows((const float*)w.blocks, from, some, K, w.rows, low, high, to + first[i], step);
        else
          (one.are_of(w) ? one : narrow.are_of(w) ? narrow : three).times(w, low, high, to + first[i], step);
      }
    };
    const int64_t share = 1 + 65536 * tiles[count] / (1 + bytes * some);  // of tiles that is worth waking a thread for
    torch::stable::parallel_for(0, tiles[count], share, run);
  }
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
      "layers(Tensor plan, Tensor norms, Tensor x, Tensor cos, Tensor sin, Tensor[] keys, Tensor[] values, "
      "Tensor[] lengths, Tensor? among, int heads, int kv_heads, float scale, float epsilon, Tensor[] codes, int coded_rows, int bits) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("products", TORCH_BOX(&products)); }

STABLE_TORCH_LIBRARY_IMPL(funcattn, CompositeExplicitAutograd, m) { m.impl("instructions", TORCH_BOX(&instructions)); }
