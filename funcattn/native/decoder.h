// What funcattn::layers and funcattn::prompt are given alike: the matrices of a decoder, as a plan of where they are in memory, and its norms.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "matrices.h"

struct Decoder {
  // plan as funcattn::plan gives it, of q, k, v, o, gate, up, down of each layer; norms (2 L + 1, E) before attention and feed-forward of
  // each, and behind the last; x has E features. Checked: `name` is of the operator.
  Decoder(const char* name, const torch::stable::Tensor& plan, const torch::stable::Tensor& norms, int64_t E, int64_t H, int64_t K, double epsilon);

  // y = norm `which` of x, both (rows, E) and perhaps the same.
  void norm(int64_t which, const float* x, int64_t rows, float* y) const;

  int64_t E, H, K, L, G, D, N, F;
  const Matrix* matrices;
  const float* norms;
  float epsilon;
};

// f(first, last) of some of N rows at a time, where there is enough of them to wake threads for.
template <class F>
void by_rows(int64_t N, int64_t size, const F& f) {
  torch::stable::parallel_for(0, N, 1 + 32768 / size, f);
}
