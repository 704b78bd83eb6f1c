// Neighbour-masked attention on a CPU, forward and backward: FlashAttention's scheme, as in the Triton kernel beside.
//
//     a task owns one head's queries (forward) or keys (backward), up to a limit that depends on the shape alone
//     keys are walked in chunks of KEYS; queries in groups, one lane of a vector each, two vectors wide
//
// Scores are kept transposed, a row a key and a lane a query: the softmax then needs no sum across lanes, a row of
// weights is an operand of the next product as it lies, and the window is one bit mask a row. Hidden is where row and
// column are both near, so the mask of key (row, col) is near_row[row] & near_col[col], two short tables a group.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "pack.h"
#include "philox.h"
#include "scratch.h"

namespace uniad {
namespace {

constexpr int64_t KEYS = 512;              // a chunk of keys: what is packed of it stays in the second-level cache
constexpr int64_t TASK_TOKENS = 1024;      // of a task; fixes the order of sums, so threads must not change it
constexpr int64_t QUERIES = 4 * GROUP;     // queries whose weights are kept for the gradients of keys and values
constexpr float INF = std::numeric_limits<float>::infinity();

struct Strides {
  int64_t batch, head, token;
};

struct Problem {
  int64_t batch, heads, height, width, radius_row, radius_col, head_dim;
  float scale, scale_log2, keep_scale;
  uint32_t keep_threshold;  // 0: no dropout
  int64_t seed;

  int64_t tokens() const { return height * width; }
  int64_t lanes_dim() const { return round_up(head_dim, GROUP); }  // head_dim as columns of a product
  int64_t rows_dim() const { return round_up(head_dim, TAIL); }    // as rows of one
};

template <class T> T* plane_start(T* p, const Strides& s, int64_t plane, int64_t heads) {
  return p + plane / heads * s.batch + plane % heads * s.head;
}

// Rows of a head lie far apart, where no hardware prefetcher looks. WRITE: they will be written.
template <int WRITE, class T> INLINE void prefetch_rows(const T* rows, int64_t stride, int64_t count) {
  for (int64_t l = 0; l < count; l++) __builtin_prefetch(rows + l * stride, WRITE);
}

// --- the window and the noise of one group -----------------------------------------------------------------------

// What the lanes of a group of queries hide and keep, for each key of a chunk.
struct GroupMasks {
  mask_t* near_row;   // [height] bit l: query l's row is near
  mask_t* near_col;   // [width]
  mask_t* hidden;     // [KEYS]
  uint16_t* keep[2];  // [KEYS] each

  GroupMasks(Scratch& scratch, const Problem& p)
      : near_row(scratch.take<mask_t>(p.height)), near_col(scratch.take<mask_t>(p.width)),
        hidden(scratch.take<mask_t>(KEYS)), keep{scratch.take<uint16_t>(KEYS), scratch.take<uint16_t>(KEYS)} {}

  void start_group(const Problem& p, int64_t first_query) {
    std::fill(near_row, near_row + p.height, 0);
    std::fill(near_col, near_col + p.width, 0);
    int64_t row = first_query / p.width, col = first_query % p.width;
    for (int l = 0; l < GROUP;) {  // lanes of one row are neighbouring bits
      const int64_t lanes = std::min<int64_t>(GROUP - l, p.width - col);
      const mask_t bits = (mask_t)(((uint64_t{1} << lanes) - 1) << l);
      const int64_t top = std::max<int64_t>(row - p.radius_row, 0), bottom = std::min(row + p.radius_row, p.height - 1);
      for (int64_t i = top; i <= bottom; i++) near_row[i] |= bits;
      for (; bits >> l & 1 && l < GROUP; l++, col++) {
        const int64_t left = std::max<int64_t>(col - p.radius_col, 0), right = std::min(col + p.radius_col, p.width - 1);
        for (int64_t i = left; i <= right; i++) near_col[i] |= mask_t{1} << l;
      }
      row++, col = 0;
    }
  }

  void start_chunk(const Problem& p, int64_t plane, int64_t first_query, int vectors, int64_t begin, int64_t end) {
    int64_t row = begin / p.width, col = begin % p.width;
    for (int64_t j = 0; j < end - begin; j++) {
      hidden[j] = near_row[row] & near_col[col];
      if (++col == p.width) col = 0, row++;
    }
    std::fill(hidden + (end - begin), hidden + round_up(end - begin, TAIL), ~mask_t{0});
    if (p.keep_threshold == 0) return;
    for (int v = 0; v < vectors; v++)
      for (int64_t j = begin; j < end; j += 64)
        keep_rows(Key(p.seed), (uint32_t)plane, (uint32_t)(first_query + v * LANES), (uint32_t)(j / 64),
                  p.keep_threshold, keep[v] + (j - begin), 1);
  }

};

INLINE bool all_hidden(const mask_t* hidden, int rows) {
  mask_t all = ~mask_t{0};
  for (int r = 0; r < rows; r++) all &= hidden[r];
  return all == (GROUP == 32 ? ~mask_t{0} : (mask_t{1} << GROUP) - 1) || all == ~mask_t{0};
}

// --- forward -----------------------------------------------------------------------------------------------------

template <class Mode, class T> struct Forward {
  const Problem& p;
  const T *query, *key, *value;
  T* out;
  float* log_sum_exp;
  Strides query_strides, key_strides, value_strides, out_strides;

  // Queries [first, last) of one head.
  void task(int64_t plane, int64_t first, int64_t last) const {
    const int64_t width = p.lanes_dim(), words = width / Mode::PAIR, tokens = p.tokens();
    const int64_t groups = (last - first + GROUP - 1) / GROUP, chunk = std::min(KEYS, round_up(tokens, 64));
    Scratch scratch;
    uint32_t* key_lanes = scratch.take<uint32_t>(words * chunk);
    uint32_t* rows = scratch.take<uint32_t>(std::max<int64_t>(chunk, GROUP) * words);
    uint32_t* value_pairs = scratch.take<uint32_t>(chunk / Mode::PAIR * width);
    uint32_t* query_lanes = scratch.take<uint32_t>(words * GROUP);
    float* scores = scratch.take<float>(chunk * GROUP);
    uint32_t* weights = scratch.take<uint32_t>(chunk / Mode::PAIR * GROUP);
    float* sums = scratch.take<float>(groups * (p.rows_dim() + 2) * GROUP);  // [groups][maximum, total, out...][GROUP]
    GroupMasks masks(scratch, p);
    for (int64_t begin = 0; begin < tokens; begin += chunk) {
      const int64_t end = std::min(begin + chunk, tokens), keys = round_up(end - begin, TAIL);
      pack_rows<Mode>(plane_start(key, key_strides, plane, p.heads) + begin * key_strides.token, key_strides.token,
                      end - begin, round_up(keys, LANES), p.head_dim, width, rows);
      transpose_rows(rows, round_up(keys, LANES), words, key_lanes, chunk);
      pack_rows<Mode>(plane_start(value, value_strides, plane, p.heads) + begin * value_strides.token,
                      value_strides.token, end - begin, keys, p.head_dim, width, rows);
      pair_rows<Mode>(rows, keys, width, value_pairs);
      for (int64_t g = 0; g < groups; g++) {
        const int64_t q = first + g * GROUP, count = std::min<int64_t>(GROUP, last - q);
        float* state = sums + g * (p.rows_dim() + 2) * GROUP;
        pack_rows<Mode>(plane_start(query, query_strides, plane, p.heads) + q * query_strides.token,
                        query_strides.token, count, GROUP, p.head_dim, width, rows);
        transpose_rows(rows, GROUP, words, query_lanes, GROUP);
        const int vectors = count > LANES ? 2 : 1;
        prefetch_rows<1>(plane_start(out, out_strides, plane, p.heads) + q * out_strides.token, out_strides.token, count);
        masks.start_group(p, q);
        masks.start_chunk(p, plane, q, vectors, begin, end);
        if (vectors == 2)
          add_chunk<2>(key_lanes, chunk, value_pairs, query_lanes, keys, masks, begin == 0, scores, weights, state);
        else
          add_chunk<1>(key_lanes, chunk, value_pairs, query_lanes, keys, masks, begin == 0, scores, weights, state);
        if (end == tokens) finish(plane, q, count, state, (float*)rows);
      }
    }
  }

  template <int V>
  void add_chunk(
      const uint32_t* key_lanes, int64_t key_stride, const uint32_t* value_pairs, const uint32_t* query_lanes,
      int64_t keys, const GroupMasks& masks, bool is_first, float* scores, uint32_t* weights, float* state) const {
    const int64_t width = p.lanes_dim(), dim_words = (p.head_dim + Mode::PAIR - 1) / Mode::PAIR;
    vfloat maximum[V], total[V], pivot[V], correction[V];
    for (int v = 0; v < V; v++) maximum[v] = is_first ? splat(-INF) : load<vfloat>(state + v * LANES);

    over_rows(keys, [&](int64_t j, auto rows) {
      constexpr int R = rows;
      if (all_hidden(masks.hidden + j, R)) {
        for (int i = 0; i < R * GROUP; i += LANES) store(scores + j * GROUP + i, splat(-INF));
        return;
      }
      vfloat sum[R][V] = {};
      multiply<Mode, 1>(key_lanes + j, key_stride, query_lanes, GROUP, dim_words, sum);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const mask_t hidden = masks.hidden[j + r];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          const vfloat s = select(hidden >> v * LANES, splat(-INF), sum[r][v]);
          maximum[v] = vmax(maximum[v], s);
          store(scores + (j + r) * GROUP + v * LANES, s);
        }
      }
    });

    for (int v = 0; v < V; v++) {
      const vfloat scaled = maximum[v] * p.scale_log2;
      // A lane that has seen no key yet keeps a finite pivot: -inf - -inf would be NaN.
      pivot[v] = maximum[v] == -INF ? vfloat{} : scaled;
      const vfloat before = is_first ? splat(-INF) : load<vfloat>(state + v * LANES) * p.scale_log2;
      correction[v] = exp2<Mode::EXP_DEGREE>(before - pivot[v]);
      total[v] = is_first ? vfloat{} : load<vfloat>(state + GROUP + v * LANES) * correction[v];
      store(state + v * LANES, maximum[v]);
    }
    const bool dropout = p.keep_threshold != 0;
    for (int64_t j = 0; j < keys; j += Mode::PAIR) {
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        vfloat weight[2];
#pragma GCC unroll 2
        for (int i = 0; i < Mode::PAIR; i++) {
          const vfloat s = load<vfloat>(scores + (j + i) * GROUP + v * LANES);
          weight[i] = exp2<Mode::EXP_DEGREE>(s * p.scale_log2 - pivot[v]);
          total[v] += weight[i];
          if (dropout) weight[i] = select(masks.keep[v][j + i], weight[i], vfloat{});
        }
        store(weights + j / Mode::PAIR * GROUP + v * LANES, pair_lanes<Mode>(weight[0], weight[Mode::PAIR - 1]));
      }
    }
    for (int v = 0; v < V; v++) store(state + GROUP + v * LANES, total[v]);

    over_rows(p.rows_dim(), [&](int64_t d, auto rows) {
      constexpr int R = rows;
      float* out_rows = state + (2 + d) * GROUP;
      vfloat sum[R][V] = {};
      if (!is_first)
        for (int r = 0; r < R; r++)
          for (int v = 0; v < V; v++) sum[r][v] = load<vfloat>(out_rows + r * GROUP + v * LANES) * correction[v];
      multiply<Mode, 1>(value_pairs + d, width, weights, GROUP, keys / Mode::PAIR, sum);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(out_rows + r * GROUP + v * LANES, sum[r][v]);
    });
  }

  void finish(int64_t plane, int64_t q, int64_t count, float* state, float* columns) const {
    float* log_sums = log_sum_exp + plane * p.tokens() + q;
    for (int v = 0; v * LANES < count; v++) {
      const vfloat total = load<vfloat>(state + GROUP + v * LANES), maximum = load<vfloat>(state + v * LANES);
      const vint empty = total == 0.f;
      const vfloat log_sum = maximum * p.scale_log2 + log_of(total) * 1.44269504f;
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
          store(block + i * LANES, row * load<vfloat>(factor + v * LANES));
        }
        transpose((uint32_t*)block, LANES, (uint32_t*)columns, LANES);
        for (int64_t l = 0; l < std::min<int64_t>(LANES, count - v * LANES); l++)
          narrow_vector(load<vfloat>(columns + l * LANES), target + (v * LANES + l) * out_strides.token + d, left);
      }
    }
  }
};

// --- backward ----------------------------------------------------------------------------------------------------

template <class Mode, class T> struct Backward {
  const Problem& p;
  const T *query, *key, *value, *out, *out_gradient;
  const float* log_sum_exp;
  T *query_gradient, *key_gradient, *value_gradient;
  float* query_parts;  // [splits][batch * heads][tokens][head_dim], or null: one split writes query_gradient
  Strides query_strides, key_strides, value_strides, out_strides, out_gradient_strides;
  Strides query_gradient_strides, key_gradient_strides, value_gradient_strides;

  // What one group of queries brings: its tokens as words, and a number a lane.
  struct Group {
    uint32_t *query_lanes, *gradient_lanes;  // [words][GROUP]
    float *log_sums, *delta;                 // [GROUP]
  };

  // Keys [first, last) of one head, and their part of the gradient of every query.
  void task(int64_t plane, int64_t split, int64_t first, int64_t last) const {
    const int64_t width = p.lanes_dim(), words = width / Mode::PAIR, tokens = p.tokens();
    const int64_t chunk = std::min(KEYS, round_up(last - first, 64));
    Scratch scratch;
    uint32_t* rows = scratch.take<uint32_t>(chunk * words);
    uint32_t* key_lanes = scratch.take<uint32_t>(words * chunk);
    uint32_t* value_lanes = scratch.take<uint32_t>(words * chunk);
    uint32_t* key_pairs = scratch.take<uint32_t>(chunk / Mode::PAIR * width);
    float* key_sums = scratch.take<float>(chunk * width);
    float* value_sums = scratch.take<float>(chunk * width);
    uint32_t* query_rows = scratch.take<uint32_t>(GROUP * words);
    uint32_t* gradient_rows = scratch.take<uint32_t>(GROUP * words);
    uint32_t* query_pairs = scratch.take<uint32_t>(QUERIES / Mode::PAIR * width);
    uint32_t* gradient_pairs = scratch.take<uint32_t>(QUERIES / Mode::PAIR * width);
    uint32_t* weights = scratch.take<uint32_t>(chunk * QUERIES / Mode::PAIR);     // [keys][QUERIES]
    uint32_t* differences = scratch.take<uint32_t>(chunk * QUERIES / Mode::PAIR);  // the same
    uint32_t* pairs = scratch.take<uint32_t>(chunk / Mode::PAIR * GROUP);          // differences, [keys / PAIR][GROUP]
    float* columns = scratch.take<float>(p.rows_dim() * GROUP);
    float* query_sums = last - first > chunk ? scratch.take<float>(tokens * p.head_dim) : nullptr;
    Group group{scratch.take<uint32_t>(words * GROUP), scratch.take<uint32_t>(words * GROUP),
                scratch.take<float>(GROUP), scratch.take<float>(GROUP)};
    GroupMasks masks(scratch, p);

    for (int64_t begin = first; begin < last; begin += chunk) {
      const int64_t end = std::min(begin + chunk, last), keys = round_up(end - begin, TAIL);
      const int64_t padded = round_up(keys, LANES);
      pack_rows<Mode>(plane_start(value, value_strides, plane, p.heads) + begin * value_strides.token,
                      value_strides.token, end - begin, padded, p.head_dim, width, rows);
      transpose_rows(rows, padded, words, value_lanes, chunk);
      pack_rows<Mode>(plane_start(key, key_strides, plane, p.heads) + begin * key_strides.token, key_strides.token,
                      end - begin, padded, p.head_dim, width, rows);
      transpose_rows(rows, padded, words, key_lanes, chunk);
      pair_rows<Mode>(rows, keys, width, key_pairs);
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
            add_group<2>(key_lanes, value_lanes, chunk, keys, group, masks, weights + at, differences + at, pairs);
            query_product<2>(key_pairs, keys, group_pairs, pair_stride, columns);
          } else {
            add_group<1>(key_lanes, value_lanes, chunk, keys, group, masks, weights + at, differences + at, pairs);
            query_product<1>(key_pairs, keys, group_pairs, pair_stride, columns);
          }
          store_query(plane, split, q, count, columns, begin == first, end == last, query_sums);
        }
        const int64_t summed = round_up(q1 - q0, LANES) / Mode::PAIR;
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
    const T* gradient = plane_start(out_gradient, out_gradient_strides, plane, p.heads) + q * out_gradient_strides.token;
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
      group.log_sums[l] = l < count ? log_sum_exp[plane * p.tokens() + q + l] : INF;
    }
  }

  // Weights after dropout (not yet divided by 1 - p) and gradients of the scores, of all keys for one group.
  template <int V>
  void add_group(
      const uint32_t* key_lanes, const uint32_t* value_lanes, int64_t key_stride, int64_t keys, const Group& group,
      const GroupMasks& masks, uint32_t* weights, uint32_t* differences, uint32_t* pairs) const {
    const int64_t dim_words = (p.head_dim + Mode::PAIR - 1) / Mode::PAIR;
    constexpr int64_t STRIDE = QUERIES / Mode::PAIR;
    const bool dropout = p.keep_threshold != 0;
    vfloat log_sums[V], delta[V];
    for (int v = 0; v < V; v++) {
      log_sums[v] = load<vfloat>(group.log_sums + v * LANES);
      delta[v] = load<vfloat>(group.delta + v * LANES);
    }
    over_rows(keys, [&](int64_t j, auto rows) {
      constexpr int R = rows;
      vfloat weight[R][V] = {}, gradient[R][V] = {};
      if (!all_hidden(masks.hidden + j, R)) {
        multiply<Mode, 1>(key_lanes + j, key_stride, group.query_lanes, GROUP, dim_words, weight);
        vfloat spill[R][V];
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) {
            const vfloat x = exp2<Mode::EXP_DEGREE>(weight[r][v] * p.scale_log2 - log_sums[v]);
            spill[r][v] = select(masks.hidden[j + r] >> v * LANES, vfloat{}, x);
          }
        multiply<Mode, 1>(value_lanes + j, key_stride, group.gradient_lanes, GROUP, dim_words, gradient);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) {
            weight[r][v] = spill[r][v];
            if (dropout) {
              const mask_t keep = masks.keep[v][j + r];
              const vfloat kept = select(keep, gradient[r][v], vfloat{});
              gradient[r][v] = spill[r][v] * (kept * p.keep_scale - delta[v]);
              weight[r][v] = select(keep, spill[r][v], vfloat{});
            } else {
              gradient[r][v] = spill[r][v] * (gradient[r][v] - delta[v]);
            }
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
  void query_product(const uint32_t* key_pairs, int64_t keys, const uint32_t* pairs, int64_t stride, float* columns) const {
    over_rows(p.rows_dim(), [&](int64_t d, auto rows) {
      constexpr int R = rows;
      vfloat sum[R][V] = {};
      multiply<Mode, 1>(key_pairs + d, p.lanes_dim(), pairs, stride, keys / Mode::PAIR, sum);
      for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(columns + (d + r) * GROUP + v * LANES, sum[r][v]);
    });
  }

  // sums [keys][lanes_dim] (+)= rows of words [keys][QUERIES] times pairs [queries / PAIR][lanes_dim].
  void key_product(
      const uint32_t* rows_of_words, const uint32_t* pairs, int64_t keys, int64_t summed, bool is_first,
      float* sums) const {
    const int64_t width = p.lanes_dim();
    for (int64_t d = 0; d < width; d += GROUP)
      over_rows(keys, [&](int64_t j, auto rows) {
        constexpr int R = rows;
        vfloat sum[R][2] = {};
        float* target = sums + j * width + d;
        if (!is_first)
          for (int r = 0; r < R; r++)
            for (int v = 0; v < 2; v++) sum[r][v] = load<vfloat>(target + r * width + v * LANES);
        constexpr int STRIDE = QUERIES / Mode::PAIR;
        multiply<Mode, STRIDE>(rows_of_words + j * STRIDE, 1, pairs + d, width, summed, sum);
        for (int r = 0; r < R; r++)
          for (int v = 0; v < 2; v++) store(target + r * width + v * LANES, sum[r][v]);
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

int64_t tasks_of(int64_t tokens) { return (tokens + TASK_TOKENS - 1) / TASK_TOKENS; }

Strides strides(const int64_t* s, int i) { return {s[3 * i], s[3 * i + 1], s[3 * i + 2]}; }

// f(plane, number of the task, its first token, its last + 1) for every task, on torch's threads.
template <class F> void over_tasks(const Problem& p, F f) {
  const int64_t each = tasks_of(p.tokens()), length = round_up((p.tokens() + each - 1) / each, 64);
  at::parallel_for(0, p.batch * p.heads * each, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % each * length;
      if (first < p.tokens()) f(i / each, i % each, first, std::min(first + length, p.tokens()));
    }
  });
}

template <class Mode, class T>
void forward(
    const Problem& p, const void* query, const void* key, const void* value, void* out, float* log_sum_exp,
    const int64_t* s) {
  const Forward<Mode, T> run{p, (const T*)query, (const T*)key, (const T*)value, (T*)out, log_sum_exp,
                             strides(s, 0), strides(s, 1), strides(s, 2), strides(s, 3)};
  over_tasks(p, [&](int64_t plane, int64_t, int64_t first, int64_t last) { run.task(plane, first, last); });
}

template <class Mode, class T> void backward(const Problem& p, void* const* t, float* query_parts, const int64_t* s) {
  const Backward<Mode, T> run{
      p, (const T*)t[0], (const T*)t[1], (const T*)t[2], (const T*)t[3], (const T*)t[4], (const float*)t[5],
      (T*)t[6], (T*)t[7], (T*)t[8], query_parts, strides(s, 0), strides(s, 1), strides(s, 2), strides(s, 3),
      strides(s, 4), strides(s, 5), strides(s, 6), strides(s, 7)};
  over_tasks(p, [&](int64_t plane, int64_t i, int64_t first, int64_t last) { run.task(plane, i, first, last); });
}

}  // namespace
}  // namespace uniad

extern "C" {

using uniad::Problem;

// Parts of a query's gradient that `uniad_attention_backward` writes for so many tokens.
int64_t uniad_attention_splits(int64_t tokens) { return uniad::tasks_of(tokens); }

// dtype 0 float32, 1 bfloat16, 2 float16. strides: (batch, head, token) in elements of query, key, value, out.
void uniad_attention_forward(
    int dtype, const Problem* p, const void* query, const void* key, const void* value, void* out, float* log_sum_exp,
    const int64_t* strides) {
  using namespace uniad;
  if (dtype == 0) forward<Single, float>(*p, query, key, value, out, log_sum_exp, strides);
  if (dtype == 1) forward<Brain, bf16>(*p, query, key, value, out, log_sum_exp, strides);
  if (dtype == 2) forward<Single, fp16>(*p, query, key, value, out, log_sum_exp, strides);
}

// tensors: query, key, value, out, out_gradient, log_sum_exp, and gradients of query, key, value; strides of all but
// log_sum_exp. query_parts: float32 [splits, B * H, N, D] to write instead of query's gradient, or null.
void uniad_attention_backward(
    int dtype, const Problem* p, void* const* tensors, float* query_parts, const int64_t* strides) {
  using namespace uniad;
  if (dtype == 0) backward<Single, float>(*p, tensors, query_parts, strides);
  if (dtype == 1) backward<Brain, bf16>(*p, tensors, query_parts, strides);
  if (dtype == 2) backward<Single, fp16>(*p, tensors, query_parts, strides);
}
}
