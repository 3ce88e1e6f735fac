#include "cpu/tap_conv.h"

#include <algorithm>
#include <type_traits>

#include "cpu/channel_blocks.h"
#include "cpu/offset_gemm_kernel.h"
#include "cpu/tap_conv_kernel.h"

namespace detkit::cpu {
namespace {

// Columns of a task: they should stay in a near cache, and yet be many enough pixels that packing
// the weights for each product does not dominate.
constexpr int64_t kColumnBytes = int64_t(2) << 20;
constexpr int64_t kFewPixels = 256;
// Input channels of a backward task at most, and tasks there should be at least.
constexpr int64_t kChannelBlock = 16;
constexpr int64_t kBackwardTasks = 8;
// Weights of a group below which calling a library costs more than it saves.
constexpr int64_t kSmallProduct = 512;
// Pixels of a tile of the blocked road at most, and outputs of a part there at least.
constexpr int64_t kTilePixels = 528;
constexpr int64_t kFewOutputs = 32;
// Taps turned at once.
constexpr int kTurned = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
constexpr ScalarType scalar_type_of() {
  if (std::is_same_v<T, double>) return ScalarType::Double;
  return std::is_same_v<T, float> ? ScalarType::Float : ScalarType::BFloat16;
}

// A matrix in memory that is not ours.
template <typename T>
struct Matrix {
  const T* data;
  int64_t rows, cols, row_stride, col_stride;

  Tensor tensor() const {
    return torch::stable::from_blob(const_cast<T*>(data), {rows, cols}, {row_stride, col_stride},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    scalar_type_of<T>());
  }
};

// out = a b by torch's GEMM. Every task is inside a parallel region, where it runs on one thread.
template <typename T>
void gemm(const Matrix<T>& a, const Matrix<T>& b, const Matrix<T>& out) {
  call1("aten::mm", "out", a.tensor(), b.tensor(), out.tensor());
}

// Runs body(begin, end) over tasks. At least two of them, the second perhaps empty: with one, torch
// would not enter a parallel region, and the GEMM inside would split itself over the threads.
template <typename F>
void for_tasks(int64_t count, const F& body) {
  torch::stable::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    end = std::min(end, count);
    if (begin < end) body(begin, end);
  });
}

// Outputs cut into tiles: per sample, or over the whole batch where samples lie behind each other.
struct Tiling {
  int64_t spaces, space_pixels;  // batch x pixels of a sample, or 1 x all pixels
  int64_t tiles, tile_pixels;

  Tiling(const ConvShape& shape, bool joined, int64_t bytes_per_pixel) {
    spaces = joined ? 1 : shape.batch;
    space_pixels = joined ? shape.batch * shape.pixels() : shape.pixels();
    const int64_t fitting = std::max(kColumnBytes / bytes_per_pixel, kFewPixels);
    tiles = ceil_div(space_pixels, fitting);
    tiles += tiles > 1 && tiles % 2 != 0;  // an even number divides over two threads
    tile_pixels = ceil_div(ceil_div(space_pixels, tiles), 16) * 16;
    tiles = ceil_div(space_pixels, tile_pixels);
  }
  int64_t begin(int64_t tile) const { return tile * tile_pixels; }
  int64_t end(int64_t tile) const { return std::min(begin(tile) + tile_pixels, space_pixels); }
};

template <typename A>
std::vector<Tap<A>> narrowed(const std::vector<Tap<double>>& taps) {
  std::vector<Tap<A>> result;
  result.reserve(taps.size());
  for (const Tap<double>& tap : taps) {
    result.push_back({tap.near, tap.far, static_cast<A>(tap.near_weight),
                      static_cast<A>(tap.far_weight), static_cast<A>(tap.slope)});
  }
  return result;
}

// One convolution of working dtype T, ready to run.
template <typename T>
struct Road {
  using A = compute_t<T>;
  const ConvShape& shape;
  const SampleTaps& taps;
  std::vector<Tap<A>> rows, cols;
  int64_t kernel, in_pixels, pixels, line_size = 0;

  Road(const ConvShape& shape, const SampleTaps& taps)
      : shape(shape),
        taps(taps),
        rows(narrowed<A>(taps.rows)),
        cols(narrowed<A>(taps.cols)),
        kernel(shape.kernel()),
        in_pixels(shape.height * shape.width),
        pixels(shape.pixels()) {
    for (int64_t n = 0; n < (taps.shared ? 1 : shape.batch); ++n) {
      line_size = std::max(line_size, border(grid(n)).width(shape.width));
    }
  }

  TapGrid<A> grid(int64_t sample) const {
    const int64_t set = taps.shared ? 0 : sample;
    return {shape.height,
            shape.width,
            shape.out_height,
            shape.out_width,
            shape.stride_h,
            shape.stride_w,
            shape.kernel_h,
            shape.kernel_w,
            rows.data() + set * shape.kernel_h,
            cols.data() + set * shape.kernel_w};
  }

  int64_t plane(int64_t sample, int64_t group, int64_t channel) const {
    return (sample * shape.channels + shape.in_begin + group * shape.group_in + channel) *
           in_pixels;
  }

  // Calls part(sample, first, last, at) for the samples that pixels [begin, end) of a space lie in.
  template <typename F>
  void for_samples(int64_t space, int64_t begin, int64_t end, bool joined, const F& part) const {
    if (!joined) return part(space, begin, end, 0);
    for (int64_t at = begin; at < end;) {
      const int64_t sample = at / pixels, first = at % pixels;
      const int64_t last = std::min(pixels, first + end - at);
      part(sample, first, last, at - begin);
      at += last - first;
    }
  }

  // Columns (channels * kernel, end - begin) of input channels [c0, c1) of a group.
  void sample(const T* input, int64_t group, int64_t c0, int64_t c1, int64_t space, int64_t begin,
              int64_t end, bool joined, T* columns, A* line) const {
    const int64_t size = end - begin;
    for_samples(space, begin, end, joined, [&](int64_t n, int64_t first, int64_t last, int64_t at) {
      const TapGrid<A> where = grid(n);
      for (int64_t c = c0; c < c1; ++c) {
        sample_plane<T>(where, input + plane(n, group, c), first, last,
                        columns + (c - c0) * kernel * size + at, size, line);
      }
    });
  }

  // The (group_out, end - begin) part of an output-shaped map.
  Matrix<T> outputs(const T* map, bool joined, int64_t group, int64_t space, int64_t begin,
                    int64_t end) const {
    const int64_t channel = shape.out_begin + group * shape.group_out;
    if (joined) {
      return {map + begin * shape.outputs + channel, shape.group_out, end - begin, 1,
              shape.outputs};
    }
    return {map + (space * shape.outputs + channel) * pixels + begin, shape.group_out, end - begin,
            pixels, 1};
  }

  bool small() const { return shape.group_out * shape.group_in * kernel <= kSmallProduct; }

  // Whether columns would only copy the input: a 1x1 kernel at every pixel.
  bool columns_are_input() const {
    return kernel == 1 && taps.shared && shape.stride_h == 1 && shape.stride_w == 1 &&
           rows[0].near == 0 && cols[0].near == 0 && shape.height == shape.out_height &&
           shape.width == shape.out_width;
  }

  void forward(const T* input, const T* weight, const T* bias, T* output, bool joined) const {
    const int64_t depth = shape.group_in * kernel;
    const Tiling tiling(shape, joined, depth * static_cast<int64_t>(sizeof(T)));
    const bool direct = columns_are_input() && !joined;
    for_tasks(tiling.spaces * shape.groups * tiling.tiles, [&](int64_t begin, int64_t end) {
      const Scratch<T> columns(direct ? 0 : depth * tiling.tile_pixels);
      const Scratch<A> line(std::max(line_size, tiling.tile_pixels));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t tile = task % tiling.tiles, group = task / tiling.tiles % shape.groups;
        const int64_t space = task / tiling.tiles / shape.groups;
        const int64_t first = tiling.begin(tile), last = tiling.end(tile), size = last - first;
        Matrix<T> b{columns.get(), depth, size, size, 1};
        if (direct) {
          b = {input + plane(space, group, 0) + first, depth, size, in_pixels, 1};
        } else {
          sample(input, group, 0, shape.group_in, space, first, last, joined, columns.get(),
                 line.get());
        }
        multiply(weight + group * shape.group_out * depth, b,
                 bias == nullptr ? nullptr : bias + group * shape.group_out,
                 outputs(output, joined, group, space, first, last), line.get());
      }
    });
  }

  // out = weight b + bias, for one group.
  void multiply(const T* weight, const Matrix<T>& b, const T* bias, const Matrix<T>& out,
                A* line) const {
    T* to = const_cast<T*>(out.data);
    if (small()) {
      small_gemm<T>(out.rows, out.cols, b.rows, weight, b.data, b.row_stride, bias, to,
                    out.row_stride, out.col_stride, line);
      return;
    }
    gemm<T>({weight, out.rows, b.rows, b.rows, 1}, b, out);
    if (bias != nullptr) {
      add_bias<T>(bias, to, out.rows, out.cols, out.row_stride, out.col_stride);
    }
  }
};

// The forward road in float on processors with a kernel of our own. Pixels of a sample are cut into
// tiles, input channels into blocks; what the taps see of a block is sampled into near caches, and
// all outputs add their product with it. A sum runs over the same terms in the same order however
// the work is cut, so cutting it by the number of threads does not change results.
struct BlockedForward : Road<float> {
  const OffsetGemm& gemm;
  int64_t tile_pixels, tiles, parts;  // tiles of a sample, and parts of a group's outputs
  int64_t block;                      // channels at once
  // With whole steps between rows, tap rows see the same sampled rows, so those are kept once:
  // `maps` per channel with `span` rows more than the tile touches, otherwise one per tap.
  bool shared_rows, direct;
  int64_t maps, span, map_size, lowest = 0;

  BlockedForward(const ConvShape& shape, const SampleTaps& taps, const OffsetGemm& gemm)
      : Road<float>(shape, taps), gemm(gemm) {
    cut();
    direct = columns_are_input();
    int64_t highest = 0;
    bool whole = taps.shared && shape.stride_h == 1;
    for (const Tap<float>& tap : rows) {
      whole = whole && tap.far_weight == 0;
      lowest = std::min(lowest, tap.near);
      highest = std::max(highest, tap.near);
    }
    const int64_t tile_rows = ceil_div(tile_pixels - 1, shape.out_width) + 1;
    span = highest - lowest;
    shared_rows = whole && (tile_rows + span) * shape.kernel_w <= tile_rows * kernel;
    maps = shared_rows ? shape.kernel_w : kernel;
    map_size = shared_rows ? (tile_rows + span) * shape.out_width : tile_pixels;
    map_size = ceil_div(map_size, 16) * 16 | 16;  // lines of a map in all sets of a cache
    block = std::min(std::max(gemm.depth / kernel, int64_t(1)), shape.group_in);
  }

  // Tiles for every thread, or parts of the outputs where pixels are few.
  void cut() {
    const int64_t threads = torch::stable::get_num_threads(), spaces = shape.batch * shape.groups;
    tiles = ceil_div(pixels, kTilePixels);
    if (spaces % threads != 0) {
      const int64_t most = std::max(ceil_div(pixels, 2 * gemm.cols), tiles);
      tiles = std::min(ceil_div(tiles, threads) * threads, most);
    }
    tile_pixels = ceil_div(ceil_div(pixels, tiles), gemm.cols) * gemm.cols;
    tiles = ceil_div(pixels, tile_pixels);
    const int64_t wanted = ceil_div(threads, spaces * tiles);
    parts = std::min(wanted, ceil_div(shape.group_out, kFewOutputs));
  }

  // Where the operands of a block of `channels` lie: by tap row, channel, tap column, so that tap
  // rows outside the map are left out by shortening the sum.
  struct Tables {
    std::vector<int64_t> a, b;

    Tables(const BlockedForward& road, int64_t channels) {
      for (int64_t i = 0; i < road.shape.kernel_h; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t j = 0; j < road.shape.kernel_w; ++j) {
            a.push_back(c * road.kernel + i * road.shape.kernel_w + j);
            b.push_back(road.direct ? c * road.in_pixels : road.offset(c, i, j));
          }
        }
      }
    }
  };

  int64_t offset(int64_t c, int64_t i, int64_t j) const {
    if (!shared_rows) return (c * kernel + i * shape.kernel_w + j) * map_size;
    return (c * shape.kernel_w + j) * map_size + (rows[i].near - lowest) * shape.out_width;
  }

  void run(const float* input, const float* weight, const float* bias, float* output) const {
    const Tables whole(*this, block), rest(*this, shape.group_in % block);
    for_tasks(shape.batch * shape.groups * tiles * parts, [&](int64_t begin, int64_t end) {
      const Scratch<float> sampled(direct ? 0 : block * maps * map_size);
      const Scratch<float> line(line_size);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, tile = task / parts % tiles;
        const int64_t group = task / parts / tiles % shape.groups;
        const int64_t n = task / parts / tiles / shape.groups;
        const int64_t first = tile * tile_pixels, last = std::min(first + tile_pixels, pixels);
        const int64_t o0 = shape.group_out * part / parts;
        const int64_t o1 = shape.group_out * (part + 1) / parts;
        const int64_t o = group * shape.group_out + o0, depth = shape.group_in * kernel;
        OffsetProduct product{};
        product.rows = o1 - o0;
        product.a_row = depth;
        product.out = output + (n * shape.outputs + shape.out_begin + o) * pixels + first;
        product.out_row = pixels;
        product.bias = bias == nullptr ? nullptr : bias + o;
        for (int64_t c0 = 0; c0 < shape.group_in; c0 += block) {
          const int64_t c1 = std::min(c0 + block, shape.group_in);
          product.a = weight + o * depth + c0 * kernel;
          product.b = sample_block(input, n, group, c0, c1, first, last, sampled.get(), line.get());
          product.add = c0 > 0;
          multiply(product, c1 - c0 == block ? whole : rest, n, first, last);
        }
      }
    });
  }

  // Where the product finds what the taps of pixels [first, last) see of channels [c0, c1).
  const float* sample_block(const float* input, int64_t n, int64_t group, int64_t c0, int64_t c1,
                            int64_t first, int64_t last, float* to, float* line) const {
    if (direct) return input + plane(n, group, c0) + first;
    TapGrid<float> where = grid(n);
    const Tap<float> top = whole_tap<float>(lowest);
    int64_t begin = first, end = last;
    if (shared_rows) {
      where.kernel_h = 1;
      where.rows = &top;
      begin = first / shape.out_width * shape.out_width;
      end = (ceil_div(last, shape.out_width) + span) * shape.out_width;
    }
    for (int64_t c = c0; c < c1; ++c, to += maps * map_size) {
      if (shape.stride_w == 1) {
        sample_rows(where, input + plane(n, group, c), begin, end, to, line);
      } else {
        sample_plane<float>(where, input + plane(n, group, c), begin, end, to, map_size, line);
      }
    }
    return to - (c1 - c0) * maps * map_size + (first - begin);
  }

  // sample_plane for a column stride of 1, with this processor's vectors.
  void sample_rows(const TapGrid<float>& where, const float* plane, int64_t first, int64_t last,
                   float* to, float* line) const {
    const Border edge = border(where);
    const int64_t width = where.width;
    std::fill(line, line + edge.width(width), 0.0f);
    float* middle = line + edge.before;
    for (int64_t p = first / where.out_width; p * where.out_width < last; ++p) {
      const int64_t begin = p * where.out_width, q0 = std::max(first - begin, int64_t(0));
      const int64_t size = std::min(last - begin, where.out_width) - q0;
      float* out = to + begin + q0 - first;
      for (int64_t i = 0; i < where.kernel_h; ++i) {
        const auto row = [&](int64_t offset) {
          const int64_t h = p * where.stride_h + offset;
          return h >= 0 && h < where.height ? plane + h * width : nullptr;
        };
        const Tap<float>& tap = where.rows[i];
        const bool any = blend(tap, row(tap.near), row(tap.far), width, middle);
        for (int64_t j = 0; j < where.kernel_w; ++j, out += map_size) {
          const auto shifted = [&](int64_t offset) {
            const bool some = any && present(offset, width, where.out_width, 1);
            return some ? middle + q0 + offset : nullptr;
          };
          const Tap<float>& col = where.cols[j];
          if (!blend(col, shifted(col.near), shifted(col.far), size, out)) {
            std::fill(out, out + size, 0.0f);
          }
        }
      }
    }
  }

  // What the tap sees between two rows or columns, null where they lie outside the map; false and
  // nothing where both do.
  bool blend(const Tap<float>& tap, const float* near, const float* far, int64_t size,
             float* to) const {
    if (tap.far_weight == 0) far = nullptr;
    if (near != nullptr) {
      gemm.blend(near, tap.near_weight, far, tap.far_weight, size, to);
    } else if (far != nullptr) {
      gemm.blend(far, tap.far_weight, nullptr, 0, size, to);
    }
    return near != nullptr || far != nullptr;
  }

  // A few rows of the output after the other, so that their weights stay in the first cache while
  // the sampled block streams past; over the tap rows that reach into the map from some pixel.
  void multiply(const OffsetProduct& all, const Tables& tables, int64_t n, int64_t first,
                int64_t last) const {
    const int64_t row_terms = static_cast<int64_t>(tables.a.size()) / shape.kernel_h;
    for (int64_t r = 0; r < all.rows; r += gemm.rows) {
      OffsetProduct product = all;
      product.rows = std::min(gemm.rows, all.rows - r);
      product.a = all.a + r * all.a_row;
      product.bias = all.bias == nullptr ? nullptr : all.bias + r;
      for (int64_t at = first; at < last; at += gemm.cols) {
        product.cols = std::min(gemm.cols, last - at);
        const int64_t p0 = at / shape.out_width, p1 = (at + product.cols - 1) / shape.out_width;
        int64_t i0 = 0, i1 = shape.kernel_h;
        while (i0 < i1 && outside(n, i0, p0, p1)) ++i0;
        while (i0 < i1 && outside(n, i1 - 1, p0, p1)) --i1;
        product.a_at = tables.a.data() + i0 * row_terms;
        product.b_at = tables.b.data() + i0 * row_terms;
        product.depth = (i1 - i0) * row_terms;
        product.b = all.b + (at - first);
        product.out = all.out + r * all.out_row + (at - first);
        gemm.multiply(product);
      }
    }
  }

  // Whether tap row i reads nothing of the map at output rows p0 to p1.
  bool outside(int64_t n, int64_t i, int64_t p0, int64_t p1) const {
    const Tap<float>& tap = grid(n).rows[i];
    const auto misses = [&](int64_t offset) {
      return p1 * shape.stride_h + offset < 0 || p0 * shape.stride_h + offset >= shape.height;
    };
    return misses(tap.near) && (tap.far_weight == 0 || misses(tap.far));
  }
};

// Input channels of a group that one backward task owns, with their part of every gradient.
struct ChannelBlocks {
  int64_t size, per_group;

  explicit ChannelBlocks(const ConvShape& shape) {
    const int64_t shared = ceil_div(shape.groups * shape.group_in, kBackwardTasks);
    size = std::min({shared, shape.group_in, kChannelBlock});
    per_group = ceil_div(shape.group_in, size);
  }
};

// Our own kernel multiplies so many rows at once, 0 where it runs not.
int64_t panel_rows() { return offset_gemms()->cols > 0 ? offset_gemms()->rows : 0; }

int64_t panel_count(int64_t rows) { return panel_rows() == 0 ? 0 : ceil_div(rows, panel_rows()); }

// Columns turned to rows of pixels lie so far apart.
int64_t turned_step(int64_t taps) { return ceil_div(taps, kTurned) * kTurned; }

// The memory of one thread of the backward road.
template <typename T>
struct BackwardScratch {
  Scratch<T> columns, product, grad, weight, panels, turned;
  Scratch<compute_t<T>> lines, sums;

  BackwardScratch(const Road<T>& road, const Tiling& tiling, int64_t taps)
      : columns(taps * tiling.tile_pixels),
        product(road.shape.group_out * taps),
        grad(road.small() ? road.shape.group_out * tiling.tile_pixels : 0),
        weight(road.small() ? road.shape.group_out * taps : 0),
        panels(panel_count(taps) * panel_rows() * road.shape.group_out),
        turned(panel_rows() > 0 ? tiling.tile_pixels * turned_step(taps) : 0),
        lines(std::max(2 * road.line_size, tiling.tile_pixels)),
        sums(road.shape.group_out * taps) {}
};

template <typename T>
struct BackwardRoad : Road<T> {
  using A = compute_t<T>;
  using Road<T>::shape, Road<T>::kernel;
  const T *grad, *input, *weight;
  bool joined;
  A *grad_input, *grad_weight;       // null where not wanted
  std::vector<double>* grad_scales;  // alike

  // One task: all pixels of all samples, for input channels [c0, c1) of a group.
  void run(int64_t group, int64_t c0, int64_t c1, const Tiling& tiling,
           const BackwardScratch<T>& scratch, double* scales) const {
    if (in_panels()) pack_panels(group, c0, c1, scratch);
    for (int64_t space = 0; space < tiling.spaces; ++space) {
      for (int64_t tile = 0; tile < tiling.tiles; ++tile) {
        const int64_t begin = tiling.begin(tile), end = tiling.end(tile);
        const Matrix<T> g = packed(this->outputs(grad, joined, group, space, begin, end), scratch);
        if (grad_input != nullptr || scales != nullptr) {
          multiply_weight(g, group, c0, c1, scratch);
          gather(group, c0, c1, space, begin, end, scratch, scales);
        }
        if (grad_weight != nullptr) {
          this->sample(input, group, c0, c1, space, begin, end, joined, scratch.columns.get(),
                       scratch.lines.get());
          add_weight_grad(g, group, c0, c1, scratch);
        }
      }
    }
  }

  // The matrix itself, or a contiguous copy for the small products.
  Matrix<T> packed(const Matrix<T>& g, const BackwardScratch<T>& scratch) const {
    if (!this->small()) return g;
    T* copy = scratch.grad.get();
    for (int64_t r = 0; r < g.rows; ++r) {
      for (int64_t c = 0; c < g.cols; ++c) {
        copy[r * g.cols + c] = g.data[r * g.row_stride + c * g.col_stride];
      }
    }
    return {copy, g.rows, g.cols, g.cols, 1};
  }

  // Whether our own kernel multiplies with the weights: it needs pixels side by side.
  bool in_panels() const {
    return std::is_same_v<T, float> && panel_rows() > 0 && !joined && !this->small();
  }

  // W^T in panels (outputs, rows) of as many rows as the kernel takes.
  void pack_panels(int64_t group, int64_t c0, int64_t c1, const BackwardScratch<T>& scratch) const {
    const int64_t depth = shape.group_in * kernel, taps = (c1 - c0) * kernel, rows = panel_rows();
    const T* w = weight + group * shape.group_out * depth + c0 * kernel;
    T* to = scratch.panels.get();
    for (int64_t t0 = 0; t0 < taps; t0 += rows) {
      for (int64_t o = 0; o < shape.group_out; ++o, to += rows) {
        std::copy(w + o * depth + t0, w + o * depth + std::min(t0 + rows, taps), to);
      }
    }
  }

  // columns = W^T g, panel by panel over pixels that stay in a near cache.
  void multiply_panels(const Matrix<T>& g, int64_t taps, const BackwardScratch<T>& scratch) const {
    if constexpr (std::is_same_v<T, float>) {
      const OffsetGemm& own = *offset_gemms();
      std::vector<int64_t> a_at(g.rows), b_at(g.rows);
      for (int64_t o = 0; o < g.rows; ++o) {
        a_at[o] = o * own.rows;
        b_at[o] = o * g.row_stride;
      }
      for (int64_t at = 0; at < g.cols; at += own.cols) {
        for (int64_t t = 0; t < taps; t += own.rows) {
          own.multiply({.rows = std::min(own.rows, taps - t),
                        .cols = std::min(own.cols, g.cols - at),
                        .depth = g.rows,
                        .a = scratch.panels.get() + t * g.rows,
                        .a_row = 1,
                        .a_at = a_at.data(),
                        .b = g.data + at,
                        .b_at = b_at.data(),
                        .out = scratch.columns.get() + t * g.cols + at,
                        .out_row = g.cols,
                        .bias = nullptr,
                        .add = false});
        }
      }
    }
  }

  // columns = W^T g
  void multiply_weight(const Matrix<T>& g, int64_t group, int64_t c0, int64_t c1,
                       const BackwardScratch<T>& scratch) const {
    const int64_t depth = shape.group_in * kernel, taps = (c1 - c0) * kernel;
    const T* w = weight + group * shape.group_out * depth + c0 * kernel;
    T* columns = scratch.columns.get();
    if (in_panels()) return multiply_panels(g, taps, scratch);
    if (!this->small()) {
      gemm<T>({w, taps, g.rows, 1, depth}, g, {columns, taps, g.cols, g.cols, 1});
      return;
    }
    T* transposed = scratch.weight.get();
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t o = 0; o < g.rows; ++o) transposed[t * g.rows + o] = w[o * depth + t];
    }
    small_gemm<T>(taps, g.cols, g.rows, transposed, g.data, g.cols, nullptr, columns, g.cols, 1,
                  scratch.lines.get());
  }

  // Gradients of input and scales from those of the columns.
  void gather(int64_t group, int64_t c0, int64_t c1, int64_t space, int64_t begin, int64_t end,
              const BackwardScratch<T>& scratch, double* scales) const {
    const int64_t size = end - begin;
    this->for_samples(
        space, begin, end, joined, [&](int64_t n, int64_t first, int64_t last, int64_t at) {
          const TapGrid<A> where = this->grid(n);
          for (int64_t c = c0; c < c1; ++c) {
            const int64_t plane = this->plane(n, group, c);
            const ScaleGrad sum = gather_plane<T>(
                where, scratch.columns.get() + (c - c0) * kernel * size + at, size, first, last,
                scales == nullptr ? nullptr : input + plane,
                grad_input == nullptr ? nullptr : grad_input + plane, scratch.lines.get());
            if (scales != nullptr) {
              scales[2 * n] += sum.h;
              scales[2 * n + 1] += sum.w;
            }
          }
        });
  }

  // sums += g columns^T, from columns turned so that the kernel finds the taps of a pixel side by
  // side, over pixels that stay in a near cache.
  void multiply_turned(const Matrix<T>& g, int64_t taps, const BackwardScratch<T>& scratch) const {
    if constexpr (std::is_same_v<T, float>) {
      const OffsetGemm& own = *offset_gemms();
      const int64_t step = turned_step(taps);
      for (int64_t t = 0; t < taps; t += kTurned) {
        to_lanes<T, T, kTurned>(scratch.columns.get() + t * g.cols, g.cols,
                                std::min<int64_t>(kTurned, taps - t), g.cols,
                                scratch.turned.get() + t, step);
      }
      std::vector<int64_t> a_at(own.depth), b_at(own.depth);
      for (int64_t k = 0; k < own.depth; ++k) {
        a_at[k] = k;
        b_at[k] = k * step;
      }
      for (int64_t at = 0; at < g.cols; at += own.depth) {
        for (int64_t o = 0; o < g.rows; o += own.rows) {
          own.multiply({.rows = std::min(own.rows, g.rows - o),
                        .cols = taps,
                        .depth = std::min(own.depth, g.cols - at),
                        .a = g.data + o * g.row_stride + at,
                        .a_row = g.row_stride,
                        .a_at = a_at.data(),
                        .b = scratch.turned.get() + at * step,
                        .b_at = b_at.data(),
                        .out = scratch.sums.get() + o * taps,
                        .out_row = taps,
                        .bias = nullptr,
                        .add = true});
        }
      }
    }
  }

  // grad_weight += g columns^T
  void add_weight_grad(const Matrix<T>& g, int64_t group, int64_t c0, int64_t c1,
                       const BackwardScratch<T>& scratch) const {
    const int64_t depth = shape.group_in * kernel, taps = (c1 - c0) * kernel;
    A* sums = scratch.sums.get();
    std::fill(sums, sums + g.rows * taps, A(0));
    if (in_panels()) {
      multiply_turned(g, taps, scratch);
    } else if (this->small()) {
      small_gemm_transposed<T>(g.rows, taps, g.cols, g.data, scratch.columns.get(), g.cols, sums);
    } else {
      T* product = scratch.product.get();
      gemm<T>(g, {scratch.columns.get(), g.cols, taps, 1, g.cols},
              {product, g.rows, taps, taps, 1});
      accumulate<T>(product, sums, g.rows * taps);
    }
    A* to = grad_weight + group * shape.group_out * depth + c0 * kernel;
    for (int64_t o = 0; o < g.rows; ++o) {
      for (int64_t t = 0; t < taps; ++t) to[o * depth + t] += sums[o * taps + t];
    }
  }

  void run_all() const {
    const ChannelBlocks blocks(shape);
    const int64_t taps = blocks.size * kernel, tasks = shape.groups * blocks.per_group;
    const Tiling tiling(shape, joined, taps * static_cast<int64_t>(sizeof(T)));
    std::vector<double> partials(grad_scales == nullptr ? 0 : tasks * shape.batch * 2, 0.0);
    for_tasks(tasks, [&](int64_t begin, int64_t end) {
      const BackwardScratch<T> scratch(*this, tiling, taps);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c0 = task % blocks.per_group * blocks.size;
        double* scales = grad_scales == nullptr ? nullptr : &partials[task * shape.batch * 2];
        run(task / blocks.per_group, c0, std::min(c0 + blocks.size, shape.group_in), tiling,
            scratch, scales);
      }
    });
    for (size_t i = 0; i < partials.size(); ++i) {
      (*grad_scales)[i % (shape.batch * 2)] += partials[i];
    }
  }
};

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
void forward_in(const ConvShape& shape, const SampleTaps& taps, const Tensor& input,
                const Tensor& weight, const std::optional<Tensor>& bias, const RoadMap& output) {
  const T *x = data<T>(input), *w = data<T>(weight), *b = bias ? data<T>(*bias) : nullptr;
  T* to = static_cast<T*>(output.work.data_ptr());
  const Road<T> road(shape, taps);
  if constexpr (std::is_same_v<T, float>) {
    const OffsetGemm& gemm = *offset_gemms();
    if (gemm.cols > 0 && !output.channels_last && !road.small()) {
      return BlockedForward(shape, taps, gemm).run(x, w, b, to);
    }
  }
  road.forward(x, w, b, to, output.channels_last);
}

template <typename T>
void backward_in(const ConvShape& shape, const SampleTaps& taps, const RoadMap& grad,
                 const Tensor& input, const Tensor& weight, const std::optional<Tensor>& grad_input,
                 const std::optional<Tensor>& grad_weight, std::vector<double>* grad_scales) {
  using A = compute_t<T>;
  BackwardRoad<T> road{Road<T>(shape, taps),
                       data<T>(grad.work),
                       data<T>(input),
                       data<T>(weight),
                       grad.channels_last,
                       grad_input ? static_cast<A*>(grad_input->data_ptr()) : nullptr,
                       grad_weight ? static_cast<A*>(grad_weight->data_ptr()) : nullptr,
                       grad_scales};
  road.run_all();
}

ScalarType working_dtype(ScalarType dtype) {
  return dtype == ScalarType::Half ? ScalarType::Float : dtype;
}

ScalarType sum_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

bool joins_samples(const Tensor& map) {
  return is_channels_last(map) || (map.size(0) > 1 && map.size(2) * map.size(3) < kFewPixels);
}

torch::headeronly::MemoryFormat layout(bool channels_last) {
  return channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                       : torch::headeronly::MemoryFormat::Contiguous;
}

Tensor empty_map(const Tensor& shape_of, int64_t channels, int64_t height, int64_t width,
                 ScalarType dtype, bool channels_last) {
  return torch::stable::empty({shape_of.size(0), channels, height, width}, dtype, std::nullopt,
                              shape_of.device(), std::nullopt, layout(channels_last));
}

}  // namespace

SampleTaps whole_taps(const ConvShape& shape, const WholeTaps& taps) {
  SampleTaps result{true, {}, {}};
  for (int64_t i = 0; i < shape.kernel_h; ++i) {
    result.rows.push_back(whole_tap<double>(i * taps.dilation_h - taps.padding_h));
  }
  for (int64_t j = 0; j < shape.kernel_w; ++j) {
    result.cols.push_back(whole_tap<double>(j * taps.dilation_w - taps.padding_w));
  }
  return result;
}

RoadMap make_output(const Tensor& input, const ConvShape& shape) {
  const int64_t channels = shape.outputs, height = shape.out_height, width = shape.out_width;
  const bool last = is_channels_last(input);
  const ScalarType dtype = input.scalar_type(), working = working_dtype(dtype);
  RoadMap output{empty_map(input, channels, height, width, dtype, last), Tensor(), last};
  const bool small = input.size(0) > 1 && height * width < kFewPixels;
  const bool blocked = working == ScalarType::Float && offset_gemms()->cols > 0;
  output.channels_last = small || (last && !blocked);  // planes are worth a copy to our own kernel
  const bool same = output.channels_last == last && dtype == working;
  output.work = same ? output.result
                     : empty_map(input, channels, height, width, working, output.channels_last);
  return output;
}

Tensor finish(const RoadMap& output) {
  if (output.work.data_ptr() != output.result.data_ptr()) {
    Tensor result = output.result;
    torch::stable::copy_(result, output.work);
  }
  return output.result;
}

RoadMap read_grad(const Tensor& grad) {
  const bool last = joins_samples(grad);
  const Tensor typed = torch::stable::to(grad, working_dtype(grad.scalar_type()));
  return {grad, torch::stable::contiguous(typed, layout(last)), last};
}

Tensor prepared(const Tensor& tensor) {
  return torch::stable::contiguous(torch::stable::to(tensor, working_dtype(tensor.scalar_type())));
}

std::optional<Tensor> prepared(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(prepared(*tensor)) : std::nullopt;
}

Tensor read_input(const Tensor& input, bool needed) {
  return needed ? prepared(input) : torch::stable::new_empty(input, {0});
}

Sum::Sum(const Tensor& like, bool needed) : like_(like) {
  if (needed) sum = torch::stable::new_zeros(like, like.sizes(), sum_dtype(like.scalar_type()));
}

Tensor Sum::result() const {
  if (!sum) return torch::stable::new_empty(like_, {0});
  return torch::stable::contiguous(torch::stable::to(*sum, like_.scalar_type()),
                                   layout(is_channels_last(like_)));
}

void tap_forward(const ConvShape& shape, const SampleTaps& taps, const Tensor& input,
                 const Tensor& weight, const std::optional<Tensor>& bias, const RoadMap& output) {
  if (shape.batch * shape.pixels() * shape.groups * shape.group_out == 0) return;
  switch (input.scalar_type()) {
    case ScalarType::Double:
      return forward_in<double>(shape, taps, input, weight, bias, output);
    case ScalarType::Float:
      return forward_in<float>(shape, taps, input, weight, bias, output);
    case ScalarType::BFloat16:
      return forward_in<BFloat16>(shape, taps, input, weight, bias, output);
    default:
      STD_TORCH_CHECK(false, "detkit convolutions: input must be a floating dtype");
  }
}

void tap_backward(const ConvShape& shape, const SampleTaps& taps, const RoadMap& grad,
                  const Tensor& input, const Tensor& weight,
                  const std::optional<Tensor>& grad_input, const std::optional<Tensor>& grad_weight,
                  std::vector<double>* grad_scales) {
  if (shape.empty()) return;
  switch (weight.scalar_type()) {
    case ScalarType::Double:
      return backward_in<double>(shape, taps, grad, input, weight, grad_input, grad_weight,
                                 grad_scales);
    case ScalarType::Float:
      return backward_in<float>(shape, taps, grad, input, weight, grad_input, grad_weight,
                                grad_scales);
    case ScalarType::BFloat16:
      return backward_in<BFloat16>(shape, taps, grad, input, weight, grad_input, grad_weight,
                                   grad_scales);
    default:
      STD_TORCH_CHECK(false, "detkit convolutions: weight must be a floating dtype");
  }
}

}  // namespace detkit::cpu
