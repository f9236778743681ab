// The operator funcattn::layers, for the CPU: the layers of a decoder behind each other, where between the products of a step of a few
// tokens there is so little to compute that calling it takes longer. The rows may be of several texts: a matrix is read once for all of
// them, and so is a past that they share.
//
//     x = x + o (attention(rotated q, k, v of norm(x)))        x = x + down (silu(gate) * up of norm(x))
//
// What a layer may have besides (biases, windows, caps, norms of heads, experts) it does not know: who calls it asks first.

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "decoder.h"
#include "many.h"
#include "matrices.h"

namespace {

using torch::stable::Tensor;

#define WANTED(condition, what) STD_TORCH_CHECK(condition, "funcattn::layers: ", what)

void add(const float* more, int64_t n, float* x) {
  for (int64_t i = 0; i < n; i++) x[i] += more[i];
}

// The first `count` rows of a text, of one head.
struct Rows : Past {
  int64_t count;
};

// Some of the past of B texts: keys and values of (P, layers, kv_heads, S, D), of which B / P texts behind each other share one.
struct Part {
  // Read once: an access through the stable ABI takes longer than a row.
  struct Side {
    const float* at;
    int64_t text, layer, head, row;  // strides

    explicit Side(const Tensor& x) : at((const float*)x.data_ptr()), text(x.stride(0)), layer(x.stride(1)), head(x.stride(2)), row(x.stride(3)) {}
  } keys, values;
  const int64_t* lengths;
  int64_t sharing;  // B / P, and as many texts as share a length

  Rows of(int64_t text, int64_t layer, int64_t head) const {
    const int64_t p = text / sharing;
    const auto at = [&](const Side& x) { return x.at + p * x.text + layer * x.layer + head * x.head; };
    return {{at(keys), at(values), keys.row, values.row}, lengths[p]};
  }
};

constexpr int64_t QUERIES = 32;  // that are done together, and read what they share once

// y[i] = attention of query i; `queries` of one head, of the texts behind each other, T * G each.
struct Attention {
  const std::vector<Part>& parts;
  const bool* among;  // (B or 1, T, T), or null: what each new token sees of the new ones
  int64_t among_step, T, G, D;
  float scale;
  const CodedPast* coded;  // before the parts, of all texts alike; or null

  // Queries first .. first + count of a head; `news` gives a text's new rows. room has a place for every row of a text, `step` apart.
  template <class News>
  void run(const float* const* q, float* const* y, int64_t first, int64_t count, int64_t layer, int64_t head, const News& news, float* room, int64_t step) const {
    const Floats& use = floats();
    float* to[QUERIES];
    for (int64_t i = 0; i < count; i++) {
      to[i] = room + i * step;
      std::fill(y[i], y[i] + D, 0.0f);
    }
    std::vector<CodedBlock> blocks(coded ? coded->count : 0);
    const Coded codes = coded ? coded->of(layer, head, blocks.data()) : Coded{};
    const int64_t in_codes = coded ? coded->count * coded->rows : 0;
    if (coded) {
      std::vector<float> turned(count * D);
      const float* rotated[QUERIES];
      for (int64_t i = 0; i < count; i++) {
        rotated[i] = turned.data() + i * D;
        std::copy(q[i], q[i] + D, turned.data() + i * D);
        coding().rotate(turned.data() + i * D, D, coded->rotation);
      }
      coding().score(codes, 0, coded->count, rotated, to, count, D, scale);
      for (int64_t i = 0; i < count; i++) to[i] += in_codes;
    }
    each_run(first, count, layer, head, [&](int64_t i, int64_t many, const Rows& rows) {
      use.score(q + i, to + i, many, rows.k, rows.k_step, rows.count, D, scale);
      for (int64_t j = i; j < i + many; j++) to[j] += rows.count;
    });
    float by[QUERIES];
    for (int64_t i = 0; i < count; i++) {
      const Rows rows = news((first + i) / (T * G));
      const int64_t t = (first + i) / G % T;
      if (!among) {
        use.score(q + i, to + i, 1, rows.k, rows.k_step, t + 1, D, scale);
        to[i] += t + 1;
      }
      for (int64_t s = 0; among && s < T; s++)
        if (sees(first + i, t, s)) use.score(q + i, to + i, 1, rows.k + s * rows.k_step, rows.k_step, 1, D, scale), to[i]++;
      float* const begin = room + i * step;
      by[i] = use.to_shares(begin, to[i] - begin);
      to[i] = begin;
    }
    if (coded) {
      coding().mix(codes, 0, coded->count, to, y, count, D);
      for (int64_t i = 0; i < count; i++) {
        coding().rotate(y[i], D, coded->rotation);
        to[i] += in_codes;
      }
    }
    each_run(first, count, layer, head, [&](int64_t i, int64_t many, const Rows& rows) {
      use.mix(to + i, y + i, many, rows.v, rows.v_step, rows.count, D);
      for (int64_t j = i; j < i + many; j++) to[j] += rows.count;
    });
    for (int64_t i = 0; i < count; i++) {
      const Rows rows = news((first + i) / (T * G));
      const int64_t t = (first + i) / G % T;
      if (!among) use.mix(to + i, y + i, 1, rows.v, rows.v_step, t + 1, D);
      for (int64_t s = 0; among && s < T; s++)
        if (sees(first + i, t, s)) {
          use.mix(to + i, y + i, 1, rows.v + s * rows.v_step, rows.v_step, 1, D);
          to[i]++;
        }
      for (int64_t d = 0; d < D; d++) y[i][d] *= by[i];
    }
  }

  bool sees(int64_t query, int64_t t, int64_t s) const { return among[query / (T * G) * among_step + t * T + s]; }

  // f(first, count, rows) of queries that read the same rows, part by part.
  template <class F>
  void each_run(int64_t first, int64_t count, int64_t layer, int64_t head, const F& f) const {
    for (const Part& part : parts)
      for (int64_t i = 0, many; i < count; i += many) {
        const int64_t text = (first + i) / (T * G), alike = part.sharing * T * G;
        many = std::min(count - i, alike - (first + i) % alike);
        f(i, many, part.of(text, layer, head));
      }
  }
};

// plan and norms as Decoder takes them, of matrices in tiles; x (B, T, E) of the T new tokens of B texts; cos and sin (B or 1, T, R) of
// these; keys and values (P, layers, kv_heads, S, D) of each part of the past, of which the first `lengths` (P,) count, and which B / P
// texts behind each other have in common; among, bool (B or 1, T, T), what the new tokens see of each other, or all before them; codes,
// of which all texts see all rows, as CodedPast takes them. Gives x behind the last norm, and keys and values (B, layers, kv_heads, T, D)
// of the new tokens.
std::tuple<Tensor, Tensor, Tensor> layers(Tensor plan, Tensor norms, Tensor x, Tensor cos, Tensor sin, Tensors keys, Tensors values,
                                          Tensors lengths, std::optional<Tensor> among, int64_t H, int64_t K, double scale, double epsilon,
                                          Tensors codes, int64_t coded_rows, int64_t bits) {
  WANTED(x.dim() == 3 && x.numel() > 0 && x.is_contiguous() && is_float(x), "x should be contiguous float32 (B, T, E), not empty");
  const Decoder decoder("funcattn::layers", plan, norms, x.size(2), H, K, epsilon);
  const int64_t L = decoder.L, E = decoder.E, G = decoder.G, D = decoder.D, N = decoder.N, F = decoder.F;
  const int64_t B = x.size(0), T = x.size(1), BT = B * T, R = cos.size(-1);
  WANTED(D % 16 == 0, "heads of a multiple of 16 features");
  for (int64_t i = 0; i < 7 * L; i++) WANTED(decoder.matrices[i].kind >= FLOATS, "matrices should be in tiles");
  for (const Tensor& w : {cos, sin})
    WANTED(w.dim() == 3 && (w.size(0) == B || w.size(0) == 1) && w.size(0) == cos.size(0) && w.size(1) == T && w.size(2) == R && R % 2 == 0 &&
               R <= D && w.is_contiguous() && is_float(w),
           "cos and sin should be contiguous float32 (B or 1, T, R)");
  const int64_t turn = cos.size(0) == 1 ? 0 : T * R;
  WANTED(values.size() == keys.size() && lengths.size() == keys.size(), "keys, values and lengths for each part of the past");
  std::vector<Part> parts;
  std::unique_ptr<const CodedPast> coded(codes.empty() ? nullptr : new CodedPast(codes, coded_rows, bits, D));
  WANTED(!coded || (coded->layers >= L && coded->heads == K), "codes should be of as many layers and heads");
  std::vector<int64_t> held(B, T + (coded ? coded->count * coded->rows : 0));  // rows that a text has
  for (size_t p = 0; p < keys.size(); p++) {
    const int64_t P = keys[p].size(0);
    for (const Tensor& w : {keys[p], values[p]})
      WANTED(w.dim() == 5 && P > 0 && B % P == 0 && w.size(0) == P && w.size(1) == L && w.size(2) == K && w.size(4) == D && w.stride(4) == 1 && is_float(w),
             "keys and values should be float32 (P, layers, kv_heads, S, D), B a multiple of P");
    WANTED(lengths[p].dim() == 1 && lengths[p].size(0) == P && lengths[p].is_contiguous() && lengths[p].scalar_type() == torch::headeronly::ScalarType::Long,
           "a length for each part of the past, contiguous int64 (P,)");
    parts.push_back({Part::Side(keys[p]), Part::Side(values[p]), (const int64_t*)lengths[p].data_ptr(), B / P});
    for (int64_t b = 0; b < B; b++) {
      const int64_t length = parts.back().lengths[b * P / B];
      WANTED(0 <= length && length <= keys[p].size(3) && length <= values[p].size(3), "lengths should be within the past");
      held[b] += length;
    }
  }
  if (among)
    WANTED(among->dim() == 3 && (among->size(0) == B || among->size(0) == 1) && among->size(1) == T && among->size(2) == T && among->is_contiguous() &&
               among->scalar_type() == torch::headeronly::ScalarType::Bool,
           "among should be contiguous bool (B or 1, T, T)");
  const Floats& use = floats();
  const bool* const shown = among ? (const bool*)among->data_ptr() : nullptr;
  const Attention attention = {parts, shown, among && among->size(0) == B ? T * T : 0, T, G, D, float(scale), coded.get()};
  const int64_t most = *std::max_element(held.begin(), held.end());

  const Tensor out = torch::stable::new_empty(x, {B, T, E});
  const Tensor new_k = torch::stable::new_empty(x, {B, L, K, T, D}), new_v = torch::stable::new_empty(x, {B, L, K, T, D});
  float *const residual = (float*)out.data_ptr(), *const to_k = (float*)new_k.data_ptr(), *const to_v = (float*)new_v.data_ptr();
  const float* const given = (const float*)x.data_ptr();
  std::copy(given, given + BT * E, residual);
  const int64_t all_heads = N + 2 * K * D;
  std::vector<float> normed(BT * E), heads(BT * all_heads), mixed(BT * N), halves(BT * 2 * F), inner(BT * F), more(BT * E);
  const float *const cosines = (const float*)cos.data_ptr(), *const sines = (const float*)sin.data_ptr();

  for (int64_t l = 0; l < L; l++) {
    const Matrix* const w = decoder.matrices + 7 * l;
    decoder.norm(2 * l, residual, BT, normed.data());
    multiply(w, 3, normed.data(), BT, E, heads.data(), all_heads);
    const auto place = [&](float* of, int64_t b, int64_t h) { return of + ((b * L + l) * K + h) * T * D; };
    by_rows(BT, all_heads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i / T, t = i % T;
        float* const row = heads.data() + i * all_heads;
        rotate(row, H + K, D, cosines + b * turn + t * R, sines + b * turn + t * R, R);
        for (int64_t h = 0; h < K; h++) {
          std::copy(row + N + h * D, row + N + (h + 1) * D, place(to_k, b, h) + t * D);
          std::copy(row + N + (K + h) * D, row + N + (K + h + 1) * D, place(to_v, b, h) + t * D);
        }
      }
    });
    const int64_t queries = BT * G, groups = (queries + QUERIES - 1) / QUERIES;  // of a head
    const auto attend = [&](int64_t begin, int64_t end) {
      const int64_t step = (most + 31) / 16 * 16;
      const std::unique_ptr<float[]> room(new float[std::min(QUERIES, queries) * step]);
      for (int64_t task = begin; task < end; task++) {
        const int64_t h = task / groups, first = task % groups * QUERIES, count = std::min(QUERIES, queries - first);
        const float* q[QUERIES];
        float* y[QUERIES];
        for (int64_t i = 0; i < count; i++) {
          const int64_t row = (first + i) / G, head = h * G + (first + i) % G;
          q[i] = heads.data() + row * all_heads + head * D;
          y[i] = mixed.data() + row * N + head * D;
        }
        const auto news = [&](int64_t b) { return Rows{{place(to_k, b, h), place(to_v, b, h), D, D}, T}; };
        attention.run(q, y, first, count, l, h, news, room.get(), step);
      }
    };
    torch::stable::parallel_for(0, K * groups, 1 + 65536 / (most * D * std::min(queries, QUERIES)), attend);
    multiply(w + 3, 1, mixed.data(), BT, N, more.data(), E);
    add(more.data(), BT * E, residual);
    decoder.norm(2 * l + 1, residual, BT, normed.data());
    multiply(w + 4, 2, normed.data(), BT, E, halves.data(), 2 * F);
    by_rows(BT, 4 * F, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) use.gated(halves.data() + i * 2 * F, halves.data() + i * 2 * F + F, F, inner.data() + i * F);
    });
    multiply(w + 6, 1, inner.data(), BT, F, more.data(), E);
    add(more.data(), BT * E, residual);
  }
  decoder.norm(2 * L, residual, BT, residual);
  return {out, new_k, new_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("layers", TORCH_BOX(&layers)); }
