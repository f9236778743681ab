// The operator funcattn::words, for the CPU: random words, counters encrypted with keys.

#include <algorithm>
#include <cstdint>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "matrices.h"
#include "targets.h"

namespace {

using torch::stable::Tensor;

#include "cipher.h"

constexpr int LANES = 16;
constexpr int64_t CHUNK = 4096;  // words that a thread makes at a time
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

// The words of counters first .. first + n.
static inline __attribute__((always_inline)) void encipher_all(uint32_t a, uint32_t b, uint32_t first, int64_t n, int32_t* x, int32_t* y) {
  Words count;
  for (int l = 0; l < LANES; l++) count[l] = first + uint32_t(l);
  for (int64_t i = 0; i < n; i += LANES, count += LANES) {
    const Pair<Words> words = encipher(a, b, count);
    const size_t bytes = 4 * size_t(std::min<int64_t>(LANES, n - i));
    __builtin_memcpy(x + i, &words.x, bytes);
    __builtin_memcpy(y + i, &words.y, bytes);
  }
}

BEGIN_TARGET_AVX512
void encipher_wide(uint32_t a, uint32_t b, uint32_t first, int64_t n, int32_t* x, int32_t* y) { encipher_all(a, b, first, n, x, y); }
END_TARGET
BEGIN_TARGET_AVX2
void encipher_narrow(uint32_t a, uint32_t b, uint32_t first, int64_t n, int32_t* x, int32_t* y) { encipher_all(a, b, first, n, x, y); }
END_TARGET

// For keys (B, 2) the two words (B, n) of counters first .. first + n, int32.
std::tuple<Tensor, Tensor> words(Tensor keys, int64_t first, int64_t n) {
  STD_TORCH_CHECK(keys.dim() == 2 && keys.size(1) == 2 && keys.is_contiguous() && keys.scalar_type() == torch::headeronly::ScalarType::Long,
                  "funcattn::words: keys should be contiguous int64 (B, 2)");
  STD_TORCH_CHECK(first >= 0 && n >= 0, "funcattn::words: first and n should not be negative");
  const int64_t B = keys.size(0), chunks = (n + CHUNK - 1) / CHUNK;
  const auto type = torch::headeronly::ScalarType::Int;
  const Tensor x = torch::stable::new_empty(keys, {B, n}, type), y = torch::stable::new_empty(keys, {B, n}, type);
  const int64_t* const key = (const int64_t*)keys.data_ptr();
  int32_t *const to_x = (int32_t*)x.data_ptr(), *const to_y = (int32_t*)y.data_ptr();
  const auto f = instructions_that_run() == AVX512 ? encipher_wide : encipher_narrow;
  torch::stable::parallel_for(0, B * chunks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = i / chunks, from = i % chunks * CHUNK;
      f(uint32_t(key[2 * b]), uint32_t(key[2 * b + 1]), uint32_t(first + from), std::min(CHUNK, n - from), to_x + b * n + from, to_y + b * n + from);
    }
  });
  return {x, y};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(funcattn, CPU, m) { m.impl("words", TORCH_BOX(&words)); }
