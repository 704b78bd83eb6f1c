// Forward pass of the attention: a task owns queries of one head and walks over its keys, a chunk at a time.
#pragma once

#include "attention_common.h"

namespace uniad {
namespace {

template <class Mode, class T> struct Forward {
  const Problem& p;
  const T *query, *key, *value;
  T* out;
  float* stats;  // [batch * heads][2][tokens], see `uniad_attention_forward`
  Strides query_strides, key_strides, value_strides, out_strides;

  // Queries [first, last) of one head.
  void task(int64_t plane, int64_t first, int64_t last) const {
    const int64_t width = p.lanes_dim(), words = width / Mode::PAIR, tokens = p.tokens();
    const int64_t groups = (last - first + GROUP - 1) / GROUP, chunk = std::min(KEYS, round_up(tokens, 64));
    [[maybe_unused]] std::conditional_t<IN_TILES<Mode>, Tiles, int> tiles{};
    Scratch scratch;
    uint32_t* keys_as_left = scratch.take<uint32_t>(words * chunk);  // of a product, as its mode takes it
    uint32_t* rows = scratch.take<uint32_t>(std::max<int64_t>(chunk, GROUP) * words);
    uint32_t* value_pairs = scratch.take<uint32_t>(chunk / Mode::PAIR * width);
    uint32_t* value_rows = IN_TILES<Mode> ? scratch.take<uint32_t>(width * chunk / Mode::PAIR) : nullptr;
    uint32_t* query_lanes = scratch.take<uint32_t>(words * GROUP);
    float* scores = scratch.take<float>(chunk * GROUP);
    uint32_t* weights = scratch.take<uint32_t>(chunk / Mode::PAIR * GROUP);
    float* sums = scratch.take<float>(groups * (width + 2) * GROUP);  // [groups][maximum, total, out...][GROUP]
    GroupMasks masks(scratch, p);
    for (int64_t begin = 0; begin < tokens; begin += chunk) {
      const int64_t end = std::min(begin + chunk, tokens), keys = padded_keys<Mode>(end - begin);
      pack_rows<Mode>(plane_start(key, key_strides, plane, p.heads) + begin * key_strides.token, key_strides.token,
                      end - begin, round_up(keys, LANES), p.head_dim, width, IN_TILES<Mode> ? keys_as_left : rows);
      if constexpr (!IN_TILES<Mode>) transpose_rows(rows, round_up(keys, LANES), words, keys_as_left, chunk);
      pack_rows<Mode>(plane_start(value, value_strides, plane, p.heads) + begin * value_strides.token,
                      value_strides.token, end - begin, keys, p.head_dim, width, rows);
      pair_rows<Mode>(rows, keys, width, value_pairs);
      if constexpr (IN_TILES<Mode>) transpose_rows(value_pairs, keys / Mode::PAIR, width, value_rows, chunk / Mode::PAIR);
      const Keys of_chunk{keys_as_left, chunk, end - begin, keys, IN_TILES<Mode> ? value_rows : value_pairs};
      for (int64_t g = 0; g < groups; g++) {
        const int64_t q = first + g * GROUP, count = std::min<int64_t>(GROUP, last - q);
        float* state = sums + g * (width + 2) * GROUP;
        pack_rows<Mode>(plane_start(query, query_strides, plane, p.heads) + q * query_strides.token,
                        query_strides.token, count, GROUP, p.head_dim, width, rows);
        transpose_rows(rows, GROUP, words, query_lanes, GROUP);
        const int vectors = count > LANES ? 2 : 1;
        T* target = plane_start(out, out_strides, plane, p.heads) + q * out_strides.token;
        prefetch_rows<1>(target, out_strides.token, count);
        masks.start_group(p, q);
        masks.start_chunk(p, plane, q, vectors, begin, end);
        if (vectors == 2)
          add_chunk<2>(of_chunk, query_lanes, masks, begin == 0, scores, weights, state);
        else
          add_chunk<1>(of_chunk, query_lanes, masks, begin == 0, scores, weights, state);
        if (end == tokens) finish(plane, q, count, state, (float*)rows);
      }
    }
  }

  // A chunk of keys and values. By vectors: keys [words][room], values [padded / PAIR][width]. By tiles: keys [padded]
  // [words], values [width][room / PAIR].
  struct Keys {
    const uint32_t* keys;
    int64_t room, count, padded;
    const uint32_t* values;
  };

  // scores [padded][GROUP]: products of keys and queries, -inf where hidden. maximum: largest of a query, up to now.
  template <int V>
  INLINE void score(
      const Keys& of, const uint32_t* query_lanes, const GroupMasks& masks, float* scores, vfloat (&maximum)[V]) const {
    const int64_t words = p.lanes_dim() / Mode::PAIR;
    for (int64_t j = 0; j < of.padded; j += GROUP) {
      if (all_hidden(masks.hidden + j, GROUP)) {
        for (int i = 0; i < GROUP * GROUP; i += LANES) store(scores + j * GROUP + i, splat(-INF));
        continue;
      }
      multiply_tiles<false>(
          of.keys + j * words, words, query_lanes, GROUP, words, GROUP, V * LANES, scores + j * GROUP, GROUP);
      for (int64_t r = j; r < j + GROUP; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          float* at = scores + r * GROUP + v * LANES;
          const vfloat s = select(masks.hidden[r], splat(-INF), load<vfloat>(at), v * LANES);
          maximum[v] = vmax(maximum[v], s);
          store(at, s);
        }
    }
  }

  template <int V>
  void add_chunk(
      const Keys& of, const uint32_t* query_lanes, const GroupMasks& masks, bool is_first, float* scores,
      uint32_t* weights, float* state) const {
    const int64_t width = p.lanes_dim(), dim_words = (p.head_dim + Mode::PAIR - 1) / Mode::PAIR;
    const int64_t keys = of.padded, weighed = round_up(of.count, TAIL);
    vfloat maximum[V], total[V], pivot[V], correction[V];
    for (int v = 0; v < V; v++) maximum[v] = is_first ? splat(-INF) : load<vfloat>(state + v * LANES);

    if constexpr (IN_TILES<Mode>)
      score<V>(of, query_lanes, masks, scores, maximum);
    else over_rows(keys, [&](int64_t j, auto rows) {
      constexpr int R = rows;
      if (all_hidden(masks.hidden + j, R)) {
        for (int i = 0; i < R * GROUP; i += LANES) store(scores + j * GROUP + i, splat(-INF));
        return;
      }
      vfloat sum[R][V] = {};
      multiply<Mode, 1>(of.keys + j, of.room, query_lanes, GROUP, dim_words, sum);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const mask_t hidden = masks.hidden[j + r];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          const vfloat s = select(hidden, splat(-INF), sum[r][v], v * LANES);
          maximum[v] = vmax(maximum[v], s);
          store(scores + (j + r) * GROUP + v * LANES, s);
        }
      }
    });

    for (int v = 0; v < V; v++) {
      // A lane that has seen no key yet keeps a finite pivot: -inf - -inf would be NaN.
      pivot[v] = maximum[v] == -INF ? vfloat{} : maximum[v];
      const vfloat before = is_first ? splat(-INF) : load<vfloat>(state + v * LANES);
      correction[v] = exp2<Mode::EXP_DEGREE>((before - pivot[v]) * p.scale_log2);
      total[v] = is_first ? vfloat{} : load<vfloat>(state + GROUP + v * LANES) * correction[v];
      store(state + v * LANES, maximum[v]);
    }
    const bool dropout = p.keep_threshold != 0;
    for (int64_t j = 0; j < weighed; j += Mode::PAIR) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        vfloat weight[2];
#pragma GCC unroll 2
        for (int i = 0; i < Mode::PAIR; i++) {
          const vfloat s = load<vfloat>(scores + (j + i) * GROUP + v * LANES);
          weight[i] = exp2<Mode::EXP_DEGREE>((s - pivot[v]) * p.scale_log2);
          total[v] += weight[i];
          if (dropout) weight[i] = where_of(masks.keep + j + i, v, weight[i]);
        }
        store(weights + j / Mode::PAIR * GROUP + v * LANES, pair_lanes<Mode>(weight[0], weight[Mode::PAIR - 1]));
      }
    }
    for (int v = 0; v < V; v++) store(state + GROUP + v * LANES, total[v]);

    if constexpr (IN_TILES<Mode>) {
      std::fill(weights + weighed / Mode::PAIR * GROUP, weights + keys / Mode::PAIR * GROUP, 0);
      float* out_rows = state + 2 * GROUP;
      const int64_t stride = of.room / Mode::PAIR, summed = keys / Mode::PAIR;
      if (is_first)
        return multiply_tiles<false>(of.values, stride, weights, GROUP, summed, width, V * LANES, out_rows, GROUP);
      for (int64_t i = 0; i < width; i++)
        for (int v = 0; v < V; v++) {
          float* at = out_rows + i * GROUP + v * LANES;
          store(at, load<vfloat>(at) * correction[v]);
        }
      return multiply_tiles<true>(of.values, stride, weights, GROUP, summed, width, V * LANES, out_rows, GROUP);
    }
    over_rows(p.rows_dim(), [&](int64_t d, auto rows) {
      constexpr int R = rows;
      float* out_rows = state + (2 + d) * GROUP;
      vfloat sum[R][V] = {};
      if (!is_first)
        for (int r = 0; r < R; r++)
          for (int v = 0; v < V; v++) sum[r][v] = load<vfloat>(out_rows + r * GROUP + v * LANES) * correction[v];
      multiply<Mode, 1>(of.values + d, width, weights, GROUP, keys / Mode::PAIR, sum);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out_rows + r * GROUP + v * LANES, sum[r][v]);
    });
  }

  void finish(int64_t plane, int64_t q, int64_t count, float* state, float* columns) const {
    float *maxima = stats + 2 * plane * p.tokens() + q, *log_sums = maxima + p.tokens();
    for (int v = 0; v * LANES < count; v++) {
      const vfloat total = load<vfloat>(state + GROUP + v * LANES), maximum = load<vfloat>(state + v * LANES);
      const vint empty = total == 0.f;
      narrow_vector(empty ? vfloat{} : maximum, maxima + v * LANES, count - v * LANES);
      const vfloat log_sum = total == total ? log_of(total) * 1.44269504f : total;  // which has no NaN
      narrow_vector(empty ? splat(INF) : log_sum, log_sums + v * LANES, count - v * LANES);
      store(state + GROUP + v * LANES, empty ? vfloat{} : p.keep_scale / total);
    }
    T* target = plane_start(out, out_strides, plane, p.heads) + q * out_strides.token;
    float *rows = state + 2 * GROUP, *factor = state + GROUP;
    for (int64_t d = 0; d < p.head_dim; d += LANES) {
      const int64_t left = p.head_dim - d;
      for (int v = 0; v * LANES < count; v++) {
        float block[LANES * LANES];
        for (int i = 0; i < LANES; i++) {
          const vfloat row = i < left ? load<vfloat>(rows + (d + i) * GROUP + v * LANES) : vfloat{};
          const vfloat by = load<vfloat>(factor + v * LANES);
          // Without a key the output is 0, whatever the values are: 0 * inf would be NaN.
          store(block + i * LANES, by == 0.f ? vfloat{} : row * by);
        }
        transpose((uint32_t*)block, LANES, (uint32_t*)columns, LANES);
        for (int64_t l = 0; l < std::min<int64_t>(LANES, count - v * LANES); l++)
          narrow_vector(load<vfloat>(columns + l * LANES), target + (v * LANES + l) * out_strides.token + d, left);
      }
    }
  }
};

}  // namespace
}  // namespace uniad
