// Jitter and project on a CPU: a task draws the noise of its tokens, adds it and multiplies, all in the cache.
//
//     noisy = token + scale / C * ||token|| * normal, where the token is jittered;  out = noisy W^T + bias
//
// The backward pass redraws the noise. The weight's gradient is summed over splits of the tokens, whose number depends
// on their count alone.
#include <algorithm>
#include <cmath>

#include "pack.h"
#include "philox.h"
#include "scratch.h"
#include "tasks.h"

namespace uniad {
namespace {

constexpr int64_t SPLIT_TOKENS = 512;
constexpr int64_t BLOCK_TOKENS = 128;  // summed before a gradient is added to the split's

struct Problem {
  int64_t tokens, channels, outs;
  float scale_by_channels;
  uint32_t prob_threshold;
  int64_t seed, first_token;  // of the noise

  // Channels and outs as columns of a product; channels also as whole calls of the noise.
  int64_t channel_width() const { return round_up(channels, 4 * LANES); }
  uint32_t noise_token(int64_t t) const { return (uint32_t)(first_token + t); }
  int64_t out_width() const { return round_up(outs, GROUP); }
};

int64_t splits_of(int64_t tokens) { return (tokens + SPLIT_TOKENS - 1) / SPLIT_TOKENS; }

template <class F> void over_splits(const Problem& p, F f) {
  over_tasks(splits_of(p.tokens), [&](int64_t i, int64_t) {
    f(i, i * SPLIT_TOKENS, std::min((i + 1) * SPLIT_TOKENS, p.tokens));
  });
}

// A token's norm and the deviation of its noise over that norm.
template <class T> std::pair<float, float> norm_and_factor(const Problem& p, const T* token, int64_t t) {
  vfloat squares{};
  for (int64_t c = 0; c < p.channels; c += LANES) {
    const vfloat x = widen_vector(token + c, p.channels - c);
    squares += x * x;
  }
  const bool jittered = p.prob_threshold >= 1 << 24 || is_jittered(Key(p.seed), p.noise_token(t), p.prob_threshold);
  return {std::sqrt(sum_lanes(squares)), jittered ? p.scale_by_channels : 0.f};
}

// Noisy tokens [first, first + count) as words [padded][channel_width / PAIR].
template <class Mode, class T>
void noisy_rows(
    const Problem& p, const T* tokens, int64_t first, int64_t count, int64_t padded, const float* deviation,
    uint32_t* out) {
  const int64_t width = p.channel_width();
  float noise[4 * LANES];
  for (int64_t t = 0; t < padded; t++, out += width / Mode::PAIR) {
    if (t >= count) {
      std::fill(out, out + width / Mode::PAIR, 0);
      continue;
    }
    const T* token = tokens + (first + t) * p.channels;
    for (int64_t block = 0; block < width; block += 4 * LANES) {
      normals(Key(p.seed), p.noise_token(first + t), (uint32_t)block, noise);
      for (int64_t c = block; c < block + 4 * LANES; c += LANES) {
        const int64_t left = std::max<int64_t>(p.channels - c, 0);
        vfloat x = widen_vector(token + c, left) + load<vfloat>(noise + (c - block)) * deviation[t];
        if (left < LANES) x = where((mask_t{1} << left) - 1, x);
        if constexpr (Mode::PAIR == 1)
          store(out + c, x);
        else
          narrow_vector(x, (bf16*)out + c);
      }
    }
  }
}

template <class Mode, class T>
void forward(const Problem& p, const T* tokens, const T* weight, const T* bias, T* out, float* deviation) {
  const int64_t width = p.channel_width(), words = width / Mode::PAIR, outs = round_up(p.outs, LANES);
  over_splits(p, [&](int64_t, int64_t first, int64_t last) {
    Scratch scratch;
    uint32_t* weight_lanes = scratch.take<uint32_t>(words * outs);
    uint32_t* rows = scratch.take<uint32_t>(std::max<int64_t>(outs, GROUP) * words);
    uint32_t* lanes = scratch.take<uint32_t>(words * GROUP);
    float* columns = scratch.take<float>(outs * GROUP);
    float* row = scratch.take<float>(LANES * LANES);
    pack_rows<Mode>(weight, p.channels, p.outs, outs, p.channels, width, rows);
    transpose_rows(rows, outs, words, weight_lanes, outs);
    for (int64_t t = first; t < last; t += GROUP) {
      const int64_t count = std::min<int64_t>(GROUP, last - t);
      for (int64_t l = 0; l < count; l++) {
        const auto [norm, factor] = norm_and_factor(p, tokens + (t + l) * p.channels, t + l);
        deviation[t + l] = norm * factor;
      }
      noisy_rows<Mode>(p, tokens, t, count, GROUP, deviation + t, rows);
      transpose_rows(rows, GROUP, words, lanes, GROUP);
      over_rows(outs, [&](int64_t o, auto rows_of) {
        constexpr int R = rows_of;
        vfloat sum[R][2] = {};
        multiply<Mode, 1>(weight_lanes + o, outs, lanes, GROUP, words, sum);
        for (int r = 0; r < R; r++)
          for (int v = 0; v < 2; v++) store(columns + (o + r) * GROUP + v * LANES, sum[r][v]);
      });
      for (int64_t o = 0; o < p.outs; o += LANES)
        for (int v = 0; v * LANES < count; v++) {
          const vfloat offset = bias ? widen_vector(bias + o, p.outs - o) : vfloat{};
          transpose((uint32_t*)columns + o * GROUP + v * LANES, GROUP, (uint32_t*)row, LANES);
          for (int64_t l = 0; l < std::min<int64_t>(LANES, count - v * LANES); l++)
            narrow_vector(load<vfloat>(row + l * LANES) + offset, out + (t + v * LANES + l) * p.outs + o, p.outs - o);
        }
    }
  });
}

// Parts [splits][outs][channels] and [splits][outs] of the gradients of weight and bias.
template <class Mode, class T>
void weight_gradient(
    const Problem& p, const T* out_gradient, const T* tokens, const float* deviation, float* parts, float* bias_parts) {
  const int64_t width = p.channel_width(), out_width = p.out_width(), rows_out = round_up(p.outs, TAIL);
  over_splits(p, [&](int64_t split, int64_t first, int64_t last) {
    Scratch scratch;
    uint32_t* rows = scratch.take<uint32_t>(BLOCK_TOKENS * std::max(width, out_width) / Mode::PAIR);
    uint32_t* noisy = scratch.take<uint32_t>(BLOCK_TOKENS / Mode::PAIR * width);
    uint32_t* gradient = scratch.take<uint32_t>(BLOCK_TOKENS / Mode::PAIR * out_width);
    float* sums = scratch.take<float>(rows_out * width);
    float* bias_sums = bias_parts + split * p.outs;
    std::fill(bias_sums, bias_sums + p.outs, 0.f);
    for (int64_t t = first; t < last; t += BLOCK_TOKENS) {
      const int64_t count = std::min(BLOCK_TOKENS, last - t), padded = round_up(count, Mode::PAIR);
      noisy_rows<Mode>(p, tokens, t, count, padded, deviation + t, rows);
      pair_rows<Mode>(rows, padded, width, noisy);
      pack_rows<Mode>(out_gradient + t * p.outs, p.outs, count, padded, p.outs, out_width, rows);
      pair_rows<Mode>(rows, padded, out_width, gradient);
      for (int64_t i = 0; i < count; i++)
        for (int64_t o = 0; o < p.outs; o++) bias_sums[o] += widen(out_gradient[(t + i) * p.outs + o]);
      for (int64_t c = 0; c < width; c += GROUP)
        over_rows(rows_out, [&](int64_t o, auto rows_of) {
          constexpr int R = rows_of;
          vfloat sum[R][2] = {};
          float* target = sums + o * width + c;
          if (t != first)
            for (int r = 0; r < R; r++)
              for (int v = 0; v < 2; v++) sum[r][v] = load<vfloat>(target + r * width + v * LANES);
          multiply<Mode, 1>(gradient + o, out_width, noisy + c, width, padded / Mode::PAIR, sum);
          for (int r = 0; r < R; r++)
            for (int v = 0; v < 2; v++) store(target + r * width + v * LANES, sum[r][v]);
        });
    }
    for (int64_t o = 0; o < p.outs; o++)
      std::copy(sums + o * width, sums + o * width + p.channels, parts + (split * p.outs + o) * p.channels);
  });
}

// With g = out_gradient W and z the normals: d token = g + factor * (g . z) * token / norm.
template <class Mode, class T>
void token_gradient(const Problem& p, const T* out_gradient, const T* tokens, const T* weight, T* gradient) {
  const int64_t width = p.channel_width(), out_width = p.out_width(), out_words = out_width / Mode::PAIR;
  over_splits(p, [&](int64_t, int64_t first, int64_t last) {
    Scratch scratch;
    uint32_t* weight_rows = scratch.take<uint32_t>(out_width * width / Mode::PAIR);
    uint32_t* weight_pairs = scratch.take<uint32_t>(out_words * width);
    uint32_t* rows = scratch.take<uint32_t>(GROUP * out_words);
    uint32_t* lanes = scratch.take<uint32_t>(out_words * GROUP);
    float* through = scratch.take<float>(GROUP * width);
    float noise[4 * LANES];
    pack_rows<Mode>(weight, p.channels, p.outs, out_width, p.channels, width, weight_rows);
    pair_rows<Mode>(weight_rows, out_width, width, weight_pairs);
    for (int64_t t = first; t < last; t += GROUP) {
      const int64_t count = std::min<int64_t>(GROUP, last - t);
      pack_rows<Mode>(out_gradient + t * p.outs, p.outs, count, GROUP, p.outs, out_width, rows);
      transpose_rows(rows, GROUP, out_words, lanes, GROUP);
      for (int64_t c = 0; c < width; c += GROUP)
        over_rows(round_up(count, TAIL), [&](int64_t l, auto rows_of) {
          constexpr int R = rows_of;
          vfloat sum[R][2] = {};
          multiply<Mode, 1>(lanes + l, GROUP, weight_pairs + c, width, out_words, sum);
          for (int r = 0; r < R; r++)
            for (int v = 0; v < 2; v++) store(through + (l + r) * width + c + v * LANES, sum[r][v]);
        });
      for (int64_t l = 0; l < count; l++) {
        const T* token = tokens + (t + l) * p.channels;
        const auto [norm, factor] = norm_and_factor(p, token, t + l);
        vfloat along{};
        for (int64_t block = 0; block < width; block += 4 * LANES) {
          normals(Key(p.seed), p.noise_token(t + l), (uint32_t)block, noise);
          for (int64_t i = 0; i < 4 * LANES; i += LANES)  // beyond the channels, `through` is 0
            along += load<vfloat>(through + l * width + block + i) * load<vfloat>(noise + i);
        }
        // A zero token has no direction: its norm's gradient is taken as zero, as torch does.
        const float slope = norm > 0 ? factor * sum_lanes(along) / norm : 0.f;
        for (int64_t c = 0; c < p.channels; c += LANES) {
          const int64_t left = p.channels - c;
          const vfloat sum = load<vfloat>(through + l * width + c) + widen_vector(token + c, left) * slope;
          narrow_vector(sum, gradient + (t + l) * p.channels + c, left);
        }
      }
    }
  });
}

template <class Mode, class T>
void backward(
    const Problem& p, const void* out_gradient, const void* tokens, const void* weight, const float* deviation,
    float* parts, float* bias_parts, void* gradient) {
  weight_gradient<Mode>(p, (const T*)out_gradient, (const T*)tokens, deviation, parts, bias_parts);
  if (gradient)
    token_gradient<Mode>(p, (const T*)out_gradient, (const T*)tokens, (const T*)weight, (T*)gradient);
}

template <class Mode, class T>
void forward_any(
    const Problem& p, const void* tokens, const void* weight, const void* bias, void* out, float* deviation) {
  forward<Mode>(p, (const T*)tokens, (const T*)weight, (const T*)bias, (T*)out, deviation);
}

}  // namespace
}  // namespace uniad

extern "C" {

// Parts of the gradients of weight and bias that `uniad_jitter_backward` writes for so many tokens.
int64_t uniad_jitter_splits(int64_t tokens) { return uniad::splits_of(tokens); }

// dtype 0 float32, 1 bfloat16, 2 float16. All contiguous; bias may be null.
void uniad_jitter_forward(
    int dtype, const uniad::Problem* p, const void* tokens, const void* weight, const void* bias, void* out,
    float* deviation) {
  using namespace uniad;
  if (dtype == 0) forward_any<Single, float>(*p, tokens, weight, bias, out, deviation);
  if (dtype == 1) forward_any<Brain, bf16>(*p, tokens, weight, bias, out, deviation);
  if (dtype == 2) forward_any<Single, fp16>(*p, tokens, weight, bias, out, deviation);
}

// The gradient of the tokens is not computed when its pointer is null.
void uniad_jitter_backward(
    int dtype, const uniad::Problem* p, const void* out_gradient, const void* tokens, const void* weight,
    const float* deviation, float* parts, float* bias_parts, void* gradient) {
  using namespace uniad;
  if (dtype == 0) backward<Single, float>(*p, out_gradient, tokens, weight, deviation, parts, bias_parts, gradient);
  if (dtype == 1) backward<Brain, bf16>(*p, out_gradient, tokens, weight, deviation, parts, bias_parts, gradient);
  if (dtype == 2) backward<Single, fp16>(*p, out_gradient, tokens, weight, deviation, parts, bias_parts, gradient);
}
}
