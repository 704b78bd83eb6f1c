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

#include "simd.h"

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

// The part of `total` things that is one of the threads'.
struct Share {
  int64_t begin, end;

  Share(int64_t total, int64_t thread, int64_t threads)
      : begin(total * thread / threads), end(total * (thread + 1) / threads) {}
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

// sum[r][v] = over c of weight[r * ins + c] * in[c][v]. The rows' pointers are kept apart: their distance varies.
// A float is spread as the word that it is: as a number it would be added to zero first.
template <int R, int V> INLINE void tile_sums(
    const float* weight, int64_t ins, const float* in, bool is_first, vfloat (&sum)[R][V]) {
  const uint32_t* row[R];
#pragma GCC unroll 24
  for (int r = 0; r < R; r++) {
    row[r] = (const uint32_t*)weight + r * ins;
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[r][v] = vfloat{};
  }
  constexpr int64_t LINE = 64 / sizeof(float);
  for (int64_t begin = 0; begin < ins; begin += LINE) {
    const int64_t end = std::min(begin + LINE, ins);
    // The next tile's weights, which may still lie in memory. Later panels find them in the cache.
    if (is_first)
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) __builtin_prefetch(row[r] + R * ins + begin, 0, 2);
#pragma GCC unroll 1
    for (int64_t c = begin; c < end; c++) {
      vfloat right[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) right[v] = load<vfloat>(in + (c * V + v) * LANES);
#pragma GCC unroll 24
      for (int r = 0; r < R; r++) {
        const vfloat left = (vfloat)splat_word(row[r][c]);
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sum[r][v] += left * right[v];
      }
    }
  }
}

// Outputs first .. first + R - 1 of one panel, V vectors wide.
template <int R, int V>
inline __attribute__((noinline)) void tile(
    const Product& p, int64_t first, const float* in, const float* residual, bool is_first, float* out) {
  vfloat sum[R][V];
  tile_sums<R, V>(p.weight + first * p.ins, p.ins, in, is_first, sum);
#pragma GCC unroll 24
  for (int r = 0; r < R; r++) {
    const float bias = p.bias ? p.bias[first + r] : 0.f;
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      const int64_t at = ((first + r) * V + v) * LANES;
      vfloat x = sum[r][v] + bias;
      if (p.relu) x = vmax(vfloat{}, x);
      if (residual) x += load<vfloat>(residual + at);
      store(out + at, x);
    }
  }
}

template <int V>
void tiles(
    const Product& p, int64_t first, int64_t last, const float* in, const float* residual, bool is_first, float* out) {
  constexpr int R = V == 2 ? TILE : NARROW_TILE;
  int64_t o = first;
  for (; o + R <= last; o += R) tile<R, V>(p, o, in, residual, is_first, out);
  if constexpr (V == 1) {
    for (; o + TILE <= last; o += TILE) tile<TILE, 1>(p, o, in, residual, is_first, out);
  }
  for (; o + 2 <= last; o += 2) tile<2, V>(p, o, in, residual, is_first, out);
  for (; o < last; o++) tile<1, V>(p, o, in, residual, is_first, out);
}

// This thread's part of the product of `batch` sequences.
inline void multiply_panels(
    const Product& p, int64_t batch, Tokens tokens, Panels in, Panels out, int64_t thread, int64_t threads) {
  // A block of weights stays in the second-level cache while all panels pass by; a panel stays in the first.
  constexpr int64_t CACHED = 48 * 1024;
  const int64_t units = (p.outs + NARROW_TILE - 1) / NARROW_TILE;
  const int64_t most = std::max<int64_t>(1, CACHED / p.ins / NARROW_TILE), blocks = (units + most - 1) / most;
  const int64_t per_block = (units + blocks - 1) / blocks, block = per_block * NARROW_TILE;
  const int64_t groups = tokens.panels() * batch;
  const Share share(blocks * groups * per_block, thread, threads);
  for (int64_t i = share.begin; i < share.end;) {
    const int64_t at = i / per_block, from = i % per_block, to = std::min(per_block, from + share.end - i);
    const int64_t sequence = at % groups / tokens.panels(), panel = at % groups % tokens.panels();
    const int64_t base = at / groups * block, width = tokens.width(panel);
    const int64_t first = std::min(p.outs, base + from * NARROW_TILE), last = std::min(p.outs, base + to * NARROW_TILE);
    const float* x = in.at(sequence, panel, width);
    const float* r = p.residual.data ? p.residual.at(sequence, panel, width) : nullptr;
    float* y = out.at(sequence, panel, width);
    const bool is_first = at % groups == 0 || i == share.begin;  // to read this block
    if (width == PANEL) tiles<2>(p, first, last, x, r, is_first, y);
    else tiles<1>(p, first, last, x, r, is_first, y);
    i += to - from;
  }
}

}  // namespace uniad
