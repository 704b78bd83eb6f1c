// Gradients of a linear layer's weight and bias from bfloat16, by the tile registers of AMX; float32 comes out.
//
//     weight [O, I] = gradient [R, O]^T times tokens [R, I],   bias [O] = sum over R of gradient
//
// Both operands are summed over their rows, so both have to be turned into pairs of neighbouring rows: a library that is
// given a transposed matrix does that for all of it before it multiplies. Here a task turns a chunk of rows that stays in
// the second-level cache, and reads the bias's gradient off on the way.
#include <ATen/Parallel.h>

#include <algorithm>

#include "scratch.h"
#include "storage.h"
#include "tiles.h"

namespace uniad {
namespace {

struct Layer {
  int64_t rows, ins, outs, token_stride, gradient_stride;  // strides of rows, in elements
};

#if defined(UNIAD_AMX)

constexpr int64_t CHUNK = 512;  // rows that are turned together
constexpr int64_t DEEP = CHUNK / 2 / SIDE, WORDS = SIDE * SIDE;  // tiles of a chunk along the rows, and words of a tile
constexpr int64_t INS = 256;    // of a task

// Words of rows r and r + 1 in columns first .. first + 15, zeros beyond `rows` and `columns`.
INLINE __m512i pairs_at(const bf16* from, int64_t stride, int64_t r, int64_t rows, int64_t first, int64_t columns) {
  const __mmask16 there = columns - first >= SIDE ? 0xffff : (1 << std::max<int64_t>(columns - first, 0)) - 1;
  const auto row = [&](int64_t number) {
    const __mmask16 mask = number < rows ? there : 0;
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + number * stride + first));
  };
  return _mm512_or_si512(row(r), _mm512_slli_epi32(row(r + 1), 16));
}

// Outputs [first, last) and inputs [begin, end) of the weight; the bias too where begin is 0.
class Task {
 public:
  Task(const Layer& layer, const bf16* tokens, const bf16* gradient, int64_t first, int64_t last, int64_t begin, int64_t end)
      : layer_(layer), tokens_(tokens), gradient_(gradient), first_(first), begin_(begin),
        outs_(round_up(last - first, SIDE)), ins_(round_up(end - begin, SIDE)) {
    left_ = scratch_.take<uint32_t>(outs_ * CHUNK / 2);
    right_ = scratch_.take<uint32_t>(CHUNK / 2 * ins_);
    sums_ = scratch_.take<float>(outs_ * ins_);
    bias_ = scratch_.take<float>(outs_ * LANES);
  }

  void run(int64_t last, int64_t end, float* weight, float* bias) {
    const Tiles tiles;
    std::fill(bias_, bias_ + outs_ * LANES, 0.f);
    std::fill(sums_, sums_ + outs_ * ins_, 0.f);
    for (int64_t r = 0; r < layer_.rows; r += CHUNK) {
      const int64_t words = round_up(std::min(CHUNK, layer_.rows - r), 2 * SIDE) / 2;
      turn_gradient(r, words, bias != nullptr);
      for (int64_t w = 0; w < words; w++)
        for (int64_t i = 0; i < ins_; i += SIDE)
          store(right_ + i * DEEP * SIDE + w * SIDE,
                pairs_at(tokens_, layer_.token_stride, r + 2 * w, layer_.rows, begin_ + i, layer_.ins));
      multiply(words / SIDE);
    }
    for (int64_t o = first_; o < last; o++) {
      std::copy_n(sums_ + (o - first_) * ins_, end - begin_, weight + o * layer_.ins + begin_);
      if (bias) bias[o] = sum_lanes(load<vfloat>(bias_ + (o - first_) * LANES));
    }
  }

 private:
  // sums [outs][ins] += left times right, whose tiles lie [outs / SIDE or ins / SIDE][DEEP], each in one piece.
  void multiply(int64_t deep) {
    asm volatile("" ::: "memory");  // see `multiply_tiles`
    const int64_t stride = 4 * ins_;
    for (int64_t c = 0; c < ins_; c += 2 * SIDE)
      for (int64_t o = 0; o < outs_; o += 2 * SIDE) {
        const bool wide = c + SIDE < ins_, tall = o + SIDE < outs_;
        float *upper = sums_ + o * ins_ + c, *lower = upper + (tall ? SIDE * ins_ : 0);
        const uint32_t *left = left_ + o * DEEP * SIDE, *right = right_ + c * DEEP * SIDE;
        const uint32_t *below = left + (tall ? DEEP * WORDS : 0), *beside = right + (wide ? DEEP * WORDS : 0);
        _tile_loadd(0, upper, stride);
        _tile_loadd(1, upper + (wide ? SIDE : 0), stride);
        _tile_loadd(2, lower, stride);
        _tile_loadd(3, lower + (wide ? SIDE : 0), stride);
        for (int64_t k = 0; k < deep * WORDS; k += WORDS) {
          _tile_loadd(4, left + k, 4 * SIDE);
          _tile_loadd(6, right + k, 4 * SIDE);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, beside + k, 4 * SIDE);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, below + k, 4 * SIDE);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        // Of tiles that are not there, what was computed of others again is stored first.
        _tile_stored(3, lower + (wide ? SIDE : 0), stride);
        _tile_stored(2, lower, stride);
        _tile_stored(1, upper + (wide ? SIDE : 0), stride);
        _tile_stored(0, upper, stride);
      }
    asm volatile("" ::: "memory");
  }

  // left, tiles of outputs by words, of rows r, ...; adds them to the bias's gradient.
  void turn_gradient(int64_t r, int64_t words, bool with_bias) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int64_t o = 0; o < outs_; o += SIDE)
      for (int64_t w = 0; w < words; w += SIDE) {
        alignas(64) uint32_t block[SIDE * SIDE];
#pragma GCC unroll 4
        for (int64_t i = 0; i < SIDE; i++)
          store(block + i * SIDE,
                pairs_at(gradient_, layer_.gradient_stride, r + 2 * (w + i), layer_.rows, first_ + o, layer_.outs));
        uint32_t* to = left_ + (o * DEEP + w) * SIDE;
        transpose(block, SIDE, to, SIDE);
        if (!with_bias) continue;
        for (int64_t i = 0; i < SIDE; i++) {
          float* at = bias_ + (o + i) * LANES;
          const __m512bh row = (__m512bh)load<__m512i>(to + i * SIDE);
          store(at, (vfloat)_mm512_dpbf16_ps((__m512)load<vfloat>(at), row, ones));
        }
      }
  }

  const Layer& layer_;
  const bf16 *tokens_, *gradient_;
  int64_t first_, begin_, outs_, ins_;
  Scratch scratch_;
  uint32_t *left_, *right_;
  float *sums_, *bias_;
};

#endif

}  // namespace
}  // namespace uniad

extern "C" {

// tokens [R, I] and gradient [R, O] in bfloat16, weight [O, I] and bias [O] in float32, bias or null. Needs tiles.
// Every sum is in one order, whatever the number of threads.
void uniad_weight_gradient(
    const uniad::Layer* layer, const void* tokens, const void* gradient, float* weight, float* bias) {
#if defined(UNIAD_AMX)
  using namespace uniad;
  const int64_t threads = at::get_num_threads();
  const int64_t block = std::clamp<int64_t>(round_up((layer->outs + threads - 1) / threads, 2 * SIDE), 2 * SIDE, 256);
  const int64_t across = (layer->ins + INS - 1) / INS, down = (layer->outs + block - 1) / block;
  at::parallel_for(0, across * down, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      const int64_t first = i / across * block, last = std::min(first + block, layer->outs);
      const int64_t begin = i % across * INS, end = std::min(begin + INS, layer->ins);
      Task task(*layer, (const bf16*)tokens, (const bf16*)gradient, first, last, begin, end);
      task.run(last, end, weight, begin == 0 ? bias : nullptr);
    }
  });
#endif
}
}
