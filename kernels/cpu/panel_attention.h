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
          const vfloat x = seen ? select(seen[at] >> v * LANES, sum[r][v], lowest) : sum[r][v];
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
