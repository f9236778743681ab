// The operator funcattn::coded_attend, for the CPU: attention of a few queries over a past in codes, beside rows of floats; see codes.h.
// The past comes as a table of addresses, which funcattn::coded_table makes of its tensors: there are hundreds, and to pass these, and
// to find in memory where each has its numbers, would take as long in each layer as to read the codes.

#include <algorithm>
#include <cmath>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "matrices.h"

namespace {

using torch::stable::Tensor;

#define WANTED(condition, what) STD_TORCH_CHECK(condition, "funcattn::coded_attend: ", what)

int64_t features_of(int64_t D) { return D % 64 ? D : 64; }  // of a group of values

int64_t rotation_of(int64_t D) { return std::min<int64_t>(D & -D, 256); }

// f(k, v, k_step, v_step, rows) of what a token sees of a head of each part.
template <class F>
void each_part(const Tensors& parts, int64_t head, const int64_t* seen, const F& f) {
  for (size_t p = 0; p < parts.size() / 2; p++) {
    const Tensor &k = parts[2 * p], &v = parts[2 * p + 1];
    const int64_t begin = seen[2 * p + 2], rows = seen[2 * p + 3] - begin;
    const auto at = [&](const Tensor& x) { return (const float*)x.data_ptr() + head * x.stride(0) + begin * x.stride(1); };
    if (rows) f(at(k), at(v), k.stride(1), v.stride(1), rows);
  }
}

constexpr int64_t TABLE = 0x636f646564;  // the first number of a table

// int64 (1 + blocks, 6): TABLE and the sizes of the past; then the addresses of a block's codes, scale and low of keys and of values. It is
// valid as long as all these tensors live, and codes as in CodedPast.
Tensor coded_table(Tensors codes, int64_t rows, int64_t bits, int64_t D) {
  const CodedPast past(codes, rows, bits, D);
  const Tensor table = torch::stable::new_empty(codes[0], {1 + past.count, 6}, torch::headeronly::ScalarType::Long);
  int64_t* const to = (int64_t*)table.data_ptr();
  const int64_t sizes[] = {TABLE, past.layers, past.heads, rows, bits, D};
  std::copy(sizes, sizes + 6, to);
  for (size_t i = 0; i < past.at.size(); i++) to[6 + i] = (int64_t)past.at[i];
  return table;
}

// q (H, T, D); table as coded_table gives it; parts: keys and values (K, S, D) of each part in floats; seen (T, 1 + parts, 2): the rows
// from .. to that a token sees of the codes, and of each part.
Tensor coded_attend(Tensor q, Tensor table, int64_t layer, Tensors parts, std::vector<int64_t> seen, double scale) {
  const int64_t count = int64_t(parts.size()) / 2;
  WANTED(q.dim() == 3 && q.numel() > 0 && q.is_contiguous() && is_float(q), "q should be contiguous float32 (H, T, D), not empty");
  const int64_t H = q.size(0), T = q.size(1), D = q.size(2);
  const CodedPast past(table);
  WANTED(past.D == D, "q should have as many features as the past");
  WANTED(0 <= layer && layer < past.layers, "layer should be one of the past");
  const int64_t K = past.heads, rows = past.rows, bounds = 2 * (count + 1);
  WANTED(H % K == 0, "H should be a multiple of the heads of the past");
  WANTED(int64_t(seen.size()) == T * bounds, "seen should be (T, 1 + parts, 2)");
  for (const Tensor& x : parts)
    WANTED(x.dim() == 3 && x.size(0) == K && x.size(2) == D && x.stride(2) == 1 && is_float(x), "parts should be float32 (K, S, D)");
  int64_t first = past.count * rows, last = 0, all = 0;
  for (int64_t p = 0; p <= count; p++) {
    const int64_t size = p ? std::min(parts[2 * p - 2].size(1), parts[2 * p - 1].size(1)) : past.count * rows;
    for (int64_t t = 0; t < T; t++) {
      const int64_t begin = seen[t * bounds + 2 * p], end = seen[t * bounds + 2 * p + 1];
      WANTED(0 <= begin && begin <= end && end <= size, "seen should be within the rows");
      if (!p) first = std::min(first, begin), last = std::max(last, end);
    }
    all += p ? size : 0;
  }
  first = first / rows, last = std::max(first, (last + rows - 1) / rows);  // of the blocks that some token sees
  all += (last - first) * rows;
  const Floats& use = floats();
  const Coding& codes_of = coding();
  const Tensor out = torch::stable::new_empty(q, {H, T, D});
  const float* const from = (const float*)q.data_ptr();
  float* const to = (float*)out.data_ptr();
  const int64_t Q = H / K * T, step = (all + 31) / 16 * 16;
  const auto run = [&](int64_t begin, int64_t end) {
    std::vector<float> room(Q * step), turned(Q * D);
    std::vector<CodedBlock> blocks(past.count);
    std::vector<const float*> queries(Q), rotated(Q);
    std::vector<float*> shares(Q), y(Q);
    for (int64_t h = begin; h < end; h++) {  // its queries (H / K, T) lie behind each other
      const Coded coded = past.of(layer, h, blocks.data());
      std::copy(from + h * Q * D, from + (h + 1) * Q * D, turned.data());
      for (int64_t i = 0; i < Q; i++) {
        queries[i] = from + (h * Q + i) * D;
        rotated[i] = turned.data() + i * D;
        y[i] = to + (h * Q + i) * D;
        shares[i] = room.data() + i * step;
        codes_of.rotate(turned.data() + i * D, D, past.rotation);
        std::fill(y[i], y[i] + D, 0.0f);
      }
      codes_of.score(coded, first, last, rotated.data(), shares.data(), Q, D, float(scale));
      std::vector<float> by(Q);
      for (int64_t i = 0; i < Q; i++) {
        const int64_t* const sees = seen.data() + i % T * bounds;
        const int64_t hidden = std::min(sees[0], last * rows) - first * rows, shown = std::max(sees[1] - first * rows, int64_t(0));
        std::fill(shares[i], shares[i] + std::max(hidden, int64_t(0)), -HUGE_VALF);
        std::fill(shares[i] + shown, shares[i] + (last - first) * rows, -HUGE_VALF);
        float* at = shares[i] + (last - first) * rows;
        each_part(parts, h, sees, [&](const float* k, const float*, int64_t k_step, int64_t, int64_t n) {
          use.score(&queries[i], &at, 1, k, k_step, n, D, float(scale));
          at += n;
        });
        by[i] = use.to_shares(shares[i], at - shares[i]);
      }
      codes_of.mix(coded, first, last, shares.data(), y.data(), Q, D);
      for (int64_t i = 0; i < Q; i++) {
        codes_of.rotate(y[i], D, past.rotation);
        const float* at = shares[i] + (last - first) * rows;
        each_part(parts, h, seen.data() + i % T * bounds, [&](const float*, const float* v, int64_t, int64_t v_step, int64_t n) {
          use.mix(&at, &y[i], 1, v, v_step, n, D);
          at += n;
        });
        for (int64_t d = 0; d < D; d++) y[i][d] *= by[i];
      }
    }
  };
  torch::stable::parallel_for(0, K, 1 + 65536 / (1 + all * D * Q), run);
  return out;
}

}  // namespace

CodedPast::CodedPast(const Tensor& table) {
  WANTED(table.dim() == 2 && table.size(1) == 6 && table.is_contiguous() && table.scalar_type() == torch::headeronly::ScalarType::Long,
         "table should be int64 (1 + blocks, 6), from coded_table");
  const int64_t* const of = (const int64_t*)table.data_ptr();
  WANTED(table.size(0) > 1 && of[0] == TABLE, "table should be from coded_table");
  count = table.size(0) - 1, layers = of[1], heads = of[2], rows = of[3], bits = of[4], D = of[5];
  features = features_of(D), rotation = rotation_of(D);
  at.assign((const char* const*)(of + 6), (const char* const*)(of + 6 * (1 + count)));
}

CodedPast::CodedPast(const Tensors& codes, int64_t rows, int64_t bits, int64_t D)
    : count(int64_t(codes.size()) / 6), rows(rows), bits(bits), D(D), features(features_of(D)), rotation(rotation_of(D)) {
  WANTED(!codes.empty() && codes.size() % 6 == 0, "codes, scale and low of keys and of values for each block");
  WANTED((bits == 4 || bits == 8) && rows > 0 && rows % 32 == 0, "blocks of 32 rows or a multiple, in 4 or 8 bits");
  WANTED(D > 0 && D % 32 == 0 && D <= MOST_FEATURES, "heads of a multiple of 32 features, to 512");
  const Tensor& first = codes[0];
  WANTED(first.dim() == 4 && first.size(0) > 0 && first.size(1) > 0, "codes should be (layers, K, D, bytes)");
  layers = first.size(0), heads = first.size(1);
  const int64_t bytes = D * rows * bits / 8, sizes[] = {bytes, rows / 32 * D, rows / 32 * D, bytes, D / features * rows, D / features * rows};
  at.reserve(codes.size());
  for (size_t i = 0; i < codes.size(); i++) {
    const Tensor& x = codes[i];
    WANTED(x.is_contiguous() && x.numel() == layers * heads * sizes[i % 6], "blocks should be contiguous, and of the same sizes");
    WANTED(x.scalar_type() == (i % 3 ? torch::headeronly::ScalarType::Float : torch::headeronly::ScalarType::Byte), "codes of uint8, scales of float32");
    at.push_back((const char*)x.data_ptr());
  }
}

Coded CodedPast::of(int64_t layer, int64_t head, CodedBlock* blocks) const {
  const int64_t i = layer * heads + head, bytes = i * D * rows * bits / 8, keys = i * rows / 32 * D, values = i * (D / features) * rows;
  for (int64_t b = 0; b < count; b++) {
    const char* const* const x = at.data() + 6 * b;
    blocks[b] = {(const uint8_t*)x[0] + bytes, (const uint8_t*)x[3] + bytes, (const float*)x[1] + keys, (const float*)x[2] + keys,
                 (const float*)x[4] + values, (const float*)x[5] + values};
  }
  return {blocks, rows, bits, features, rotation};
}

STABLE_TORCH_LIBRARY_FRAGMENT(funcattn, m) {
  m.def("coded_table(Tensor[] codes, int rows, int bits, int size) -> Tensor");
  m.def("coded_attend(Tensor q, Tensor table, int layer, Tensor[] parts, int[] seen, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) {
  m.impl("coded_table", TORCH_BOX(&coded_table));
  m.impl("coded_attend", TORCH_BOX(&coded_attend));
}
