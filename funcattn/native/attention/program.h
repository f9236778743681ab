// The program of a contraction, the tensors that it reads and writes, and the room of a task; see
// contract.h for what is done with them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace contraction {

constexpr int MAX_AXES = 16;  // leading axes

enum Kind { FLOAT32, BFLOAT16, FLOAT16, BOOLEAN, INTEGER64, KINDS };

// A tensor (*lead, rows, columns) by its strides in elements; a stride is 0 where it is broadcast.
struct View {
  char* data;
  int kind;
  int64_t rows, columns, row, column;
  int64_t lead[MAX_AXES];
};

struct Scaled {  // a tensor times a number
  int tensor;
  float weight;
};

struct Dot {  // a block of queries times the keys of a pack
  int load, pack;
};

// A matrix (T, S): low-rank terms, numbers of each query, numbers of each key, dense matrices. The
// terms may be products of pairs of bfloat16, which are multiplied by their common weight later.
struct Factor {
  int buffer;
  std::vector<Dot> dots;
  std::vector<Scaled> rows, columns, dense;
  bool paired = false;
};

// to = weight * from * factor, or to += that; without a factor (-1), of weight * from.
struct Step {
  bool adds;
  int to, from, factor;
  float weight;
};

enum Side { QUERY, KEY, PAIR };

struct Output {
  int side;
  float weight;  // of what the sinks sum
};

// A matrix that adds to an output, through values: a pack of values on the query side, a load on
// the key side; -1 for ones. It counts only where the leading index is 0 on the axes of `gate`.
// Where it is paired, the matrix is rounded to bfloat16.
struct Sink {
  int buffer, values, output;
  int64_t gate;
  bool paired = false;
};

// The keys (1, 2) of a leading index; a pair whose word is below the threshold has no weight.
struct Dropout {
  int tensor;  // -1: none
  uint32_t threshold;
  float weight;  // of the others
};

struct Program {
  Dropout dropout;
  std::vector<Scaled> loads;        // query-side tensors, read by blocks
  std::vector<int> packs, values;   // key-side tensors of products with queries, and of sums
  std::vector<Factor> factors;      // the first is the logits
  std::vector<int> mask;            // (start, stop), or (booleans)
  std::vector<Step> steps;
  std::vector<Output> outputs;
  std::vector<Sink> sinks;
  int buffers, lse;
};

struct Job {
  Program program;
  std::vector<View> tensors;
  std::vector<std::vector<View>> outputs;  // for each chunk of the query blocks
  int64_t T, S, rows, keys;                // sizes, and those of a block
  int axes;
  int64_t sizes[MAX_AXES];
  std::vector<int> outer, inner;  // axes of the tasks, axes within a task
  int64_t tasks, repeats, chunks;
};

// Products of pairs of bfloat16, where the processor has them, and what these are made from; an
// element is a pair of features, of keys or of queries. pairs.h has them.
struct Pairs {
  void (*pack)(const View&, int64_t S, float* to, float* room);  // panels of keys
  void (*load)(const View&, int64_t first, int rows, float* to);
  void (*zip)(const View&, int64_t first, int64_t rows, int width, float* to);  // pairs of rows
  // a block (m, n) of a matrix, rounded, as pairs of its columns or of its rows times a weight
  void (*halve)(float* W, int step, int m, int n, float* to);
  void (*turn)(const float* W, int step, int m, int n, float weight, float* to);
  void (*nt[2])(const float*, int, const float*, int M, int N, int K, float*, int);
  void (*nn)(const float*, int, const float*, int, int M, int N, int D, float*, int);
  void (*tn)(const float*, int, const float*, int, int M, int N, int D, float*, int);
};

constexpr int64_t elements(int64_t n) { return (n + 1) / 2; }
constexpr int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The room of one task, and the tensors at its leading index. Widths are those of sums: multiples
// of `head`, of which the columns beyond the tensor's are nothing and are not read. A key-side
// output of another width is summed in a room of its own.
struct Work {
  const Job& job;
  const Program& program;
  const Pairs* const pairs;
  const int rows, keys, step;  // queries and keys of a block, distance of its rows
  std::vector<float*> buffers, loads, packs, values, row_terms, column_terms, sums;
  std::vector<float*> pair_loads, pair_rows, pair_packs, pair_values;  // of those that need them
  float *halves, *turned, *panel;                                     // rooms for a block, for rows
  std::vector<int> load_width, value_width, sum_width;
  float *base, *log_mass;
  uint8_t* hidden;
  std::vector<View> x, out;
  std::vector<const void*> packed, copied;  // what the packs and values are made of
  int64_t nonzero;                          // axes where the leading index is not 0
  bool is_lost = false;                     // a logit overflowed: what is computed is nothing

  Work(const Job& job, const Pairs* pairs, int panel_rows, int head);
  void move_to(int64_t task, int64_t repeat, int64_t chunk);

 private:
  std::unique_ptr<float[]> room;
};

}  // namespace contraction
