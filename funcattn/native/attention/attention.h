// What attention.cpp and the kernels of forward.h say to each other: operands by strides, blocks of queries, a table of kernels.
#pragma once

#include <cstdint>

constexpr int AXES = 24;  // leading axes, at most

enum Type { FLOAT32, BFLOAT16, FLOAT16, BYTE, INT64, INT32 };

// A tensor (*lead, rows, columns) by strides in bytes, 0 along axes that it lacks.
struct Operand {
  char* at = nullptr;
  Type type = FLOAT32;
  int64_t lead[AXES] = {}, row = 0, column = 0;
  explicit operator bool() const { return at != nullptr; }
};

// Leading axes are in two groups: those of heads, which keys, values or their tangents have, and the others, whose queries are more
// rows of the same products, so that keys are packed once.
struct Attention {
  int axes = 0, head_axes = 0;
  int64_t sizes[AXES] = {};
  int64_t heads = 1, groups = 1;  // products of the sizes
  int64_t T = 0, S = 0, D = 0, Dv = 0, intervals = 0;
  float scale = 1;
  Operand q, k, v, dq, dk, dv, start, stop, dense, bias, out, lse, dout, dlse;
  bool pushes = false;  // with tangents
  int rows = 0;         // queries of a block, at most

  int64_t offset(const Operand& x, int first, int last, int64_t index) const {
    int64_t sum = 0;
    for (int a = last - 1; a >= first; a--) {
      sum += index % sizes[a] * x.lead[a];
      index /= sizes[a];
    }
    return sum;
  }
  char* at(const Operand& x, int64_t head, int64_t group) const {
    return x.at + offset(x, 0, head_axes, head) + offset(x, head_axes, axes, group);
  }
  // True for the first of those that would write the same part of x.
  bool writes(const Operand& x, int64_t head, int64_t group) const {
    for (int a = axes - 1; a >= 0; a--) {
      int64_t& index = a >= head_axes ? group : head;
      if (!x.lead[a] && index % sizes[a]) return false;
      index /= sizes[a];
    }
    return true;
  }
};

// Some queries of some groups of a head (all queries, if several groups), over the keys from first to last.
struct Block {
  int64_t head, group, groups, query, queries, first, last;
};

// Of a set of instructions. Sizes are in floats.
struct Kernels {
  int most_rows;
  int64_t (*packed_size)(const Attention&, int64_t keys);
  int64_t (*scratch_size)(const Attention&);
  int64_t (*state_size)(const Attention&);
  int (*step)();  // where a part of the keys may begin: at its multiples
  void (*pack)(const Attention&, int64_t head, int64_t first, int64_t last, int64_t place, int64_t packed_keys, float* packed,
               float* scratch);
  void (*attend)(const Attention&, const Block&, const float* packed, float* state, float* scratch);
  void (*merge)(const Attention&, const Block&, float* state, const float* other);
  bool (*finish)(const Attention&, const Block&, float* state);  // gives whether all is finite
};

// Attention as described, all of it: to out and lse, and their tangents. Gives whether all of it is finite.
bool attend(Attention& a);
