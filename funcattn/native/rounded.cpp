// Matrices in tiles times many vectors that are rounded to 8 bits: a pair of tiles times VECTORS of them at a time, so that what is loaded
// of a vector is multiplied twice, and what is loaded of the matrix VECTORS times. The numbers are those of products.h, bit for bit.

#include <algorithm>
#include <memory>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "lanes.h"
#include "many.h"
#include "matrices.h"

namespace {

constexpr int VECTORS = 6, PAIR = 2;          // whose sums of integers and of floats are 24 registers
constexpr int64_t DIGIT_BYTES = 3 << 17;      // of vectors that stay near while the matrices are read

// Of some vectors, by groups of VECTORS, and in each by blocks: digits (32), sums of these, unit and total of a vector behind each other.
struct Rounded {
  int64_t T, B;
  std::vector<int8_t> digits;
  std::vector<int32_t> sums;
  std::vector<float> unit, total;

  int64_t at(int64_t t) const { return t / VECTORS * VECTORS * B; }          // of the group of vector t
  int64_t many(int64_t t) const { return std::min<int64_t>(VECTORS, T - t); }  // of the group from t on
};

}  // namespace

BEGIN_TARGET_AVX512
namespace avx512 {
#define EACH(i, n) UNROLLED for (int i = 0; i < n; i++)

// TILES tiles behind each other times a group of M vectors, to the floats of each.
template <int KIND, int TILES, int M>
static inline void tiles_times(const uint8_t* at, const Rounded& x, const int32_t* start, int64_t first, Real (*to)[M]) {
  const int64_t next = x.B * bytes_of(KIND);  // tile
  const int8_t* digits = x.digits.data() + 32 * first;
  const float *unit = x.unit.data() + first, *total = x.total.data() + first;
  start += first;
  EACH(r, TILES) EACH(m, M) to[r][m] = zero_real();
  for (int64_t b = 0; b < x.B; b++, at += bytes_of(KIND), digits += 32 * M, unit += M, total += M, start += M) {
    Int dot[TILES][M];
    EACH(r, TILES) EACH(m, M) dot[r][m] = offset_of(KIND) ? broadcast(start[m]) : zero_int();
    if constexpr (bits_of(KIND) == 4) {
      EACH(c, 4) {
        Int low[TILES], high[TILES];
        EACH(r, TILES) {
          const Int codes = load(at + r * next + 64 * c);
          low[r] = low_nibbles(codes), high[r] = high_nibbles(codes);
        }
        EACH(m, M) {
          const Int one = four(digits + 32 * m + 4 * c), other = four(digits + 32 * m + 4 * c + 16);
          EACH(r, TILES) dot[r][m] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(dot[r][m], low[r], one), high[r], other);
        }
      }
    } else {
      EACH(c, 8) {
        Int codes[TILES];
        EACH(r, TILES) codes[r] = load(at + r * next + 64 * c);
        EACH(m, M) {
          const Int one = four(digits + 32 * m + 4 * c);
          EACH(r, TILES) dot[r][m] = _mm512_dpbusd_epi32(dot[r][m], codes[r], one);
        }
      }
    }
    EACH(r, TILES) {
      const uint8_t* const after = at + r * next + codes_of(KIND);
      constexpr bool half = KIND == HALF8 || KIND == HALF4 || KIND == CENTERED4;
      const Real scale = KIND == ROW8 ? zero_real() : half ? load_half(after) : load_real(after);
      const Real zero = !has_zero(KIND) ? zero_real() : half ? load_half(after + 32) : load_real(after + 64);
      EACH(m, M) {
        const Real sum = to_real(dot[r][m]), by = broadcast(unit[m]);
        to[r][m] = KIND == ROW8 ? fma(sum, by, to[r][m]) : fma(times(sum, by), scale, to[r][m]);
        if constexpr (has_zero(KIND)) to[r][m] = fma(zero, broadcast(total[m]), to[r][m]);
      }
    }
  }
}

template <int KIND, int TILES, int M>
static void group(const Matrix& w, const Rounded& x, const int32_t* start, int64_t n, int64_t t, float* y, int64_t step) {
  Real to[TILES][M];
  tiles_times<KIND, TILES, M>((const uint8_t*)w.blocks + n * x.B * bytes_of(KIND), x, start, x.at(t), to);
  EACH(r, TILES) {
    const int64_t row = 16 * (n + r);
    const int count = least(16, w.rows - row);
    EACH(m, M) {
      if (KIND == ROW8) to[r][m] = times(to[r][m], load_some(w.scale + row, count));
      store_some(y + (t + m) * step + row, to[r][m], count);
    }
  }
}

// Tiles n on, all vectors.
template <int KIND, int TILES>
static void all_groups(const Matrix& w, const Rounded& x, const int32_t* start, int64_t n, float* y, int64_t step) {
  for (int64_t t = 0; t < x.T; t += VECTORS) switch (x.many(t)) {
      case 1: group<KIND, TILES, 1>(w, x, start, n, t, y, step); break;
      case 2: group<KIND, TILES, 2>(w, x, start, n, t, y, step); break;
      case 3: group<KIND, TILES, 3>(w, x, start, n, t, y, step); break;
      case 4: group<KIND, TILES, 4>(w, x, start, n, t, y, step); break;
      case 5: group<KIND, TILES, 5>(w, x, start, n, t, y, step); break;
      default: group<KIND, TILES, VECTORS>(w, x, start, n, t, y, step);
    }
}

template <int KIND>
static void pair(const Matrix& w, const Rounded& x, const int32_t* start, int64_t n, float* y, int64_t step) {
  (n + PAIR <= w.tiles ? all_groups<KIND, PAIR> : all_groups<KIND, 1>)(w, x, start, n, y, step);
}

// Gives whether each block has digits, or is 0.
static bool round_vector(const float* x, int64_t K, int64_t t, Rounded& to) {
  const int64_t many = to.many(t / VECTORS * VECTORS);
  int64_t odd = 0;
  for (int64_t b = 0; b < to.B; b++) {
    const int64_t i = to.at(t) + b * many + t % VECTORS;
    odd += to_digits<1>(x + 32 * b, std::min<int64_t>(32, K - 32 * b), 1, 32, &to.digits[32 * i], &to.sums[i], &to.unit[i], &to.total[i]);
  }
  return !odd;
}
}  // namespace avx512
END_TARGET

bool multiply_rounded(const Matrix* which, int64_t count, const float* x, int64_t T, int64_t K, float* y, int64_t step) {
  using namespace avx512;
  using Pair = void (*)(const Matrix&, const Rounded&, const int32_t*, int64_t, float*, int64_t);
  constexpr Pair PAIRS[] = {pair<ROW8>, pair<HALF8>, pair<REAL8>, pair<CENTERED4>, pair<HALF4>, pair<REAL4>, pair<AFFINE8>};
  const auto is_served = [](const Matrix& w) { return w.digits == 1 && w.kind >= 0 && w.kind < NARROW8; };
  if (instructions_that_run() != AVX512 || T < VECTORS || !std::all_of(which, which + count, is_served)) return false;
  const int64_t B = (K + 31) / 32, most = std::max<int64_t>(VECTORS, DIGIT_BYTES / (32 * B) / VECTORS * VECTORS);
  struct Task {
    const Matrix* w;
    int64_t n, column;
  };
  std::vector<Task> tasks;
  for (int64_t i = 0, column = 0; i < count; column += which[i++].rows)
    for (int64_t n = 0; n < which[i].tiles; n += PAIR) tasks.push_back({which + i, n, column});
  for (int64_t t = 0, some; t < T; t += some) {
    some = std::min(most, T - t);
    Rounded vectors = {some, B, std::vector<int8_t>(32 * some * B), std::vector<int32_t>(some * B), std::vector<float>(some * B), std::vector<float>(some * B)};
    std::vector<char> has_digits(some);
    torch::stable::parallel_for(0, some, 1 + 65536 / (K + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) has_digits[i] = round_vector(x + (t + i) * K, K, i, vectors);
    });
    if (!std::all_of(has_digits.begin(), has_digits.end(), [](char has) { return has; })) return false;
    // What a code stands for less it: of all codes of a block together, where they are not the numbers themselves.
    std::vector<int32_t> starts[2];
    for (int four_bits = 0; four_bits < 2; four_bits++) {
      starts[four_bits] = vectors.sums;
      for (int32_t& sum : starts[four_bits]) sum *= -offset_of(four_bits ? CENTERED4 : ROW8);
    }
    torch::stable::parallel_for(0, int64_t(tasks.size()), 1 + (1 << 21) / (some * K * 32), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const auto [w, n, column] = tasks[i];
        PAIRS[w->kind](*w, vectors, starts[bits_of(w->kind) == 4].data(), n, y + t * step + column, step);
      }
    });
  }
  return true;
}
