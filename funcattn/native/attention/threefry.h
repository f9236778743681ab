// Dropout: whether pair (i, j) is kept, with the same bits as kernels/dropout.py for all sizes of
// blocks. Included inside a namespace that has VL.

typedef uint32_t Words __attribute__((vector_size(4 * VL)));
typedef int32_t Booleans __attribute__((vector_size(4 * VL)));

#include "../cipher.h"

// Row i of P from column j on: p times 1 / (1 - rate) where a pair is kept, else times 0.
static void drop_row(const Dropout& dropout, const View& keys, int64_t i, int64_t j, int n,
                     float* p) {
  const int64_t* const of_head = (const int64_t*)keys.data;
  const uint32_t a = uint32_t(of_head[0]), b = uint32_t(of_head[keys.column]);
  const Pair<uint32_t> of_row = encipher(a, b, uint32_t(i));
  Words count;
  for (int l = 0; l < VL; l++) count[l] = uint32_t(j + l);
  uint32_t bits;
  __builtin_memcpy(&bits, &dropout.weight, 4);
  for (int c = 0; c < n; c += VL, count += VL) {
    const Pair<Words> words = encipher(of_row.x, of_row.y, count);
    const Words weight = (Words)((words.x ^ words.y) >= dropout.threshold) & bits;
    store(p + c, mul(load(p + c), (Vec)weight));
  }
}
