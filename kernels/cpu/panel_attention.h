// Softmax attention and LayerNorm over panels: a lane is a query, so that neither needs a sum across lanes.
#pragma once

#include <limits>

#include "panels.h"

namespace uniad {

// f(first row, constant number of rows) over [0, rows) in tiles V vectors wide, as tall as the registers allow.
template <int V, class F> INLINE void over_tiles(int64_t rows, F f) {
  if constexpr (V == 2 && TAIL == 1) {
    over_rows(rows, f);
  } else {
    constexpr int R = V == 2 ? ROWS : 2 * ROWS;
    int64_t r = 0;
    for (; r + R <= rows; r += R) f(r, std::integral_constant<int, R>{});
    for (; r + 4 <= rows; r += 4) f(r, std::integral_constant<int, 4>{});
    for (; r < rows; r++) f(r, std::integral_constant<int, 1>{});
  }
}

// One head's keys or values: panels in which its channels begin at `first`.
struct Head {
  Panels panels;
  int64_t sequence;

  const uint32_t* at(Tokens tokens, int64_t panel, int64_t channel) const {
    const int64_t width = tokens.width(panel);
    return (const uint32_t*)panels.at(sequence, panel, width) + channel * width;
  }
};

// weights [key][V * LANES] = scores, and the largest of each query; what is hidden is -inf.
template <int V>
INLINE void score(
    Tokens tokens, int64_t head_dim, const float* query, const Head& key, const uint32_t* seen, float* weights,
    vfloat (&most)[V]) {
  const vfloat lowest = splat(-std::numeric_limits<float>::infinity());
  for (int v = 0; v < V; v++) most[v] = lowest;
  for (int64_t panel = 0; panel < tokens.panels(); panel++) {
    const int64_t width = tokens.width(panel), first = panel * PANEL;
    const uint32_t* keys = key.at(tokens, panel, 0);
    over_tiles<V>(std::min(width, tokens.count - first), [&](int64_t k, auto rows) {
      constexpr int R = rows;
      vfloat sum[R][V] = {};
      multiply<Single, 1, R, V>(keys + k, width, (const uint32_t*)query, V * LANES, head_dim, sum);
#pragma GCC unroll 24
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          const int64_t at = first + k + r;
          const vfloat x = seen ? select(seen[at], sum[r][v], lowest, v * LANES) : sum[r][v];
          most[v] = vmax(most[v], x);
          store(weights + (at * V + v) * LANES, x);
        }
    });
  }
}

template <int V>
void attention_of(
    Tokens tokens, int64_t head_dim, const float* query, const Head& key, const Head& value, const uint32_t* seen,
    float* weights, float* out) {
  const float scale = 1.4426950408889634f / std::sqrt((float)head_dim);  // of exponents of 2
  vfloat most[V], total[V];
  score<V>(tokens, head_dim, query, key, seen, weights, most);
  for (int v = 0; v < V; v++) total[v] = vfloat{};
  for (int64_t k = 0; k < tokens.count; k++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      float* at = weights + (k * V + v) * LANES;
      // The difference first: of large products it is exact, and their scaled values are not.
      const vfloat weight = exp2<6>((load<vfloat>(at) - most[v]) * scale);
      total[v] += weight;
      store(at, weight);
    }
  for (int v = 0; v < V; v++) total[v] = 1.f / total[v];
  over_tiles<V>(head_dim, [&](int64_t d, auto rows) {
    constexpr int R = rows;
    vfloat sum[R][V] = {};
    for (int64_t panel = 0; panel < tokens.panels(); panel++) {
      const int64_t first = panel * PANEL, keys = std::min<int64_t>(PANEL, tokens.count - first);
      const uint32_t *x = value.at(tokens, panel, d), *w = (const uint32_t*)weights + first * V * LANES;
      if (tokens.width(panel) == PANEL)
        multiply<Single, PANEL, R, V>(x, 1, w, V * LANES, keys, sum);
      else
        multiply<Single, LANES, R, V>(x, 1, w, V * LANES, keys, sum);
    }
#pragma GCC unroll 24
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) store(out + ((d + r) * V + v) * LANES, sum[r][v] * total[v]);
  });
}

// Working memory of `tiled_attention`, in words.
struct TiledRoom {
  int64_t dims, keys;  // padded to whole tiles

  TiledRoom(Tokens tokens, int64_t head_dim) : dims(round_up(head_dim, 2 * SIDE)), keys(round_up(tokens.count, 2 * SIDE)) {}

  int64_t words() const { return dims * keys + (dims / 2 + dims) * PANEL + (keys + keys / 2) * PANEL; }
};

#if defined(UNIAD_AMX)
// Attention with products by tiles: operands are rounded to bfloat16, sums and the softmax are float32.
class TiledAttention {
 public:
  // room: `TiledRoom::words`.
  TiledAttention(Tokens tokens, int64_t head_dim, uint32_t* room)
      : tokens_(tokens), head_dim_(head_dim), size_(tokens, head_dim) {
    keys_ = room;
    values_ = keys_ + size_.keys * size_.dims / 2;
    query_ = values_ + size_.dims * size_.keys / 2;
    out_ = (float*)(query_ + size_.dims / 2 * PANEL);
    scores_ = out_ + size_.dims * PANEL;
    weights_ = (uint32_t*)(scores_ + size_.keys * PANEL);
  }

  // Take one head's keys and values as left operands: keys [keys][dims / 2], values [dims][keys / 2].
  void take(const Head& key, const Head& value) {
    std::fill(keys_, keys_ + size_.keys * size_.dims / 2, 0);
    std::fill(values_, values_ + size_.dims * size_.keys / 2, 0);
    for (int64_t panel = 0; panel < tokens_.panels(); panel++) {
      const int64_t width = tokens_.width(panel), first = panel * PANEL;
      for (int64_t d = 0; d < head_dim_; d += 2 * SIDE)
        for (int64_t t = 0; t < width; t += SIDE) {
          uint32_t pairs[SIDE * SIDE] = {};
          for (int64_t c = d; c < std::min(d + 2 * SIDE, head_dim_); c += 2) {
            const float* at = (const float*)key.at(tokens_, panel, c) + t;
            const vfloat high = c + 1 < head_dim_ ? load<vfloat>(at + width) : vfloat{};
            store(pairs + (c - d) / 2 * SIDE, pair_lanes<Half>(load<vfloat>(at), high));
          }
          transpose(pairs, SIDE, keys_ + (first + t) * (size_.dims / 2) + d / 2, size_.dims / 2);
        }
      for (int64_t d = 0; d < head_dim_; d++)
        for (int64_t t = 0; t < width; t += SIDE) {
          // What lies in lanes beyond the last token may be anything, and 0 * NaN is NaN.
          const int64_t left = tokens_.count - first - t;
          const __mmask16 there = left >= SIDE ? 0xffff : (1 << left) - 1;
          const float* at = (const float*)value.at(tokens_, panel, d) + t;
          store(values_ + d * (size_.keys / 2) + (first + t) / 2, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, at)));
        }
    }
  }

  // As `attention_of`, for the head that was taken.
  template <int V> void run(const float* query, const uint32_t* seen, float* out) {
    const float scale = 1.4426950408889634f / std::sqrt((float)head_dim_);  // of exponents of 2
    const vfloat lowest = splat(-std::numeric_limits<float>::infinity());
    constexpr int64_t WIDE = V * LANES;
    pair_panel(query, head_dim_, WIDE, size_.dims / 2, query_);
    multiply_tiles<false>(keys_, size_.dims / 2, query_, WIDE, size_.dims / 2, size_.keys, WIDE, scores_, WIDE);
    vfloat most[V], total[V];
    for (int v = 0; v < V; v++) most[v] = lowest, total[v] = vfloat{};
    for (int64_t k = 0; k < tokens_.count; k++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        float* at = scores_ + (k * V + v) * LANES;
        const vfloat x = seen ? select(seen[k], load<vfloat>(at), lowest, v * LANES) : load<vfloat>(at);
        most[v] = vmax(most[v], x);
        store(at, x);
      }
    for (int64_t k = tokens_.count; k < size_.keys; k++)
      for (int v = 0; v < V; v++) store(scores_ + (k * V + v) * LANES, lowest);
    for (int64_t k = 0; k < size_.keys; k += 2)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        // The difference first: of large products it is exact, and their scaled values are not.
        const float* at = scores_ + (k * V + v) * LANES;
        const vfloat low = exp2<3>((load<vfloat>(at) - most[v]) * scale);
        const vfloat high = exp2<3>((load<vfloat>(at + WIDE) - most[v]) * scale);
        total[v] += low + high;
        store(weights_ + (k / 2 * V + v) * LANES, pair_lanes<Half>(low, high));
      }
    multiply_tiles<false>(values_, size_.keys / 2, weights_, WIDE, size_.keys / 2, size_.dims, WIDE, out_, WIDE);
    for (int v = 0; v < V; v++) total[v] = 1.f / total[v];
    for (int64_t d = 0; d < head_dim_; d++)
      for (int v = 0; v < V; v++) {
        const int64_t at = (d * V + v) * LANES;
        store(out + at, load<vfloat>(out_ + at) * total[v]);
      }
  }

 private:
  Tokens tokens_;
  int64_t head_dim_;
  TiledRoom size_;
  uint32_t *keys_, *values_, *query_, *weights_;
  float *out_, *scores_;
};
#endif

// The output of one head for one panel of queries.
//
// seen: [panel][key], a bit a query of the panel: whether it sees that key; or null, where all see all.
// weights: room for tokens.count * PANEL.
inline void panel_attention(
    Tokens tokens, int64_t head_dim, Panels query, Panels key, Panels value, Panels out, const uint32_t* seen,
    int64_t sequence, int64_t head, int64_t panel, float* weights) {
  const int64_t width = tokens.width(panel), channel = head * head_dim;
  const float* q = query.at(sequence, panel, width) + channel * width;
  float* to = out.at(sequence, panel, width) + channel * width;
  if (seen) seen += panel * tokens.count;
  key.first += channel;
  value.first += channel;
  if (width == PANEL)
    attention_of<2>(tokens, head_dim, q, {key, sequence}, {value, sequence}, seen, weights, to);
  else
    attention_of<1>(tokens, head_dim, q, {key, sequence}, {value, sequence}, seen, weights, to);
}

// to = LayerNorm(from) over the channels of a panel; placed = to + position, unless it is null. `to` may be `from`.
inline void norm_panel(
    const float* weight, const float* bias, float eps, int64_t channels, int64_t width, const float* from, float* to,
    const float* position, float* placed) {
  for (int64_t t = 0; t < width; t += LANES) {
    vfloat sum[4] = {}, squares[4] = {};
    const auto sum_of = [](const vfloat (&parts)[4]) { return (parts[0] + parts[1]) + (parts[2] + parts[3]); };
    for (int64_t c = 0; c < channels; c++) sum[c % 4] += load<vfloat>(from + c * width + t);
    const vfloat mean = sum_of(sum) / (float)channels;
    for (int64_t c = 0; c < channels; c++) {
      const vfloat d = load<vfloat>(from + c * width + t) - mean;
      squares[c % 4] += d * d;
    }
    const vfloat variance = sum_of(squares) / (float)channels + eps;
    vfloat rstd{};
    for (int l = 0; l < LANES; l++) rstd[l] = 1.f / std::sqrt(variance[l]);
    for (int64_t c = 0; c < channels; c++) {
      const int64_t at = c * width + t;
      const vfloat y = (load<vfloat>(from + at) - mean) * rstd * weight[c] + bias[c];
      store(to + at, y);
      if (placed) store(placed + at, y + load<vfloat>(position + at));
    }
  }
}

}  // namespace uniad
