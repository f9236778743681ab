// The operator funcattn::prompt, for the CPU: the layers of a decoder behind each other for many tokens of one text. As layers.cpp, but
// made of the products and the attention of many vectors, with what stands between them done where rows are near.
//
//     x = x + o (attention(rotated q, k, v of norm(x)))        x = x + down (silu(gate) * up of norm(x))

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "attention/attention.h"
#include "decoder.h"
#include "many.h"
#include "matrices.h"

namespace {

using torch::stable::Tensor;
using Room = std::vector<float>;

#define WANTED(condition, what) STD_TORCH_CHECK(condition, "funcattn::prompt: ", what)

void times_tiles(const Matrix* which, int64_t count, const float* x, int64_t T, int64_t K, float* y, int64_t step) {
  if (!multiply_rounded(which, count, x, T, K, y, step)) multiply(which, count, x, T, K, y, step);
}

bool is_dense(const Matrix& w) { return w.kind < FLOATS; }

// Matrices w, in tiles or as they are, times x (T, K), to columns of y behind each other.
void multiply_several(const Matrix* w, int64_t count, const float* x, int64_t T, int64_t K, float* y, int64_t step) {
  for (int64_t i = 0, many; i < count; i += many) {
    many = 1;
    while (i + many < count && is_dense(w[i]) == is_dense(w[i + many])) many++;
    if (!is_dense(w[i])) times_tiles(w + i, many, x, T, K, y, step);
    std::vector<Dense> some;
    for (int64_t j = i; j < i + many; j++) {
      if (is_dense(w[j])) some.push_back(dense_of(w[j])), some.back().y = y;
      y += w[j].rows;
    }
    if (is_dense(w[i])) multiply(some.data(), many, x, T, K, K, step, STORE);
  }
}

// y += matrix w times x
void add(const Matrix& w, const float* x, int64_t T, int64_t K, float* y, Room& room) {
  const int64_t N = w.rows;
  if (is_dense(w)) {
    Dense one = dense_of(w);
    one.y = y;
    return multiply(&one, 1, x, T, K, K, N, ADD);
  }
  room.resize(size_t(T * N));
  times_tiles(&w, 1, x, T, K, room.data(), N);
  by_rows(T, N, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * N; j < end * N; j++) y[j] += room[j];
  });
}

// y = silu(matrix w[0] times x) * matrix w[1] times x
void gate(const Matrix* w, const float* x, int64_t T, int64_t K, int64_t F, float* y, Room& room) {
  if (is_dense(w[0]) && is_dense(w[1])) {
    Dense both[] = {dense_of(w[0]), dense_of(w[1])};
    both[0].y = y;
    return multiply(both, 2, x, T, K, K, F, GATE);
  }
  room.resize(size_t(T * 2 * F));
  multiply_several(w, 2, x, T, K, room.data(), 2 * F);
  by_rows(T, 4 * F, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) floats().gated(room.data() + t * 2 * F, room.data() + t * 2 * F + F, F, y + t * F);
  });
}

// One layer's attention of T queries of H heads, over rows of keys that K heads have.
Attention attention_of(const float* q, int64_t q_step, float* out, float* lse, int64_t T, int64_t H, int64_t K, int64_t D, double scale) {
  Attention a;
  const int64_t G = H / K, size = sizeof(float);
  a.axes = 2, a.head_axes = 1, a.sizes[0] = a.heads = K, a.sizes[1] = a.groups = G;
  a.T = T, a.D = a.Dv = D, a.scale = float(scale);
  const auto rows = [&](const float* at, int64_t head, int64_t row) {
    Operand x;
    x.at = (char*)at, x.lead[0] = G * head * size, x.lead[1] = head * size, x.row = row * size, x.column = size;
    return x;
  };
  a.q = rows(q, D, q_step), a.out = rows(out, D, H * D), a.lse = rows(lse, T, 1);
  return a;
}

void read(Attention& a, const Past& rows, int64_t k_head, int64_t v_head, int64_t count) {
  const int64_t size = sizeof(float);
  a.S = count;
  a.k.at = (char*)rows.k, a.k.lead[0] = k_head * size, a.k.row = rows.k_step * size, a.k.column = size;
  a.v.at = (char*)rows.v, a.v.lead[0] = v_head * size, a.v.row = rows.v_step * size, a.v.column = size;
}

// Joins what other keys gave, of T queries of H heads: each weighs exp(lse).
void merge(float* y, float* lse, const float* other, const float* other_lse, int64_t T, int64_t H, int64_t D) {
  by_rows(T, H * D, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t h = 0; h < H; h++) {
        float& mine = lse[h * T + t];
        const float theirs = other_lse[h * T + t], most = std::max(mine, theirs);
        const float a = std::exp(mine - most), b = std::exp(theirs - most), by = 1 / (a + b);
        float* const to = y + (t * H + h) * D;
        for (int64_t d = 0; d < D; d++) to[d] = (to[d] * a + other[(t * H + h) * D + d] * b) * by;
        mine = most + std::log(a + b);
      }
  });
}

// plan and norms as Decoder takes them; x (T, E) of the new tokens, cos and sin (T, R); keys and values (layers, K, S, D) of each part of
// the past, all of whose rows are seen. Gives x behind the last norm, keys and values (layers, K, T, D), and whether all of it is finite:
// else it may not be the result, since rows that a query does not see have weight 0, and 0 * NaN is NaN.
std::tuple<Tensor, Tensor, Tensor, bool> prompt(Tensor plan, Tensor norms, Tensor x, Tensor cos, Tensor sin, Tensors keys, Tensors values,
                                                int64_t H, int64_t K, double scale, double epsilon) {
  WANTED(x.dim() == 2 && x.numel() > 0 && x.is_contiguous() && is_float(x), "x should be contiguous float32 (T, E), not empty");
  const Decoder decoder("funcattn::prompt", plan, norms, x.size(1), H, K, epsilon);
  const int64_t L = decoder.L, E = decoder.E, D = decoder.D, N = decoder.N, F = decoder.F, T = x.size(0), R = cos.size(-1);
  for (const Tensor& w : {cos, sin})
    WANTED(w.dim() == 2 && w.size(0) == T && w.size(1) == R && R % 2 == 0 && R <= D && w.is_contiguous() && is_float(w),
           "cos and sin should be contiguous float32 (T, R)");
  WANTED(values.size() == keys.size(), "keys and values for each part of the past");
  for (size_t p = 0; p < keys.size(); p++)
    for (const Tensor& w : {keys[p], values[p]})
      WANTED(w.dim() == 4 && w.size(0) == L && w.size(1) == K && w.size(2) == keys[p].size(2) && w.size(2) > 0 && w.size(3) == D && w.stride(3) == 1 && is_float(w),
             "keys and values should be float32 (layers, kv_heads, S, D)");

  const Tensor out = torch::stable::new_empty(x, {T, E});
  const Tensor new_k = torch::stable::new_empty(x, {L, K, T, D}), new_v = torch::stable::new_empty(x, {L, K, T, D});
  float* const residual = (float*)out.data_ptr();
  std::copy((const float*)x.data_ptr(), (const float*)x.data_ptr() + T * E, residual);
  const int64_t all_heads = N + 2 * K * D;
  Room normed(T * E), heads(T * all_heads), mixed(T * N), lse(H * T), inner(T * F), room, other(keys.empty() ? 0 : T * N), other_lse(keys.empty() ? 0 : H * T);
  const float *const cosines = (const float*)cos.data_ptr(), *const sines = (const float*)sin.data_ptr();
  std::vector<int64_t> stops(T), starts(1, 0);
  for (int64_t t = 0; t < T; t++) stops[t] = t + 1;
  bool finite = true;

  for (int64_t l = 0; l < L; l++) {
    const Matrix* const w = decoder.matrices + 7 * l;
    decoder.norm(2 * l, residual, T, normed.data());
    multiply_several(w, 3, normed.data(), T, E, heads.data(), all_heads);
    float *const k = (float*)new_k.data_ptr() + l * K * T * D, *const v = (float*)new_v.data_ptr() + l * K * T * D;
    by_rows(T, all_heads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        float* const row = heads.data() + t * all_heads;
        rotate(row, H + K, D, cosines + t * R, sines + t * R, R);
        for (int64_t h = 0; h < K; h++) {
          std::copy(row + N + h * D, row + N + (h + 1) * D, k + (h * T + t) * D);
          std::copy(row + N + (K + h) * D, row + N + (K + h + 1) * D, v + (h * T + t) * D);
        }
      }
    });
    Attention among = attention_of(heads.data(), all_heads, mixed.data(), lse.data(), T, H, K, D, scale);
    read(among, {k, v, D, D}, T * D, T * D, T);
    among.intervals = 1;
    among.start.at = (char*)starts.data(), among.stop.at = (char*)stops.data();
    among.start.type = among.stop.type = INT64, among.stop.row = sizeof(int64_t);
    finite = attend(among) && finite;
    for (size_t p = 0; p < keys.size(); p++) {
      Attention before = attention_of(heads.data(), all_heads, other.data(), other_lse.data(), T, H, K, D, scale);
      const auto at = [&](const Tensor& w) { return (const float*)w.data_ptr() + l * w.stride(0); };
      read(before, {at(keys[p]), at(values[p]), keys[p].stride(2), values[p].stride(2)}, keys[p].stride(1), values[p].stride(1), keys[p].size(2));
      finite = attend(before) && finite;
      merge(mixed.data(), lse.data(), other.data(), other_lse.data(), T, H, D);
    }
    add(w[3], mixed.data(), T, N, residual, room);
    decoder.norm(2 * l + 1, residual, T, normed.data());
    gate(w + 4, normed.data(), T, E, F, inner.data(), room);
    add(w[6], inner.data(), T, F, residual, room);
  }
  decoder.norm(2 * L, residual, T, residual);
  return {out, new_k, new_v, finite};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(funcattn, m) {
  m.def(
      "prompt(Tensor plan, Tensor norms, Tensor x, Tensor cos, Tensor sin, Tensor[] keys, Tensor[] values, int heads, int kv_heads, float scale, float epsilon) -> (Tensor, Tensor, Tensor, bool)");
}

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("prompt", TORCH_BOX(&prompt)); }
