// Backward pass of the attention: a task owns keys of one head and walks over all queries, a group at a time.
#pragma once

#include "attention_common.h"

namespace uniad {
namespace {

template <class Mode, class T> struct Backward {
  const Problem& p;
  const T *query, *key, *value, *out, *out_gradient;
  const float* stats;  // [batch * heads][2][tokens], as the forward pass wrote it
  T *query_gradient, *key_gradient, *value_gradient;
  float* query_parts;  // [splits][batch * heads][tokens][head_dim], or null: one split writes query_gradient
  Strides query_strides, key_strides, value_strides, out_strides, out_gradient_strides;
  Strides query_gradient_strides, key_gradient_strides, value_gradient_strides;

  // What one group of queries brings: its tokens as words, and a number a lane.
  struct Group {
    uint32_t *query_lanes, *gradient_lanes;  // [words][GROUP]
    float *maxima, *log_sums, *delta;        // [GROUP]
  };

  // Keys [first, last) of one head, and their part of the gradient of every query.
  void task(int64_t plane, int64_t split, int64_t first, int64_t last) const {
    const int64_t width = p.lanes_dim(), words = width / Mode::PAIR, tokens = p.tokens();
    const int64_t chunk = std::min(KEYS, round_up(last - first, 64));
    [[maybe_unused]] std::conditional_t<IN_TILES<Mode>, Tiles, int> tiles{};
    Scratch scratch;
    uint32_t* rows = IN_TILES<Mode> ? nullptr : scratch.take<uint32_t>(chunk * words);
    uint32_t* keys_as_left = scratch.take<uint32_t>(words * chunk);  // of a product, as its mode takes it
    uint32_t* values_as_left = scratch.take<uint32_t>(words * chunk);
    uint32_t* key_pairs = scratch.take<uint32_t>(chunk / Mode::PAIR * width);
    uint32_t* key_rows = IN_TILES<Mode> ? scratch.take<uint32_t>(width * chunk / Mode::PAIR) : nullptr;
    float* key_sums = scratch.take<float>(chunk * width);
    float* value_sums = scratch.take<float>(chunk * width);
    uint32_t* query_rows = scratch.take<uint32_t>(GROUP * words);
    uint32_t* gradient_rows = scratch.take<uint32_t>(GROUP * words);
    uint32_t* query_pairs = scratch.take<uint32_t>(QUERIES / Mode::PAIR * width);
    uint32_t* gradient_pairs = scratch.take<uint32_t>(QUERIES / Mode::PAIR * width);
    uint32_t* weights = scratch.take<uint32_t>(chunk * QUERIES / Mode::PAIR);     // [keys][QUERIES]
    uint32_t* differences = scratch.take<uint32_t>(chunk * QUERIES / Mode::PAIR);  // the same
    uint32_t* pairs = scratch.take<uint32_t>(chunk / Mode::PAIR * GROUP);          // differences, [keys / PAIR][GROUP]
    float* columns = scratch.take<float>(width * GROUP);
    float* query_sums = last - first > chunk ? scratch.take<float>(tokens * p.head_dim) : nullptr;
    Group group{scratch.take<uint32_t>(words * GROUP), scratch.take<uint32_t>(words * GROUP),
                scratch.take<float>(GROUP), scratch.take<float>(GROUP), scratch.take<float>(GROUP)};
    GroupMasks masks(scratch, p);

    for (int64_t begin = first; begin < last; begin += chunk) {
      const int64_t end = std::min(begin + chunk, last), keys = padded_keys<Mode>(end - begin);
      const int64_t padded = round_up(keys, LANES);
      pack_rows<Mode>(plane_start(value, value_strides, plane, p.heads) + begin * value_strides.token,
                      value_strides.token, end - begin, padded, p.head_dim, width,
                      IN_TILES<Mode> ? values_as_left : rows);
      if constexpr (!IN_TILES<Mode>) transpose_rows(rows, padded, words, values_as_left, chunk);
      pack_rows<Mode>(plane_start(key, key_strides, plane, p.heads) + begin * key_strides.token, key_strides.token,
                      end - begin, padded, p.head_dim, width, IN_TILES<Mode> ? keys_as_left : rows);
      if constexpr (!IN_TILES<Mode>) transpose_rows(rows, padded, words, keys_as_left, chunk);
      pair_rows<Mode>(IN_TILES<Mode> ? keys_as_left : rows, keys, width, key_pairs);
      if constexpr (IN_TILES<Mode>) transpose_rows(key_pairs, keys / Mode::PAIR, width, key_rows, chunk / Mode::PAIR);
      const Keys of_chunk{keys_as_left, values_as_left, chunk, keys, IN_TILES<Mode> ? key_rows : key_pairs};
      for (int64_t q0 = 0; q0 < tokens; q0 += QUERIES) {
        const int64_t q1 = std::min(q0 + QUERIES, tokens);
        for (int64_t q = q0; q < q1; q += GROUP) {
          const int64_t count = std::min<int64_t>(GROUP, q1 - q), at = (q - q0) / Mode::PAIR;
          load_group(plane, q, count, group, query_rows, gradient_rows);
          pair_rows<Mode>(query_rows, GROUP, width, query_pairs + at * width);
          pair_rows<Mode>(gradient_rows, GROUP, width, gradient_pairs + at * width);
          const int vectors = count > LANES ? 2 : 1;
          masks.start_group(p, q);
          masks.start_chunk(p, plane, q, vectors, begin, end);
          // Single words of a row are words of a pair already.
          uint32_t* group_pairs = Mode::PAIR == 1 ? differences + (q - q0) : pairs;
          const int64_t pair_stride = Mode::PAIR == 1 ? QUERIES : GROUP;
          if (vectors == 2) {
            add_group<2>(of_chunk, group, masks, weights + at, differences + at, pairs);
            query_product<2>(of_chunk, group_pairs, pair_stride, columns);
          } else {
            add_group<1>(of_chunk, group, masks, weights + at, differences + at, pairs);
            query_product<1>(of_chunk, group_pairs, pair_stride, columns);
          }
          store_query(plane, split, q, count, columns, begin == first, end == last, query_sums);
        }
        const int64_t summed = round_up(q1 - q0, IN_TILES<Mode> ? GROUP : LANES) / Mode::PAIR;
        key_product(weights, gradient_pairs, keys, summed, q0 == 0, value_sums);
        key_product(differences, query_pairs, keys, summed, q0 == 0, key_sums);
      }
      store_rows(key_sums, end - begin, p.scale, plane_start(key_gradient, key_gradient_strides, plane, p.heads),
                 begin, key_gradient_strides.token);
      store_rows(value_sums, end - begin, p.keep_scale,
                 plane_start(value_gradient, value_gradient_strides, plane, p.heads), begin,
                 value_gradient_strides.token);
    }
  }

  void load_group(
      int64_t plane, int64_t q, int64_t count, const Group& group, uint32_t* query_rows,
      uint32_t* gradient_rows) const {
    const int64_t width = p.lanes_dim(), words = width / Mode::PAIR;
    const T* gradient =
        plane_start(out_gradient, out_gradient_strides, plane, p.heads) + q * out_gradient_strides.token;
    const T* output = plane_start(out, out_strides, plane, p.heads) + q * out_strides.token;
    T* target = plane_start(query_gradient, query_gradient_strides, plane, p.heads) + q * query_gradient_strides.token;
    prefetch_rows<0>(gradient, out_gradient_strides.token, count);
    prefetch_rows<0>(output, out_strides.token, count);
    prefetch_rows<1>(target, query_gradient_strides.token, count);
    pack_rows<Mode>(plane_start(query, query_strides, plane, p.heads) + q * query_strides.token, query_strides.token,
                    count, GROUP, p.head_dim, width, query_rows);
    pack_rows<Mode>(gradient, out_gradient_strides.token, count, GROUP, p.head_dim, width, gradient_rows);
    transpose_rows(query_rows, GROUP, words, group.query_lanes, GROUP);
    transpose_rows(gradient_rows, GROUP, words, group.gradient_lanes, GROUP);
    for (int l = 0; l < GROUP; l++) {
      vfloat sum{};
      for (int64_t d = 0; l < count && d < p.head_dim; d += LANES)
        sum += widen_vector(output + l * out_strides.token + d, p.head_dim - d) *
               widen_vector(gradient + l * out_gradient_strides.token + d, p.head_dim - d);
      group.delta[l] = sum_lanes(sum);
      const float* at = stats + 2 * plane * p.tokens() + q + l;
      group.maxima[l] = l < count ? at[0] : 0.f;
      group.log_sums[l] = l < count ? at[p.tokens()] : INF;
    }
  }

  // A chunk of keys and values, [words][room] by vectors, [padded][words] by tiles; and keys as the left operand of the
  // queries' gradient, [padded / PAIR][width] by vectors, [width][room / PAIR] by tiles.
  struct Keys {
    const uint32_t *keys, *values;
    int64_t room, padded;
    const uint32_t* summed_keys;
  };

  // What a query has in one vector of lanes.
  struct Lanes {
    vfloat maximum, log_sum, delta;
  };
  template <int V> static INLINE void load_lanes_of(const Group& group, Lanes (&lanes)[V]) {
    for (int v = 0; v < V; v++)
      lanes[v] = {load<vfloat>(group.maxima + v * LANES), load<vfloat>(group.log_sums + v * LANES),
                  load<vfloat>(group.delta + v * LANES)};
  }

  INLINE vfloat weight_of(vfloat product, const Lanes& lanes, mask_t hidden, int v) const {
    // The difference first: of large products it is exact, and their scaled values are not.
    const vfloat x = exp2<Mode::EXP_DEGREE>((product - lanes.maximum) * p.scale_log2 - lanes.log_sum);
    return select(hidden, vfloat{}, x, v * LANES);
  }

  // The gradient of a score, from that of its weight.
  INLINE vfloat difference_of(
      vfloat weight, vfloat gradient, const Lanes& lanes, bool dropout, const mask_t* keep, int v) const {
    if (dropout) gradient = where_of(keep, v, gradient) * p.keep_scale;
    return weight * (gradient - lanes.delta);
  }

  // As `add_group`, by tiles.
  template <int V>
  INLINE void add_group_in_tiles(
      const Keys& of, const Group& group, const GroupMasks& masks, uint32_t* weights, uint32_t* differences,
      uint32_t* pairs) const {
    const int64_t words = p.lanes_dim() / Mode::PAIR;
    constexpr int64_t STRIDE = QUERIES / Mode::PAIR;
    const bool dropout = p.keep_threshold != 0;
    Lanes lanes[V];
    load_lanes_of(group, lanes);
    alignas(64) float products[GROUP * GROUP], gradients[GROUP * GROUP];
    for (int64_t j = 0; j < of.padded; j += GROUP) {
      const bool seen = !all_hidden(masks.hidden + j, GROUP);
      if (seen) {
        multiply_tiles<false>(
            of.keys + j * words, words, group.query_lanes, GROUP, words, GROUP, V * LANES, products, GROUP);
        multiply_tiles<false>(
            of.values + j * words, words, group.gradient_lanes, GROUP, words, GROUP, V * LANES, gradients, GROUP);
      }
      for (int64_t r = 0; r < GROUP; r += 2)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
          vfloat difference[2] = {};
#pragma GCC unroll 2
          for (int i = 0; i < 2; i++) {
            vfloat weight{};
            if (seen && v < V) {
              const int64_t at = (r + i) * GROUP + v * LANES;
              const mask_t* keep = masks.keep + j + r + i;
              weight = weight_of(load<vfloat>(products + at), lanes[v], masks.hidden[j + r + i], v);
              difference[i] = difference_of(weight, load<vfloat>(gradients + at), lanes[v], dropout, keep, v);
              if (dropout) weight = where_of(keep, v, weight);
            }
            // Lanes beyond V are summed over with the others, so they are 0.
            narrow_vector(weight, (bf16*)(weights + (j + r + i) * STRIDE) + v * LANES);
            narrow_vector(difference[i], (bf16*)(differences + (j + r + i) * STRIDE) + v * LANES);
          }
          store(pairs + (j + r) / 2 * GROUP + v * LANES, pair_lanes<Mode>(difference[0], difference[1]));
        }
    }
  }

  // Weights after dropout (not yet divided by 1 - p) and gradients of the scores, of all keys for one group.
  template <int V>
  void add_group(
      const Keys& of, const Group& group, const GroupMasks& masks, uint32_t* weights, uint32_t* differences,
      uint32_t* pairs) const {
    if constexpr (IN_TILES<Mode>) return add_group_in_tiles<V>(of, group, masks, weights, differences, pairs);
    const int64_t dim_words = (p.head_dim + Mode::PAIR - 1) / Mode::PAIR;
    constexpr int64_t STRIDE = QUERIES / Mode::PAIR;
    const bool dropout = p.keep_threshold != 0;
    Lanes lanes[V];
    load_lanes_of(group, lanes);
    over_rows(of.padded, [&](int64_t j, auto rows) {
      constexpr int R = rows;
      vfloat weight[R][V] = {}, gradient[R][V] = {};
      if (!all_hidden(masks.hidden + j, R)) {
        multiply<Mode, 1>(of.keys + j, of.room, group.query_lanes, GROUP, dim_words, weight);
        vfloat spill[R][V];
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
          for (int v = 0; v < V; v++)
            spill[r][v] = weight_of(weight[r][v], lanes[v], masks.hidden[j + r], v);
        multiply<Mode, 1>(of.values + j, of.room, group.gradient_lanes, GROUP, dim_words, gradient);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) {
            const mask_t* keep = masks.keep + j + r;
            gradient[r][v] = difference_of(spill[r][v], gradient[r][v], lanes[v], dropout, keep, v);
            weight[r][v] = dropout ? where_of(keep, v, spill[r][v]) : spill[r][v];
          }
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          if constexpr (Mode::PAIR == 1) {
            store(weights + (j + r) * STRIDE + v * LANES, weight[r][v]);
            store(differences + (j + r) * STRIDE + v * LANES, gradient[r][v]);
          } else {
            narrow_vector(weight[r][v], (bf16*)(weights + (j + r) * STRIDE) + v * LANES);
            narrow_vector(gradient[r][v], (bf16*)(differences + (j + r) * STRIDE) + v * LANES);
            if (r % 2 == 1)
              store(pairs + (j + r) / 2 * GROUP + v * LANES, pair_lanes<Mode>(gradient[r - 1][v], gradient[r][v]));
          }
        }
    });
  }

  // columns [rows_dim][GROUP]: the group's gradient of the scores times the keys.
  template <int V>
  void query_product(
      const Keys& of, const uint32_t* pairs, int64_t stride, float* columns) const {
    if constexpr (IN_TILES<Mode>)
      return multiply_tiles<false>(
          of.summed_keys, of.room / Mode::PAIR, pairs, stride, of.padded / Mode::PAIR, p.lanes_dim(), V * LANES,
          columns, GROUP);
    over_rows(p.rows_dim(), [&](int64_t d, auto rows) {
      constexpr int R = rows;
      vfloat sum[R][V] = {};
      multiply<Mode, 1>(of.summed_keys + d, p.lanes_dim(), pairs, stride, of.padded / Mode::PAIR, sum);
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(columns + (d + r) * GROUP + v * LANES, sum[r][v]);
    });
  }

  // sums [keys][lanes_dim] (+)= rows of words [keys][QUERIES] times pairs [queries / PAIR][lanes_dim].
  void key_product(
      const uint32_t* rows_of_words, const uint32_t* pairs, int64_t keys, int64_t summed, bool is_first,
      float* sums) const {
    const int64_t width = p.lanes_dim();
    if constexpr (IN_TILES<Mode>) {
      constexpr int STRIDE = QUERIES / Mode::PAIR;
      if (is_first) return multiply_tiles<false>(rows_of_words, STRIDE, pairs, width, summed, keys, width, sums, width);
      return multiply_tiles<true>(rows_of_words, STRIDE, pairs, width, summed, keys, width, sums, width);
    }
    for (int64_t d = 0; d < width; d += GROUP)
      over_rows(keys, [&](int64_t j, auto rows) {
        constexpr int R = rows;
        vfloat sum[R][2] = {};
        float* target = sums + j * width + d;
        constexpr int STRIDE = QUERIES / Mode::PAIR;
        multiply<Mode, STRIDE>(rows_of_words + j * STRIDE, 1, pairs + d, width, summed, sum);
        // Sums of parts: one sum over all queries of a large grid would be rounded as often as it has terms.
        for (int r = 0; r < R; r++)
          for (int v = 0; v < 2; v++) {
            float* at = target + r * width + v * LANES;
            store(at, is_first ? sum[r][v] : load<vfloat>(at) + sum[r][v]);
          }
      });
  }

  void store_rows(const float* sums, int64_t count, float factor, T* target, int64_t begin, int64_t stride) const {
    for (int64_t t = 0; t < count; t++)
      for (int64_t d = 0; d < p.head_dim; d += LANES)
        narrow_vector(load<vfloat>(sums + t * p.lanes_dim() + d) * factor, target + (begin + t) * stride + d,
                      p.head_dim - d);
  }

  // Adds one chunk's part of a group's gradient to `sums` (where there are several), and writes it with the last.
  void store_query(
      int64_t plane, int64_t split, int64_t q, int64_t count, const float* columns, bool is_first, bool is_last,
      float* sums) const {
    const int64_t tokens = p.tokens();
    float block[LANES * LANES], turned[LANES * LANES];
    T* target = plane_start(query_gradient, query_gradient_strides, plane, p.heads);
    float* part = query_parts ? query_parts + (split * p.batch * p.heads + plane) * tokens * p.head_dim : nullptr;
    for (int64_t d = 0; d < p.head_dim; d += LANES) {
      const int64_t left = p.head_dim - d;
      for (int v = 0; v * LANES < count; v++) {
        for (int i = 0; i < LANES; i++)
          store(block + i * LANES, i < left ? load<vfloat>(columns + (d + i) * GROUP + v * LANES) : vfloat{});
        transpose((uint32_t*)block, LANES, (uint32_t*)turned, LANES);
        for (int64_t l = 0; l < std::min<int64_t>(LANES, count - v * LANES); l++) {
          const int64_t token = q + v * LANES + l;
          vfloat sum = load<vfloat>(turned + l * LANES);
          if (sums && !is_first) sum += widen_vector(sums + token * p.head_dim + d, left);
          if (!is_last)
            narrow_vector(sum, sums + token * p.head_dim + d, left);
          else if (part)
            narrow_vector(sum * p.scale, part + token * p.head_dim + d, left);
          else
            narrow_vector(sum * p.scale, target + token * query_gradient_strides.token + d, left);
        }
      }
    }
  }
};

}  // namespace
}  // namespace uniad
