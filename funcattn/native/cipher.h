// Threefry-2x32, of words or of vectors of words. Included inside a namespace.
//
// Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.

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
  _Pragma("GCC unroll 8") for (int block = 0; block < 5; block++) {
    _Pragma("GCC unroll 8") for (int place = 0; place < 4; place++) {
      const int turn = turns[block % 2][place];
      x += y;
      y = (y << turn | y >> (32 - turn)) ^ x;
    }
    x += schedule[(block + 1) % 3];
    y += schedule[(block + 2) % 3] + uint32_t(block + 1);
  }
  return {x, y};
}
