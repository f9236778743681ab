// What the operators for many vectors share: products of floats (dense.cpp), and what stands between products.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

#include "matrices.h"

// A matrix (N, K) of floats, and where its results go. `step` is the distance of its rows, or of its columns where these are contiguous.
struct Dense {
  const float* w;
  float* y;
  int64_t N, step;
  bool by_columns;
};

Dense dense_of(const torch::stable::Tensor& weight);
Dense dense_of(const Matrix& w);  // BY_ROWS or BY_COLUMNS

// y = W x, y += W x, or y = silu(W0 x) * W1 x of two matrices, to the y of the first.
enum Finish { STORE, ADD, GATE };

// Several matrices times the same T vectors x (T, K), rows `x_step` apart, to rows `y_step` apart of the y of each.
void multiply(const Dense* which, int64_t count, const float* x, int64_t T, int64_t K, int64_t x_step, int64_t y_step, Finish finish);

// In place, the first R features of some heads of D features, half-split.
void rotate(float* row, int64_t heads, int64_t D, const float* cos, const float* sin, int64_t R);

// As `multiply` of matrices.h, where all of them multiply vectors rounded to 8 bits: the same numbers, faster. False, and y of no meaning,
// where it is not for these matrices, vectors or instructions.
bool multiply_rounded(const Matrix* which, int64_t count, const float* x, int64_t T, int64_t K, float* y, int64_t step);
