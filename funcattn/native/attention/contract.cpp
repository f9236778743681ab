// The operator funcattn::native_contract, for the CPU: a contraction of the closed algebra.
//
// The program comes as integers and weights, as kernels/backends/native_contract.py writes it.
// Outputs are float32, contiguous and zero; sums are added to them. A task is a leading index that
// all outputs have, or a part of its query blocks; within a task the axes that some output lacks
// are summed one index after the other. Parts have key-side outputs of their own, which are added
// in order: no sum depends on which thread is first. Gives whether all is finite, the logits included.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../matrices.h"
#include "program.h"
#include "vectors.h"
#include "work.h"

using namespace contraction;

BEGIN_TARGET_AVX512
namespace avx512 {
#include "threefry.h"
#include "contract.h"
}
END_TARGET

BEGIN_TARGET_AVX2
namespace avx2 {
#include "threefry.h"
#include "contract.h"
}
END_TARGET

BEGIN_TARGET_BF16
namespace avx512bf16 {
#include "pairs.h"
}
END_TARGET

namespace {

using torch::stable::Tensor;

#define WANTED(condition, what) STD_TORCH_CHECK(condition, "funcattn::native_contract: ", what)

// The numbers of a program, in order.
struct Reader {
  const std::vector<int64_t>& numbers;
  const std::vector<double>& weights;
  size_t at = 0, weighed = 0;

  int next() {
    WANTED(at < numbers.size(), "the program ends early");
    return int(numbers[at++]);
  }
  uint32_t word() { return uint32_t(next()); }
  float weight() {
    WANTED(weighed < weights.size(), "the program has too few weights");
    return float(weights[weighed++]);
  }
  Scaled scaled() { return {next(), weight()}; }
  template <class F>
  auto list(F one) {
    const int count = next();
    std::vector<decltype(one())> all(count);
    for (auto& x : all) x = one();
    return all;
  }
};

Program read(const std::vector<int64_t>& numbers, const std::vector<double>& weights) {
  Reader r = {numbers, weights};
  const auto next = [&] { return r.next(); };
  const auto scaled = [&] { return r.scaled(); };
  Program p;
  p.buffers = next();
  p.lse = next();
  p.dropout = {next(), r.word(), r.weight()};
  p.mask = r.list(next);
  p.loads = r.list(scaled);
  p.packs = r.list(next);
  p.values = r.list(next);
  p.factors = r.list([&] {
    Factor f;
    f.buffer = next();
    f.dots = r.list([&] { return Dot{next(), next()}; });
    f.rows = r.list(scaled), f.columns = r.list(scaled), f.dense = r.list(scaled);
    return f;
  });
  p.steps = r.list([&] { return Step{bool(next()), next(), next(), next(), r.weight()}; });
  p.outputs = r.list([&] { return Output{next(), r.weight()}; });
  p.sinks = r.list([&] { return Sink{next(), next(), next(), next()}; });
  return p;
}

// A tensor whose last two axes broadcast to rows and columns, where these are not 0.
View view_of(const Tensor& t, int axes, int64_t rows, int64_t columns) {
  using torch::headeronly::ScalarType;
  const ScalarType type = t.scalar_type();
  View v = {(char*)t.data_ptr(), FLOAT32, t.size(-2), t.size(-1), t.stride(-2), t.stride(-1), {}};
  const ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half,
                              ScalarType::Bool, ScalarType::Long};
  while (v.kind < KINDS && type != types[v.kind]) v.kind++;
  WANTED(v.kind < KINDS, "a tensor of another dtype");
  if (v.rows == 1 && rows != 1) v.row = 0;
  if (v.columns == 1 && columns > 1) v.column = 0;
  const int more = axes + 2 - int(t.dim());
  for (int a = more; a < axes; a++) v.lead[a] = t.size(a - more) == 1 ? 0 : t.stride(a - more);
  return v;
}

// Every index of the program is one of a tensor, buffer, ... of the shape and dtype that it is read
// with: what the interpreter relies on.
void check(const Job& job) {
  const Program& p = job.program;
  const auto one_of = [](int64_t index, size_t count) {
    WANTED(0 <= index && size_t(index) < count, "an index beyond its list");
  };
  const auto rows = [&](int tensor, int64_t count) -> const View& {
    one_of(tensor, job.tensors.size());
    const View& v = job.tensors[tensor];
    WANTED(v.kind <= FLOAT16 && v.rows == count && (v.column == 1 || v.columns == 1),
           "rows of floats for each query or key");
    return v;
  };
  const auto pairs = [&](int tensor) -> const View& {
    one_of(tensor, job.tensors.size());
    const View& v = job.tensors[tensor];
    WANTED((v.rows == job.T || !v.row) && (v.columns == job.S || !v.column),
           "a matrix for queries and keys");
    return v;
  };
  const auto buffer = [&](int index) { one_of(index, size_t(p.buffers)); };
  const View& lse = rows(p.lse, job.T);
  WANTED(lse.columns == 1 && lse.kind == FLOAT32, "one float32 lse for each query");
  for (const Scaled& x : p.loads) rows(x.tensor, job.T);
  for (int tensor : p.packs) rows(tensor, job.S);
  for (int tensor : p.values) rows(tensor, job.S);
  WANTED(!p.factors.empty() && p.mask.size() <= 2, "logits, and a mask of at most two tensors");
  for (size_t f = 0; f < p.factors.size(); f++) {
    WANTED(p.factors[f].buffer == int(f) && int(f) < p.buffers, "the buffers of factors first");
    for (const Dot& dot : p.factors[f].dots) {
      one_of(dot.load, p.loads.size()), one_of(dot.pack, p.packs.size());
      const View &a = rows(p.loads[dot.load].tensor, job.T), &b = rows(p.packs[dot.pack], job.S);
      WANTED(a.columns == b.columns, "equal features");
    }
    for (const Scaled& x : p.factors[f].rows) rows(x.tensor, job.T);
    for (const Scaled& x : p.factors[f].columns) rows(x.tensor, job.S);
    for (const Scaled& x : p.factors[f].dense)
      WANTED(pairs(x.tensor).kind <= FLOAT16, "floats of pairs");
  }
  if (p.mask.size() == 1) WANTED(pairs(p.mask[0]).kind == BOOLEAN, "booleans of pairs");
  if (p.dropout.tensor >= 0) {
    one_of(p.dropout.tensor, job.tensors.size());
    const View& v = job.tensors[p.dropout.tensor];
    WANTED(v.kind == INTEGER64 && v.rows == 1 && v.columns == 2, "two words of dropout");
  }
  if (p.mask.size() == 2)
    for (int tensor : p.mask) {
      one_of(tensor, job.tensors.size()), one_of(p.mask[0], job.tensors.size());
      const View& v = job.tensors[tensor];
      const int64_t columns = job.tensors[p.mask[0]].columns;
      WANTED(v.kind == INTEGER64 && v.rows == job.T && v.columns == columns,
             "intervals of each query");
    }
  for (const Step& step : p.steps) {
    buffer(step.to), buffer(step.from);
    if (step.factor >= 0) buffer(step.factor);
  }
  for (const Sink& sink : p.sinks) {
    buffer(sink.buffer), one_of(sink.output, p.outputs.size());
    const View& out = job.outputs[0][sink.output];
    const int side = p.outputs[sink.output].side;
    if (side == PAIR) {
      WANTED((out.rows == job.T || !out.row) && (out.columns == job.S || !out.column),
             "an output of pairs");
      continue;
    }
    WANTED(side == QUERY ? out.rows == job.T : side == KEY && out.rows == job.S,
           "outputs of each query or key");
    if (sink.values < 0) {
      WANTED(out.columns == 1, "one sum for each query or key");
      continue;
    }
    one_of(sink.values, side == QUERY ? p.values.size() : p.loads.size());
    const int tensor = side == QUERY ? p.values[sink.values] : p.loads[sink.values].tensor;
    WANTED(job.tensors[tensor].columns == out.columns, "outputs as wide as values");
  }
}

// Which products are of pairs of bfloat16: those of tensors of that dtype, and of them and matrices
// where the output is rounded to it in the end (the bits of `rounds`).
void pair(Job& job, int64_t rounds) {
  Program& p = job.program;
  const auto is_half = [&](int tensor) { return job.tensors[tensor].kind == BFLOAT16; };
  for (Factor& f : p.factors) {
    f.paired = !f.dots.empty();
    for (const Dot& dot : f.dots) {
      const Scaled &load = p.loads[dot.load], &first = p.loads[f.dots[0].load];
      f.paired = f.paired && is_half(load.tensor) && is_half(p.packs[dot.pack]) &&
                 load.weight == first.weight;
    }
  }
  for (Sink& sink : p.sinks) {
    const int side = p.outputs[sink.output].side;
    if (sink.values < 0 || side == PAIR || !(rounds >> sink.output & 1)) continue;
    sink.paired = is_half(side == QUERY ? p.values[sink.values] : p.loads[sink.values].tensor);
  }
}

using Run = void (*)(Work&, int64_t, int64_t);

// The outputs of chunks behind the first, and their sum.
struct Chunks {
  std::vector<std::unique_ptr<float[]>> room;

  void split(Job& job, const std::vector<Tensor>& outs) {
    for (int64_t c = 1; c < job.chunks; c++) {
      job.outputs.push_back(job.outputs[0]);
      for (size_t o = 0; o < outs.size(); o++) {
        if (!is_common(job, o)) continue;
        room.emplace_back(new float[size_t(outs[o].numel())]());
        job.outputs[c][o].data = (char*)room.back().get();
      }
    }
  }

  void join(const Job& job, const std::vector<Tensor>& outs) const {
    size_t next = 0;
    for (int64_t c = 1; c < job.chunks; c++)
      for (size_t o = 0; o < outs.size(); o++) {
        if (!is_common(job, o)) continue;
        const float* const from = room[next++].get();
        float* const to = (float*)outs[o].data_ptr();
        torch::stable::parallel_for(0, outs[o].numel(), 65536, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i++) to[i] += from[i];
        });
      }
  }

  // True where all queries add to the same numbers.
  static bool is_common(const Job& job, size_t o) {
    const int side = job.program.outputs[o].side;
    return side == KEY || (side == PAIR && !job.outputs[0][o].row);
  }
};

bool contract(std::vector<Tensor> tensors, std::vector<int64_t> numbers,
              std::vector<double> weights, std::vector<Tensor> outs, int64_t rows, int64_t keys, int64_t rounds) {
  Job job;
  job.program = read(numbers, weights);
  const Program& p = job.program;
  WANTED(tensors.size() > 2 && outs.size() == p.outputs.size(),
         "tensors q, k, lse, ..., and all outputs");
  for (const auto* list : {&tensors, &outs})
    for (const Tensor& t : *list)
      WANTED(t.dim() >= 2 && t.numel(), "tensors with rows and columns, none empty");
  WANTED(rows > 0 && keys > 0 && keys % avx512::PANEL == 0, "blocks of whole panels");
  job.T = tensors[0].size(-2), job.S = tensors[1].size(-2);
  job.rows = std::min(rows, job.T);
  job.keys = std::min(keys, rounded(job.S, avx512::PANEL));

  job.axes = 0;
  for (const auto* list : {&tensors, &outs})
    for (const Tensor& t : *list) job.axes = std::max(job.axes, int(t.dim()) - 2);
  WANTED(job.axes <= MAX_AXES, "too many leading axes");
  const auto size = [&](const Tensor& t, int a) {
    const int at = a - (job.axes + 2 - int(t.dim()));
    return at < 0 ? int64_t(1) : t.size(at);
  };
  job.tasks = job.repeats = 1;
  for (int a = 0; a < job.axes; a++) {
    job.sizes[a] = 1;
    for (const auto* list : {&tensors, &outs})
      for (const Tensor& t : *list)
        if (size(t, a) != 1) {
          WANTED(job.sizes[a] == 1 || job.sizes[a] == size(t, a), "leading axes that broadcast");
          job.sizes[a] = size(t, a);
        }
    bool in_all = true;
    for (const Tensor& out : outs) in_all = in_all && size(out, a) != 1;
    if (job.sizes[a] == 1) continue;
    (in_all ? job.outer : job.inner).push_back(a);
    (in_all ? job.tasks : job.repeats) *= job.sizes[a];
  }

  std::vector<char> is_pair(tensors.size(), 0), has_keys(tensors.size(), 0);
  for (const Factor& f : p.factors)
    for (const Scaled& term : f.dense) is_pair.at(term.tensor) = 1;
  if (p.mask.size() == 1) is_pair.at(p.mask[0]) = 1;
  for (size_t n = 0; n < tensors.size(); n++)
    job.tensors.push_back(
        view_of(tensors[n], job.axes, is_pair[n] ? job.T : 0, is_pair[n] ? job.S : 0));
  job.outputs.emplace_back();
  for (size_t o = 0; o < outs.size(); o++) {
    const bool pair = p.outputs[o].side == PAIR;
    WANTED(outs[o].is_contiguous() && outs[o].scalar_type() == torch::headeronly::ScalarType::Float,
           "outputs should be contiguous float32");
    job.outputs[0].push_back(view_of(outs[o], job.axes, pair ? job.T : 0, pair ? job.S : 0));
  }
  check(job);

  const int64_t blocks = rounded(job.T, job.rows) / job.rows;
  const int64_t threads = torch::stable::get_num_threads();
  const bool is_uneven = job.tasks < 4 * threads && job.tasks % threads;
  job.chunks = is_uneven ? std::min(threads, blocks) : 1;
  Chunks chunks;
  chunks.split(job, outs);
  const bool is_avx512 = instructions_that_run() == AVX512;
  const bool has_pairs = is_avx512 && __builtin_cpu_supports("avx512bf16");
  if (has_pairs) pair(job, rounds);
  const Run run = is_avx512 ? avx512::run : avx2::run;
  const int panel = is_avx512 ? avx512::PANEL : avx2::PANEL;
  const int head = is_avx512 ? avx512::HEAD : avx2::HEAD;
  std::atomic<bool> finite{true};
  torch::stable::parallel_for(0, job.tasks * job.chunks, 1, [&](int64_t begin, int64_t end) {
    Work work(job, has_pairs ? &avx512bf16::pairs_of_bf16 : nullptr, panel, head);
    run(work, begin, end);
    if (work.is_lost) finite = false;
  });
  chunks.join(job, outs);
  const auto all_finite = is_avx512 ? avx512::all_finite : avx2::all_finite;
  for (const Tensor& out : outs)
    torch::stable::parallel_for(0, out.numel(), 65536, [&](int64_t begin, int64_t end) {
      if (!all_finite((const float*)out.data_ptr() + begin, end - begin)) finite = false;
    });
  return finite;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(funcattn, m) {
  m.def(
      "native_contract(Tensor[] tensors, int[] program, float[] weights, Tensor(a!)[] outs, "
      "int rows, int keys, int rounds) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("native_contract", TORCH_BOX(&contract)); }
