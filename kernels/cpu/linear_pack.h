// The operands of a linear layer's products, packed into words (see simd.h): what linear.cpp multiplies.
#pragma once

#include <algorithm>

#include "pack.h"

namespace uniad {
namespace {

// A tile: rows of the left operand by vectors of the right one. With AVX-512 four vectors are loaded where twelve rows
// would be, from fewer places.
constexpr int TILE = LANES == 16 ? 6 : ROWS, VECTORS = LANES == 16 ? 4 : 2;
constexpr int64_t COLUMNS = VECTORS * LANES;
constexpr int64_t DEPTH = LANES == 16 ? 128 : 320;      // words of a part: 32 or 20 KiB of a panel
constexpr int64_t ROW_DEPTH = LANES == 16 ? 256 : 320;  // the same where rows are summed
constexpr int64_t OUTS = 96;    // of a weight's gradient, packed together: whole tiles, whole vectors
constexpr int64_t LINE = 64 / sizeof(uint32_t);
constexpr int64_t AHEAD = 32;   // rows between one that is packed and the one that is fetched
constexpr int64_t AT_ONCE = 8;  // words of rows that are packed together: as many streams as a processor fetches ahead
static_assert(OUTS % TILE == 0 && OUTS % LANES == 0);

template <class Mode> using Element = std::conditional_t<Mode::PAIR == 2, bf16, float>;

template <class S> struct Matrix {
  const S* data;
  int64_t rows, columns, row_stride, column_stride;
};

template <class Mode> int64_t words_of(int64_t elements) { return (elements + Mode::PAIR - 1) / Mode::PAIR; }

int64_t panels_of(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }

// Length of the parts, of `most` at most, that a summed axis is cut into.
int64_t part_of(int64_t length, int64_t most) {
  const int64_t parts = std::max<int64_t>(1, (length + most - 1) / most);
  return std::max<int64_t>(1, (length + parts - 1) / parts);
}

// Vectors of a panel that hold any column.
int64_t vectors_of(int64_t columns, int64_t panel) {
  return std::min<int64_t>(VECTORS, (columns - panel * COLUMNS + LANES - 1) / LANES);
}

// f(number of vectors as a constant)
template <class F> INLINE void with_vectors(int64_t vectors, F f) {
  if (vectors == 1) f(std::integral_constant<int, 1>{});
  if (vectors == 2) f(std::integral_constant<int, 2>{});
  if constexpr (VECTORS == 4) {
    if (vectors == 3) f(std::integral_constant<int, 3>{});
    if (vectors == 4) f(std::integral_constant<int, 4>{});
  }
}

// Word k of the column at `from` and its neighbours, of which `left` exist, along `rows` rows. Later ones, which lie apart,
// are fetched: two operands of whole layers pass by, from memory.
template <class Mode, class S> INLINE vword row_word(const S* from, int64_t stride, int64_t k, int64_t rows, int64_t left) {
#pragma GCC unroll 2
  for (int i = 0; i < Mode::PAIR; i++) __builtin_prefetch(from + (Mode::PAIR * k + AHEAD + i) * stride, 0, 3);
  const auto row = [&](int64_t r) { return widen_vector(from + r * stride, left); };
  if constexpr (Mode::PAIR == 1) return (vword)row(k);
  const vfloat first = row(2 * k), second = 2 * k + 1 < rows ? row(2 * k + 1) : vfloat{};
  if constexpr (sizeof(S) == 2) return (vword)first >> 16 | (vword)second;
  return pair_lanes<Mode>(first, second);
}

// Word k of column c along the rows, zeros beyond them.
template <class Mode, class S> uint32_t word_at(const Matrix<S>& m, int64_t k, int64_t c) {
  uint32_t word = 0;
  for (int i = 0; i < Mode::PAIR; i++) {
    const int64_t r = Mode::PAIR * k + i;
    if (r >= m.rows || c >= m.columns) continue;
    Element<Mode> element;
    narrow(widen(m.data[r * m.row_stride + c * m.column_stride]), &element);
    memcpy((char*)&word + i * sizeof element, &element, sizeof element);
  }
  return word;
}

// Words first .. first + count - 1 of one panel of a matrix, zeros beyond its columns.
template <class Mode, class S>
void pack_panel(const Matrix<S>& m, int64_t panel, int64_t first, int64_t count, uint32_t* out) {
  for (int64_t v = 0; v < vectors_of(m.columns, panel); v++, out += LANES) {
    const int64_t column = panel * COLUMNS + v * LANES, left = m.columns - column;
    const S* from = m.data + column * m.column_stride;
    int64_t k = 0;
    if (m.column_stride == 1)
      for (; k < count; k++) store(out + k * COLUMNS, row_word<Mode>(from, m.row_stride, first + k, m.rows, left));
    if constexpr (sizeof(S) == 4)
      if (m.row_stride == 1 && left >= LANES)
        for (; k + LANES <= count && Mode::PAIR * (first + k + LANES) <= m.rows; k += LANES) {
          alignas(64) uint32_t block[LANES * LANES];
          for (int c = 0; c < LANES; c++) {
            const S* row = from + c * m.column_stride + Mode::PAIR * (first + k);
            store(block + c * LANES, join_lanes<Mode>(row));
          }
          transpose(block, LANES, out + k * COLUMNS, COLUMNS);
        }
    for (; k < count; k++)
      for (int64_t c = 0; c < LANES; c++) out[k * COLUMNS + c] = word_at<Mode>(m, first + k, column + c);
  }
}

// `count` words of `columns` columns from `first` on, at most OUTS, zeros beyond the matrix, [word][OUTS]. What the columns
// sum up to is added to `sums`.
template <class Mode>
void pack_columns(
    const Matrix<Element<Mode>>& m, int64_t first, int64_t columns, int64_t begin, int64_t count, uint32_t* out, float* sums) {
  for (int64_t k = 0; k < count; k += AT_ONCE)
    for (int64_t c = 0; c < columns; c += LANES) {
      vfloat sum = load<vfloat>(sums + c);
      for (int64_t i = k; i < std::min(k + AT_ONCE, count); i++) {
        const vword word = row_word<Mode>(m.data + first + c, m.row_stride, begin + i, m.rows, m.columns - first - c);
        if constexpr (Mode::PAIR == 2) sum += (vfloat)(word << 16) + (vfloat)(word & 0xffff0000);
        else sum += (vfloat)word;
        store(out + i * OUTS + c, word);
      }
      store(sums + c, sum);
    }
}

}  // namespace
}  // namespace uniad
