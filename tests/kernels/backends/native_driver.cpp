// The kernels of attention without torch, on tensors whose rooms end where they end: for a compiler that checks every access.
//
// Prints "bound NAME X", what an exponential is off by at most, relative to itself, and "wrong ..." for a result that is.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../../funcattn/native/attention/attention.h"
#include "../../../funcattn/native/attention/vectors.h"

BEGIN_TARGET_AVX512
namespace avx512 {
#define PAIRS 0
#include "../../../funcattn/native/attention/forward.h"
}  // namespace avx512
END_TARGET
BEGIN_TARGET_AVX2
namespace avx2 {
#include "../../../funcattn/native/attention/forward.h"
#undef PAIRS
}  // namespace avx2
END_TARGET
BEGIN_TARGET_BF16
namespace avx512bf16 {
#define PAIRS 1
#include "../../../funcattn/native/attention/forward.h"
#undef PAIRS
}  // namespace avx512bf16
END_TARGET

template <class T>
using Room = std::unique_ptr<T[]>;

static uint64_t seed = 1;
static double draw() {  // from -1 to 1
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return double(int64_t(seed) >> 11) / double(int64_t(1) << 52);
}
static int among(int low, int high) { return low + int((draw() + 1) / 2 * (high - low + 0.999)); }

// A tensor (rows, columns) of floats or of bfloat16, and its values. Rows follow each other, or are 16, 32, ... numbers apart, as
// those of the last head are in a tensor (S, heads, D); the room ends with the last number.
struct Numbers {
  Room<char> room;
  std::vector<double> values;
  Operand operand;
  int64_t columns;

  Numbers(bool half, int64_t rows, int64_t columns) : values(rows * columns), columns(columns) {
    const int64_t apart = among(0, 1) ? columns : (columns + 15) / 16 * 16, size = half ? 2 : 4;
    room.reset(new char[((rows - 1) * apart + columns) * size]);
    operand.at = room.get(), operand.type = half ? BFLOAT16 : FLOAT32;
    operand.column = size, operand.row = operand.column * apart;
    for (int64_t i = 0; i < rows * columns; i++) {
      float x = float(draw());
      uint32_t bits;
      __builtin_memcpy(&bits, &x, 4);
      if (half) bits &= 0xffff0000u;
      __builtin_memcpy(&x, &bits, 4);
      const uint16_t high = uint16_t(bits >> 16);
      half ? __builtin_memcpy(place(i), &high, 2) : __builtin_memcpy(place(i), &x, 4);
      values[i] = x;
    }
  }
  char* place(int64_t i) const { return room.get() + i / columns * operand.row + i % columns * operand.column; }
  double at(int64_t i) const {
    float x = 0;
    __builtin_memcpy((char*)&x + (operand.type == BFLOAT16 ? 2 : 0), place(i), size_t(operand.column));
    return x;
  }
};

static void check(const char* name, const Kernels& use, bool half, bool pushes) {
  Attention a;
  a.T = among(1, 130), a.S = among(1, 2) == 1 ? among(1, 80) : among(200, 600), a.D = among(1, 70), a.Dv = among(1, 70);
  a.scale = 0.7f, a.pushes = pushes;
  const bool wide = half && &use != &avx512bf16::kernels;  // read as floats
  Numbers q(half, a.T, a.D), k(half, a.S, a.D), v(half, a.S, a.Dv), dq(half, a.T, a.D), dk(half, a.S, a.D), dv(half, a.S, a.Dv);
  Numbers out(half, a.T, a.Dv), dout(half, a.T, a.Dv), lse(false, a.T, 1), dlse(false, a.T, 1), bias(false, a.T, a.S);
  a.q = q.operand, a.k = k.operand, a.v = v.operand, a.out = out.operand, a.lse = lse.operand;
  if (pushes) a.dq = dq.operand, a.dk = dk.operand, a.dv = dv.operand, a.dout = dout.operand, a.dlse = dlse.operand;
  const int kind = among(0, 3);
  Room<int64_t> start(new int64_t[2 * a.T]), stop(new int64_t[2 * a.T]);
  Room<uint8_t> seen(new uint8_t[a.T * a.S]);
  for (int64_t t = 0; t < 2 * a.T; t++) start[t] = among(-5, int(a.S)), stop[t] = start[t] + among(-2, int(a.S) / 2 + 3);
  for (int64_t i = 0; i < a.T * a.S; i++) seen[i] = draw() > 0;
  a.intervals = kind == 1 || kind == 2 ? kind : 0;
  if (a.intervals) {
    a.start.at = (char*)start.get(), a.stop.at = (char*)stop.get();
    a.start.type = a.stop.type = INT64, a.start.column = a.stop.column = 8, a.start.row = a.stop.row = 8 * a.intervals;
  }
  if (kind == 3) a.dense.at = (char*)seen.get(), a.dense.type = BYTE, a.dense.column = 1, a.dense.row = a.S;
  if (!pushes && among(0, 1)) a.bias = bias.operand;

  const int64_t step = use.step(), rows = a.T > use.most_rows ? 60 : a.T;
  a.rows = int(rows);
  const bool once = a.T == rows && among(0, 1);
  const auto room = [](int64_t floats) { return Room<float>(new float[floats]); };
  const auto scratch = room(use.scratch_size(a)), packed = room(use.packed_size(a, a.S)), one = room(use.state_size(a)), two = room(use.state_size(a));
  for (int64_t first = 0; first < a.S; first += step)
    use.pack(a, 0, first, first + step < a.S ? first + step : a.S, first, a.S, packed.get(), scratch.get());
  for (int64_t t = 0; t < a.T; t += rows) {
    Block block = {0, 0, 1, t, a.T - t < rows ? a.T - t : rows, 0, a.S};
    const float* const from = once ? nullptr : packed.get();
    if (a.S > step) {
      block.last = step;
      use.attend(a, block, from, one.get(), scratch.get());
      block.first = step, block.last = a.S;
      use.attend(a, block, from, two.get(), scratch.get());
      use.merge(a, block, one.get(), two.get());
    } else {
      use.attend(a, block, from, one.get(), scratch.get());
    }
    use.finish(a, block, one.get());
  }

  for (int64_t t = 0; t < a.T; t++) {
    std::vector<double> s(a.S), ds(a.S);
    double most = -INFINITY, mass = 0, slope = 0;
    for (int64_t j = 0; j < a.S; j++) {
      for (int64_t d = 0; d < a.D; d++) {
        s[j] += double(a.scale) * q.values[t * a.D + d] * k.values[j * a.D + d];
        ds[j] += double(a.scale) * (dq.values[t * a.D + d] * k.values[j * a.D + d] + q.values[t * a.D + d] * dk.values[j * a.D + d]);
      }
      if (a.bias) s[j] += bias.values[t * a.S + j];
      bool visible = kind == 0 || (kind == 3 && seen[t * a.S + j]);
      for (int64_t n = t * a.intervals; n < (t + 1) * a.intervals; n++) visible = visible || (start[n] <= j && j < stop[n]);
      if (!visible) s[j] = -INFINITY;
      most = std::fmax(most, s[j]);
    }
    for (int64_t j = 0; j < a.S; j++) s[j] = most == -INFINITY ? 0 : std::exp(s[j] - most), mass += s[j], slope += s[j] * ds[j];
    const double near = half ? 0.05 : 1e-4;
    const auto expect = [&](const char* what, double got, double wanted) {
      if (!(std::fabs(got - wanted) <= near) && got != wanted)
        std::printf("wrong %s %s: %g for %g (T %d S %d D %d Dv %d, mask %d)\n", name, what, got, wanted, int(a.T), int(a.S), int(a.D), int(a.Dv), kind);
    };
    expect("lse", lse.at(t), mass ? most + std::log(mass) : -INFINITY);
    if (pushes) expect("slope", dlse.at(t), mass ? slope / mass : 0);
    for (int64_t d = 0; d < a.Dv; d++) {
      double y = 0, dy = 0;
      for (int64_t j = 0; j < a.S && mass; j++) {
        y += s[j] / mass * v.values[j * a.Dv + d];
        dy += s[j] / mass * ((ds[j] - slope / mass) * v.values[j * a.Dv + d] + dv.values[j * a.Dv + d]);
      }
      expect("out", out.at(t * a.Dv + d), y);
      if (pushes) expect("tangent", dout.at(t * a.Dv + d), dy);
    }
  }
}

#define EXPONENTIALS(name)                                                                                     \
  namespace name {                                                                                             \
  static void exponentials() {                                                                                 \
    double worst = 0, worst2 = 0;                                                                              \
    for (double at = -87; at < 88.7; at += 1.0 / 8192) {                                                       \
      float y[VL], y2[VL];                                                                                     \
      store(y, expv(all(float(at)))), store(y2, exp2v(all(float(at))));                                        \
      worst = std::fmax(worst, std::fabs(y[0] / std::exp(double(float(at))) - 1));                             \
      worst2 = std::fmax(worst2, std::fabs(y2[VL - 1] / std::exp2(double(float(at))) - 1));                    \
    }                                                                                                          \
    std::printf("bound %s_exp %g\nbound %s_exp2 %g\n", #name, worst, #name, worst2);                           \
    const auto expect = [](float x, double wanted, double wanted2) {                                           \
      float y[VL], y2[VL];                                                                                     \
      store(y, expv(all(x))), store(y2, exp2v(all(x)));                                                        \
      const auto is = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= 0x1p-149; }; \
      if (!is(y[0], wanted) || !is(y2[0], wanted2)) std::printf("wrong " #name " exp(%g): %g, exp2 %g\n", x, y[0], y2[0]); \
    };                                                                                                         \
    expect(-INFINITY, 0, 0), expect(NAN, NAN, NAN), expect(INFINITY, INFINITY, INFINITY), expect(0, 1, 1);     \
    expect(-1e30f, 0, 0), expect(1e30f, INFINITY, INFINITY), expect(-152, 0, 0), expect(-149, 0, 0x1p-149);    \
    expect(-103, std::exp(-103.0), 0x1p-103), expect(128, INFINITY, INFINITY);                                 \
  }                                                                                                            \
  }
BEGIN_TARGET_AVX512
EXPONENTIALS(avx512)
END_TARGET
BEGIN_TARGET_AVX2
EXPONENTIALS(avx2)
END_TARGET

int main(int, char** given) {
  const bool has_512 = __builtin_cpu_supports("avx512vnni"), has_pairs = has_512 && __builtin_cpu_supports("avx512bf16");
  avx2::exponentials();
  if (has_512) avx512::exponentials();
  const int turns = std::atoi(given[1]);
  for (int i = 0; i < turns; i++)
    for (const bool pushes : {false, true})
      for (const bool half : {false, true}) {
        check("AVX2", avx2::kernels, half, pushes);
        if (has_512) check("AVX-512", avx512::kernels, half, pushes);
        if (has_pairs && half) check("AVX-512 BF16", avx512bf16::kernels, half, pushes);
      }
  std::puts("done");
}
