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

// Some rows of what is remembered of one head.
struct Past {
  const float *k, *v;
  int64_t k_step, v_step;
};

// A query, where its result goes, and how many rows of the last part it sees.
struct Query {
  const float* q;
  float* y;
  int64_t own;
};

struct Floats {
  void (*norm)(const float* x, const float* weight, int64_t E, float epsilon, float* y);
  void (*gated)(const float* gate, const float* up, int64_t F, float* y);
  void (*attend)(const Query* queries, int64_t Q, const Past* parts, const int64_t* seen, int64_t count, int64_t D, float scale, float* room, int64_t room_step);
  void (*rows)(const float* w, const float* x, int64_t T, int64_t K, int64_t N, int64_t begin, int64_t end, float* y, int64_t step);
  int queries;  // of one call of attend, at most
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
