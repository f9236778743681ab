// Rows of any type as elements that the products take, and the panels of keys and rows of values of a head.
// Included by forward.h, in its namespace.

// Elements of n features, or keys.
static inline int64_t elements(int64_t n) { return PAIRS ? (n + 1) / 2 : n; }
static inline int64_t whole_of(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static inline Vec load_as(Type type, const char* p) {
  return type == FLOAT32 ? load((const float*)p) : type == BFLOAT16 ? load_bf16((const uint16_t*)p) : load_f16((const uint16_t*)p);
}

// n numbers of any type, `step` bytes apart, as floats times `by`; nothing is read beyond them.
static void load_row(Type type, const char* from, int64_t step, int64_t n, float* to, float by = 1) {
  const int64_t size = type == FLOAT32 ? 4 : 2;
  int64_t i = 0;
  if (step == size)
    for (; i + VL <= n; i += VL) store(to + i, mul(load_as(type, from + i * size), all(by)));
  for (; i < n; i += VL) {
    alignas(64) char some[4 * VL] = {};
    const int count = int(n - i < VL ? n - i : VL);
    for (int j = 0; j < count; j++) __builtin_memcpy(some + j * size, from + (i + j) * step, size_t(size));
    store_some(to + i, mul(load_as(type, some), all(by)), count);
  }
}

static void store_row(Type type, const float* from, int64_t n, char* to) {
  if (type == FLOAT32) {
    __builtin_memcpy(to, from, 4 * size_t(n));
    return;
  }
  for (int64_t i = 0; i < n; i += VL) {
    const int count = int(n - i < VL ? n - i : VL);
    uint16_t some[VL];
    type == BFLOAT16 ? store_bf16(some, load_some(from + i, count)) : store_f16(some, load_some(from + i, count));
    __builtin_memcpy(to + 2 * i, some, 2 * size_t(count));
  }
}

// A row of n features as elements; times `by`, where these are floats.
static void load_elements(const Operand& x, const char* from, int64_t n, float by, float* to) {
  if constexpr (PAIRS) {
    to[elements(n) - 1] = 0;
    if (x.column == 2) {
      __builtin_memcpy((void*)to, from, 2 * size_t(n));
    } else {
      for (int64_t i = 0; i < n; i++) __builtin_memcpy((char*)to + 2 * i, from + i * x.column, 2);
    }
  } else {
    load_row(x.type, from, x.column, n, to, by);
  }
}

// Sizes of what is packed of a head: panels of keys, then values and their tangents, unless these can be read where they are.
struct Layout {
  int64_t E, panel, width;  // elements of a key; floats of a panel; features of a value, padded
  bool copies_v, copies_dv;

  explicit Layout(const Attention& a) : E(elements(a.D)), panel(E * PANEL * (a.dk ? 2 : 1)), width(whole_of(a.Dv, HEAD)) {
    // Rows that are only as far apart as whole vectors end sooner, the last of them perhaps with the tensor.
    const bool is_whole = a.Dv == width;
    const auto copies = [&](const Operand& x) { return x && (PAIRS || !is_whole || x.type != FLOAT32 || x.column != 4 || x.row != 4 * width); };
    copies_v = copies(a.v), copies_dv = copies(a.dv);
  }
  int64_t values_at(int64_t keys) const { return whole_of(keys, PANEL) / PANEL * panel; }
  int64_t values_size(int64_t keys) const { return elements(whole_of(keys, PANEL)) * width; }
};

static int64_t packed_size(const Attention& a, int64_t keys) {
  const Layout to(a);
  return to.values_at(keys) + (to.copies_v + to.copies_dv) * to.values_size(keys);
}

// Values (n, Dv) as elements of keys (n, width), padded by zeros.
static void copy_values(const Operand& x, const char* from, int64_t n, int64_t Dv, int64_t width, float* to) {
#if PAIRS
  for (int64_t j = 0; j < n; j += 2) {
    const char* const a = from + j * x.row;
    zip_rows(a, j + 1 < n ? a + x.row : nullptr, x.column, Dv, width, to + j / 2 * width);
  }
#else
  for (int64_t j = 0; j < n; j++) {
    float* const row = to + j * width;
    load_row(x.type, from + j * x.row, x.column, Dv, row);
    for (int64_t d = Dv; d < width; d++) row[d] = 0;
  }
#endif
}

// True where rows of D features are rows of elements as they are.
static bool is_direct(const Operand& x, int64_t D) {
  return PAIRS ? x.column == 2 && x.row % 4 == 0 && D % 2 == 0 : x.type == FLOAT32 && x.column == 4;
}

static void pack_side(const Operand& x, const char* from, int64_t n, int64_t D, float* to, int64_t step, float* rows) {
  const int64_t E = elements(D);
  if (is_direct(x, D)) {
    pack_panels((const float*)from, x.row / 4, int(n), int(E), to, step);
    return;
  }
  for (int64_t j = 0; j < n; j += PANEL) {
    const int count = int(n - j < PANEL ? n - j : PANEL);
    for (int i = 0; i < count; i++) load_elements(x, from + (j + i) * x.row, D, 1, rows + i * E);
    pack_panels(rows, E, count, int(E), to + j / PANEL * step, step);
  }
}

static void pack_values(const Attention& a, int64_t head, int64_t first, int64_t last, int64_t place, int64_t packed_keys, float* packed) {
  const Layout to(a);
  float* values = packed + to.values_at(packed_keys) + elements(place) * to.width;
  if (to.copies_v) {
    copy_values(a.v, a.at(a.v, head, 0) + first * a.v.row, last - first, a.Dv, to.width, values);
    values += to.values_size(packed_keys);
  }
  if (to.copies_dv) copy_values(a.dv, a.at(a.dv, head, 0) + first * a.dv.row, last - first, a.Dv, to.width, values);
}

// Keys from first to last to the places from `place` on (a multiple of PANEL) among packed_keys; scratch has room for a panel's rows.
static void pack_keys(const Attention& a, int64_t head, int64_t first, int64_t last, int64_t place, int64_t packed_keys, float* packed,
                      float* scratch) {
  const Layout to(a);
  float* const panels = packed + place / PANEL * to.panel;
  pack_side(a.k, a.at(a.k, head, 0) + first * a.k.row, last - first, a.D, panels, to.panel, scratch);
  if (a.dk) pack_side(a.dk, a.at(a.dk, head, 0) + first * a.dk.row, last - first, a.D, panels + to.E * PANEL, to.panel, scratch);
  pack_values(a, head, first, last, place, packed_keys, packed);
}

// The products of one row of E elements and n rows `step` floats apart, of keys that are not packed: s has room for whole vectors.
static void products_of_row(const float* q, const float* k, int64_t step, int n, int E, float* s) {
  for (int j = 0; j < n; j += VL) {
    Vec sums[VL];
    UNROLL for (int i = 0; i < VL; i++) sums[i] = zero();
    const float* const from = k + j * step;
    const int there = n - j < VL ? n - j : VL;
    for (int e = 0; e < E; e += VL) {
      const int some = E - e < VL ? E - e : VL;
      const Vec by = load_some(q + e, some);
      if (there == VL && some == VL) {
        UNROLL for (int i = 0; i < VL; i++) sums[i] = dot(by, load(from + i * step + e), sums[i]);
      } else {
        UNROLL for (int i = 0; i < VL; i++) sums[i] = dot(by, i < there ? load_some(from + i * step + e, some) : zero(), sums[i]);
      }
    }
    transpose(sums);
    UNROLL for (int i = 1; i < VL; i *= 2) {
      UNROLL for (int l = 0; l < VL; l += 2 * i) sums[l] = add(sums[l], sums[l + i]);
    }
    store(s + j, sums[0]);
  }
}
