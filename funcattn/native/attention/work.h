// The room of a task of a contraction, in one piece, and the move to its tensors.
#pragma once

#include <algorithm>

#include "program.h"

namespace contraction {

inline Work::Work(const Job& job, const Pairs* pairs, int panel_rows, int head)
    : job(job),
      program(job.program),
      pairs(pairs),
      rows(int(job.rows)),
      keys(int(job.keys)),
      step(int(job.keys) + 16) {
  const int64_t S = rounded(job.S, panel_rows);
  size_t used = 0;
  std::vector<std::pair<float**, size_t>> wanted;  // addresses, and offsets from the first
  const auto take = [&](float*& to, size_t floats) {
    wanted.push_back({&to, used});
    used += size_t(rounded(int64_t(floats), 16));
  };
  const auto need = [&](float*& to, int64_t floats) {  // once
    for (const auto& one : wanted)
      if (one.first == &to) return;
    take(to, size_t(floats));
  };
  const auto columns = [&](int tensor) { return job.tensors[tensor].columns; };
  const auto width = [&](int64_t columns) { return int(rounded(columns, head)); };
  const auto sized = [](size_t count, auto&... lists) { (lists.assign(count, nullptr), ...); };
  const Program& p = program;
  sized(p.buffers, buffers);
  sized(p.loads.size(), loads, pair_loads, pair_rows);
  sized(p.packs.size(), packs, packed, pair_packs);
  sized(p.values.size(), values, copied, pair_values);
  sized(p.factors.size(), row_terms, column_terms);
  sized(p.outputs.size(), sums);
  for (const Scaled& load : p.loads) load_width.push_back(width(columns(load.tensor)));
  for (int tensor : p.values) value_width.push_back(width(columns(tensor)));
  for (float*& to : buffers) take(to, size_t(rows + 1) * step);
  int64_t widest = 1;
  for (const View& v : job.tensors) widest = v.kind <= FLOAT16 ? std::max(widest, v.columns) : widest;
  take(panel, size_t(panel_rows * widest));
  halves = turned = nullptr;
  for (const Factor& f : p.factors)
    for (const Dot& dot : f.dots) {
      const int64_t D = columns(p.packs[dot.pack]), E = f.paired ? elements(D) : D;
      need(f.paired ? pair_loads[dot.load] : loads[dot.load], rows * rounded(E, head));
      need(f.paired ? pair_packs[dot.pack] : packs[dot.pack], S * E);
    }
  for (const Sink& sink : p.sinks) {
    const int n = sink.values, side = p.outputs[sink.output].side;
    if (sink.paired) need(side == QUERY ? halves : turned, elements(rows + 1) * 2 * step);
    if (n < 0 || side == PAIR) continue;
    if (side == KEY) {
      need(sink.paired ? pair_rows[n] : loads[n], (rows + 1) * load_width[n]);
      continue;
    }
    const bool as_is = value_width[n] == columns(p.values[n]) && job.tensors[p.values[n]].kind == FLOAT32;
    if (sink.paired || !as_is) need(sink.paired ? pair_values[n] : values[n], S * value_width[n]);
  }
  for (size_t f = 0; f < p.factors.size(); f++) {
    if (!p.factors[f].rows.empty()) take(row_terms[f], rows);
    if (!p.factors[f].columns.empty()) take(column_terms[f], S);
  }
  for (size_t o = 0; o < sums.size(); o++) {
    const View& out = job.outputs[0][o];
    sum_width.push_back(width(out.columns));
    if (p.outputs[o].side == QUERY) take(sums[o], size_t(rows) * sum_width[o]);
    if (p.outputs[o].side == KEY && sum_width[o] != out.columns) take(sums[o], S * sum_width[o]);
  }
  float* seen = nullptr;
  take(base, rows);
  take(log_mass, rows);
  take(seen, size_t(keys + 3) / 4);
  room.reset(new float[used + 16]);
  float* const first = (float*)(uintptr_t(rounded(int64_t(uintptr_t(room.get())), 64)));
  for (const auto& [to, offset] : wanted) *to = first + offset;
  hidden = (uint8_t*)seen;
}

inline void Work::move_to(int64_t task, int64_t repeat, int64_t chunk) {
  int64_t index[MAX_AXES] = {};
  const auto decode = [&](const std::vector<int>& axes, int64_t flat) {
    for (size_t a = axes.size(); a-- > 0; flat /= job.sizes[axes[a]])
      index[axes[a]] = flat % job.sizes[axes[a]];
  };
  decode(job.outer, task);
  decode(job.inner, repeat);
  nonzero = 0;
  for (int a = 0; a < job.axes; a++) nonzero |= int64_t(index[a] != 0) << a;
  const int bytes[] = {4, 2, 2, 1, 8};  // of each Kind
  const auto move = [&](std::vector<View>& views) {
    for (View& v : views)
      for (int a = 0; a < job.axes; a++) v.data += index[a] * v.lead[a] * bytes[v.kind];
  };
  x = job.tensors, out = job.outputs[chunk];
  move(x), move(out);
}

}  // namespace contraction

