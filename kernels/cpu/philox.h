// Counter-based noise: the bits that uniad_fast/ops/noise.py defines, for vectors of rows or of channels.
#pragma once

#include "simd.h"

namespace uniad {

constexpr uint32_t KEEP = 0, JITTER = 1, JITTER_TOKEN = 2;  // streams: the last word of a counter

struct Key {
  uint32_t low, high;
  explicit Key(int64_t seed) : low((uint32_t)seed), high((uint32_t)((uint64_t)seed >> 32)) {}
};

// High and low words of a * m.
INLINE void multiply_wide(vword a, uint32_t m, vword* high, vword* low) {
#if defined(UNIAD_AVX512)
  const __m512i factor = _mm512_set1_epi32((int)m);
  const __m512i even = _mm512_mul_epu32((__m512i)a, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), factor);
  constexpr _MM_PERM_ENUM SWAP = _MM_PERM_CDAB;  // within each pair
  *high = (vword)_mm512_mask_shuffle_epi32(odd, 0x5555, even, SWAP);
  *low = (vword)_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, SWAP);
#elif defined(UNIAD_AVX2)
  const __m256i factor = _mm256_set1_epi32((int)m);
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  *high = (vword)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = (vword)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#elif defined(UNIAD_NEON)
  const uint32x4_t words = (uint32x4_t)a, factor = vdupq_n_u32(m);
  const uint32x4_t first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(words), vget_low_u32(factor)));
  const uint32x4_t last = vreinterpretq_u32_u64(vmull_high_u32(words, factor));
  *high = (vword)vuzp2q_u32(first, last);
  *low = (vword)vuzp1q_u32(first, last);
#else
  for (int l = 0; l < LANES; l++) {
    const uint64_t product = (uint64_t)a[l] * m;
    (*high)[l] = (uint32_t)(product >> 32);
    (*low)[l] = (uint32_t)product;
  }
#endif
}

// Philox-4x32-10: each counter w[i] becomes its four output words. A round waits for the one before, so that two
// counters take little longer than one.
template <int N> INLINE void philox(vword (&w)[N][4], Key key) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; round++) {
#pragma GCC unroll 2
    for (int i = 0; i < N; i++) {
      vword high0, low0, high1, low1;
      multiply_wide(w[i][0], 0xD2511F53u, &high0, &low0);
      multiply_wide(w[i][2], 0xCD9E8D57u, &high1, &low1);
      w[i][0] = high1 ^ w[i][1] ^ key.low;
      w[i][2] = high0 ^ w[i][3] ^ key.high;
      w[i][1] = low1;
      w[i][3] = low0;
    }
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
}

INLINE vword lane_numbers() {
  vword lane;
  for (int l = 0; l < LANES; l++) lane[l] = (uint32_t)l;
  return lane;
}

// Lanes where a >= threshold, unsigned.
INLINE mask_t at_least(vword a, uint32_t threshold) {
#if defined(UNIAD_AVX512)
  return _mm512_cmpge_epu32_mask((__m512i)a, _mm512_set1_epi32((int)threshold));
#elif defined(UNIAD_AVX2)
  const __m256i larger = _mm256_max_epu32((__m256i)a, _mm256_set1_epi32((int)threshold));
  return (mask_t)_mm256_movemask_ps((__m256)_mm256_cmpeq_epi32(larger, (__m256i)a));
#elif defined(UNIAD_NEON)
  const vword lane = splat_word(1) << lane_numbers();
  return vaddvq_u32((uint32x4_t)((vword)(a >= threshold) & lane));
#else
  mask_t bits = 0;
  for (int l = 0; l < LANES; l++) bits |= (mask_t)(a[l] >= threshold) << l;
  return bits;
#endif
}

// Stream KEEP for V vectors of rows from `row` on and the first columns of the 64 of `block`: keep[col] has a bit a row,
// set where the element is kept. There is room for 64.
template <int V>
INLINE void keep_rows(
    Key key, uint32_t plane, uint32_t row, uint32_t block, int64_t columns, uint32_t threshold, mask_t* keep) {
  constexpr uint32_t TOGETHER = 2 / V;  // columns that two counters serve
  const vword rows = lane_numbers() + row;
  for (uint32_t c = 0; c < 8 && c < columns; c += TOGETHER) {
    vword w[2][4];
#pragma GCC unroll 2
    for (uint32_t i = 0; i < 2; i++) {
      w[i][0] = splat_word(8 * block + c + (V == 1 ? i : 0)), w[i][1] = V == 1 ? rows : rows + i * LANES;
      w[i][2] = splat_word(plane), w[i][3] = splat_word(KEEP);
    }
    philox(w, key);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      mask_t* at = keep + 16 * k + c;
      const mask_t low[2] = {at_least(w[0][k] & 0xffff, threshold), at_least(w[1][k] & 0xffff, threshold)};
      const mask_t high[2] = {at_least(w[0][k] >> 16, threshold), at_least(w[1][k] >> 16, threshold)};
      at[0] = V == 1 ? low[0] : low[0] | low[1] << LANES;
      at[8] = V == 1 ? high[0] : high[0] | high[1] << LANES;
      if (V == 1) at[1] = low[1], at[9] = high[1];
    }
  }
}

// The same for one row and the blocks [0, blocks): keep[block], a bit a column.
INLINE void keep_columns(Key key, uint32_t plane, uint32_t row, int64_t blocks, uint32_t threshold, uint64_t* keep) {
  constexpr int64_t WIDE = LANES >= 8 ? 2 * LANES / 8 : 1;  // blocks two counters serve, one a byte of their lanes' bits
  for (int64_t b = 0; b < blocks; b += WIDE) {
    vword w[2][4];
#pragma GCC unroll 2
    for (uint32_t i = 0; i < 2; i++) {
      w[i][0] = lane_numbers() + (uint32_t)(8 * b + i * LANES);
      w[i][1] = splat_word(row), w[i][2] = splat_word(plane), w[i][3] = splat_word(KEEP);
    }
    philox(w, key);
    mask_t low[4], high[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      low[k] = at_least(w[0][k] & 0xffff, threshold) | at_least(w[1][k] & 0xffff, threshold) << LANES;
      high[k] = at_least(w[0][k] >> 16, threshold) | at_least(w[1][k] >> 16, threshold) << LANES;
    }
    for (int i = 0; i < WIDE && b + i < blocks; i++) {
      const auto columns = [&](int k) { return (uint64_t)((low[k] >> 8 * i & 0xff) | (high[k] >> 8 * i & 0xff) << 8); };
      keep[b + i] = columns(0) | columns(1) << 16 | columns(2) << 32 | columns(3) << 48;
    }
  }
}

// Natural logarithm of x > 0, to a rounding or two.
INLINE vfloat log_of(vfloat x) {
  const vint bits = (vint)x, exponent = (bits - 0x3f3504f3) >> 23;  // so that the rest is in [sqrt(1/2), sqrt(2))
  const vfloat f = (vfloat)(bits - (exponent << 23)) - 1.f, square = f * f;
  const vfloat e = __builtin_convertvector(exponent, vfloat);
  vfloat p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f + (p * f * square + e * -2.12194440e-4f - square * 0.5f) + e * 0.693359375f;
}

INLINE vfloat sqrt_of(vfloat x) {
#if defined(UNIAD_AVX512)
  return (vfloat)_mm512_sqrt_ps((__m512)x);
#elif defined(UNIAD_NEON)
  return (vfloat)vsqrtq_f32((float32x4_t)x);
#else
  for (int l = 0; l < LANES; l++) x[l] = __builtin_sqrtf(x[l]);
  return x;
#endif
}

// Two standard normals from two words, by Box and Muller.
INLINE void normal_pair(vword radius_word, vword angle_word, vfloat* first, vfloat* second) {
  const vfloat radius_u = __builtin_convertvector((vint)(radius_word >> 8) + 1, vfloat) * 0x1p-24f;
  const vfloat turns = __builtin_convertvector((vint)(angle_word >> 8) + 1, vfloat) * 0x1p-22f;  // in quarters
  const vfloat radius = sqrt_of(vmax(vfloat{}, log_of(radius_u) * -2.f));
  const vint quarter = __builtin_convertvector(turns + 0.5f, vint);
  const vfloat angle = (turns - __builtin_convertvector(quarter, vfloat)) * 1.5707963267948966f;  // an eighth at most
  const vfloat square = angle * angle;
  vfloat sine = square * -1.9515295891e-4f + 8.3321608736e-3f;
  sine = sine * square - 1.6666654611e-1f;
  sine = sine * square * angle + angle;
  vfloat cosine = square * 2.443315711809948e-5f - 1.388731625493765e-3f;
  cosine = cosine * square + 4.166664568298827e-2f;
  cosine = cosine * square - 0.5f;
  cosine = cosine * square + 1.f;
  const vint turn = quarter & 3;
  const vint swapped = (turn & 1) != 0;
  vfloat a = swapped ? sine : cosine, b = swapped ? cosine : sine;
  a = ((turn == 1) | (turn == 2)) ? -a : a;
  b = turn >= 2 ? -b : b;
  *first = radius * a;
  *second = radius * b;
}

// Stream JITTER: standard normals of 4 * LANES channels of a token, from `channel` on, a multiple of 4.
INLINE void normals(Key key, uint32_t token, uint32_t channel, float* out) {
  vword w[1][4] = {{lane_numbers() + channel / 4, splat_word(token), splat_word(0), splat_word(JITTER)}};
  philox(w, key);
  vfloat z[4];
  normal_pair(w[0][0], w[0][1], &z[0], &z[1]);
  normal_pair(w[0][2], w[0][3], &z[2], &z[3]);
  float rows[4][LANES];
  for (int i = 0; i < 4; i++) store(rows[i], z[i]);
  for (int l = 0; l < LANES; l++)
    for (int i = 0; i < 4; i++) out[4 * l + i] = rows[i][l];
}

// Stream JITTER_TOKEN: whether a token gets noise; threshold = round(prob * 2^24).
inline bool is_jittered(Key key, uint32_t token, uint32_t threshold) {
  vword w[1][4] = {{splat_word(0), splat_word(token), splat_word(0), splat_word(JITTER_TOKEN)}};
  philox(w, key);
  return w[0][0][0] >> 8 < threshold;
}

}  // namespace uniad
