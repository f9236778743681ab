// Products of matrices of floats with many vectors, and the operator funcattn::linear, y (T, N) = x (T, K) W^T, for the CPU.
//
// A task is a panel of rows of W, packed by DEPTH columns at a time and multiplied by all vectors, which are packed once before: W is
// read once, and to pack a number costs one of its T products. Rows or columns of W may be contiguous. The sum of a result is taken in
// the same order whatever the number of vectors, rows of the matrix or threads.

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "attention/vectors.h"
#include "many.h"
#include "matrices.h"

constexpr int64_t DEPTH = 192;  // columns of a panel, at most: 24 KB with AVX-512, a fraction of the second cache
constexpr int64_t CHUNK = 768;  // vectors whose results with a panel stay near, a multiple of TALL

// Some columns of x and of the matrices.
struct Piece {
  int64_t first;
  int depth;
};

struct Products {
  const Dense* which;
  const float* x;
  int64_t T, K, x_step, y_step;
  Finish finish;
  std::vector<Piece> pieces;
  std::unique_ptr<float[]> vectors;

  float* vectors_at(const Piece& piece, int64_t t) const { return vectors.get() + piece.first * T + t * piece.depth; }
};

BEGIN_TARGET_AVX512
namespace avx512 {
#include "dense.h"
}  // namespace avx512
END_TARGET
BEGIN_TARGET_AVX2
namespace avx2 {
#include "dense.h"
}  // namespace avx2
END_TARGET

void multiply(const Dense* which, int64_t count, const float* x, int64_t T, int64_t K, int64_t x_step, int64_t y_step, Finish finish) {
  const bool wide = instructions_that_run() == AVX512;
  const int64_t panel = wide ? avx512::PANEL : avx2::PANEL, tall = wide ? avx512::TALL : avx2::TALL;
  Products p = {which, x, T, K, x_step, y_step, finish, {}, nullptr};
  const int64_t parts = (K + DEPTH - 1) / DEPTH;
  for (int64_t k = 0, part = 0; part < parts; part++) {  // of like sizes
    const int depth = int((K - k + parts - part - 1) / (parts - part));
    p.pieces.push_back({k, depth});
    k += depth;
  }
  p.vectors.reset(new float[T * K]);
  torch::stable::parallel_for(0, (T + tall - 1) / tall, 1 + 65536 / (tall * K),
                              [&](int64_t begin, int64_t end) { (wide ? avx512::pack_vectors : avx2::pack_vectors)(p, begin, end); });
  std::vector<std::pair<const Dense*, int64_t>> tasks;
  for (int64_t m = 0; m < (finish == GATE ? 1 : count); m++)
    for (int64_t i = 0; i < (which[m].N + panel - 1) / panel; i++) tasks.push_back({which + m, i});
  torch::stable::parallel_for(0, int64_t(tasks.size()), 1 + (1 << 20) / (T * K * panel), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> room(new float[2 * std::min(T, CHUNK) * panel]);
    for (int64_t i = begin; i < end; i++) (wide ? avx512::panel : avx2::panel)(p, *tasks[i].first, tasks[i].second, room.get());
  });
}

void rotate(float* row, int64_t heads, int64_t D, const float* cos, const float* sin, int64_t R) {
  (instructions_that_run() == AVX512 ? avx512::rotate : avx2::rotate)(row, heads, D, cos, sin, R);
}

Dense dense_of(const torch::stable::Tensor& weight) {
  const bool by_columns = weight.stride(1) != 1 && weight.size(1) > 1;
  STD_TORCH_CHECK(!by_columns || weight.stride(0) == 1 || weight.size(0) < 2, "funcattn::linear: rows or columns of weight should be contiguous");
  return {(const float*)weight.data_ptr(), nullptr, weight.size(0), weight.stride(by_columns ? 1 : 0), by_columns};
}

Dense dense_of(const Matrix& w) { return {(const float*)w.blocks, nullptr, w.rows, w.step, w.kind == BY_COLUMNS}; }

namespace {

using torch::stable::Tensor;

#define WANTED(condition, what) STD_TORCH_CHECK(condition, "funcattn::linear: ", what)

Tensor linear(Tensor weight, Tensor x) {
  const auto is_float = [](const Tensor& t) { return t.dim() == 2 && t.scalar_type() == torch::headeronly::ScalarType::Float; };
  WANTED(instructions_that_run() != NONE, "the processor has no AVX2");
  WANTED(is_float(x) && is_float(weight) && weight.size(1) == x.size(1), "weight (N, K) and x (T, K) should be float32, of as many columns");
  WANTED(x.stride(1) == 1 || x.size(1) < 2, "rows of x should be contiguous");
  Dense one = dense_of(weight);
  const int64_t T = x.size(0), K = x.size(1);
  Tensor y = torch::stable::new_empty(x, {T, one.N});
  if (T == 0 || one.N == 0) return y;
  if (K == 0) return torch::stable::fill_(y, 0.0);
  one.y = (float*)y.data_ptr();
  multiply(&one, 1, (const float*)x.data_ptr(), T, K, x.stride(0), one.N, STORE);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(funcattn, m) { m.def("linear(Tensor weight, Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }
