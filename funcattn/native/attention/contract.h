// The interpreter of a contraction, written once for every set of instructions; program.h has the
// records. Included inside a namespace that has the products of blocks, gemm.h.
//
// For each block of queries and of keys: logits -> P -> factors -> weights, which are matrices of
// the block in cache, and then the products of weights and values. What stands between products is
// done row by row, so that a row of each matrix stays in the fastest cache.

#include "rows.h"

// The sum of the weighted rows i.
static float sum_of_rows(Work& w, const std::vector<Scaled>& terms, int64_t i) {
  float total = 0;
  for (const Scaled& term : terms) {
    const View& x = w.x[term.tensor];
    read_row(x, i, 1, w.panel);
    total += term.weight * sum_of(w.panel, x.columns);
  }
  return total;
}

// Panels of keys, values, and numbers of the keys; kept from one leading index to the next where
// the tensor is the same there.
static void load_keys(Work& w) {
  const Program& p = w.program;
  const int64_t S = w.job.S;
  for (size_t n = 0; n < p.packs.size(); n++) {
    const View& v = w.x[p.packs[n]];
    if (w.packed[n] == v.data) continue;
    w.packed[n] = v.data;
    if (w.pair_packs[n]) w.pairs->pack(v, S, w.pair_packs[n], w.panel);
    const int D = int(v.columns);
    if (w.packs[n] && v.kind == FLOAT32) pack((const float*)v.data, int(v.row), int(S), D, w.packs[n]);
    for (int64_t j = 0; j < S && w.packs[n] && v.kind != FLOAT32; j += PANEL) {
      const int rows = int(S - j < PANEL ? S - j : PANEL);
      for (int r = 0; r < rows; r++) read_row(v, j + r, 1, w.panel + r * D);
      pack(w.panel, D, rows, D, w.packs[n] + j * D);
    }
  }
  for (size_t n = 0; n < p.values.size(); n++) {
    const View& v = w.x[p.values[n]];
    if (w.copied[n] == v.data) continue;
    w.copied[n] = v.data;
    if (w.pair_values[n]) w.pairs->zip(v, 0, S, w.value_width[n], w.pair_values[n]);
    for (int64_t j = 0; j < S && w.values[n]; j++)
      read_row(v, j, 1, w.values[n] + j * w.value_width[n]);
  }
  for (size_t f = 0; f < p.factors.size(); f++)
    for (int64_t j = 0; j < S && !p.factors[f].columns.empty(); j++)
      w.column_terms[f][j] = sum_of_rows(w, p.factors[f].columns, j);
}

static void load_queries(Work& w, int64_t i0, int m) {
  const Program& p = w.program;
  for (size_t n = 0; n < p.loads.size(); n++) {
    const View& v = w.x[p.loads[n].tensor];
    const int width = w.load_width[n];
    for (int r = 0; r < m && w.loads[n]; r++)
      read_row(v, i0 + r, p.loads[n].weight, w.loads[n] + r * width);
    if (w.pair_loads[n]) w.pairs->load(v, i0, m, w.pair_loads[n]);
    if (w.pair_rows[n]) w.pairs->zip(v, i0, m, width, w.pair_rows[n]);
  }
  for (size_t f = 0; f < p.factors.size(); f++)
    for (int r = 0; r < m && !p.factors[f].rows.empty(); r++)
      w.row_terms[f][r] = sum_of_rows(w, p.factors[f].rows, i0 + r);
}

// The keys that query i sees in its interval n, within begin .. end; none where start >= stop.
struct Interval {
  int64_t start, stop;
};

static Interval interval(const Work& w, int64_t i, int64_t n, int64_t begin, int64_t end) {
  const View &a = w.x[w.program.mask[0]], &b = w.x[w.program.mask[1]];
  const int64_t start = ((const int64_t*)a.data)[i * a.row + n * a.column];
  const int64_t stop = ((const int64_t*)b.data)[i * b.row + n * b.column];
  return {start > begin ? start : begin, stop < end ? stop : end};
}

static bool has_intervals(const Work& w) { return w.program.mask.size() == 2; }

// From the first to the last key of begin .. end that some of m queries sees.
static Interval seen_by_some(const Work& w, int64_t i0, int m, int64_t begin, int64_t end) {
  Interval all = {end, begin};
  for (int64_t i = i0; i < i0 + m; i++)
    for (int64_t n = 0; n < w.x[w.program.mask[0]].columns; n++) {
      const Interval one = interval(w, i, n, begin, end);
      if (one.start >= one.stop) continue;
      if (one.start < all.start) all.start = one.start;
      if (one.stop > all.stop) all.stop = one.stop;
    }
  return all;
}

static bool is_hidden(const Work& w, int64_t i0, int m, int64_t j, int n) {
  if (has_intervals(w)) {
    const Interval seen = seen_by_some(w, i0, m, j, j + n);
    return seen.start >= seen.stop;
  }
  if (w.program.mask.empty()) return false;
  const View& v = w.x[w.program.mask[0]];
  for (int64_t i = i0; i < (v.row ? i0 + m : i0 + 1); i++)
    for (int64_t c = j; c < (v.column ? j + n : j + 1); c++)
      if (v.data[i * v.row + c * v.column]) return false;
  return true;
}

// Logits of query i at hidden keys become -inf.
static void hide(Work& w, int64_t i, int64_t j, int n, float* s) {
  const float nothing = -__builtin_inff();
  if (!has_intervals(w)) {
    const View& v = w.x[w.program.mask[0]];
    const char* const seen = v.data + i * v.row + j * v.column;
    int c = 0;
    for (; v.column == 1 && c + VL <= n; c += VL)
      store(s + c, only((const uint8_t*)seen + c, load(s + c)));
    for (; c < n; c++) s[c] = seen[c * v.column] ? s[c] : nothing;
    return;
  }
  const int64_t count = w.x[w.program.mask[0]].columns;
  if (count == 1) {
    const Interval one = interval(w, i, 0, j, j + n);
    const bool some = one.start < one.stop;
    const int first = some ? int(one.start - j) : n, last = some ? int(one.stop - j) : n;
    for (int c = 0; c < first; c++) s[c] = nothing;
    for (int c = last; c < n; c++) s[c] = nothing;
    return;
  }
  for (int c = 0; c < n; c++) w.hidden[c] = 1;
  for (int64_t k = 0; k < count; k++) {
    const Interval one = interval(w, i, k, j, j + n);
    for (int64_t c = one.start; c < one.stop; c++) w.hidden[c - j] = 0;
  }
  for (int c = 0; c < n; c++) s[c] = w.hidden[c] ? nothing : s[c];
}

// The products of a factor.
static void multiply(const Work& w, const Factor& f, int m, int64_t j, int wide) {
  for (size_t d = 0; d < f.dots.size(); d++) {
    const auto [from, by] = f.dots[d];
    const int D = int(w.x[w.program.packs[by]].columns), E = int(elements(D));
    float* const to = w.buffers[f.buffer];
    if (f.paired) {
      w.pairs->nt[d > 0](w.pair_loads[from], E, w.pair_packs[by] + j * E, m, wide, E, to, w.step);
      continue;
    }
    const float *const a = w.loads[from], *const b = w.packs[by] + j * D;
    const auto gemm = d ? gemm_nt<true> : gemm_nt<false>;
    gemm(a, w.load_width[from], b, m, wide, D, to, w.step);
  }
}

// The terms of a factor that are no products, in row r of the block.
static void add_terms(const Work& w, size_t which, int64_t i0, int r, int64_t j, int n, int wide) {
  const Factor& f = w.program.factors[which];
  float* const to = w.buffers[f.buffer] + r * w.step;
  const Vec constant = f.rows.empty() ? zero() : all(w.row_terms[which][r]);
  if (f.dots.empty())
    for (int c = 0; c < wide; c += VL) store(to + c, constant);
  else if (f.paired) {
    const Vec weight = all(w.program.loads[f.dots[0].load].weight);
    for (int c = 0; c < wide; c += VL) store(to + c, fma(weight, load(to + c), constant));
  } else if (!f.rows.empty())
    for (int c = 0; c < wide; c += VL) store(to + c, add(load(to + c), constant));
  if (!f.columns.empty()) add_scaled(w.column_terms[which] + j, n, 1, to);
  for (const Scaled& term : f.dense) add_row(w.x[term.tensor], i0 + r, j, term.weight, n, to);
}

static void take(const Step& step, float* to, const float* from, const float* factor, int n) {
  const Vec w = all(step.weight);
  if (step.factor < 0) {
    const auto old = [&](int c) { return step.adds ? load(to + c) : zero(); };
    for (int c = 0; c < n; c += VL) store(to + c, fma(w, load(from + c), old(c)));
  } else if (step.adds) {
    for (int c = 0; c < n; c += VL)
      store(to + c, fma(mul(w, load(from + c)), load(factor + c), load(to + c)));
  } else {
    for (int c = 0; c < n; c += VL) store(to + c, mul(mul(w, load(from + c)), load(factor + c)));
  }
}

// Logits of row r of a block whose products are made.
static float* logits(Work& w, int64_t i0, int r, int64_t j, int n, int wide) {
  float* const s = w.buffers[0] + r * w.step;
  w.is_lost |= is_lost(s, n);
  add_terms(w, 0, i0, r, j, n, wide);
  if (!w.program.mask.empty()) hide(w, i0 + r, j, n, s);
  return s;
}

// The largest logit and the log of the normalizer of each row, over all keys of span.
static void normalize(Work& w, int64_t i0, int m, Interval span) {
  const float infinite = __builtin_inff();
  for (int r = 0; r < m; r++) w.base[r] = -infinite, w.log_mass[r] = 0;
  for (int64_t j = span.start; j < span.stop; j += w.keys) {
    const int n = int(span.stop - j < w.keys ? span.stop - j : w.keys);
    const int wide = int(rounded(n, PANEL));
    if (is_hidden(w, i0, m, j, n)) continue;
    multiply(w, w.program.factors[0], m, j, wide);
    for (int r = 0; r < m; r++) {
      float* const s = logits(w, i0, r, j, n, wide);
      for (int c = n; c < wide; c++) s[c] = -infinite;
      float most = w.base[r];
      for (int c = 0; c < n; c++) most = s[c] > most || s[c] != s[c] ? s[c] : most;
      if (most == -infinite) continue;
      for (int c = 0; c < wide; c += VL) store(s + c, expv(sub(load(s + c), all(most))));
      w.log_mass[r] = w.log_mass[r] * expf(w.base[r] - most) + sum_of(s, n);
      w.base[r] = most;
    }
  }
  for (int r = 0; r < m; r++) {
    const bool none = w.log_mass[r] == 0;
    w.base[r] = none ? infinite : w.base[r];
    w.log_mass[r] = none ? 0 : logf(w.log_mass[r]);
  }
}

// P = exp((logits - base) - log_mass). An lse is precise enough up to FAR; of a larger one the log
// of the normalizer is lost, and both are computed again for the block.
static void statistics(Work& w, int64_t i0, int m, Interval span) {
  constexpr float FAR = 512;
  const float nothing = -__builtin_inff();
  bool is_far = false;
  for (int r = 0; r < m; r++) {
    const float lse = *row_of(w.x[w.program.lse], i0 + r);
    is_far |= fabsf(lse) > FAR && lse != nothing;
    w.base[r] = lse == nothing ? -nothing : lse;  // a query without visible keys has no weights
    w.log_mass[r] = 0;
  }
  if (is_far) normalize(w, i0, m, span);
}

static void give_query(Work& w, const Sink& sink, int m, int64_t j, int n) {
  const float* const W = w.buffers[sink.buffer];
  const int width = w.sum_width[sink.output];
  float* const to = w.sums[sink.output];
  if (sink.values < 0) {
    for (int r = 0; r < m; r++) to[r * width] += sum_of(W + r * w.step, n);
    return;
  }
  if (sink.paired) {
    w.pairs->halve(w.buffers[sink.buffer], w.step, m, n, w.halves);
    const float* const from = w.pair_values[sink.values] + j / 2 * width;
    w.pairs->nn(w.halves, w.step, from, width, m, int(elements(n)), width, to, width);
    return;
  }
  const View& v = w.x[w.program.values[sink.values]];
  const bool is_copy = w.values[sink.values] != nullptr;
  const int64_t step = is_copy ? w.value_width[sink.values] : v.row;
  const float* const from = is_copy ? w.values[sink.values] + j * step : row_of(v, j);
  gemm_nn(W, w.step, from, int(step), m, n, width, to, width);
}

static void give_key(Work& w, const Sink& sink, int m, int64_t j, int n) {
  const float* const W = w.buffers[sink.buffer];
  const View& out = w.out[sink.output];
  if (sink.values < 0) {  // sums over the first row
    float* const total = w.buffers[sink.buffer] + w.rows * w.step;
    for (int c = 0; c < n; c += VL) {
      Vec sums = zero();
      for (int r = 0; r < m; r++) sums = add(sums, load(W + r * w.step + c));
      store(total + c, sums);
    }
    for (int c = 0; c < n; c++)
      ((float*)out.data)[(j + c) * out.row] += w.program.outputs[sink.output].weight * total[c];
    return;
  }
  const int width = w.sum_width[sink.output];
  float* const sums = w.sums[sink.output];
  float* const to = sums ? sums + j * width : (float*)out.data + j * out.row;
  if (sink.paired) {
    w.pairs->turn(W, w.step, m, n, w.program.loads[sink.values].weight, w.turned);
    const float* const rows = w.pair_rows[sink.values];
    w.pairs->tn(w.turned, w.step, rows, w.load_width[sink.values], int(elements(m)), n, width, to, width);
    return;
  }
  gemm_tn(W, w.step, w.loads[sink.values], w.load_width[sink.values], m, n, width, to, width);
}

static void give_pair(Work& w, const Sink& sink, int64_t i0, int m, int64_t j, int n) {
  const View& out = w.out[sink.output];
  const float weight = w.program.outputs[sink.output].weight;
  for (int r = 0; r < m; r++) {
    const float* const W = w.buffers[sink.buffer] + r * w.step;
    float* const to = (float*)out.data + (i0 + r) * out.row + j * out.column;
    if (out.column)
      add_scaled(W, n, weight, to);
    else
      *to += weight * sum_of(W, n);
  }
}

static void block(Work& w, int64_t i0, int m, int64_t j, int n) {
  const Program& p = w.program;
  const int wide = int(rounded(n, PANEL));
  if (is_hidden(w, i0, m, j, n)) return;
  for (const Factor& f : p.factors) multiply(w, f, m, j, wide);
  for (int r = 0; r < m; r++) {
    float* const s = logits(w, i0, r, j, n, wide);
    const Vec base = all(w.base[r]), log_mass = all(w.log_mass[r]);
    for (int c = 0; c < wide; c += VL) store(s + c, expv(sub(sub(load(s + c), base), log_mass)));
    if (p.dropout.tensor >= 0) drop_row(p.dropout, w.x[p.dropout.tensor], i0 + r, j, n, s);
    for (size_t f = 1; f < p.factors.size(); f++) add_terms(w, f, i0, r, j, n, wide);
    const auto row = [&](int b) { return b < 0 ? nullptr : w.buffers[b] + r * w.step; };
    for (const Step& step : p.steps)
      take(step, row(step.to), row(step.from), row(step.factor), wide);
  }
  for (const Sink& sink : p.sinks) {
    if (sink.gate & w.nonzero) continue;
    const int side = p.outputs[sink.output].side;
    if (side == QUERY) give_query(w, sink, m, j, n);
    if (side == KEY) give_key(w, sink, m, j, n);
    if (side == PAIR) give_pair(w, sink, i0, m, j, n);
  }
}

// All visible keys of m queries.
static void query_block(Work& w, int64_t i0, int m) {
  const Program& p = w.program;
  Interval span = {0, w.job.S};
  if (has_intervals(w)) span = seen_by_some(w, i0, m, 0, w.job.S);
  if (span.start >= span.stop) return;
  span.start = span.start / PANEL * PANEL;
  load_queries(w, i0, m);
  statistics(w, i0, m, span);
  for (size_t o = 0; o < p.outputs.size(); o++)
    if (p.outputs[o].side == QUERY)
      __builtin_memset(w.sums[o], 0, sizeof(float) * m * w.sum_width[o]);
  for (int64_t j = span.start; j < span.stop; j += w.keys)
    block(w, i0, m, j, int(span.stop - j < w.keys ? span.stop - j : w.keys));
  for (size_t o = 0; o < p.outputs.size(); o++)
    for (int r = 0; r < m && p.outputs[o].side == QUERY; r++) {
      float* const to = (float*)w.out[o].data + (i0 + r) * w.out[o].row;
      add_scaled(w.sums[o] + r * w.sum_width[o], w.out[o].columns, p.outputs[o].weight, to);
    }
}

static void run(Work& w, int64_t begin, int64_t end) {
  const Program& p = w.program;
  const auto own_sums = [&](size_t o) { return p.outputs[o].side == KEY && w.sums[o]; };
  for (int64_t task = begin; task < end; task++)
    for (int64_t repeat = 0; repeat < w.job.repeats; repeat++) {
      const int64_t chunk = task % w.job.chunks, T = w.job.T;
      w.move_to(task / w.job.chunks, repeat, chunk);
      load_keys(w);
      for (size_t o = 0; o < p.outputs.size(); o++)
        if (own_sums(o)) __builtin_memset(w.sums[o], 0, sizeof(float) * w.job.S * w.sum_width[o]);
      for (int64_t i = chunk * w.rows; i < T; i += w.job.chunks * w.rows)
        query_block(w, i, int(T - i < w.rows ? T - i : w.rows));
      for (size_t o = 0; o < p.outputs.size(); o++)
        for (int64_t j = 0; j < w.job.S && own_sums(o); j++) {
          float* const to = (float*)w.out[o].data + j * w.out[o].row;
          add_scaled(w.sums[o] + j * w.sum_width[o], w.out[o].columns, 1, to);
        }
    }
}
