// What forward and backward of the attention share: the problem, its limits, and the masks of a group of queries.
#pragma once

#include <algorithm>
#include <limits>

#include "pack.h"
#include "philox.h"
#include "scratch.h"
#include "tiles.h"

namespace uniad {
namespace {

constexpr int64_t KEYS = 512;              // a chunk of keys: what is packed of it stays in the second-level cache
constexpr int64_t TASK_TOKENS = 1024;      // of a task; fixes the order of sums, so threads must not change it
constexpr int64_t QUERIES = 4 * GROUP;     // queries whose weights are kept for the gradients of keys and values
constexpr mask_t EVERY_LANE = ~mask_t{0} >> (32 - GROUP);
constexpr float INF = std::numeric_limits<float>::infinity();

struct Strides {
  int64_t batch, head, token;
};

struct Problem {
  int64_t batch, heads, height, width, radius_row, radius_col, head_dim;
  float scale, scale_log2, keep_scale;
  uint32_t keep_threshold;  // 0: no dropout
  int64_t seed, first_plane;  // of the noise

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

// What the lanes of a group of queries hide and keep, for each key of a chunk.
struct GroupMasks {
  mask_t* near_row;   // [height] bit l: query l's row is near
  mask_t* near_col;   // [width]
  mask_t* hidden;     // [KEYS]
  mask_t* keep;       // [KEYS]

  GroupMasks(Scratch& scratch, const Problem& p)
      : near_row(scratch.take<mask_t>(p.height)), near_col(scratch.take<mask_t>(p.width)),
        hidden(scratch.take<mask_t>(KEYS)), keep(scratch.take<mask_t>(KEYS)) {}

  void start_group(const Problem& p, int64_t first_query) {
    std::fill(near_row, near_row + p.height, 0);
    std::fill(near_col, near_col + p.width, 0);
    int64_t row = first_query / p.width, col = first_query % p.width;
    for (int l = 0; l < GROUP;) {  // lanes of one row are neighbouring bits
      const int64_t lanes = std::min<int64_t>(GROUP - l, p.width - col);
      const mask_t bits = (mask_t)(((uint64_t{1} << lanes) - 1) << l);
      const int64_t top = std::max<int64_t>(row - p.radius_row, 0), bottom = std::min(row + p.radius_row, p.height - 1);
      for (int64_t i = top; i <= bottom; i++) near_row[i] |= bits;
      for (; l < GROUP && (bits >> l & 1); l++, col++) {
        const int64_t left = std::max<int64_t>(col - p.radius_col, 0);
        const int64_t right = std::min(col + p.radius_col, p.width - 1);
        for (int64_t i = left; i <= right; i++) near_col[i] |= mask_t{1} << l;
      }
      row++, col = 0;
    }
  }

  void start_chunk(const Problem& p, int64_t plane, int64_t first_query, int vectors, int64_t begin, int64_t end) {
    int64_t row = begin / p.width, col = begin % p.width;
    for (int64_t j = 0; j < end - begin; row++, col = 0) {
      const int64_t keys = std::min(p.width - col, end - begin - j);
      for (int64_t i = 0; i < keys; i++) hidden[j + i] = near_row[row] & near_col[col + i];
      j += keys;
    }
    std::fill(hidden + (end - begin), hidden + round_up(end - begin, GROUP), EVERY_LANE);
    if (p.keep_threshold == 0) return;
    const uint32_t noise_plane = (uint32_t)(p.first_plane + plane), query = (uint32_t)first_query;
    for (int64_t j = begin; j < end; j += 64) {
      if (vectors == 2)
        keep_rows<2>(Key(p.seed), noise_plane, query, (uint32_t)(j / 64), end - j, p.keep_threshold, keep + (j - begin));
      else
        keep_rows<1>(Key(p.seed), noise_plane, query, (uint32_t)(j / 64), end - j, p.keep_threshold, keep + (j - begin));
    }
  }

};

// Keys as rows of a product: whole tiles where it is by tiles.
template <class Mode> INLINE int64_t padded_keys(int64_t keys) { return round_up(keys, IN_TILES<Mode> ? GROUP : TAIL); }

INLINE bool all_hidden(const mask_t* hidden, int rows) {
  mask_t all = EVERY_LANE;
  for (int r = 0; r < rows; r++) all &= hidden[r];
  return all == EVERY_LANE;
}

}  // namespace
}  // namespace uniad
