// Activations as the right operand of a product, from the first layer of a network to the last.
//
// A sequence of N tokens of C channels lies in panels of PANEL tokens, [panel][channel][token in the panel]; the last
// may be one vector of tokens wide instead of two. A product's tile reads a panel as it lies and a weight as torch keeps
// it, one row an output, and what it writes is a panel again: nothing is ever packed, so no copy of a weight exists
// that could be older than the weight.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "pack.h"
#include "tiles.h"

namespace uniad {

constexpr int PANEL = 2 * LANES;
// Outputs of a tile two vectors wide, and of one a vector wide: as many as leave registers for the operands.
constexpr int TILE = ROWS;
constexpr int NARROW_TILE = 2 * TILE;

// Where the panels of one sequence lie.
struct Tokens {
  int64_t count;

  int64_t padded() const { return round_up(count, LANES); }
  int64_t panels() const { return (count + PANEL - 1) / PANEL; }
  int64_t width(int64_t panel) const { return std::min<int64_t>(PANEL, padded() - panel * PANEL); }
};

// One of `parts` parts of `total` things.
struct Share {
  int64_t begin, end;

  Share(int64_t total, int64_t part, int64_t parts) : begin(total * part / parts), end(total * (part + 1) / parts) {}
};

// Where a product reads or writes: the sequences' panels, and which of their channels.
struct Panels {
  float* data;
  int64_t stride;    // from one sequence's to the next, 0 where all have the same
  int64_t channels;  // of a panel
  int64_t first = 0; // channel that a product's first output goes to

  float* at(int64_t sequence, int64_t panel, int64_t width) const {
    return data + sequence * stride + panel * PANEL * channels + first * width;
  }
};

// out = weight * in + bias, then what the product is for.
struct Product {
  const float* weight;  // [outs, ins], rows `ins` apart
  const float* bias;    // [outs], or null
  int64_t ins, outs;
  bool relu = false;
  Panels residual = {nullptr, 0, 0};  // added, of `outs` channels
};

// sum[r][v] = over words c of weight[r * words + c] * in[c][v]. The rows' pointers are kept apart: their distance varies.
template <class Mode, int R, int V> INLINE void tile_sums(
    const uint32_t* weight, int64_t words, const uint32_t* in, bool is_first, vfloat (&sum)[R][V]) {
  const uint32_t* row[R];
#pragma GCC unroll 24
  for (int r = 0; r < R; r++) {
    row[r] = weight + r * words;
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[r][v] = vfloat{};
  }
  constexpr int64_t LINE = 64 / sizeof(uint32_t);
  for (int64_t begin = 0; begin < words; begin += LINE) {
    const int64_t end = std::min(begin + LINE, words);
    // The next tile's weights, which may still lie in memory. Later panels find them in the cache.
    if (is_first)
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) __builtin_prefetch(row[r] + R * words + begin, 0, 2);
    int64_t c = begin;
#if defined(UNIAD_NEON)
#pragma GCC unroll 1
    for (; c + LANES <= end; c += LANES) {
      const uint32_t* words_of[R];
      for (int r = 0; r < R; r++) words_of[r] = row[r] + c;
      multiply_four<Mode>(words_of, in + c * V * LANES, V * LANES, sum);
    }
#endif
#pragma GCC unroll 1
    for (; c < end; c++) {
      vword right[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) right[v] = load<vword>(in + (c * V + v) * LANES);
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
        const vword left = splat_word(row[r][c]);
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sum[r][v] = Mode::dot(sum[r][v], left, right[v]);
      }
    }
  }
}

// Sums of output `o` of a panel, to where they belong.
template <int V>
INLINE void finish_output(const Product& p, int64_t o, const vfloat (&sum)[V], const float* residual, float* out) {
  const float bias = p.bias ? p.bias[o] : 0.f;
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    const int64_t at = (o * V + v) * LANES;
    vfloat x = sum[v] + bias;
    if (p.relu) x = vmax(vfloat{}, x);
    if (residual) x += load<vfloat>(residual + at);
    store(out + at, x);
  }
}

// What a tile multiplies: weights of the product's row `row` and those after it, and a panel, both as words.
struct Operands {
  const uint32_t *weight, *in;
  int64_t words, row;
  bool is_first;  // to read these weights from where torch keeps them
};

// Outputs first .. first + R - 1 of one panel, V vectors wide.
template <class Mode, int R, int V>
inline __attribute__((noinline)) void tile(
    const Product& p, int64_t first, const Operands& x, const float* residual, float* out) {
  vfloat sum[R][V];
  tile_sums<Mode, R, V>(x.weight + (first - x.row) * x.words, x.words, x.in, x.is_first, sum);
#pragma GCC unroll 24
  for (int r = 0; r < R; r++) finish_output(p, first + r, sum[r], residual, out);
}

template <class Mode, int V>
void tiles(const Product& p, int64_t first, int64_t last, const Operands& x, const float* residual, float* out) {
  if constexpr (IN_TILES<Mode>) {
    alignas(64) float sums[2 * SIDE * PANEL];
    for (int64_t o = first; o < last; o += 2 * SIDE) {
      const int64_t outs = std::min(2 * SIDE, last - o);  // rows of weights beyond them are whatever lies there
      multiply_tiles<false>(
          x.weight + (o - x.row) * x.words, x.words, x.in, V * LANES, x.words, round_up(outs, SIDE), V * LANES, sums,
          V * LANES);
      for (int64_t r = 0; r < outs; r++) {
        vfloat sum[V];
        for (int v = 0; v < V; v++) sum[v] = load<vfloat>(sums + (r * V + v) * LANES);
        finish_output(p, o + r, sum, residual, out);
      }
    }
    return;
  }
  constexpr int R = V == 2 ? TILE : NARROW_TILE;
  int64_t o = first;
  for (; o + R <= last; o += R) tile<Mode, R, V>(p, o, x, residual, out);
  if constexpr (V == 1) {
    for (; o + TILE <= last; o += TILE) tile<Mode, TILE, 1>(p, o, x, residual, out);
  }
  // Four outputs by two vectors are as many sums as multiplications are under way at a time.
  for (; o + 4 <= last; o += 4) tile<Mode, 4, V>(p, o, x, residual, out);
  for (; o + 2 <= last; o += 2) tile<Mode, 2, V>(p, o, x, residual, out);
  for (; o < last; o++) tile<Mode, 1, V>(p, o, x, residual, out);
}

// Elements of a block of weights, which stays in the second-level cache while all panels pass by; a panel stays in the
// first.
template <class Mode> constexpr int64_t CACHED = 48 * 1024 * Mode::PAIR;

// Outputs at a multiple of which threads divide a block.
template <class Mode> constexpr int64_t UNIT = IN_TILES<Mode> ? 2 * SIDE : NARROW_TILE;

// Of a row of operands: by tiles, whole ones, zeros at the end.
template <class Mode> constexpr int64_t words_of(int64_t ins) {
  return round_up((ins + Mode::PAIR - 1) / Mode::PAIR, IN_TILES<Mode> ? SIDE : 1);
}

// Words of a block of weights as pairs of bfloat16.
template <class Mode> int64_t weight_room(int64_t ins) {
  return std::max(CACHED<Mode> / 2, UNIT<Mode> * words_of<Mode>(ins));
}

// A thread's room for operands as pairs of bfloat16: a block of weights, then a panel.
template <class Mode> int64_t pair_room(int64_t ins) {
  return Mode::PAIR == 1 ? 0 : weight_room<Mode>(ins) + words_of<Mode>(ins) * PANEL;
}

#if defined(UNIAD_BF16)
// Rows of floats as `words` pairs of bfloat16 that are neighbours in their row.
inline void pair_weights(const float* from, int64_t rows, int64_t ins, int64_t words, uint32_t* to) {
  for (int64_t r = 0; r < rows; r++) {
    std::fill(to + r * words + (ins + 1) / 2, to + (r + 1) * words, 0);
    for (int64_t c = 0; c < ins; c += 2 * LANES) {
      const int64_t left = ins - c;
#if defined(UNIAD_NEON)
      const float* at = from + r * ins + c;
      const vfloat low = widen_vector(at, left);
      const vfloat high = left > LANES ? widen_vector(at + LANES, left - LANES) : vfloat{};
      const auto pairs = vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)low), (float32x4_t)high);
      memcpy(to + r * words + c / 2, &pairs, std::min<int64_t>(LANES, (left + 1) / 2) * 4);
#else
      const __mmask16 low = left >= LANES ? 0xffff : (1 << left) - 1;
      const __mmask16 high = left >= 2 * LANES ? 0xffff : left > LANES ? (1 << (left - LANES)) - 1 : 0;
      const __mmask16 stored = left >= 2 * LANES ? 0xffff : (1 << (left + 1) / 2) - 1;
      const float* at = from + r * ins + c;
      const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, at + LANES), _mm512_maskz_loadu_ps(low, at));
      _mm512_mask_storeu_epi32(to + r * words + c / 2, stored, (__m512i)pair);
#endif
    }
  }
}

// A panel's channels as `words` rows of pairs of bfloat16 that are neighbours in their token.
inline void pair_panel(const float* from, int64_t ins, int64_t width, int64_t words, uint32_t* to) {
  std::fill(to + (ins + 1) / 2 * width, to + words * width, 0);
  for (int64_t c = 0; c < ins; c += 2)
    for (int64_t t = 0; t < width; t += LANES) {
      const float* low = from + c * width + t;
      const vfloat high = c + 1 < ins ? load<vfloat>(low + width) : vfloat{};
      store(to + c / 2 * width + t, pair_lanes<Half>(load<vfloat>(low), high));
    }
}
#endif

// A part of the product of `batch` sequences. room: `pair_room` words of this thread's, where Mode has pairs.
template <class Mode>
inline void multiply_panels(
    const Product& p, int64_t batch, Tokens tokens, Panels in, Panels out, int64_t part, int64_t parts, uint32_t* room) {
  constexpr int64_t UNITS = UNIT<Mode>;
  const int64_t words = words_of<Mode>(p.ins), vectors = tokens.padded() / LANES;
  const int64_t most = std::max<int64_t>(1, CACHED<Mode> / (words * Mode::PAIR) / UNITS) * UNITS;
  const int64_t blocks = (p.outs + most - 1) / most, block = round_up((p.outs + blocks - 1) / blocks, UNITS);
  [[maybe_unused]] std::conditional_t<IN_TILES<Mode>, Tiles, int> in_tiles{};
  // Counted in vectors of outputs, one block after the other, in it one panel after the other: neither blocks nor panels
  // are all of one size.
  const Share share(p.outs * vectors * batch, part, parts);
  int64_t paired = -1;  // first output of the block whose weights are in `room`
  for (int64_t i = share.begin; i < share.end;) {
    const int64_t base = i / (batch * vectors * block) * block, size = std::min(block, p.outs - base);
    const int64_t in_block = i - base * batch * vectors, sequence = in_block / (vectors * size);
    const int64_t in_sequence = in_block % (vectors * size), panel = in_sequence / (2 * size);
    const int64_t width = tokens.width(panel), wide = width / LANES, begin = in_sequence - panel * 2 * size;
    const int64_t end = std::min(size * wide, begin + share.end - i), from = begin / wide, to = end / wide;
    const bool is_first = in_block < 2 * size || i == share.begin;
    i += end - begin;
    const auto whole = [&](int64_t o) { return o == size ? size : (o + UNITS / 2) / UNITS * UNITS; };
    const int64_t first = base + std::min(whole(from), size), last = base + std::min(whole(to), size);
    if (first == last) continue;
    const float* x = in.at(sequence, panel, width);
    const float* r = p.residual.data ? p.residual.at(sequence, panel, width) : nullptr;
    float* y = out.at(sequence, panel, width);
    Operands operands{(const uint32_t*)p.weight, (const uint32_t*)x, words, 0, is_first};
#if defined(UNIAD_BF16)
    if constexpr (Mode::PAIR == 2) {
      uint32_t* panel_room = room + weight_room<Mode>(p.ins);
      if (paired != base) {
        pair_weights(p.weight + base * p.ins, size, p.ins, words, room);
        paired = base;
      }
      pair_panel(x, p.ins, width, words, panel_room);
      operands = {room, panel_room, words, base, false};
    }
#endif
    (void)paired;
    if (width == PANEL) tiles<Mode, 2>(p, first, last, operands, r, y);
    else tiles<Mode, 1>(p, first, last, operands, r, y);
  }
}

}  // namespace uniad
