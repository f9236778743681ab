// What the operators share: matrices in tiles and their products, and the arithmetic of floats between these.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

using Tensors = std::vector<torch::stable::Tensor>;

constexpr int FLOATS = -1;  // a kind: tiles of floats (K, 16)

struct Matrix {
  const void* blocks;
  const float* scale;  // one a row, or null
  int kind;
  int64_t rows, tiles, bytes;
};

struct Floats {
  void (*norm)(const float* x, const float* weight, int64_t E, float epsilon, float* y);
  void (*gated)(const float* gate, const float* up, int64_t F, float* y);
  void (*score)(const float* const* q, float* const* to, int64_t Q, const float* k, int64_t step, int64_t rows, int64_t D, float scale);
  float (*to_shares)(float* x, int64_t count);
  void (*mix)(const float* const* share, float* const* y, int64_t Q, const float* v, int64_t step, int64_t rows, int64_t D);
  void (*rows)(const float* w, const float* x, int64_t T, int64_t K, int64_t N, int64_t begin, int64_t end, float* y, int64_t step);
};

// The matrices that blocks, (tiles, blocks of K, bytes) or floats (tiles, K, 16), and scales hold, checked; K is the length of their rows.
std::vector<Matrix> matrices(const Tensors& blocks, const Tensors& scales, const std::vector<int64_t>& rows, const std::vector<int64_t>& K);

// Several matrices times the same T vectors x (T, K): y (T, step), the results of a vector behind each other.
void multiply(const Matrix* which, int64_t count, const float* x, int64_t T, int64_t K, float* y, int64_t step);

enum Instructions { NONE, AVX2, AVX512 };

// Those of the processor, or those that a test asked for.
int instructions_that_run();

// Of the instructions that run.
const Floats& floats();
