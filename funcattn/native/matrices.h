// What the operators share: matrices in tiles and their products, and the arithmetic of floats between these.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

using Tensors = std::vector<torch::stable::Tensor>;

inline bool is_float(const torch::stable::Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Float; }

// Kinds beside those of products.h: tiles of floats (K, 16), and floats (N, K) of which rows or columns are contiguous, `step` apart.
enum { FLOATS = -1, BY_ROWS = -2, BY_COLUMNS = -3 };

struct Matrix {
  const void* blocks;
  const float* scale;  // one a row, or null
  int64_t rows, depth;  // depth: columns of floats, or blocks of columns
  int64_t tiles, bytes, step;
  int kind, digits;  // digits of the vectors: 3, or 1 where they are rounded to 8 bits
};

struct Floats {
  void (*norm)(const float* x, const float* weight, int64_t E, float epsilon, float* y);
  void (*gated)(const float* gate, const float* up, int64_t F, float* y);
  void (*score)(const float* const* q, float* const* to, int64_t Q, const float* k, int64_t step, int64_t rows, int64_t D, float scale);
  float (*to_shares)(float* x, int64_t count);
  void (*mix)(const float* const* share, float* const* y, int64_t Q, const float* v, int64_t step, int64_t rows, int64_t D);
  void (*rows)(const float* w, const float* x, int64_t T, int64_t K, int64_t N, int64_t begin, int64_t end, float* y, int64_t step);
};

// The matrices that blocks, (tiles, blocks of K, bytes) or floats (tiles, K, 16) or (N, K), and scales hold, checked. Bytes are uint8, or
// int8 where the matrix multiplies vectors rounded to 8 bits.
std::vector<Matrix> matrices(const Tensors& blocks, const Tensors& scales, const std::vector<int64_t>& rows);

// Whether rows of K numbers are as long as those of a matrix.
bool has_columns(const Matrix& w, int64_t K);

// Several matrices times the same T vectors x (T, K): y (T, step), the results of a vector behind each other.
void multiply(const Matrix* which, int64_t count, const float* x, int64_t T, int64_t K, float* y, int64_t step);

enum Instructions { NONE, AVX2, AVX512 };

// Those of the processor, or those that a test asked for.
int instructions_that_run();

// Of the instructions that run.
const Floats& floats();

// Some rows of what is remembered of one head.
struct Past {
  const float *k, *v;
  int64_t k_step, v_step;
};

// R rows of one head in codes; see codes.h. Keys: codes (D, R), scale and low (R / 32, D). Values: codes (R, D), scale and low
// (D / features, R).
struct CodedBlock {
  const uint8_t *k, *v;
  const float *k_scale, *k_low, *v_scale, *v_low;
};

struct Coded {
  const CodedBlock* blocks;
  int64_t rows, bits, features, rotation;
};

constexpr int64_t MOST_FEATURES = 512;  // of a head in codes

// As score and mix of Floats, of the rows of blocks first .. last: queries are rotated before, and what is mixed behind.
struct Coding {
  void (*score)(const Coded& coded, int64_t first, int64_t last, const float* const* q, float* const* to, int64_t Q, int64_t D, float scale);
  void (*mix)(const Coded& coded, int64_t first, int64_t last, const float* const* share, float* const* y, int64_t Q, int64_t D);
  void (*rotate)(float* x, int64_t D, int64_t n);
};

const Coding& coding();

// A past in codes, checked: of each block codes, scale and low of keys, then of values, (layers, K, ..).
struct CodedPast {
  CodedPast(const Tensors& codes, int64_t rows, int64_t bits, int64_t D);
  explicit CodedPast(const torch::stable::Tensor& table);  // as funcattn::coded_table gives it
  Coded of(int64_t layer, int64_t head, CodedBlock* blocks) const;  // blocks: room for `count`
  int64_t count, rows, bits, D, features, rotation, layers = 0, heads = 0;
  std::vector<const char*> at;  // 6 addresses a block
};
