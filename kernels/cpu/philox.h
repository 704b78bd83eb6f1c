// Counter-based noise: the bits that uniad_fast/ops/noise.py defines, for vectors of rows or of channels.
#pragma once

#include <array>

#include "simd.h"

namespace uniad {

constexpr uint32_t KEEP = 0, JITTER = 1, JITTER_TOKEN = 2;  // streams: the last word of a counter

struct Key {
  uint32_t low, high;
  explicit Key(int64_t seed) : low((uint32_t)seed), high((uint32_t)((uint64_t)seed >> 32)) {}
  Key(uint32_t low, uint32_t high) : low(low), high(high) {}

  // Of the round after one with this key.
  Key next() const { return Key(low + 0x9E3779B9u, high + 0xBB67AE85u); }
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

INLINE void multiply_wide(uint32_t a, uint32_t m, uint32_t* high, uint32_t* low) {
  const uint64_t product = (uint64_t)a * m;
  *high = (uint32_t)(product >> 32);
  *low = (uint32_t)product;
}

INLINE vword in_lanes(vword x) { return x; }
INLINE vword in_lanes(uint32_t x) { return splat_word(x); }

// a ^ b ^ key
INLINE uint32_t mix(uint32_t a, uint32_t b, uint32_t key) { return a ^ b ^ key; }
template <class A, class B> INLINE vword mix(A a, B b, uint32_t key) {
#if defined(UNIAD_AVX512)
  if constexpr (std::is_same_v<A, B>)
    return (vword)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, _mm512_set1_epi32((int)key), 0x96);
#endif
  if constexpr (std::is_same_v<A, uint32_t>) return in_lanes(a ^ key) ^ b;
  else return a ^ in_lanes(b ^ key);
}

// The four words of a counter, each one number or a number a lane. What all lanes have in common stays so for up to three
// rounds, whose products are then of single numbers for the most part, or at least a third of them.
template <class A, class B, class C, class D> struct Counter {
  A a;
  B b;
  C c;
  D d;
};
template <class A, class B, class C, class D> Counter(A, B, C, D) -> Counter<A, B, C, D>;

template <class A, class B, class C, class D> INLINE auto philox_round(const Counter<A, B, C, D>& w, Key key) {
  A high0, low0;
  C high1, low1;
  multiply_wide(w.a, 0xD2511F53u, &high0, &low0);
  multiply_wide(w.c, 0xCD9E8D57u, &high1, &low1);
  return Counter{mix(high1, w.b, key.low), low1, mix(high0, w.d, key.high), low0};
}

// Philox-4x32-10: each counter becomes its four output words. A round waits for the one before, so that two counters take
// little longer than one.
template <class AnyCounter, size_t N>
INLINE void philox(const std::array<AnyCounter, N>& counters, Key key, vword (&out)[N][4]) {
  const Key second = key.next(), third = second.next();
  Counter<vword, vword, vword, vword> w[N];
#pragma GCC unroll 2
  for (size_t i = 0; i < N; i++) {
    const auto mixed = philox_round(philox_round(philox_round(counters[i], key), second), third);
    w[i] = {in_lanes(mixed.a), in_lanes(mixed.b), in_lanes(mixed.c), in_lanes(mixed.d)};
  }
  key = third;
#pragma GCC unroll 10
  for (int round = 3; round < 10; round++) {
    key = key.next();
#pragma GCC unroll 2
    for (size_t i = 0; i < N; i++) w[i] = philox_round(w[i], key);
  }
#pragma GCC unroll 2
  for (size_t i = 0; i < N; i++) out[i][0] = w[i].a, out[i][1] = w[i].b, out[i][2] = w[i].c, out[i][3] = w[i].d;
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

// Of the 32-bit words in two vectors, which lower and which upper halves are at least `threshold`: a bit a lane, those of
// the second vector after those of the first.
struct Decisions {
  mask_t low, high;
};
INLINE Decisions decide(const vword& first, const vword& second, uint32_t threshold) {
#if defined(UNIAD_AVX512)
  if (threshold > 0xffff) return {0, 0};
  alignas(64) static constexpr uint16_t EVEN[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                    32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  const __m512i even = load<__m512i>(EVEN), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  const __m512i bound = _mm512_set1_epi16((short)threshold);
  const auto of = [&](__m512i order) {
    return (mask_t)_mm512_cmpge_epu16_mask(_mm512_permutex2var_epi16((__m512i)first, order, (__m512i)second), bound);
  };
  return {of(even), of(odd)};
#else
  return {at_least(first & 0xffff, threshold) | at_least(second & 0xffff, threshold) << LANES,
          at_least(first >> 16, threshold) | at_least(second >> 16, threshold) << LANES};
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
    const std::array counters{Counter{8 * block + c, rows, plane, KEEP},
                              Counter{8 * block + c + (V == 1), V == 1 ? rows : rows + LANES, plane, KEEP}};
    vword w[2][4];
    philox(counters, key, w);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      mask_t* at = keep + 16 * k + c;
      const Decisions kept = decide(w[0][k], w[1][k], threshold);
      constexpr mask_t ONE = (mask_t)((uint64_t{1} << LANES) - 1);
      at[0] = V == 1 ? kept.low & ONE : kept.low;
      at[8] = V == 1 ? kept.high & ONE : kept.high;
      if (V == 1) at[1] = kept.low >> LANES, at[9] = kept.high >> LANES;
    }
  }
}

// The same for one row and the blocks [0, blocks): keep[block], a bit a column.
INLINE void keep_columns(Key key, uint32_t plane, uint32_t row, int64_t blocks, uint32_t threshold, uint64_t* keep) {
  constexpr int64_t WIDE = LANES >= 8 ? 2 * LANES / 8 : 1;  // blocks two counters serve, one a byte of their lanes' bits
  for (int64_t b = 0; b < blocks; b += WIDE) {
    const vword first = lane_numbers() + (uint32_t)(8 * b);
    const std::array counters{Counter{first, row, plane, KEEP}, Counter{first + LANES, row, plane, KEEP}};
    vword w[2][4];
    philox(counters, key, w);
    Decisions kept[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) kept[k] = decide(w[0][k], w[1][k], threshold);
    for (int i = 0; i < WIDE && b + i < blocks; i++) {
      const auto columns = [&](int k) {
        return (uint64_t)((kept[k].low >> 8 * i & 0xff) | (kept[k].high >> 8 * i & 0xff) << 8);
      };
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
  const std::array counters{Counter{lane_numbers() + channel / 4, token, 0u, JITTER}};
  vword w[1][4];
  philox(counters, key, w);
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
  Counter w{0u, token, 0u, JITTER_TOKEN};
  for (int round = 0; round < 10; round++, key = key.next()) w = philox_round(w, key);
  return w.a >> 8 < threshold;
}

}  // namespace uniad
