// The operator funcattn::plan, for the CPU: where the matrices of a decoder are in memory, found and checked once. There are hundreds, and
// to pass and check these tensors at each token takes a tenth of the time of the layers of a small model.

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "decoder.h"

namespace {

using torch::stable::Tensor;

constexpr int64_t PLAN = 0x706c616e, NUMBERS = sizeof(Matrix) / sizeof(int64_t);  // PLAN: the first number of a plan
static_assert(sizeof(Matrix) % sizeof(int64_t) == 0);

// int64 (1 + matrices, NUMBERS): PLAN and the plan's own address, then a Matrix a row. It is valid as long as these tensors live, and a copy
// might outlive them: its address is another.
Tensor plan(Tensors weights, Tensors scales, std::vector<int64_t> rows) {
  STD_TORCH_CHECK(!weights.empty(), "funcattn::plan: one matrix at least");
  const std::vector<Matrix> all = matrices(weights, scales, rows);
  const Tensor plan = torch::stable::new_empty(weights[0], {1 + int64_t(all.size()), NUMBERS}, torch::headeronly::ScalarType::Long);
  int64_t* const to = (int64_t*)plan.data_ptr();
  std::fill(to, to + NUMBERS, 0);
  to[0] = PLAN, to[1] = (int64_t)to;
  std::memcpy(to + NUMBERS, all.data(), all.size() * sizeof(Matrix));
  return plan;
}

}  // namespace

#define WANTED(condition, what) STD_TORCH_CHECK(condition, name, ": ", what)

Decoder::Decoder(const char* name, const Tensor& plan, const Tensor& norms, int64_t E, int64_t H, int64_t K, double epsilon)
    : E(E), H(H), K(K), norms((const float*)norms.data_ptr()), epsilon(float(epsilon)) {
  WANTED(instructions_that_run() != NONE, "the processor has no AVX2");
  WANTED(plan.dim() == 2 && plan.size(0) > 1 && plan.size(1) == NUMBERS && plan.is_contiguous() && plan.scalar_type() == torch::headeronly::ScalarType::Long,
         "plan should be int64 (1 + matrices, numbers), from funcattn::plan");
  const int64_t *const of = (const int64_t*)plan.data_ptr(), count = plan.size(0) - 1;
  WANTED(of[0] == PLAN && of[1] == (int64_t)of, "plan should be from funcattn::plan, and no copy");
  L = count / 7;
  WANTED(L > 0 && count == 7 * L && norms.dim() == 2 && norms.size(0) == 2 * L + 1, "seven matrices and two norms for each layer, and a norm behind the last");
  WANTED(norms.size(1) == E && norms.is_contiguous() && is_float(norms), "norms should be contiguous float32 (2 layers + 1, E)");
  matrices = (const Matrix*)(of + NUMBERS);
  WANTED(H > 0 && K > 0 && H % K == 0, "H should be a multiple of K");
  N = matrices[0].rows, D = N / H, F = matrices[4].rows, G = H / K;
  WANTED(D > 0 && F > 0 && N == H * D, "H heads of one size, and a feed-forward");
  const int64_t rows[] = {N, K * D, K * D, E, F, F, E}, columns[] = {E, E, E, N, E, E, F};
  for (int64_t i = 0; i < count; i++)
    WANTED(matrices[i].rows == rows[i % 7] && has_columns(matrices[i], columns[i % 7]), "layers of the same sizes");
}

void Decoder::norm(int64_t which, const float* x, int64_t rows, float* y) const {
  const Floats& use = floats();
  by_rows(rows, E, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) use.norm(x + i * E, norms + which * E, E, epsilon, y + i * E);
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(funcattn, m) { m.def("plan(Tensor[] weights, Tensor[] scales, int[] rows) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("plan", TORCH_BOX(&plan)); }
