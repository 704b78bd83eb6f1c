// The three products of a linear layer in float32:
//
//     output  [R, O] = tokens [R, I] times weight [O, I]^T + bias [O]
//     gradient of tokens [R, I] = gradient [R, O] times weight [O, I]
//     gradients of weight [O, I] = gradient [R, O]^T times tokens [R, I], and of bias [O] = sum over R of gradient
//
// The right operand is packed into panels, [panel][summed axis][COLUMNS], of which a part of DEPTH stays in the first-level
// cache while tiles of the left one pass by. Rows of tokens are read as they lie, an element broadcast at a time, so that
// nothing of their size is written but the result. A weight's gradient is summed over them: there both operands are
// packed, DEPTH rows at a time, which needs no turning. A tile's sum of DEPTH is in registers, the total in memory; in which
// order things are added does not depend on the number of threads.
#include <ATen/Parallel.h>

#include <algorithm>

#include "scratch.h"
#include "simd.h"

namespace uniad {
namespace {

constexpr int64_t COLUMNS = 2 * LANES;
constexpr int64_t DEPTH = LANES == 16 ? 272 : 320;
constexpr int64_t BLOCK = 96;  // rows of the left operand whose part of DEPTH stays in the second-level cache, at most
constexpr int64_t OUTS = 128 / ROWS * ROWS;  // of a weight's gradient, packed together
constexpr int64_t LINE = 64 / sizeof(float);
constexpr int64_t AT_ONCE = 8;  // rows that are packed together: so many streams a processor fetches ahead

struct Layer {
  int64_t rows, ins, outs, token_stride, gradient_stride;  // strides of rows, in elements
};

struct Matrix {
  const float* data;
  int64_t rows, columns, row_stride, column_stride;
};

int64_t panels_of(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }

// Length of the parts, of DEPTH at most, that a summed axis is cut into.
int64_t depth_of(int64_t length) {
  const int64_t parts = std::max<int64_t>(1, (length + DEPTH - 1) / DEPTH);
  return std::max<int64_t>(1, (length + parts - 1) / parts);
}

// Vectors of a panel that hold any column.
int64_t vectors_of(int64_t columns, int64_t panel) { return columns - panel * COLUMNS > LANES ? 2 : 1; }

// Rows first .. first + count - 1 of one panel of a matrix, zeros beyond its columns.
void pack_panel(const Matrix& m, int64_t panel, int64_t first, int64_t count, float* out) {
  for (int v = 0; v < 2; v++, out += LANES) {
    const int64_t column = panel * COLUMNS + v * LANES, left = std::clamp<int64_t>(m.columns - column, 0, LANES);
    const float* from = m.data + first * m.row_stride + column * m.column_stride;
    int64_t k = 0;
    if (left == LANES && m.column_stride == 1)
      for (; k < count; k++) store(out + k * COLUMNS, load<vfloat>(from + k * m.row_stride));
    if (left == LANES && m.row_stride == 1)
      for (; k + LANES <= count; k += LANES)
        transpose((const uint32_t*)from + k, m.column_stride, (uint32_t*)out + k * COLUMNS, COLUMNS);
    for (; k < count; k++)
      for (int64_t c = 0; c < LANES; c++)
        out[k * COLUMNS + c] = c < left ? from[k * m.row_stride + c * m.column_stride] : 0.f;
  }
}

// out [valid][columns left] = sum (+ bias), or += sum.
template <int V>
INLINE void finish(const vfloat (&sum)[ROWS][V], const float* bias, bool is_first, int64_t valid, int64_t left, float* out,
                   int64_t stride) {
  vfloat shift[V] = {};
  if (is_first && bias)
    for (int v = 0; v < V; v++) shift[v] = load<vfloat>(bias + v * LANES);
  if (valid == ROWS && left >= V * LANES) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        float* at = out + r * stride + v * LANES;
        store(at, sum[r][v] + (is_first ? shift[v] : load<vfloat>(at)));
      }
    return;
  }
  alignas(64) float some[ROWS][V * LANES];
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) store(some[r] + v * LANES, sum[r][v] + shift[v]);
  for (int64_t r = 0; r < valid; r++)
    for (int64_t c = 0; c < std::min<int64_t>(left, V * LANES); c++)
      out[r * stride + c] = some[r][c] + (is_first ? 0.f : out[r * stride + c]);
}

// What a tile will be written to.
INLINE void prefetch_rows(const float* out, int64_t stride) {
  for (int r = 0; r < ROWS; r++)
    for (int64_t c = 0; c < COLUMNS; c += LINE) __builtin_prefetch(out + r * stride + c, 1, 3);
}

// ROWS rows of the left operand, of which the first `valid` count, times `depth` rows of a panel.
template <int V>
__attribute__((noinline)) void tile_of_rows(
    const float* left, int64_t stride, int64_t valid, const float* panel, int64_t depth, const float* bias, bool is_first,
    int64_t columns, float* out, int64_t out_stride) {
  const uint32_t* row[ROWS];
  vfloat sum[ROWS][V];
  prefetch_rows(out, out_stride);
#pragma GCC unroll 12
  for (int r = 0; r < ROWS; r++) {
    row[r] = (const uint32_t*)left + std::min<int64_t>(r, valid - 1) * stride;
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[r][v] = vfloat{};
  }
  for (int64_t begin = 0; begin < depth; begin += LINE) {
    const int64_t end = std::min(begin + LINE, depth);
    // The next tile's rows lie apart, so that nothing else fetches them in time; twelve would push the panel out.
    if constexpr (LANES < 16)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) __builtin_prefetch(row[r] + ROWS * stride + begin, 0, 3);
#pragma GCC unroll 4
    for (int64_t k = begin; k < end; k++) {
      vfloat right[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) right[v] = load<vfloat>(panel + k * COLUMNS + v * LANES);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        const vfloat one = (vfloat)splat_word(row[r][k]);
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sum[r][v] += one * right[v];
      }
    }
  }
  finish(sum, bias, is_first, valid, columns, out, out_stride);
}

// The same where the left operand is packed, [depth][ROWS].
template <int V>
__attribute__((noinline)) void tile_of_packed(
    const float* left, int64_t valid, const float* panel, int64_t depth, bool is_first, int64_t columns, float* out,
    int64_t out_stride) {
  prefetch_rows(out, out_stride);
  vfloat sum[ROWS][V] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++) {
    vfloat right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) right[v] = load<vfloat>(panel + k * COLUMNS + v * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
      const vfloat one = (vfloat)splat_word(((const uint32_t*)left)[k * ROWS + r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[r][v] += one * right[v];
    }
  }
  finish(sum, nullptr, is_first, valid, columns, out, out_stride);
}

// out [rows, right.columns] = left [rows, right.rows] times right, plus bias.
void multiply_rows(
    const float* left, int64_t left_stride, int64_t rows, const Matrix& right, const float* bias, float* out) {
  const int64_t panels = panels_of(right.columns), depth = right.rows, part = depth_of(depth);
  const int64_t threads = at::get_num_threads();
  Scratch scratch;
  float* packed = scratch.take<float>(panels * depth * COLUMNS);
  float* shift = bias ? scratch.take<float>(panels * COLUMNS) : nullptr;
  if (bias) std::copy(bias, bias + right.columns, shift), std::fill(shift + right.columns, shift + panels * COLUMNS, 0.f);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++) pack_panel(right, p, 0, depth, packed + p * depth * COLUMNS);
  });
  // As many blocks for each thread; where one ends changes no sum.
  if (rows == 0) return;
  const int64_t turns = (rows + BLOCK * threads - 1) / (BLOCK * threads);
  const int64_t block = round_up((rows + turns * threads - 1) / (turns * threads), ROWS);
  at::parallel_for(0, (rows + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t first = b * block, last = std::min(rows, first + block);
      for (int64_t k = 0; k == 0 || k < depth; k += part)  // a sum of nothing is the bias
        for (int64_t p = 0; p < panels; p++) {
          const float* panel = packed + (p * depth + k) * COLUMNS;
          const int64_t left_columns = right.columns - p * COLUMNS, count = std::min(part, depth - k);
          const float* shifted = shift ? shift + p * COLUMNS : nullptr;
          for (int64_t r = first; r < last; r += ROWS) {
            const auto tile = vectors_of(right.columns, p) == 2 ? tile_of_rows<2> : tile_of_rows<1>;
            tile(left + r * left_stride + k, left_stride, std::min<int64_t>(ROWS, last - r), panel, count, shifted, k == 0,
                 left_columns, out + r * right.columns + p * COLUMNS, right.columns);
          }
        }
    }
  });
}

// Of a tile's rows, which a vector may be wider or narrower than.
constexpr int VECTORS = (ROWS + LANES - 1) / LANES, WIDTH = VECTORS * LANES;

// `count` rows of columns first .. first + tiles * ROWS - 1 as packed left operands, zeros beyond the matrix, a tile's `room`
// after the one before. Each tile's sums are added to WIDTH of `sums`.
void pack_columns(
    const Matrix& m, int64_t first, int64_t tiles, int64_t begin, int64_t count, float* out, int64_t room, float* sums) {
  for (int64_t k = 0; k < count; k += AT_ONCE) {
    const int64_t rows = std::min(AT_ONCE, count - k);
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t left = m.columns - first - t * ROWS;
      const float* from = m.data + (begin + k) * m.row_stride + first + t * ROWS;
      float* to = out + t * room + k * ROWS;
      vfloat sum[VECTORS];
      for (int v = 0; v < VECTORS; v++) sum[v] = load<vfloat>(sums + t * WIDTH + v * LANES);
      for (int64_t r = 0; r < rows; r++) {
        vfloat row[VECTORS] = {};
        if (left >= WIDTH) memcpy(row, from + r * m.row_stride, sizeof row);
        else memcpy(row, from + r * m.row_stride, left * sizeof(float));
        for (int v = 0; v < VECTORS; v++) sum[v] += row[v];
        memcpy(to + r * ROWS, row, sizeof row);  // what is too much the next row overwrites
      }
      for (int v = 0; v < VECTORS; v++) store(sums + t * WIDTH + v * LANES, sum[v]);
    }
  }
}

// Outputs [first, last) of the gradient of weight and, where there is `bias`, of bias; inputs of panels [panel, end).
void weight_gradient(
    const Matrix& tokens, const Matrix& gradient, int64_t first, int64_t last, int64_t panel, int64_t end, float* weight,
    float* bias) {
  Scratch scratch;
  const int64_t rows = tokens.rows, part = depth_of(rows), columns = tokens.columns;
  const int64_t room = part * ROWS + LINE;  // no multiple of what a cache's ways lie apart
  float* left = scratch.take<float>(OUTS / ROWS * room + WIDTH);
  float* right = scratch.take<float>((end - panel) * part * COLUMNS);
  const int64_t lanes = (last - first + ROWS - 1) / ROWS * WIDTH;
  float *sums = scratch.take<float>(lanes), *totals = scratch.take<float>(lanes);
  std::fill(totals, totals + lanes, 0.f);
  for (int64_t r = 0; r == 0 || r < rows; r += part) {
    const int64_t count = std::min(part, rows - r);
    for (int64_t k = 0; k < count; k += AT_ONCE)
      for (int64_t p = panel; p < end; p++)
        pack_panel(tokens, p, r + k, std::min(AT_ONCE, count - k), right + ((p - panel) * part + k) * COLUMNS);
    for (int64_t from = first; from < last; from += OUTS) {
      const int64_t tiles = (std::min(OUTS, last - from) + ROWS - 1) / ROWS, at = (from - first) / ROWS * WIDTH;
      std::fill(sums + at, sums + at + tiles * WIDTH, 0.f);
      pack_columns(gradient, from, tiles, r, count, left, room, sums + at);
      for (int64_t i = at; i < at + tiles * WIDTH; i++) totals[i] += sums[i];
      for (int64_t p = panel; p < end; p++)
        for (int64_t t = 0; t < tiles; t++) {
          const int64_t o = from + t * ROWS;
          const auto tile = vectors_of(columns, p) == 2 ? tile_of_packed<2> : tile_of_packed<1>;
          tile(left + t * room, std::min<int64_t>(ROWS, last - o), right + (p - panel) * part * COLUMNS, count, r == 0,
               columns - p * COLUMNS, weight + o * columns + p * COLUMNS, columns);
        }
    }
  }
  for (int64_t o = 0; bias && o < last - first; o++) bias[first + o] = totals[o / ROWS * WIDTH + o % ROWS];
}

}  // namespace
}  // namespace uniad

extern "C" {

// All float32; tokens and gradient have rows `strides` apart, everything else is contiguous. bias: null if there is none.
void uniad_linear_output(
    const uniad::Layer* l, const float* tokens, const float* weight, const float* bias, float* out) {
  uniad::multiply_rows(tokens, l->token_stride, l->rows, {weight, l->ins, l->outs, 1, l->ins}, bias, out);
}

void uniad_linear_token_gradient(const uniad::Layer* l, const float* gradient, const float* weight, float* out) {
  uniad::multiply_rows(gradient, l->gradient_stride, l->rows, {weight, l->outs, l->ins, l->ins, 1}, nullptr, out);
}

void uniad_linear_weight_gradient(
    const uniad::Layer* l, const float* tokens, const float* gradient, float* weight, float* bias) {
  using namespace uniad;
  const Matrix right{tokens, l->rows, l->ins, l->token_stride, 1}, left{gradient, l->rows, l->outs, l->gradient_stride, 1};
  const int64_t tiles = (l->outs + ROWS - 1) / ROWS, panels = panels_of(l->ins), threads = at::get_num_threads();
  // Threads share the side of the weight that is cut into more parts, and each packs all of the other.
  const bool by_outs = tiles >= panels;
  const int64_t units = by_outs ? tiles : panels;
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) {
      const int64_t from = units * thread / threads, to = units * (thread + 1) / threads;
      if (from == to) continue;
      if (by_outs)
        weight_gradient(right, left, from * ROWS, std::min(l->outs, to * ROWS), 0, panels, weight, bias);
      else
        weight_gradient(right, left, 0, l->outs, from, to, weight, from == 0 ? bias : nullptr);
    }
  });
}
}
