// The operator funcattn::linear, for the CPU: a matrix of floats times many vectors, y (T, N) = x (T, K) W^T.
//
// A task is a panel of rows of W, packed by DEPTH columns at a time and multiplied by all vectors: W is read once, and to pack a number
// costs one of its T products. Rows or columns of W may be contiguous. The sum of a result is taken in the same order whatever the number
// of vectors, rows of the matrix or threads.

#include <algorithm>
#include <memory>
#include <type_traits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "attention/vectors.h"
#include "matrices.h"

struct Product {
  const float *x, *w;
  float* y;
  int64_t T, K, N, x_step, w_step;  // distances of rows, or of columns of W
  bool by_columns;                  // True where columns of W are contiguous
};

#define DEPTH 192  // columns of a panel, at most: 24 KB with AVX-512, a fraction of the second cache

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

namespace {

using torch::stable::Tensor;

#define WANTED(condition, what) STD_TORCH_CHECK(condition, "funcattn::linear: ", what)

Tensor linear(Tensor weight, Tensor x) {
  const auto is_float = [](const Tensor& t) { return t.dim() == 2 && t.scalar_type() == torch::headeronly::ScalarType::Float; };
  WANTED(instructions_that_run() != NONE, "the processor has no AVX2");
  WANTED(is_float(x) && is_float(weight) && weight.size(1) == x.size(1), "weight (N, K) and x (T, K) should be float32, of as many columns");
  const bool by_columns = weight.stride(1) != 1 && weight.size(1) > 1;
  WANTED(x.stride(1) == 1 || x.size(1) < 2, "rows of x should be contiguous");
  WANTED(!by_columns || weight.stride(0) == 1 || weight.size(0) < 2, "rows or columns of weight should be contiguous");
  const int64_t T = x.size(0), K = x.size(1), N = weight.size(0);
  Tensor y = torch::stable::new_empty(x, {T, N});
  if (T == 0 || N == 0) return y;
  if (K == 0) return torch::stable::fill_(y, 0.0);
  const bool wide = instructions_that_run() == AVX512;
  const Product one = {(const float*)x.data_ptr(), (const float*)weight.data_ptr(), (float*)y.data_ptr(), T, K, N,
                       x.stride(0), weight.stride(by_columns ? 1 : 0), by_columns};
  const int64_t panel = wide ? avx512::PANEL : avx2::PANEL, least = 1 + (1 << 20) / (T * K * panel);
  torch::stable::parallel_for(0, (N + panel - 1) / panel, least,
                              [&](int64_t begin, int64_t end) { (wide ? avx512::panels : avx2::panels)(one, begin, end); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(funcattn, m) { m.def("linear(Tensor weight, Tensor x) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }
