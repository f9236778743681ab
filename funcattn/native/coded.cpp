// The operator funcattn::coded_attend, for the CPU: attention of a few queries over a past in codes, beside rows of floats; see codes.h.

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "matrices.h"

namespace {

using torch::stable::Tensor;

#define WANTED(condition, what) STD_TORCH_CHECK(condition, "funcattn::coded_attend: ", what)

bool is_float(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Float; }

// q (H, T, D); parts: keys and values (K, S, D) of each part in floats; seen (T, 1 + parts, 2): the rows from .. to that a token sees of
// the codes, and of each part; codes as in CodedPast.
Tensor coded_attend(Tensor q, Tensors codes, int64_t layer, int64_t rows, int64_t bits, Tensors parts, std::vector<int64_t> seen, double scale) {
  const int64_t count = int64_t(parts.size()) / 2;
  WANTED(q.dim() == 3 && q.numel() > 0 && q.is_contiguous() && is_float(q), "q should be contiguous float32 (H, T, D), not empty");
  const int64_t H = q.size(0), T = q.size(1), D = q.size(2);
  const CodedPast past(codes, layer, rows, bits, D);
  const int64_t K = past.heads;
  WANTED(H % K == 0, "H should be a multiple of the heads of the past");
  WANTED(int64_t(seen.size()) == 2 * T * (count + 1), "seen should be (T, 1 + parts, 2)");
  for (const Tensor& x : parts)
    WANTED(x.dim() == 3 && x.size(0) == K && x.size(2) == D && x.stride(2) == 1 && is_float(x), "parts should be float32 (K, S, D)");
  const int64_t* const each = seen.data();
  int64_t all = past.count * rows;
  for (int64_t p = 0; p <= count; p++) {
    const int64_t size = p ? std::min(parts[2 * p - 2].size(1), parts[2 * p - 1].size(1)) : past.count * rows;
    for (int64_t t = 0; t < T; t++) {
      const int64_t* const some = each + 2 * (t * (count + 1) + p);
      WANTED(0 <= some[0] && some[0] <= some[1] && some[1] <= size, "seen should be within the rows");
    }
    all += p ? size : 0;
  }
  const Coding& use = coding();
  const Tensor out = torch::stable::new_empty(q, {H, T, D});
  const float* const from = (const float*)q.data_ptr();
  float* const to = (float*)out.data_ptr();
  const int64_t G = H / K, room_step = (all + 31) / 16 * 16;
  const auto run = [&](int64_t begin, int64_t end) {
    std::vector<float> room(use.queries * room_step), scratch(use.queries * (2 * D + std::max(D, rows)));
    std::vector<Past> dense(count);
    std::vector<CodedBlock> blocks(past.count);
    for (int64_t h = begin; h < end; h++) {
      for (int64_t p = 0; p < count; p++) {
        const Tensor &a = parts[2 * p], &b = parts[2 * p + 1];
        dense[p] = {(const float*)a.data_ptr() + h * a.stride(0), (const float*)b.data_ptr() + h * b.stride(0), a.stride(1), b.stride(1)};
      }
      const Coded coded = past.of(h, blocks.data());
      std::vector<CodedQuery> queries;
      for (int64_t t = 0; t < T; t++)
        for (int64_t g = h * G; g < (h + 1) * G; g++)
          queries.push_back({from + (g * T + t) * D, to + (g * T + t) * D, each + 2 * t * (count + 1)});
      for (int64_t i = 0, many = int64_t(queries.size()); i < many; i += use.queries)
        use.attend(queries.data() + i, std::min(int64_t(use.queries), many - i), coded, dense.data(), count, D, float(scale), room.data(),
                   room_step, scratch.data());
    }
  };
  torch::stable::parallel_for(0, K, 1 + 65536 / (1 + all * D * G * T), run);
  return out;
}

}  // namespace

CodedPast::CodedPast(const Tensors& codes, int64_t layer, int64_t rows, int64_t bits, int64_t D)
    : count(int64_t(codes.size()) / 6), rows(rows), bits(bits), D(D), features(D % 64 ? D : 64), rotation(std::min<int64_t>(D & -D, 256)) {
  WANTED(!codes.empty() && codes.size() % 6 == 0, "codes, scale and low of keys and of values for each block");
  WANTED((bits == 4 || bits == 8) && rows > 0 && rows % 32 == 0 && D > 0 && D % 32 == 0, "blocks of 32 rows and features, or a multiple");
  const Tensor& first = codes[0];
  WANTED(first.dim() == 4 && first.size(0) > layer && layer >= 0 && first.size(1) > 0, "codes should be (layers, K, D, bytes)");
  heads = first.size(1);
  const int64_t L = first.size(0);
  const int64_t bytes = D * rows * bits / 8, sizes[] = {bytes, rows / 32 * D, rows / 32 * D, bytes, D / features * rows, D / features * rows};
  at.reserve(codes.size());
  for (size_t i = 0; i < codes.size(); i++) {
    const Tensor& x = codes[i];
    const int64_t size = sizes[i % 6];
    WANTED(x.is_contiguous() && x.numel() == L * heads * size, "blocks should be contiguous, and of the same sizes");
    WANTED(x.scalar_type() == (i % 3 ? torch::headeronly::ScalarType::Float : torch::headeronly::ScalarType::Byte), "codes of uint8, scales of float32");
    at.push_back((const char*)x.data_ptr() + layer * heads * size * (i % 3 ? 4 : 1));
  }
}

Coded CodedPast::of(int64_t head, CodedBlock* blocks) const {
  const int64_t bytes = head * D * rows * bits / 8, keys = head * rows / 32 * D, values = head * (D / features) * rows;
  for (int64_t b = 0; b < count; b++) {
    const char* const* const x = at.data() + 6 * b;
    blocks[b] = {(const uint8_t*)x[0] + bytes, (const uint8_t*)x[3] + bytes, (const float*)x[1] + keys, (const float*)x[2] + keys,
                 (const float*)x[4] + values, (const float*)x[5] + values};
  }
  return {blocks, rows, bits, features, rotation};
}

STABLE_TORCH_LIBRARY_FRAGMENT(funcattn, m) {
  m.def("coded_attend(Tensor q, Tensor[] codes, int layer, int rows, int bits, Tensor[] parts, int[] seen, float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("coded_attend", TORCH_BOX(&coded_attend)); }
