// The operator funcattn::layers, for the CPU: the layers of a decoder behind each other, where between the products of a step of a few
// tokens there is so little to compute that calling it takes longer.
//
//     x = x + o (attention(rotated q, k, v of norm(x)))        x = x + down (silu(gate) * up of norm(x))
//
// What a layer may have besides (biases, windows, caps, norms of heads, experts) it does not know: who calls it asks first.

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "matrices.h"

namespace {

using torch::stable::Tensor;

#define WANTED(condition, what) STD_TORCH_CHECK(condition, "funcattn::layers: ", what)

bool is_float(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Float; }

// Plane i of a head turns features i and i + R / 2.
void rotate(float* head, const float* cos, const float* sin, int64_t R) {
  for (int64_t i = 0; i < R / 2; i++) {
    const float a = head[i], b = head[i + R / 2];
    head[i] = a * cos[i] + b * sin[i];
    head[i + R / 2] = b * cos[i + R / 2] + a * sin[i + R / 2];
  }
}

void add(const float* more, int64_t n, float* x) {
  for (int64_t i = 0; i < n; i++) x[i] += more[i];
}

// For each layer the matrices q, k, v, o, gate, up, down and the norms before attention and feed-forward; x (T, E); cos and sin
// (T, R) of the new tokens; keys and values (layers, kv_heads, S, D) of each part of the past, of which the first `lengths` count.
// Gives x behind the layers, and keys and values (layers, kv_heads, T, D) of the new tokens.
std::tuple<Tensor, Tensor, Tensor> layers(Tensors blocks, Tensors scales, std::vector<int64_t> rows, Tensors norms, Tensor x, Tensor cos,
                                          Tensor sin, Tensors keys, Tensors values, std::vector<int64_t> lengths, int64_t H, int64_t K,
                                          double scale, double epsilon) {
  const int64_t L = int64_t(norms.size()) / 2, parts = int64_t(keys.size());
  WANTED(x.dim() == 2 && x.numel() > 0 && x.is_contiguous() && is_float(x), "x should be contiguous float32 (T, E), not empty");
  WANTED(L > 0 && int64_t(norms.size()) == 2 * L && int64_t(rows.size()) == 7 * L, "seven matrices and two norms for each layer");
  WANTED(H > 0 && K > 0 && H % K == 0, "heads of a multiple of 16 features, H a multiple of K");
  const int64_t T = x.size(0), E = x.size(1), N = rows[0], D = N / H, F = rows[4], R = cos.size(-1), G = H / K;
  WANTED(D > 0 && N == H * D && D % 16 == 0, "heads of a multiple of 16 features, H a multiple of K");
  std::vector<int64_t> columns;
  for (int64_t l = 0; l < L; l++) {
    const int64_t* const n = rows.data() + 7 * l;
    WANTED(n[0] == N && n[1] == K * D && n[2] == K * D && n[3] == E && n[4] == F && n[5] == F && n[6] == E, "layers of the same sizes");
    columns.insert(columns.end(), {E, E, E, N, E, E, F});
  }
  for (const Tensor& w : norms) WANTED(w.dim() == 1 && w.size(0) == E && w.is_contiguous() && is_float(w), "norms should be contiguous float32 (E,)");
  for (const Tensor& w : {cos, sin})
    WANTED(w.dim() == 2 && w.size(0) == T && w.size(1) == R && R % 2 == 0 && R <= D && w.is_contiguous() && is_float(w),
           "cos and sin should be contiguous float32 (T, R)");
  WANTED(values.size() == keys.size() && lengths.size() == keys.size(), "keys, values and a length for each part of the past");
  int64_t remembered = T;
  for (int64_t p = 0; p < parts; p++) {
    for (const Tensor& w : {keys[p], values[p]})
      WANTED(w.dim() == 4 && w.size(0) == L && w.size(1) == K && w.size(3) == D && w.stride(3) == 1 && is_float(w),
             "keys and values should be float32 (layers, kv_heads, S, D)");
    WANTED(0 <= lengths[p] && lengths[p] <= keys[p].size(2) && lengths[p] <= values[p].size(2), "lengths should be within the past");
    remembered += lengths[p];
  }
  const std::vector<Matrix> all = matrices(blocks, scales, rows, columns);
  const Floats& use = floats();

  const Tensor out = torch::stable::new_empty(x, {T, E});
  const Tensor new_k = torch::stable::new_empty(x, {L, K, T, D}), new_v = torch::stable::new_empty(x, {L, K, T, D});
  float* const residual = (float*)out.data_ptr();
  const float* const given = (const float*)x.data_ptr();
  std::copy(given, given + T * E, residual);
  const int64_t all_heads = N + 2 * K * D;
  std::vector<float> normed(T * E), heads(T * all_heads), mixed(T * N), halves(T * 2 * F), inner(T * F), more(T * E);
  const float *const cosines = (const float*)cos.data_ptr(), *const sines = (const float*)sin.data_ptr();

  for (int64_t l = 0; l < L; l++) {
    const Matrix* const w = all.data() + 7 * l;
    const auto norm = [&](const Tensor& weight) {
      for (int64_t t = 0; t < T; t++) use.norm(residual + t * E, (const float*)weight.data_ptr(), E, float(epsilon), normed.data() + t * E);
    };
    norm(norms[2 * l]);
    multiply(w, 3, normed.data(), T, E, heads.data(), all_heads);
    float* const k = (float*)new_k.data_ptr() + l * K * T * D;
    float* const v = (float*)new_v.data_ptr() + l * K * T * D;
    for (int64_t t = 0; t < T; t++) {
      float* const row = heads.data() + t * all_heads;
      for (int64_t h = 0; h < H + K; h++) rotate(row + h * D, cosines + t * R, sines + t * R, R);
      for (int64_t h = 0; h < K; h++) {
        std::copy(row + N + h * D, row + N + (h + 1) * D, k + (h * T + t) * D);
        std::copy(row + N + (K + h) * D, row + N + (K + h + 1) * D, v + (h * T + t) * D);
      }
    }
    const auto attend = [&](int64_t begin, int64_t end) {
      std::vector<Past> pasts(parts + 1);
      std::vector<int64_t> seen(lengths);
      seen.push_back(0);
      const int64_t room_step = (remembered + 31) / 16 * 16;
      std::vector<float> room(use.queries * room_step);
      for (int64_t h = begin; h < end; h++) {
        for (int64_t p = 0; p < parts; p++) {
          const Tensor &a = keys[p], &b = values[p];
          pasts[p] = {(const float*)a.data_ptr() + l * a.stride(0) + h * a.stride(1),
                      (const float*)b.data_ptr() + l * b.stride(0) + h * b.stride(1), a.stride(2), b.stride(2)};
        }
        pasts[parts] = {k + h * T * D, v + h * T * D, D, D};
        std::vector<Query> queries;
        for (int64_t t = 0; t < T; t++)
          for (int64_t g = h * G; g < (h + 1) * G; g++)
            queries.push_back({heads.data() + t * all_heads + g * D, mixed.data() + t * N + g * D, t + 1});
        for (int64_t i = 0, many = int64_t(queries.size()); i < many; i += use.queries)
          use.attend(queries.data() + i, std::min(int64_t(use.queries), many - i), pasts.data(), seen.data(), parts + 1, D, float(scale), room.data(), room_step);
      }
    };
    torch::stable::parallel_for(0, K, 1 + 65536 / (remembered * D * G * T), attend);
    multiply(w + 3, 1, mixed.data(), T, N, more.data(), E);
    add(more.data(), T * E, residual);
    norm(norms[2 * l + 1]);
    multiply(w + 4, 2, normed.data(), T, E, halves.data(), 2 * F);
    for (int64_t t = 0; t < T; t++) use.gated(halves.data() + t * 2 * F, halves.data() + t * 2 * F + F, F, inner.data() + t * F);
    multiply(w + 6, 1, inner.data(), T, F, more.data(), E);
    add(more.data(), T * E, residual);
  }
  return {out, new_k, new_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("layers", TORCH_BOX(&layers)); }
