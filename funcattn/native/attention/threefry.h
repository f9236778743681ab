// Dropout: whether pair (i, j) is kept, with the same bits as kernels/dropout.py for all sizes of
// blocks. Included inside a namespace that has VL.
//
// Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011, for Threefry-2x32.

typedef uint32_t Words __attribute__((vector_size(4 * VL)));
typedef int32_t Booleans __attribute__((vector_size(4 * VL)));

template <class W>
struct Pair {
  W x, y;
};

// Encrypts the pairs (0, count) with the two words of the key, in 20 rounds.
template <class W>
static inline Pair<W> encipher(uint32_t a, uint32_t b, W count) {
  constexpr int turns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t schedule[3] = {a, b, a ^ b ^ 0x1BD11BDAu};
  W y = count + b, x = count - count + a;
  UNROLL for (int block = 0; block < 5; block++) {
    UNROLL for (int place = 0; place < 4; place++) {
      const int turn = turns[block % 2][place];
      x += y;
      y = (y << turn | y >> (32 - turn)) ^ x;
    }
    x += schedule[(block + 1) % 3];
    y += schedule[(block + 2) % 3] + uint32_t(block + 1);
  }
  return {x, y};
}

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
