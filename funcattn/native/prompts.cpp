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
#include "many.h"
#include "matrices.h"

namespace {

using torch::stable::Tensor;
using Room = std::vector<float>;

#define WANTED(condition, what) STD_TORCH_CHECK(condition, "funcattn::prompt: ", what)

bool is_float(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Float; }

// f(first, last) of some of T rows at a time, where there is enough of them to wake threads for.
template <class F>
void by_rows(int64_t T, int64_t size, const F& f) {
  torch::stable::parallel_for(0, T, 1 + 32768 / size, f);
}

void times_tiles(const Matrix* which, int64_t count, const float* x, int64_t T, int64_t K, float* y, int64_t step) {
  if (!multiply_rounded(which, count, x, T, K, y, step)) multiply(which, count, x, T, K, y, step);
}

// The matrices of all layers, in tiles or as they are.
struct Factors {
  std::vector<Dense> dense;
  std::vector<Matrix> tiles;  // as many; each is one of both

  Factors(const Tensors& weights, const Tensors& scales, const std::vector<int64_t>& rows, const std::vector<int64_t>& columns) {
    Tensors blocks;
    std::vector<int64_t> N, K;
    for (size_t i = 0; i < weights.size(); i++) {
      const Tensor& w = weights[i];
      if (w.dim() == 2) {
        WANTED(is_float(w) && w.size(0) == rows[i] && w.size(1) == columns[i], "matrices should be float32 (rows, columns), or in tiles");
        dense.push_back(dense_of(w));
      } else {
        dense.push_back({});
        blocks.push_back(w), N.push_back(rows[i]), K.push_back(columns[i]);
      }
    }
    const std::vector<Matrix> some = matrices(blocks, scales, N, K);
    auto next = some.begin();
    for (const Dense& one : dense) tiles.push_back(one.w ? Matrix{} : *next++);
  }

  // Matrices `first` on times x (T, K), to columns of y behind each other.
  void multiply(int64_t first, int64_t count, const float* x, int64_t T, int64_t K, float* y, int64_t step) const {
    for (int64_t i = first, many; i < first + count; i += many) {
      many = 1;
      while (i + many < first + count && !dense[i].w == !dense[i + many].w) many++;
      if (dense[i].w) {
        std::vector<Dense> some(dense.begin() + i, dense.begin() + i + many);
        for (Dense& one : some) one.y = y, y += one.N;
        ::multiply(some.data(), many, x, T, K, K, step, STORE);
      } else {
        times_tiles(tiles.data() + i, many, x, T, K, y, step);
        for (int64_t j = i; j < i + many; j++) y += tiles[j].rows;
      }
    }
  }

  // y += matrix i times x
  void add(int64_t i, const float* x, int64_t T, int64_t K, float* y, Room& room) const {
    if (dense[i].w) {
      Dense one = dense[i];
      one.y = y;
      return ::multiply(&one, 1, x, T, K, K, one.N, ADD);
    }
    const int64_t N = tiles[i].rows;
    room.resize(size_t(T * N));
    times_tiles(&tiles[i], 1, x, T, K, room.data(), N);
    by_rows(T, N, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin * N; j < end * N; j++) y[j] += room[j];
    });
  }

  // y = silu(matrix i times x) * matrix i + 1 times x
  void gate(int64_t i, const float* x, int64_t T, int64_t K, int64_t F, float* y, Room& room) const {
    if (dense[i].w && dense[i + 1].w) {
      Dense both[] = {dense[i], dense[i + 1]};
      both[0].y = y;
      return ::multiply(both, 2, x, T, K, K, F, GATE);
    }
    room.resize(size_t(T * 2 * F));
    multiply(i, 2, x, T, K, room.data(), 2 * F);
    by_rows(T, 4 * F, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) floats().gated(room.data() + t * 2 * F, room.data() + t * 2 * F + F, F, y + t * F);
    });
  }
};

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

// For each layer the matrices q, k, v, o, gate, up, down, float32 (N, K) or in tiles, and the norms before attention and feed-forward;
// x (T, E) of the new tokens, cos and sin (T, R); keys and values (layers, K, S, D) of each part of the past, all of whose rows are
// seen. Gives x behind the layers, keys and values (layers, K, T, D), and whether all of it is finite: else it may not be the result,
// since rows that a query does not see have weight 0, and 0 * NaN is NaN.
std::tuple<Tensor, Tensor, Tensor, bool> prompt(Tensors weights, Tensors scales, std::vector<int64_t> rows, Tensors norms, Tensor x, Tensor cos,
                                                Tensor sin, Tensors keys, Tensors values, int64_t H, int64_t K, double scale, double epsilon) {
  WANTED(instructions_that_run() != NONE, "the processor has no AVX2");
  const int64_t L = int64_t(norms.size()) / 2;
  WANTED(x.dim() == 2 && x.numel() > 0 && x.is_contiguous() && is_float(x), "x should be contiguous float32 (T, E), not empty");
  WANTED(L > 0 && int64_t(norms.size()) == 2 * L && int64_t(rows.size()) == 7 * L && weights.size() == rows.size(), "seven matrices and two norms for each layer");
  WANTED(H > 0 && K > 0 && H % K == 0, "H should be a multiple of K");
  const int64_t T = x.size(0), E = x.size(1), N = rows[0], D = N / H, F = rows[4], R = cos.size(-1);
  WANTED(D > 0 && N == H * D, "H heads of one size");
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
  WANTED(values.size() == keys.size(), "keys and values for each part of the past");
  for (size_t p = 0; p < keys.size(); p++)
    for (const Tensor& w : {keys[p], values[p]})
      WANTED(w.dim() == 4 && w.size(0) == L && w.size(1) == K && w.size(2) == keys[p].size(2) && w.size(2) > 0 && w.size(3) == D && w.stride(3) == 1 && is_float(w),
             "keys and values should be float32 (layers, kv_heads, S, D)");
  const Factors all(weights, scales, rows, columns);
  const Floats& use = floats();

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
    const auto norm = [&](const Tensor& weight) {
      by_rows(T, E, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; t++) use.norm(residual + t * E, (const float*)weight.data_ptr(), E, float(epsilon), normed.data() + t * E);
      });
    };
    norm(norms[2 * l]);
    all.multiply(7 * l, 3, normed.data(), T, E, heads.data(), all_heads);
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
    all.add(7 * l + 3, mixed.data(), T, N, residual, room);
    norm(norms[2 * l + 1]);
    all.gate(7 * l + 4, normed.data(), T, E, F, inner.data(), room);
    all.add(7 * l + 6, inner.data(), T, F, residual, room);
  }
  return {out, new_k, new_v, finite};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(funcattn, m) {
  m.def(
      "prompt(Tensor[] weights, Tensor[] scales, int[] rows, Tensor[] norms, Tensor x, Tensor cos, Tensor sin, Tensor[] keys, Tensor[] values, "
      "int heads, int kv_heads, float scale, float epsilon) -> (Tensor, Tensor, Tensor, bool)");
}

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("prompt", TORCH_BOX(&prompt)); }
