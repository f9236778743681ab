// Attention and its tangent for a block of queries, in one pass over the keys. Included by attention.cpp inside a namespace with
// vectors, gemm.h and PAIRS: whether factors are pairs of bfloat16.
//
//     P = exp(S - base)       l = sum P      out  = P V / l                  lse  = base + log l
//     W = P * dS              u = sum W / l  dout = (W V + P dV) / l - u out     dlse = u
//
// The logits are scale q . k + bias. Queries come in rows [dq | q], keys in panels [k ; dk], so that dS = dq . k + q . dk is one
// product. The base of a row is the largest of its first logits, and is raised where others are far above it. It is subtracted before
// anything is multiplied, so softmax does not change under shifts, however large.

constexpr int ROWS = 96, KEYS = 256, BAND = 24;  // of a block; rows of one range of keys, where a mask cuts through the block
constexpr float LOG2E = 1.44269504f, SLACK = 3, NOTHING = -__builtin_inff();

#include "packing.h"

// What is known of a block of queries while keys go by.
struct State {
  float *top, *mass, *slope, *mixed, *tangent;  // base, sum of P, sum of W, P V, W V + P dV

  State(const Attention& a, float* at) {
    top = at, mass = top + a.rows, slope = mass + a.rows, mixed = slope + a.rows;
    tangent = mixed + a.rows * whole_of(a.Dv, HEAD);
  }
};

static int64_t state_size(const Attention& a) { return a.rows * (3 + (a.pushes ? 2 : 1) * whole_of(a.Dv, HEAD)); }

static int64_t keys_of(const Attention& a) { return whole_of(a.S < KEYS ? a.S : KEYS, PANEL); }

static int64_t scratch_size(const Attention& a) {
  const int64_t blocks = a.pushes ? 2 : 1, E = elements(a.D), room = PANEL * E > whole_of(a.Dv, HEAD) ? PANEL * E : whole_of(a.Dv, HEAD);
  return blocks * a.rows * (keys_of(a) + E) + keys_of(a) + room + packed_size(a, keys_of(a));
}

// An end of an interval, from 0 to S: what lies beyond hides and shows the same keys, and differences of ends do not overflow.
static int64_t end_of(const Attention& a, const Operand& x, const char* at) {
  const int64_t end = x.type == INT64 ? *(const int64_t*)at : *(const int32_t*)at;
  return end < 0 ? 0 : end > a.S ? a.S : end;
}

static float power(float x) { return top(exp_below(all(x))); }  // e^x for x up to 0

static void scale_row(float* x, int64_t n, float by) {
  for (int64_t i = 0; i < n; i += VL) store(x + i, mul(load(x + i), all(by)));
}

struct Rows {
  int64_t first[ROWS], last[ROWS];  // of a mask of one interval a row
  const char *start[ROWS], *stop[ROWS], *dense[ROWS], *bias[ROWS];
};

struct Cut {
  bool some, every;
};

// Whether some pair of the block of keys from j to end is visible, and whether every one is.
static Cut cut(const Attention& a, const Rows& rows, int M, int64_t j, int64_t end) {
  Cut is = {false, true};
  if (a.dense) {
    if (a.dense.column != 1) return {true, false};
    const size_t n = size_t(end - j);
    for (int i = 0; i < M && (is.every || !is.some); i++) {
      is.some = is.some || rows.dense[i][j] || __builtin_memcmp(rows.dense[i] + j, rows.dense[i] + j + 1, n - 1);
      is.every = is.every && !__builtin_memchr(rows.dense[i] + j, 0, n);
    }
    return is;
  }
  for (int i = 0; i < M && (is.every || !is.some); i++) {
    bool some = false, every = false;
    for (int64_t n = 0; n < a.intervals; n++) {
      const int64_t start = a.intervals == 1 ? rows.first[i] : end_of(a, a.start, rows.start[i] + n * a.start.column);
      const int64_t stop = a.intervals == 1 ? rows.last[i] : end_of(a, a.stop, rows.stop[i] + n * a.stop.column);
      some = some || (start < stop && start < end && stop > j);
      every = every || (start <= j && stop >= end);
    }
    is.some = is.some || some;
    is.every = is.every && every;
  }
  return is;
}

template <bool PUSHES>
struct Sweeper {
  const Attention& a;
  const Block& b;
  const Layout to;
  const State state;
  const int M;
  const int64_t keys, E, width;  // of a block; elements of a row; features of a value
  const float factor, unit;      // of products of queries and keys, and of the logits that a base is of
  const float slack;             // how far logits may be above the base
  const bool is_thin;            // so few rows that packing takes longer than what it saves
  float *S, *dS, *queries, *room, *fly;
  Rows rows;

  Sweeper(const Attention& a, const Block& b, float* at, float* scratch)
      : a(a), b(b), to(a), state(a, at), M(int(b.groups * b.queries)), keys(keys_of(a)), E(PUSHES ? 2 * to.E : to.E), width(to.width),
        factor(PAIRS ? a.scale : 1), unit(a.bias ? 1 : factor),
        slack(SLACK / LOG2E / unit), is_thin(!PUSHES && M * 2 * VL <= to.E && is_direct(a.k, a.D)) {
    S = scratch, dS = S + a.rows * keys, queries = dS + (PUSHES ? a.rows * keys : 0), room = queries + a.rows * E;
    fly = room + keys + (PANEL * to.E > width ? PANEL * to.E : width);
  }

  void begin() {
    for (int64_t g = 0; g < b.groups; g++) {
      const auto at = [&](const Operand& x) { return x ? a.at(x, b.head, b.group + g) + b.query * x.row : nullptr; };
      const char *q = at(a.q), *dq = at(a.dq), *start = at(a.start), *stop = at(a.stop), *dense = at(a.dense), *bias = at(a.bias);
      for (int64_t t = 0; t < b.queries; t++) {
        const int64_t i = g * b.queries + t;
        float* const row = queries + i * E;
        load_elements(a.q, q + t * a.q.row, a.D, a.scale, row + E - to.E);
        if (PUSHES && a.dq) load_elements(a.dq, dq + t * a.dq.row, a.D, a.scale, row);
        if (a.intervals) {
          rows.start[i] = start + t * a.start.row, rows.stop[i] = stop + t * a.stop.row;
          rows.first[i] = end_of(a, a.start, rows.start[i]), rows.last[i] = end_of(a, a.stop, rows.stop[i]);
        }
        if (a.dense) rows.dense[i] = dense + t * a.dense.row;
        if (a.bias) rows.bias[i] = bias + t * a.bias.row;
      }
    }
    for (int i = 0; i < M; i++) state.top[i] = NOTHING, state.mass[i] = state.slope[i] = 0;
    for (int64_t i = 0; i < M * width; i += VL) {
      store(state.mixed + i, zero());
      if (PUSHES) store(state.tangent + i, zero());
    }
  }

  // Bias and mask of a row of logits, of the keys from j on, columns low to high of which those below `count` exist.
  void hide(int i, float* s, int64_t j, int low, int high, int count, bool every) {
    if (a.bias) {
      const char* const from = rows.bias[i] + (j + low) * a.bias.column;
      const float* bias = (const float*)from;
      if (a.bias.type != FLOAT32 || a.bias.column != 4 || count < high) {
        load_row(a.bias.type, from, a.bias.column, (count < high ? count : high) - low, room);
        bias = room;
      }
      for (int n = low; n < high; n += VL) store(s + n, fma(load(s + n), all(factor), load(bias + n - low)));
    }
    if (a.intervals == 1 && !every) {
      const int64_t first = rows.first[i] - j, last = rows.last[i] - j;
      const int begin = int(first < low ? low : first > high ? high : first), end = int(last < begin ? begin : last > high ? high : last);
      for (int n = low; n < begin; n++) s[n] = NOTHING;
      for (int n = end; n < high; n++) s[n] = NOTHING;
    } else if ((a.dense || a.intervals) && !every) {
      uint8_t bytes[KEYS + 64];
      const uint8_t* seen = bytes;
      if (a.dense && a.dense.column == 1 && count >= high) {
        seen = (const uint8_t*)rows.dense[i] + j;
      } else if (a.dense) {
        for (int n = low; n < high; n++) bytes[n] = n < count ? *(const uint8_t*)(rows.dense[i] + (j + n) * a.dense.column) : 0;
      } else {
        __builtin_memset(bytes + low, 0, size_t(high - low));
        for (int64_t r = 0; r < a.intervals; r++) {
          const int64_t first = end_of(a, a.start, rows.start[i] + r * a.start.column) - j;
          const int64_t last = end_of(a, a.stop, rows.stop[i] + r * a.stop.column) - j;
          for (int64_t n = first < low ? low : first; n < (last < high ? last : high); n++) bytes[n] = 1;
        }
      }
      for (int n = low; n < high; n += VL) store(s + n, only(seen + n, load(s + n)));
    }
    for (int n = count; n < high; n++) s[n] = NOTHING;
  }

  // Makes a logit the base of the exponents of a row.
  void raise(int i, float base) {
    if (state.mass[i] != 0) {
      const float fade = power((state.top[i] - base) * unit);
      state.mass[i] *= fade;
      scale_row(state.mixed + i * width, width, fade);
      if (PUSHES) {
        state.slope[i] *= fade;
        scale_row(state.tangent + i * width, width, fade);
      }
    }
    state.top[i] = base;
  }

  // From logits to P (and W), and what that does to the sums. The base is raised where P would be above 2^SLACK: seldom, so that
  // exponentials need not wait for the largest logit of a row.
  void weigh(int i, float* s, float* ds, int low, int high, bool moves) {
    Vec most = all(NOTHING);
    for (int n = low; n < high; n += VL) most = largest(load(s + n), most);
    if (is_above(most, all(state.top[i] + slack))) raise(i, top(most));
    const float base = state.top[i] == NOTHING ? 0 : state.top[i];
    const Vec down = all(base), steep = all(unit * LOG2E), by = all(factor);
    Vec mass = zero(), slope = zero();
    constexpr int STEP = PAIRS ? 2 * VL : VL;
    float *to_s = s + low, *to_ds = ds + low;
    for (int n = low; n < high; n += STEP) {
      Vec p[STEP / VL], w[STEP / VL];
      UNROLL for (int c = 0; c < STEP / VL; c++) {
        const Vec x = sub(load(s + n + c * VL), down);
        p[c] = PAIRS ? exp2_below(mul(x, steep)) : exp_below(x);
        mass = add(mass, p[c]);
        if (PUSHES && moves) {
          w[c] = mul(PAIRS ? mul(p[c], by) : p[c], load(ds + n + c * VL));
          slope = add(slope, w[c]);
        }
      }
#if PAIRS
      store(to_s, pairs(p[0], p[1]));
      if (PUSHES && moves) store(to_ds, pairs(w[0], w[1]));
#else
      store(to_s, p[0]);
      if (PUSHES && moves) store(to_ds, w[0]);
#endif
      to_s += VL, to_ds += VL;
    }
    state.mass[i] += sum(mass);
    if (PUSHES && moves) state.slope[i] += sum(slope);
  }

  // Rows r to r + count of the block, over columns low to high (multiples of PANEL) of the block of keys from j on.
  void band(int r, int count, int64_t j, int low, int high, int there, const float* panels, const float* v, const float* dv, bool every) {
    const bool moves = PUSHES && (a.dq || a.dk);
    const int64_t from = a.dq ? 0 : to.E, skip = a.dq ? 0 : to.E, many = a.dq && a.dk ? 2 * to.E : to.E;
    const float* const q = queries + r * E;
    float *const s = S + r * keys, *const ds = PUSHES ? dS + r * keys : S;
    if (!panels) {
      const float* const k = (const float*)(a.at(a.k, b.head, 0) + (j + low) * a.k.row);
      for (int i = 0; i < count; i++) products_of_row(q + i * E, k, a.k.row / 4, (there < high ? there : high) - low, int(E), s + i * keys + low);
    }
    for (int n = low; panels && n < high; n += PANEL) {
      const float* const panel = panels + n / PANEL * to.panel;
      gemm_nt<false>(q + E - to.E, int(E), panel, count, PANEL, int(to.E), s + n, int(keys));
      if (moves) gemm_nt<false>(q + from, int(E), panel + skip * PANEL, count, PANEL, int(many), ds + n, int(keys));
    }
    for (int i = 0; i < count; i++) {
      if (is_lost(s + i * keys + low, (there < high ? there : high) - low)) state.mass[r + i] = __builtin_nanf("");
      hide(r + i, s + i * keys, j, low, high, there, every);
      weigh(r + i, s + i * keys, ds + i * keys, low, high, moves);
    }
    const int N = int(elements((there < high ? there : high) - low)), w = int(width);
    if (N <= 0) return;
    const int64_t at = elements(low) * width;
    gemm_nn(s + low, int(keys), v + at, w, count, N, w, state.mixed + r * width, w);
    if (moves) gemm_nn(ds + low, int(keys), v + at, w, count, N, w, state.tangent + r * width, w);
    if (PUSHES && a.dv) gemm_nn(s + low, int(keys), dv + at, w, count, N, w, state.tangent + r * width, w);
  }

  void run(const float* packed) {
    begin();
    int64_t first = b.first, last = b.last;
    if (a.intervals == 1) {
      int64_t least = last, most = first;
      for (int i = 0; i < M; i++)
        if (rows.first[i] < rows.last[i]) {
          least = rows.first[i] < least ? rows.first[i] : least;
          most = rows.last[i] > most ? rows.last[i] : most;
        }
      first = least > first ? least / PANEL * PANEL : first;
      first = first < b.first ? b.first : first;
      last = most < last ? most : last;
    }
    for (int64_t j = first; j < last; j += keys) {
      const int64_t end = j + keys < b.last ? j + keys : b.last;
      const Cut is = a.intervals || a.dense ? cut(a, rows, M, j, end) : Cut{true, true};
      if (!is.some) continue;
      const float* from = packed;
      int64_t begin = j, many = a.S;  // where the block begins in what is packed, and how many keys that has
      if (!packed) {
        if (is_thin)
          pack_values(a, b.head, j, end, 0, keys, fly);
        else
          pack_keys(a, b.head, j, end, 0, keys, fly, room + keys);
        from = fly, begin = 0, many = keys;
      }
      const float* values = from + to.values_at(many);
      const int64_t at = elements(begin) * width;
      const float* v = to.copies_v ? values + at : (const float*)(a.at(a.v, b.head, 0) + j * a.v.row);
      const float* dv = to.copies_dv ? values + (to.copies_v ? to.values_size(many) : 0) + at
                                     : a.dv ? (const float*)(a.at(a.dv, b.head, 0) + j * a.dv.row) : nullptr;
      const float* const panels = is_thin && !packed ? nullptr : from + begin / PANEL * to.panel;
      const int there = int(end - j), width_of_block = int(whole_of(there, PANEL));
      if (is.every || a.intervals != 1) {
        band(0, M, j, 0, width_of_block, there, panels, v, dv, is.every);
        continue;
      }
      for (int r = 0; r < M; r += BAND) {
        const int count = M - r < BAND ? M - r : BAND;
        int64_t least = end, most = j;
        for (int i = r; i < r + count; i++)
          if (rows.first[i] < rows.last[i]) {
            least = rows.first[i] < least ? rows.first[i] : least;
            most = rows.last[i] > most ? rows.last[i] : most;
          }
        const int64_t low = least > j ? (least - j) / PANEL * PANEL : 0, high = most < end ? whole_of(most - j, PANEL) : width_of_block;
        if (low < high) band(r, count, j, int(low), int(high), there, panels, v, dv, false);
      }
    }
  }
};

static void attend(const Attention& a, const Block& b, const float* packed, float* state, float* scratch) {
  a.pushes ? Sweeper<true>(a, b, state, scratch).run(packed) : Sweeper<false>(a, b, state, scratch).run(packed);
}

// Joins what other keys gave to what these did.
static void merge(const Attention& a, const Block& b, float* into, const float* other) {
  const State x(a, into), y(a, (float*)other);
  const int64_t width = whole_of(a.Dv, HEAD);
  const float unit = PAIRS && !a.bias ? a.scale : 1;
  for (int64_t i = 0; i < b.groups * b.queries; i++) {
    const float most = x.top[i] > y.top[i] ? x.top[i] : y.top[i], base = most == NOTHING ? 0 : most;
    const float mine = power((x.top[i] - base) * unit), others = power((y.top[i] - base) * unit);
    const auto join = [&](float* to, const float* from, int64_t n) {
      for (int64_t d = 0; d < n; d++) to[d] = to[d] * mine + from[d] * others;
    };
    x.top[i] = most;
    join(x.mass + i, y.mass + i, 1);
    join(x.mixed + i * width, y.mixed + i * width, width);
    if (!a.pushes) continue;
    join(x.slope + i, y.slope + i, 1);
    join(x.tangent + i * width, y.tangent + i * width, width);
  }
}

static bool finish(const Attention& a, const Block& b, float* from) {
  const State x(a, from);
  const int64_t width = whole_of(a.Dv, HEAD);
  const float unit = PAIRS && !a.bias ? a.scale : 1;
  Vec odd = zero();
  for (int64_t g = 0; g < b.groups; g++) {
    const bool out = a.writes(a.out, b.head, b.group + g), lse = a.writes(a.lse, b.head, b.group + g);
    const bool dlse = a.pushes && a.writes(a.dlse, b.head, b.group + g);
    const auto at = [&](const Operand& y) { return a.at(y, b.head, b.group + g) + b.query * y.row; };
    for (int64_t t = 0; t < b.queries; t++) {
      const int64_t i = g * b.queries + t;
      const bool none = x.mass[i] == 0;
      const float by = none ? 0 : 1 / x.mass[i], slope = x.slope[i] * by;
      float *const mixed = x.mixed + i * width, *const tangent = x.tangent + i * width;
      for (int64_t d = 0; d < width; d += VL) {
        const Vec y = mul(load(mixed + d), all(by));
        odd = fma(y, zero(), odd);
        store(mixed + d, y);
        if (!a.pushes) continue;
        const Vec dy = fma(load(tangent + d), all(by), mul(y, all(-slope)));
        odd = fma(dy, zero(), odd);
        store(tangent + d, dy);
      }
      if (out) store_row(a.out.type, mixed, a.Dv, at(a.out) + t * a.out.row);
      if (a.pushes) store_row(a.dout.type, tangent, a.Dv, at(a.dout) + t * a.dout.row);
      if (lse) *(float*)(at(a.lse) + t * a.lse.row) = none ? NOTHING : x.top[i] * unit + __builtin_logf(x.mass[i]);
      if (dlse) *(float*)(at(a.dlse) + t * a.dlse.row) = slope;
    }
  }
  return !has_nan(odd);
}

static int step() { return KEYS; }

constexpr Kernels kernels = {ROWS, packed_size, scratch_size, state_size, step, pack_keys, attend, merge, finish};
