// Products of a quantized matrix with a few vectors, written once for every set of instructions.
//
// Included inside a namespace that names the vectors: Int (16 lanes of 32 bits) and Real (16 floats), and what products.cpp says
// of them, and MOST vectors of three digits (MOST_LIGHT of one) whose sums, a register for each digit, are taken in one pass over a tile. A lane is a row of the matrix, so no sum is ever taken across lanes.
//
// The matrix comes in tiles of 16 rows, and a tile in blocks of 32 columns, one behind the other in memory: the codes of a block,
// then its 16 scales, then its 16 zeros, where it has them. A vector comes in the same blocks, each as a scale and digits:
//
//     x[k] ~ unit * (d0[k] 256^(P-1) + ... + d(P-1)[k])          digits from -128 to 127
//
// With three digits that is all of a float; one digit rounds x to -127 .. 127 units, as `packed.rounded` does, to the same numbers.
//
// so that sums of products of codes and digits are sums of integers, and exact. Units are between 2^-87 and 2^41, where no product of
// floats here is rounded to what has fewer digits or overflows before the result does: a block whose largest number is beyond 2^-64 ..
// 2^64 has no digits, and products.cpp multiplies it by itself.

// NARROW8 has blocks of 16 columns, with 16 bytes more that tell it apart; the digits of its vectors have 16 zeros behind each 16 numbers.
enum Kind { ROW8, HALF8, REAL8, CENTERED4, HALF4, REAL4, AFFINE8, NARROW8, KINDS };

constexpr int bits_of(int kind) { return kind >= CENTERED4 && kind <= REAL4 ? 4 : 8; }
constexpr int columns_of(int kind) { return kind == NARROW8 ? 16 : 32; }
constexpr int codes_of(int kind) { return 16 * columns_of(kind) * bits_of(kind) / 8; }
constexpr bool has_zero(int kind) { return kind == HALF4 || kind == REAL4 || kind == AFFINE8; }
constexpr int bytes_of(int kind) {
  return codes_of(kind) + (kind == ROW8 ? 0 : kind == HALF8 || kind == CENTERED4 ? 32 : kind == HALF4 || kind == REAL8 ? 64 : kind == NARROW8 ? 80 : 128);
}
// what code stands for 0
constexpr int offset_of(int kind) { return has_zero(kind) ? 0 : kind == CENTERED4 ? 8 : 128; }
// Whether the sum of three digits of a block, at most 32 * 8 * 8355711, is an integer of 32 bits.
constexpr bool fits(int kind) { return offset_of(kind) == 8; }

#ifndef AHEAD
#define AHEAD 8192
#endif
// A few vectors as digits. Of vector t and block b: digits at 32 P (t B + b), sums at P (t B + b), the rest at t B + b.
struct Vectors {
  const int8_t* digits;
  const int32_t* sums;  // of the digits of a block, times -128
  const float* unit;
  const float* total;  // of the block, as its digits say it
  int64_t blocks;
};

// The digits of blocks of `columns` numbers, at most 32. Gives how many blocks have none because they are too small or too large.
template <int P>
VECTORIZED static int64_t to_digits(const float* x, int64_t K, int64_t blocks, int64_t columns, int8_t* digits, int32_t* sums, float* unit, float* total) {
  constexpr int largest = P == 3 ? 8355708 : P == 2 ? 32639 : 127;  // all digits 127, and 3 less, by which a float may be rounded up
  int64_t odd = 0;
  for (int64_t b = 0; b < blocks; b++) {
    alignas(64) float v[32];
    alignas(64) int32_t whole[32];
    const int64_t first = columns * b, count = K - first < columns ? K - first : columns;
    if (count == 32)
      __builtin_memcpy(v, x + first, sizeof v);
    else
      for (int j = 0; j < 32; j++) v[j] = j < count ? x[first + j] : 0.0f;
    const uint32_t most = most_in(v);  // of floats without their sign, which are ordered as integers; NaN is above infinity
    float size;
    __builtin_memcpy(&size, &most, 4);
    const bool finite = most < 0x7f800000u, is_odd = is_beyond(most), has_digits = finite && most && !is_odd;
    odd += is_odd;
    const float by = has_digits ? largest / size : 0.0f, step = has_digits ? size / largest : 1.0f;
    for (int j = 0; j < 32; j++) v[j] = !has_digits ? 0.0f : P == 1 ? v[j] / step : v[j] * by;
    round_all(v, whole);
    int8_t* const to = digits + 32 * P * b;
    int32_t sum[P];
    for (int p = P - 1; p >= 0; p--) sums[P * b + p] = -128 * (sum[p] = split_last(whole, to + 32 * p));
    float all = 0.0f;
    for (int p = 0; p < P; p++) all = all * 256.0f + float(sum[p]);
    unit[b] = finite ? (has_digits ? size / largest : 0.0f) : __builtin_nanf("");
    total[b] = all * unit[b];
  }
  return odd;
}

// out[t] = the tile times vector t, for T vectors.
template <int KIND, int P, int T>
static inline void tile(const uint8_t* at, const Vectors& x, Real* to) {
  constexpr bool half = KIND == HALF8 || KIND == HALF4 || KIND == CENTERED4;
  Real out[T];
  UNROLLED
  for (int t = 0; t < T; t++) out[t] = zero_real();
  for (int64_t b = 0; b < x.blocks; b++, at += bytes_of(KIND)) {
    for (int i = 0; i < bytes_of(KIND); i += 64) __builtin_prefetch(at + AHEAD + i);
    Int dot[T][P];
    UNROLLED
    for (int t = 0; t < T; t++)
      UNROLLED
      for (int p = 0; p < P; p++) {
        const int32_t* const sum = x.sums + (t * x.blocks + b) * P + p;
        dot[t][p] = offset_of(KIND) == 128 ? broadcast(*sum) : offset_of(KIND) == 8 ? sixteenth(broadcast(*sum)) : zero_int();
      }
    if constexpr (bits_of(KIND) == 4) {
      UNROLLED
      for (int c = 0; c < 4; c++) {
        const Int codes = load(at + 64 * c), low = low_nibbles(codes), high = high_nibbles(codes);
        UNROLLED
        for (int t = 0; t < T; t++)
          UNROLLED
          for (int p = 0; p < P; p++) {
            const int8_t* d = x.digits + ((t * x.blocks + b) * P + p) * 32 + 4 * c;
            dot[t][p] = dot_nibbles(dot_nibbles(dot[t][p], low, d), high, d + 16);
          }
      }
    } else {
      UNROLLED
      for (int c = 0; c < columns_of(KIND) / 4; c++) {
        const Int codes = load(at + 64 * c);
        UNROLLED
        for (int t = 0; t < T; t++)
          UNROLLED
          for (int p = 0; p < P; p++)
            dot[t][p] = dot_bytes(dot[t][p], codes, x.digits + ((t * x.blocks + b) * P + p) * 32 + 4 * c);
      }
    }
    const uint8_t* const after = at + codes_of(KIND);
    Real scale = KIND == ROW8 ? zero_real() : half ? load_half(after) : load_real(after);
    Real zero = !has_zero(KIND) ? zero_real() : half ? load_half(after + 32) : load_real(after + 64);
    UNROLLED
    for (int t = 0; t < T; t++) {
      const int64_t i = t * x.blocks + b;
      Int whole = dot[t][0];
      UNROLLED
      for (int p = 1; p < (P == 3 && !fits(KIND) ? 2 : P); p++) whole = plus(shifted(whole), dot[t][p]);
      Real sum = to_real(whole);
      if constexpr (P == 3 && !fits(KIND)) sum = fma(sum, broadcast(256.0f), to_real(dot[t][2]));
      const Real unit = broadcast(x.unit[i]);
      out[t] = KIND == ROW8 ? fma(sum, unit, out[t]) : fma(times(sum, unit), scale, out[t]);
      if constexpr (has_zero(KIND)) out[t] = fma(zero, broadcast(x.total[i]), out[t]);
    }
  }
  UNROLLED
  for (int t = 0; t < T; t++) to[t] = out[t];
}

static inline Vectors from(const Vectors& x, int P, int64_t t) {
  const int64_t i = t * x.blocks;
  return {x.digits + 32 * P * i, x.sums + P * i, x.unit + i, x.total + i, x.blocks};
}

// Rows 16 begin .. 16 end of y, a vector of N each `step` numbers; those from N on are not written.
template <int KIND, int P>
static void rows(const uint8_t* blocks, const float* scale, const Vectors& x, int64_t T, int64_t N, int64_t begin, int64_t end, float* y, int64_t step) {
  constexpr int MANY = P == 1 ? MOST_LIGHT : MOST;
  for (int64_t n = begin; n < end; n++) {
    const uint8_t* const at = blocks + n * x.blocks * bytes_of(KIND);
    const int count = N - 16 * n < 16 ? int(N - 16 * n) : 16;
    for (int64_t t = 0, left = (T + MANY - 1) / MANY; t < T; left--) {  // parts of like sizes
      Real out[MANY];
      const int many = int((T - t + left - 1) / left);
      const Vectors part = from(x, P, t);
      switch (many) {
        case 1: tile<KIND, P, 1>(at, part, out); break;
        case 2: tile<KIND, P, 2>(at, part, out); break;
        case 3: tile<KIND, P, MANY < 3 ? MANY : 3>(at, part, out); break;
        case 4: tile<KIND, P, MANY < 4 ? MANY : 4>(at, part, out); break;
        case 5: tile<KIND, P, MANY < 5 ? MANY : 5>(at, part, out); break;
        case 6: tile<KIND, P, MANY < 6 ? MANY : 6>(at, part, out); break;
        case 7: tile<KIND, P, MANY < 7 ? MANY : 7>(at, part, out); break;
        default: tile<KIND, P, MANY>(at, part, out);
      }
      for (int i = 0; i < many; i++, t++) {
        if (KIND == ROW8) out[i] = times(out[i], load_some(scale + 16 * n, count));
        store_some(y + t * step + 16 * n, out[i], count);
      }
    }
  }
}

using Rows = void (*)(const uint8_t*, const float*, const Vectors&, int64_t, int64_t, int64_t, int64_t, float*, int64_t);
using ToDigits = int64_t (*)(const float*, int64_t, int64_t, int64_t, int8_t*, int32_t*, float*, float*);

template <int P>
constexpr Rows ROWS[KINDS] = {rows<ROW8, P>, rows<HALF8, P>, rows<REAL8, P>, rows<CENTERED4, P>, rows<HALF4, P>, rows<REAL4, P>, rows<AFFINE8, P>, rows<NARROW8, P>};

static Rows rows_of(int digits, int kind) { return (digits == 1 ? ROWS<1> : ROWS<DIGITS>)[kind]; }
static ToDigits digits_of(int digits) { return digits == 1 ? to_digits<1> : to_digits<DIGITS>; }
