// Included once per instruction set, inside its namespace and between its target pragmas, where
// `Isa` says what a vector is. No include guard.

// R rows by V vectors stay in registers over the whole depth; every loop over them is unrolled, or
// the compiler would keep them in memory. With `Part` the last vector is cut
// to `mask`, memory beyond it is not touched.
template <int R, int V, bool Part>
void multiply_tile(const OffsetProduct& p, int64_t row, int64_t col, Isa::Mask mask) {
  typename Isa::Vec sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = Isa::zero();
  }
  float* out = p.out + row * p.out_row + col;
  if (p.add) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) __builtin_prefetch(out + r * p.out_row + v * Isa::kLanes, 1);
    }
  }
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + col;
  for (int64_t k = 0; k < p.depth; ++k) {
    const float* from = b + p.b_at[k];
    typename Isa::Vec x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const bool cut = Part && v == V - 1;
      x[v] = cut ? Isa::load(from + v * Isa::kLanes, mask) : Isa::load(from + v * Isa::kLanes);
    }
    const float* weight = a + p.a_at[k];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename Isa::Vec w = Isa::all(weight[r * p.a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = Isa::multiply_add(w, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r, out += p.out_row) {
    const typename Isa::Vec start = Isa::all(p.bias == nullptr ? 0.0f : p.bias[row + r]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const bool cut = Part && v == V - 1;
      float* to = out + v * Isa::kLanes;
      typename Isa::Vec before = start;
      if (p.add) before = cut ? Isa::load(to, mask) : Isa::load(to);
      const typename Isa::Vec total = Isa::plus(before, sum[r][v]);
      if (cut) {
        Isa::store(to, total, mask);
      } else {
        Isa::store(to, total);
      }
    }
  }
}

// All rows of one block of columns, R at a time and the rest in one.
template <int V, bool Part, int R = Isa::kRows>
void multiply_rest(const OffsetProduct& p, int64_t row, int64_t col, Isa::Mask mask) {
  if constexpr (R > 0) {
    if (p.rows - row == R) return multiply_tile<R, V, Part>(p, row, col, mask);
    multiply_rest<V, Part, R - 1>(p, row, col, mask);
  }
}

template <int V, bool Part>
void multiply_cols(const OffsetProduct& p, int64_t col, Isa::Mask mask) {
  int64_t row = 0;
  for (; row + Isa::kRows <= p.rows; row += Isa::kRows) {
    multiply_tile<Isa::kRows, V, Part>(p, row, col, mask);
  }
  multiply_rest<V, Part>(p, row, col, mask);
}

void multiply(const OffsetProduct& p) {
  constexpr int64_t lanes = Isa::kLanes, block = 3 * lanes;
  const Isa::Mask all = Isa::first(lanes);
  int64_t col = 0;
  for (; col + block <= p.cols; col += block) multiply_cols<3, false>(p, col, all);
  const int64_t rest = p.cols - col;
  if (rest == 0) return;
  const Isa::Mask mask = Isa::first((rest - 1) % lanes + 1);
  if (rest <= lanes) return multiply_cols<1, true>(p, col, mask);
  if (rest <= 2 * lanes) return multiply_cols<2, true>(p, col, mask);
  multiply_cols<3, true>(p, col, mask);
}

// The products are rounded before they are added, as in the other sampling routines.
void blend(const float* a, float a_weight, const float* b, float b_weight, int64_t size,
           float* to) {
  constexpr int64_t lanes = Isa::kLanes;
  const typename Isa::Vec wa = Isa::all(a_weight), wb = Isa::all(b_weight);
  const Isa::Mask mask = Isa::first(size % lanes);
  const int64_t whole = size - size % lanes;
  if (b == nullptr) {
    for (int64_t t = 0; t < whole; t += lanes) {
      Isa::store(to + t, Isa::times(Isa::load(a + t), wa));
    }
    Isa::store(to + whole, Isa::times(Isa::load(a + whole, mask), wa), mask);
    return;
  }
  for (int64_t t = 0; t < whole; t += lanes) {
    const typename Isa::Vec near = Isa::times(Isa::load(a + t), wa);
    Isa::store(to + t, Isa::plus(near, Isa::times(Isa::load(b + t), wb)));
  }
  const typename Isa::Vec near = Isa::times(Isa::load(a + whole, mask), wa);
  Isa::store(to + whole, Isa::plus(near, Isa::times(Isa::load(b + whole, mask), wb)), mask);
}
