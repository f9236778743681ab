// The operators funcattn::native_attend and funcattn::native_attend_jvp, for the CPU: tensors to blocks of queries, and these to threads.
//
// A task is a block of queries of one head over all keys, or over a part of them where there are fewer tasks than threads. The keys of
// a head are packed once: by whoever takes the head, or for all heads first, or, where a head has one block, block by block as they
// are read. What is computed of a block does not depend on which thread takes it.

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "attention.h"
#include "vectors.h"

#include "../matrices.h"

BEGIN_TARGET_AVX512
namespace avx512 {
#define PAIRS 0
#include "forward.h"
}  // namespace avx512
END_TARGET
BEGIN_TARGET_AVX2
namespace avx2 {
#include "forward.h"
#undef PAIRS
}  // namespace avx2
END_TARGET
BEGIN_TARGET_BF16
namespace avx512bf16 {
#define PAIRS 1
#include "forward.h"
#undef PAIRS
}  // namespace avx512bf16
END_TARGET

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;
using Some = std::optional<Tensor>;

#define WANTED(condition, what) STD_TORCH_CHECK(condition, "funcattn::native_attend: ", what)

constexpr int64_t ALONE = 1 << 19;  // products of numbers that take less time than waking a thread

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return FLOAT32;
    case ScalarType::BFloat16: return BFLOAT16;
    case ScalarType::Half: return FLOAT16;
    case ScalarType::Bool: return BYTE;
    case ScalarType::Long: return INT64;
    case ScalarType::Int: return INT32;
    default: WANTED(false, "float32, bfloat16 or float16, masks of booleans or int64");
  }
}

int64_t size_of(Type type) { return type == FLOAT32 || type == INT32 ? 4 : type == INT64 ? 8 : type == BYTE ? 1 : 2; }

// The leading axes of tensors that broadcast.
struct Lead {
  Shape sizes;

  void widen(const Tensor& x) {
    const auto shape = x.sizes();
    const size_t rank = shape.size() - 2;
    if (rank > sizes.size()) sizes.insert(sizes.begin(), rank - sizes.size(), 1);
    for (size_t i = 0; i < rank; i++) {
      int64_t& size = sizes[sizes.size() - rank + i];
      WANTED(size == 1 || shape[i] == 1 || size == shape[i], "leading axes that broadcast");
      if (size == 1) size = shape[i];
    }
  }
  Shape with(int64_t rows, int64_t columns) const {
    Shape all = sizes;
    all.insert(all.end(), {rows, columns});
    return all;
  }
};

Tensor empty(const Tensor& like, const Shape& shape, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, type);
}

// The strides of a tensor along axes of `lead` (which counts from the left of the whole shape), 0 where it has size 1.
Operand operand(const Tensor& x, const std::vector<int>& axes, size_t rank) {
  Operand to;
  const auto shape = x.sizes(), strides = x.strides();
  const size_t own = shape.size() - 2;
  to.at = (char*)x.data_ptr();
  to.type = type_of(x);
  const int64_t size = size_of(to.type);
  const auto stride = [&](size_t i) { return shape[i] == 1 ? 0 : strides[i] * size; };
  for (size_t a = 0; a < axes.size(); a++) {
    const size_t missing = rank - own, axis = size_t(axes[a]);
    to.lead[a] = axis < missing ? 0 : stride(axis - missing);
  }
  to.row = shape[own] == 1 ? 0 : strides[own] * size;
  to.column = shape[own + 1] == 1 ? 0 : strides[own + 1] * size;
  return to;
}

using Room = std::unique_ptr<float[], void (*)(float*)>;

Room room(int64_t floats) {
  const auto release = [](float* at) { ::operator delete[](at, std::align_val_t(64)); };
  return {(float*)::operator new[](size_t(floats) * sizeof(float), std::align_val_t(64)), release};
}

// Tasks to threads as these become free; `begin` gives what a thread calls with each.
template <class F>
void spread(int64_t tasks, int64_t workers, const F& begin) {
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    const auto run = begin();
    for (int64_t task; (task = next++) < tasks;) run(task);
  };
  if (workers <= 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, workers, 1, work);
}

// The blocks of a head: of `rows` queries of one group, or of all queries of `groups`.
struct Blocks {
  int64_t rows, groups, down, count;

  Blocks(const Attention& a, int64_t most) {
    if (a.T > most) {
      const int64_t even = (a.T + (a.T + most - 1) / most - 1) / ((a.T + most - 1) / most);
      rows = (even + 11) / 12 * 12, groups = 1;
    } else {
      rows = a.T, groups = std::min(a.groups, most / a.T);
    }
    down = (a.T + rows - 1) / rows;
    count = down * ((a.groups + groups - 1) / groups);
  }
  Block at(const Attention& a, int64_t head, int64_t index) const {
    const int64_t group = index / down * groups, query = index % down * rows;
    return {head, group, std::min(groups, a.groups - group), query, std::min(rows, a.T - query), 0, a.S};
  }
};

const Kernels& kernels_for(const Attention& a) {
  const auto is_half = [](const Operand& x) { return !x || x.type == BFLOAT16; };
  if (instructions_that_run() == AVX2) return avx2::kernels;
  const bool all_half = is_half(a.q) && is_half(a.k) && is_half(a.v) && is_half(a.dq) && is_half(a.dk) && is_half(a.dv);
  const bool pairs = all_half && a.scale > 1e-30f && a.scale < 1e30f && __builtin_cpu_supports("avx512bf16");
  return pairs ? avx512bf16::kernels : avx512::kernels;
}

// Gives whether all outputs are finite.
bool run(Attention& a) {
  const Kernels& use = kernels_for(a);
  const Blocks blocks(a, use.most_rows);
  a.rows = int(blocks.rows * blocks.groups);
  const int64_t work = a.heads * a.groups * a.T * a.S * (a.D + a.Dv);
  const int64_t threads = work < ALONE ? 1 : int64_t(torch::stable::get_num_threads());
  const int64_t scratch = use.scratch_size(a), state = use.state_size(a), per_head = use.packed_size(a, a.S);
  std::atomic<bool> finite{true};
  const auto whole = [&](const Block& block, const float* packed, float* at, float* free) {
    use.attend(a, block, packed, at, free);
    if (!use.finish(a, block, at)) finite = false;
  };

  const int64_t rounds = (a.heads + threads - 1) / threads;
  const bool reads_once = blocks.count == 1;
  if (!reads_once && rounds * threads * 8 <= a.heads * 9) {  // heads share out evenly
    spread(a.heads, std::min(threads, a.heads), [&] {
      return [&, free = std::shared_ptr<float[]>(room(scratch + state + per_head))](int64_t head) {
        float *const at = free.get() + scratch, *const packed = at + state;
        use.pack(a, head, 0, a.S, 0, a.S, packed, free.get());
        for (int64_t i = 0; i < blocks.count; i++) whole(blocks.at(a, head, i), packed, at, free.get());
      };
    });
    return finite;
  }

  const int64_t step = use.step(), steps = (a.S + step - 1) / step, several = a.heads * blocks.count;
  Room packed = room(reads_once ? 0 : a.heads * per_head);
  if (!reads_once)
    spread(a.heads * steps, threads, [&] {
      return [&, free = std::shared_ptr<float[]>(room(scratch))](int64_t task) {
        const int64_t head = task / steps, first = task % steps * step;
        use.pack(a, head, first, std::min(first + step, a.S), first, a.S, packed.get() + head * per_head, free.get());
      };
    });
  const auto packed_of = [&](int64_t head) { return reads_once ? nullptr : packed.get() + head * per_head; };
  const int64_t parts = several >= threads ? 1 : std::max<int64_t>(1, std::min((2 * threads + several - 1) / several, steps / 2));
  Room states = room(parts == 1 ? 0 : several * parts * state);
  const auto block_of = [&](int64_t task) {
    const int64_t i = task % blocks.count;  // from both ends, as under a causal mask the last have most to do
    return blocks.at(a, task / blocks.count, i % 2 ? blocks.count - 1 - i / 2 : i / 2);
  };
  spread(several * parts, std::min(threads, several * parts), [&] {
    return [&, free = std::shared_ptr<float[]>(room(scratch + state))](int64_t task) {
      Block block = block_of(task / parts);
      const float* const from = packed_of(block.head);
      if (parts == 1) return whole(block, from, free.get() + scratch, free.get());
      const int64_t part = task % parts;
      block.first = std::min(a.S, part * steps / parts * step), block.last = std::min(a.S, (part + 1) * steps / parts * step);
      use.attend(a, block, from, states.get() + task * state, free.get());
    };
  });
  if (parts > 1)
    for (int64_t task = 0; task < several; task++) {
      float* const into = states.get() + task * parts * state;
      const Block block = block_of(task);
      for (int64_t part = 1; part < parts; part++) use.merge(a, block, into, into + part * state);
      if (!use.finish(a, block, into)) finite = false;
    }
  return finite;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, bool> attend_jvp(Tensor q, Tensor k, Tensor v, Some dq, Some dk, Some dv, Tensors mask, Some bias,
                                                           double scale, bool pushes) {
  WANTED(instructions_that_run() != NONE, "a processor with AVX2");
  for (const Tensor* x : {&q, &k, &v}) WANTED(x->dim() >= 2 && x->numel() > 0, "tensors (*lead, rows, columns), not empty");
  Attention a;
  a.T = q.size(-2), a.S = k.size(-2), a.D = q.size(-1), a.Dv = v.size(-1), a.scale = float(scale), a.pushes = pushes;
  const auto is_float = [](const Tensor& x) { return type_of(x) <= FLOAT16; };
  const auto sized = [](const Tensor& x, int64_t rows, int64_t columns) { return x.dim() >= 2 && x.size(-2) == rows && x.size(-1) == columns; };
  WANTED(is_float(q) && is_float(k) && is_float(v), "q, k and v of floats");
  WANTED(sized(k, a.S, a.D) && sized(v, a.S, a.Dv), "keys of the size of queries, and as many values");
  WANTED(!dq || (is_float(*dq) && sized(*dq, a.T, a.D)), "tangents of the shapes of q, k and v");
  WANTED(!dk || (is_float(*dk) && sized(*dk, a.S, a.D)), "tangents of the shapes of q, k and v");
  WANTED(!dv || (is_float(*dv) && sized(*dv, a.S, a.Dv)), "tangents of the shapes of q, k and v");
  const auto paired = [&](const Tensor& x) {
    return x.dim() >= 2 && (x.size(-2) == a.T || x.size(-2) == 1) && (x.size(-1) == a.S || x.size(-1) == 1);
  };
  WANTED(mask.size() <= 2, "a mask of booleans, or of two ends of intervals");
  if (mask.size() == 1) WANTED(type_of(mask[0]) == BYTE && paired(mask[0]), "a mask (*lead, T, S) of booleans");
  if (mask.size() == 2)
    for (const Tensor& x : mask)
      WANTED((type_of(x) == INT64 || type_of(x) == INT32) && x.dim() >= 2 && (x.size(-2) == a.T || x.size(-2) == 1) && x.size(-1) == mask[0].size(-1),
             "ends of intervals (*lead, T, n), of integers");
  WANTED(!bias || (is_float(*bias) && paired(*bias)), "a bias (*lead, T, S) of floats");

  Lead level, keyed;
  for (const Tensor* x : {&q, &k}) level.widen(*x);
  for (const Tensor& x : mask) level.widen(x);
  if (bias) level.widen(*bias);
  Lead lead = level;
  lead.widen(v);
  Lead dlevel = level, dlead = lead;
  for (const Some* x : {&dq, &dk})
    if (*x) dlevel.widen(**x), dlead.widen(**x);
  if (dv) dlead.widen(*dv);
  const size_t rank = dlead.sizes.size();
  WANTED(rank <= AXES, "at most 24 leading axes");
  keyed.sizes.assign(rank, 1);
  for (const Tensor* x : {&k, &v}) keyed.widen(*x);
  for (const Some* x : {&dk, &dv})
    if (*x) keyed.widen(**x);

  std::vector<int> axes;
  for (const bool of_heads : {true, false}) {
    for (size_t i = 0; i < rank; i++)
      if (dlead.sizes[i] != 1 && (keyed.sizes[i] != 1) == of_heads) axes.push_back(int(i));
    if (of_heads) a.head_axes = int(axes.size());
  }
  a.axes = int(axes.size());
  for (int i = 0; i < a.axes; i++) {
    a.sizes[i] = dlead.sizes[size_t(axes[size_t(i)])];
    (i < a.head_axes ? a.heads : a.groups) *= a.sizes[i];
  }
  const auto of = [&](const Tensor& x) { return operand(x, axes, rank); };
  const Tensor out = empty(v, lead.with(a.T, a.Dv)), lse = empty(q, level.with(a.T, 1), ScalarType::Float);
  const Tensor dout = pushes ? empty(v, dlead.with(a.T, a.Dv)) : out, dlse = pushes ? empty(q, dlevel.with(a.T, 1), ScalarType::Float) : lse;
  if (a.heads * a.groups == 0) return {out, lse, dout, dlse, true};
  a.q = of(q), a.k = of(k), a.v = of(v), a.out = of(out), a.lse = of(lse);
  if (pushes) a.dout = of(dout), a.dlse = of(dlse);
  if (dq) a.dq = of(*dq);
  if (dk) a.dk = of(*dk);
  if (dv) a.dv = of(*dv);
  if (bias) a.bias = of(*bias);
  if (mask.size() == 1) a.dense = of(mask[0]);
  if (mask.size() == 2) a.start = of(mask[0]), a.stop = of(mask[1]), a.intervals = mask[0].size(-1);
  return {out, lse, dout, dlse, run(a)};
}

std::tuple<Tensor, Tensor, bool> value(Tensor q, Tensor k, Tensor v, Tensors mask, Some bias, double scale) {
  const auto [out, lse, dout, dlse, finite] = attend_jvp(q, k, v, {}, {}, {}, mask, bias, scale, false);
  return {out, lse, finite};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, bool> value_and_tangent(Tensor q, Tensor k, Tensor v, Some dq, Some dk, Some dv, Tensors mask, double scale) {
  return attend_jvp(q, k, v, dq, dk, dv, mask, {}, scale, true);
}

}  // namespace

bool attend(Attention& a) { return run(a); }

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) {
  m.impl("native_attend", TORCH_BOX(&value));
  m.impl("native_attend_jvp", TORCH_BOX(&value_and_tangent));
}
