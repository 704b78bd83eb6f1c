// Vectors of one machine: 16 lanes with AVX-512, 8 with AVX2, 4 with NEON or otherwise, behind the few operations the
// kernels need.
//
// A "word" is 32 bits of an operand of a matrix product: one float, or two bfloat16 that are neighbours along the
// summed axis. With that, a product of either kind is written once: broadcast a word, load a vector of words, multiply
// and add into float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define UNIAD_AVX512 1
#if defined(__AVX512BF16__)
#define UNIAD_BF16 1
#endif
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define UNIAD_AVX2 1
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define UNIAD_NEON 1
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define UNIAD_BF16 1
#endif
#endif

#define INLINE inline __attribute__((always_inline))

namespace uniad {

#if defined(UNIAD_AVX512)
constexpr int LANES = 16;
#elif defined(UNIAD_AVX2)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

// Rows of a register tile, two vectors wide: as many as leave registers for the operands. TAIL rows end an axis.
#if defined(UNIAD_NEON)
constexpr int ROWS = 8, TAIL = 4;  // of 32 registers: 16 sums, two operands, and eight that are taken lane by lane
#else
constexpr int ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;
constexpr int TAIL = LANES == 16 ? 4 : 1;
#endif

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vword __attribute__((vector_size(4 * LANES)));
typedef uint32_t mask_t;  // bit l: lane l

INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class V> INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V> INLINE void store(void* p, V v) { memcpy(p, &v, sizeof v); }
INLINE vfloat splat(float x) { return vfloat{} + x; }
INLINE vword splat_word(uint32_t x) { return vword{} + x; }

// The larger; `b` where either is NaN, so that a bound goes first and a NaN goes through.
INLINE vfloat vmax(vfloat a, vfloat b) {
#if defined(UNIAD_AVX512)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(UNIAD_AVX2)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// The smaller; `b` where either is NaN.
INLINE vfloat vmin(vfloat a, vfloat b) {
#if defined(UNIAD_AVX512)
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(UNIAD_AVX2)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// `a` in the lanes whose bit is set, `b` elsewhere; lane l has bit first + l, first a constant.
INLINE vfloat select(mask_t bits, vfloat a, vfloat b, int first = 0) {
#if defined(UNIAD_AVX512)
  return (vfloat)_mm512_mask_mov_ps((__m512)b, (__mmask16)(bits >> first), (__m512)a);
#else
  vint lane;
  for (int l = 0; l < LANES; l++) lane[l] = 1 << (first + l);
  return ((vint)((vint{} + (int32_t)bits) & lane) == lane) ? a : b;
#endif
}

// `a` in the lanes whose bit is set, 0 elsewhere.
INLINE vfloat where(mask_t bits, vfloat a, int first = 0) {
#if defined(UNIAD_AVX512)
  return (vfloat)_mm512_maskz_mov_ps((__mmask16)(bits >> first), (__m512)a);
#else
  vint lane;
  for (int l = 0; l < LANES; l++) lane[l] = 1 << (first + l);
  return (vfloat)((vint)a & (vint)(((vint{} + (int32_t)bits) & lane) == lane));
#endif
}

// The same for vector v of a token's, whose bits follow each other; a mask is loaded by itself where one can be.
INLINE vfloat where_of(const mask_t* bits, int v, vfloat a) {
#if defined(UNIAD_AVX512)
  return where(load<uint16_t>((const uint16_t*)bits + v), a);
#else
  return where(*bits, a, v * LANES);
#endif
}

INLINE float sum_lanes(vfloat v) {
#if defined(UNIAD_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(UNIAD_AVX2)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#elif defined(UNIAD_NEON)
  return vaddvq_f32((float32x4_t)v);
#else
  float total = 0;
  for (int l = 0; l < LANES; l++) total += v[l];
  return total;
#endif
}

// 2^x of x <= 0, 0 where x is -inf; what it is of x > 0 nobody may read. DEGREE 6 has a relative error of 8e-8, 3 of
// 8e-5, which a rounding to bfloat16 hides.
template <int DEGREE> INLINE vfloat exp2(vfloat x) {
  static_assert(DEGREE == 3 || DEGREE == 6);
#if defined(UNIAD_AVX512)
  // What would underflow is left out: a result below the normal ones takes an Intel processor hundreds of cycles.
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-126.f), _CMP_NLT_UQ);
  x = vmax(splat(-126.f), x);  // infinities are slow
  const vfloat f = x - (vfloat)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vfloat p;
  if constexpr (DEGREE == 3) {
    p = f * 7.802452178e-2f + 2.260671566e-1f;
    p = p * f + 6.958335401e-1f;
    p = p * f + 9.999252186e-1f;
  } else {
    p = f * 2.170225538e-4f + 1.243968785e-3f;
    p = p * f + 9.678840994e-3f;
    p = p * f + 5.548334199e-2f;
    p = p * f + 2.402298363e-1f;
    p = p * f + 6.931469838e-1f;
    p = p * f + 1.f;
  }
  return (vfloat)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);  // which takes the floor of x
#else
  const vint underflow = x < -126.f;
  x = vmax(splat(-126.f), x);
  const vfloat shifted = x + 12583039.f;  // 1.5 * 2^23 + 127 leaves the exponent of the nearest power in the last bits
  const vfloat f = x - (shifted - 12583039.f);
  vfloat p;
  if constexpr (DEGREE == 3) {
    p = f * 5.517166853e-2f + 2.426111251e-1f;
    p = p * f + 6.932609677e-1f;
    p = p * f + 9.999280572e-1f;
  } else {
    p = f * 1.534581242594868e-4f + 1.3399930903688073e-3f;
    p = p * f + 9.618489071726799e-3f;
    p = p * f + 5.550328642129898e-2f;
    p = p * f + 2.4022646248340607e-1f;
    p = p * f + 6.931471824645996e-1f;
    p = p * f + 1.f;
  }
  // A product: a sum with the bits of p would make numbers of those NaNs whose last bits are not 0.
  return underflow ? vfloat{} : p * (vfloat)((vword)shifted << 23);
#endif
}

// --- matrix products of words ------------------------------------------------------------------------------------

struct Single {  // a word is a float
  static constexpr int PAIR = 1, EXP_DEGREE = 6;
  static INLINE vfloat dot(vfloat sum, vword a, vword b) { return (vfloat)a * (vfloat)b + sum; }
#if defined(UNIAD_NEON)
  template <int LANE> static INLINE vfloat dot_lane(vfloat sum, vword a, vword b) {
    return (vfloat)vfmaq_laneq_f32((float32x4_t)sum, (float32x4_t)b, (float32x4_t)a, LANE);
  }
#endif
};

#if defined(UNIAD_BF16)
struct Half {  // a word is two bfloat16
  static constexpr int PAIR = 2, EXP_DEGREE = 3;
#if defined(UNIAD_NEON)
  // The two products are added to each other, and that to the sum, both times rounded to odd: off by less than a unit,
  // up as often as down. AVX-512 adds one product after the other, rounded to nearest. Either takes subnormals for 0.
  static INLINE vfloat dot(vfloat sum, vword a, vword b) {
    return (vfloat)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
  }
  template <int LANE> static INLINE vfloat dot_lane(vfloat sum, vword a, vword b) {
    return (vfloat)vbfdotq_laneq_f32((float32x4_t)sum, (bfloat16x8_t)b, (bfloat16x8_t)a, LANE);
  }
#else
  static INLINE vfloat dot(vfloat sum, vword a, vword b) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
#endif
};
#endif

// How bfloat16 tensors are multiplied by vectors. UNIAD_SINGLES: as floats, where that is faster, see pair_rate.cpp.
#if defined(UNIAD_BF16) && !defined(UNIAD_SINGLES)
using Brain = Half;
#else
using Brain = Single;
#endif

#if defined(UNIAD_NEON)
// A multiplication takes one lane of a vector for all lanes of another, so left operands are loaded four words at a
// time: four vector loads for 16 multiplications instead of ten loads.
INLINE vword load_lanes(const uint32_t* p) {
  vword v = load<vword>(p);
  asm("" : "+w"(v));  // or GCC takes it apart again, into a load, two moves and a shift for each lane
  return v;
}

// sum[r][v] += a[r] * b[v * LANES ...], rows that are neighbours.
template <class Mode, int R, int V>
INLINE void multiply_column(const uint32_t* a, const uint32_t* b, vfloat (&sum)[R][V]) {
  static_assert(R % LANES == 0);
  for (int v = 0; v < V; v++) {
    const vword right = load<vword>(b + v * LANES);
#pragma GCC unroll 4
    for (int r = 0; r < R; r += LANES) {
      const vword left = load_lanes(a + r);
      sum[r][v] = Mode::template dot_lane<0>(sum[r][v], left, right);
      sum[r + 1][v] = Mode::template dot_lane<1>(sum[r + 1][v], left, right);
      sum[r + 2][v] = Mode::template dot_lane<2>(sum[r + 2][v], left, right);
      sum[r + 3][v] = Mode::template dot_lane<3>(sum[r + 3][v], left, right);
    }
  }
}

// sum[first + r][v] += that lane of left[r] * right
template <class Mode, int LANE, int N, int R, int V>
INLINE void add_lane(const vword (&left)[N], vword right, vfloat (&sum)[R][V], int first, int v) {
#pragma GCC unroll 8
  for (int r = 0; r < N; r++) sum[first + r][v] = Mode::template dot_lane<LANE>(sum[first + r][v], left[r], right);
}

// sum[r][v] += over four k of row[r][k] * b[k * b_stride + v * LANES ...]
template <class Mode, int R, int V>
INLINE void multiply_four(const uint32_t* const (&row)[R], const uint32_t* b, int64_t b_stride, vfloat (&sum)[R][V]) {
  constexpr int TOGETHER = R < ROWS ? R : ROWS;
#pragma GCC unroll 2
  for (int first = 0; first < R; first += TOGETHER) {
    vword left[TOGETHER];
#pragma GCC unroll 8
    for (int r = 0; r < TOGETHER; r++) left[r] = load_lanes(row[first + r]);
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      const uint32_t* at = b + v * LANES;
      add_lane<Mode, 0>(left, load<vword>(at), sum, first, v);
      add_lane<Mode, 1>(left, load<vword>(at + b_stride), sum, first, v);
      add_lane<Mode, 2>(left, load<vword>(at + 2 * b_stride), sum, first, v);
      add_lane<Mode, 3>(left, load<vword>(at + 3 * b_stride), sum, first, v);
    }
  }
}
#endif

// sum[r][v] += over k of a[r * ROW_STRIDE + k * k_stride] * b[k * b_stride + v * LANES ...]
// The rows' stride is a constant, so that their addresses are one register and offsets.
template <class Mode, int ROW_STRIDE, int R, int V>
INLINE void multiply(
    const uint32_t* a, int64_t k_stride, const uint32_t* b, int64_t b_stride, int64_t words, vfloat (&sum)[R][V]) {
  int64_t k = 0;
#if defined(UNIAD_NEON)
  if constexpr (ROW_STRIDE == 1 && R % LANES == 0) {
    for (; k < words; k++) multiply_column<Mode>(a + k * k_stride, b + k * b_stride, sum);
    return;
  } else if constexpr (ROW_STRIDE != 1) {
    for (; k_stride == 1 && k + LANES <= words; k += LANES) {
      const uint32_t* row[R];
      for (int r = 0; r < R; r++) row[r] = a + r * ROW_STRIDE + k;
      multiply_four<Mode>(row, b + k * b_stride, b_stride, sum);
    }
  }
#endif
  for (; k < words; k++) {
    vword right[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) right[v] = load<vword>(b + k * b_stride + v * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const vword left = splat_word(a[r * ROW_STRIDE + k * k_stride]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[r][v] = Mode::dot(sum[r][v], left, right[v]);
    }
  }
}

// f(first row, constant number of rows) over [0, rows), rows a multiple of TAIL.
template <class F> INLINE void over_rows(int64_t rows, F f) {
  int64_t r = 0;
  if constexpr (TAIL == 1) {
    // So many tiles of a row less leave whole tiles: a tile of one row waits for each of its own sums.
    const int64_t smaller = (ROWS - rows % ROWS) % ROWS;
    if (smaller * (ROWS - 1) <= rows)
      for (; r < smaller * (ROWS - 1); r += ROWS - 1) f(r, std::integral_constant<int, ROWS - 1>{});
  }
  for (; r + ROWS <= rows; r += ROWS) f(r, std::integral_constant<int, ROWS>{});
  for (; r < rows; r += TAIL) f(r, std::integral_constant<int, TAIL>{});
}

// LANES x LANES words, rows `stride` apart, into columns `out_stride` apart.
INLINE void transpose(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
#if defined(UNIAD_AVX512)
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = load<__m512i>(in + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    store(out + i * out_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    store(out + (i + 8) * out_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    store(out + (i + 4) * out_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    store(out + (i + 12) * out_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
  }
#elif defined(UNIAD_AVX2)
  __m256i a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) a[i] = load<__m256i>(in + i * stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    store(out + i * out_stride, _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
    store(out + (i + 4) * out_stride, _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
  }
#elif defined(UNIAD_NEON)
  const auto row = [&](int i) { return vld1q_u32(in + i * stride); };
  const auto pairs = [](uint32x4_t a, uint32x4_t b, bool odd) {
    return vreinterpretq_u64_u32(odd ? vtrn2q_u32(a, b) : vtrn1q_u32(a, b));
  };
  const uint32x4_t a[4] = {row(0), row(1), row(2), row(3)};
  for (int i = 0; i < 2; i++) {
    const uint64x2_t low = pairs(a[0], a[1], i == 1), high = pairs(a[2], a[3], i == 1);
    store(out + i * out_stride, vtrn1q_u64(low, high));
    store(out + (i + 2) * out_stride, vtrn2q_u64(low, high));
  }
#else
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) out[j * out_stride + i] = in[i * stride + j];
#endif
}

}  // namespace uniad
