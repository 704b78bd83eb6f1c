// The three products of a linear layer whose weight is float32; tokens and gradients are float32 or bfloat16:
//
//     output  [R, O] = tokens [R, I] times weight [O, I]^T + bias [O], then ReLU and dropout where they come next
//     gradient of tokens [R, I] = gradient [R, O] times weight [O, I], then that of the ReLU and dropout before it
//     gradients of weight [O, I] = gradient [R, O]^T times tokens [R, I], and of bias [O] = sum over R of gradient
//
// The right operand is packed into panels of words (see simd.h), [panel][summed axis][COLUMNS], of which a part is in the
// first-level cache while tiles of the left one pass by. Rows of tokens are read as they lie, a word broadcast at a time, so
// that nothing of their size is written but the result. A weight's gradient is summed over them: there both operands are
// packed, a part of the rows at a time, which needs no turning. A part's sum is in registers, the total in memory, and what
// follows a product is done when the last part is there; in which order things are added does not depend on the number of
// threads.
#include <algorithm>

#include "linear_pack.h"
#include "philox.h"
#include "scratch.h"
#include "tasks.h"

namespace uniad {
namespace {

constexpr int64_t BLOCK = 96;  // rows of the left operand whose part stays in the second-level cache, at most

struct Layer {
  int64_t rows, ins, outs, token_stride, gradient_stride;  // strides of rows, in elements
};

// ReLU and dropout of [rows, columns], as dropout.cpp has them; keep_threshold 0: no dropout.
struct Dropout {
  float keep_scale;
  uint32_t keep_threshold;
  int64_t seed, first_row;
};

// Where a tile's sums go, and what is done to them before.
template <class Mode> struct Ending {
  Element<Mode>* out;
  int64_t columns;                 // of the result, and from one row of it to the next
  const float* bias;               // padded to whole panels, or null
  const Dropout* dropout;          // null: no ReLU either
  const uint64_t* keep;            // of the block's first row, `keep_words` for each; null: everything
  int64_t keep_words;
  const Element<Mode>* activated;  // what ReLU and dropout gave: their gradient is asked for; or null
  float activated_scale;
};

template <class Mode, int V>
INLINE void end_tile(vfloat (&sum)[TILE][V], const Ending<Mode>& e, int64_t row, int64_t column, int64_t row_in_block,
                     int64_t valid) {
  if (valid == TILE && column + V * LANES <= e.columns && !e.dropout && !e.activated) {  // as most are
    vfloat shift[V] = {};
#pragma GCC unroll 4
    for (int v = 0; e.bias && v < V; v++) shift[v] = load<vfloat>(e.bias + column + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) narrow_vector(sum[r][v] + shift[v], e.out + (row + r) * e.columns + column + v * LANES);
    return;
  }
#pragma GCC unroll 8
  for (int r = 0; r < TILE; r++) {
    if (r >= valid) return;
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const int64_t c = column + v * LANES, left = e.columns - c, at = (row + r) * e.columns + c;
      vfloat x = sum[r][v];
      if (e.bias) x += load<vfloat>(e.bias + c);
      if (e.dropout) {
        x = vmax(vfloat{}, x);
        if (e.keep) {
          const uint64_t bits = e.keep[(row_in_block + r) * e.keep_words + c / 64];
          x = where((mask_t)(bits >> c % 64), x * e.dropout->keep_scale);
        }
      }
      if (e.activated) x = widen_vector(e.activated + at, left) > 0.f ? x * e.activated_scale : vfloat{};
      narrow_vector(x, e.out + at, left);
    }
  }
}

// TILE rows of the left operand, of which the first `valid` count, times `depth` words of a panel.
template <class Mode, int V>
INLINE void multiply_tile(const uint32_t* left, int64_t stride, int64_t valid, const uint32_t* panel, int64_t depth,
                          vfloat (&sum)[TILE][V]) {
  const uint32_t* row[TILE];
#pragma GCC unroll 8
  for (int r = 0; r < TILE; r++) {
    row[r] = left + std::min<int64_t>(r, valid - 1) * stride;
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[r][v] = vfloat{};
  }
  for (int64_t begin = 0; begin < depth; begin += LINE) {
    const int64_t end = std::min(begin + LINE, depth);
    // The next tile's rows lie apart, so that nothing else fetches them in time.
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++) __builtin_prefetch(row[r] + TILE * stride + begin, 0, 3);
#pragma GCC unroll 4
    for (int64_t k = begin; k < end; k++) {
      vword right[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) right[v] = load<vword>(panel + k * COLUMNS + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < TILE; r++) {
        const vword one = splat_word(row[r][k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = Mode::dot(sum[r][v], one, right[v]);
      }
    }
  }
}

template <int V> INLINE void add_totals(const float* totals, int64_t stride, vfloat (&sum)[TILE][V]) {
#pragma GCC unroll 8
  for (int r = 0; r < TILE; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[r][v] += load<vfloat>(totals + r * stride + v * LANES);
}

template <int V> INLINE void store_totals(const vfloat (&sum)[TILE][V], float* totals, int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < TILE; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(totals + r * stride + v * LANES, sum[r][v]);
}

// Rows first .. last - 1 of the left operand times one panel's part.
template <class Mode, int V>
__attribute__((noinline)) void multiply_block(
    const uint32_t* left, int64_t stride, int64_t first, int64_t last, const uint32_t* panel, int64_t depth, int64_t column,
    float* totals, bool is_first, bool is_last, const Ending<Mode>& ending) {
  for (int64_t r = first; r < last; r += TILE, totals += TILE * COLUMNS) {
    const int64_t valid = std::min<int64_t>(TILE, last - r);
    // What the tile will be written to, and what is read there before.
    if (is_last)
      for (int64_t i = 0; i < valid; i++)
        for (int64_t c = 0; c < V * LANES; c += 64 / sizeof(Element<Mode>)) {
          const int64_t at = (r + i) * ending.columns + column + c;
          __builtin_prefetch(ending.out + at, 1, 3);
          if (ending.activated) __builtin_prefetch(ending.activated + at, 0, 3);
        }
    vfloat sum[TILE][V];
    multiply_tile<Mode, V>(left + r * stride, stride, valid, panel, depth, sum);
    if (!is_first) add_totals(totals, COLUMNS, sum);
    if (is_last) end_tile<Mode, V>(sum, ending, r, column, r - first, valid);
    else store_totals(sum, totals, COLUMNS);
  }
}

// ending's result [rows, right.columns] = left [rows, right.rows] times right.
template <class Mode>
void multiply_rows(
    const uint32_t* left, int64_t stride, int64_t rows, const Matrix<float>& right, const float* bias, Ending<Mode> ending) {
  const int64_t panels = panels_of(right.columns), depth = words_of<Mode>(right.rows), part = part_of(depth, DEPTH);
  const int64_t threads = at::get_num_threads();
  if (rows == 0) return;
  Scratch scratch;
  uint32_t* packed = scratch.take<uint32_t>(panels * depth * COLUMNS);
  if (bias) {
    float* padded = scratch.take<float>(panels * COLUMNS);
    std::copy(bias, bias + right.columns, padded), std::fill(padded + right.columns, padded + panels * COLUMNS, 0.f);
    ending.bias = padded;
  }
  over_tasks(panels, [&](int64_t p, int64_t) { pack_panel<Mode>(right, p, 0, depth, packed + p * depth * COLUMNS); });
  // As many blocks for each thread; where one ends changes no sum.
  const int64_t turns = (rows + BLOCK * threads - 1) / (BLOCK * threads);
  const int64_t block = round_up((rows + turns * threads - 1) / (turns * threads), TILE);
  over_tasks((rows + block - 1) / block, [&](int64_t b, int64_t) {
    Scratch own;
    const int64_t first = b * block, last = std::min(rows, first + block);
    float* totals = own.take<float>(block * COLUMNS);
    Ending<Mode> here = ending;
    if (const Dropout* d = ending.dropout; d && d->keep_threshold != 0) {
      here.keep_words = (right.columns + 63) / 64;
      uint64_t* keep = own.take<uint64_t>(block * here.keep_words);
      for (int64_t r = first; r < last; r++)
        keep_columns(Key(d->seed), 0, (uint32_t)(d->first_row + r), here.keep_words, d->keep_threshold,
                     keep + (r - first) * here.keep_words);
      here.keep = keep;
    }
    for (int64_t p = 0; p < panels; p++)
      for (int64_t k = 0; k == 0 || k < depth; k += part) {  // a sum of nothing is the bias
        const int64_t count = std::min(part, depth - k);
        with_vectors(vectors_of(right.columns, p), [&](auto vectors) {
          multiply_block<Mode, vectors>(left + k, stride, first, last, packed + (p * depth + k) * COLUMNS, count,
                                        p * COLUMNS, totals, k == 0, k + part >= depth, here);
        });
      }
  });
}

// TILE columns of a left operand [depth][OUTS], of which the first `valid` count, times a panel: stored, or added.
template <class Mode, int V>
__attribute__((noinline)) void multiply_packed(
    const uint32_t* left, int64_t valid, const uint32_t* panel, int64_t depth, bool is_first, int64_t columns, float* out,
    int64_t out_stride) {
  for (int64_t r = 0; r < valid; r++)
    for (int64_t c = 0; c < V * LANES; c += LINE) __builtin_prefetch(out + r * out_stride + c, 1, 3);
  vfloat sum[TILE][V] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++) {
    vword right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) right[v] = load<vword>(panel + k * COLUMNS + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < TILE; r++) {
      const vword one = splat_word(left[k * OUTS + r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] = Mode::dot(sum[r][v], one, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < TILE; r++) {
    if (r >= valid) return;
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* at = out + r * out_stride + v * LANES;
      const int64_t left_columns = columns - v * LANES;
      narrow_vector(is_first ? sum[r][v] : widen_vector(at, left_columns) + sum[r][v], at, left_columns);
    }
  }
}

// Outputs [first, last) of the gradient of weight and, where there is `bias`, of bias; inputs of panels [panel, end).
template <class Mode>
void weight_gradient(
    const Matrix<Element<Mode>>& tokens, const Matrix<Element<Mode>>& gradient, int64_t first, int64_t last, int64_t panel,
    int64_t end, float* weight, float* bias) {
  Scratch scratch;
  const int64_t words = words_of<Mode>(tokens.rows), part = part_of(words, ROW_DEPTH), columns = tokens.columns;
  uint32_t* left = scratch.take<uint32_t>(part * OUTS);
  uint32_t* right = scratch.take<uint32_t>((end - panel) * part * COLUMNS);
  const int64_t padded = round_up(last - first, OUTS);
  float *sums = scratch.take<float>(padded), *totals = scratch.take<float>(padded);
  std::fill(totals, totals + padded, 0.f);
  for (int64_t k = 0; k == 0 || k < words; k += part) {
    const int64_t count = std::min(part, words - k);
    for (int64_t i = 0; i < count; i += AT_ONCE)
      for (int64_t p = panel; p < end; p++)
        pack_panel<Mode>(tokens, p, k + i, std::min(AT_ONCE, count - i), right + ((p - panel) * part + i) * COLUMNS);
    std::fill(sums, sums + padded, 0.f);
    for (int64_t from = first; from < last; from += OUTS) {
      const int64_t tiles = (std::min(OUTS, last - from) + TILE - 1) / TILE;
      pack_columns<Mode>(gradient, from, tiles * TILE, k, count, left, sums + from - first);
      for (int64_t p = panel; p < end; p++)
        for (int64_t t = 0; t < tiles; t++) {
          const int64_t o = from + t * TILE;
          with_vectors(vectors_of(columns, p), [&](auto vectors) {
            multiply_packed<Mode, vectors>(left + t * TILE, std::min<int64_t>(TILE, last - o),
                                           right + (p - panel) * part * COLUMNS, count, k == 0, columns - p * COLUMNS,
                                           weight + o * columns + p * COLUMNS, columns);
          });
        }
    }
    for (int64_t i = 0; i < padded; i++) totals[i] += sums[i];
  }
  if (bias) std::copy(totals, totals + last - first, bias + first);
}

template <class Mode>
void weight_gradient_by_threads(
    const Layer& l, const Element<Mode>* tokens, const Element<Mode>* gradient, float* weight, float* bias) {
  const Matrix<Element<Mode>> right{tokens, l.rows, l.ins, l.token_stride, 1};
  const Matrix<Element<Mode>> left{gradient, l.rows, l.outs, l.gradient_stride, 1};
  const int64_t tiles = (l.outs + TILE - 1) / TILE, panels = panels_of(l.ins), threads = at::get_num_threads();
  // Threads share one side of the weight, and each packs all of the other: the longer one where that is in equal parts,
  // or else the one of more parts.
  const bool by_outs = tiles >= panels && !(l.ins >= l.outs && panels % threads == 0);
  const int64_t units = by_outs ? tiles : panels;
  over_tasks(threads, [&](int64_t i, int64_t) {
    const int64_t from = units * i / threads, to = units * (i + 1) / threads;
    if (from == to) return;
    if (by_outs)
      weight_gradient<Mode>(right, left, from * TILE, std::min(l.outs, to * TILE), 0, panels, weight, bias);
    else
      weight_gradient<Mode>(right, left, 0, l.outs, from, to, weight, from == 0 ? bias : nullptr);
  });
}

// f(mode) of what tensors of a dtype are multiplied by: pairs only where there are any.
template <class F> void with_mode(int dtype, F f) {
  if (dtype == 0) f(Single{});
#if defined(UNIAD_BF16)
  if (dtype == 1) f(Half{});
#endif
}

}  // namespace
}  // namespace uniad

extern "C" {

// Whether tensors of bfloat16 can be multiplied, and are the faster for it.
int64_t uniad_linear_has_pairs() { return uniad::Brain::PAIR == 2; }

// dtype 0 float32, 1 bfloat16 (which needs instructions for pairs, and tokens and gradients at addresses and strides of
// whole words for the first two) of tokens, gradients, `out` and `activated`; weight, bias and their gradients are float32.
// tokens and gradient have rows `strides` apart, everything else is contiguous. Null where there is none: bias, dropout,
// activated.
void uniad_linear_output(
    int dtype, const uniad::Layer* l, const void* tokens, const float* weight, const float* bias,
    const uniad::Dropout* dropout, void* out) {
  uniad::with_mode(dtype, [&](auto mode) {
    using Mode = decltype(mode);
    uniad::Ending<Mode> ending{(uniad::Element<Mode>*)out, l->outs, nullptr, dropout, nullptr, 0, nullptr, 0.f};
    uniad::multiply_rows<Mode>((const uint32_t*)tokens, l->token_stride / Mode::PAIR, l->rows,
                               {weight, l->ins, l->outs, 1, l->ins}, bias, ending);
  });
}

void uniad_linear_token_gradient(
    int dtype, const uniad::Layer* l, const void* gradient, const float* weight, const uniad::Dropout* dropout,
    const void* activated, void* out) {
  uniad::with_mode(dtype, [&](auto mode) {
    using Mode = decltype(mode);
    using T = uniad::Element<Mode>;
    uniad::Ending<Mode> ending{(T*)out, l->ins, nullptr, nullptr, nullptr, 0, (const T*)activated,
                               dropout ? dropout->keep_scale : 1.f};
    uniad::multiply_rows<Mode>((const uint32_t*)gradient, l->gradient_stride / Mode::PAIR, l->rows,
                               {weight, l->outs, l->ins, l->ins, 1}, nullptr, ending);
  });
}

void uniad_linear_weight_gradient(
    int dtype, const uniad::Layer* l, const void* tokens, const void* gradient, float* weight, float* bias) {
  uniad::with_mode(dtype, [&](auto mode) {
    using Mode = decltype(mode);
    using T = uniad::Element<Mode>;
    uniad::weight_gradient_by_threads<Mode>(*l, (const T*)tokens, (const T*)gradient, weight, bias);
  });
}
}
