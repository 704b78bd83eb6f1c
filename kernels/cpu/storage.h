// The types tensors are stored in, a number or a vector at a time, from and to float32.
#pragma once

#include "simd.h"

namespace uniad {

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
INLINE float widen(fp16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(UNIAD_NEON)
  __fp16 value;
  memcpy(&value, &x, 2);
  return value;
#else
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else {  // rebias by a multiplication, which also normalises subnormals
    bits = magnitude << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float out;
  memcpy(&out, &bits, 4);
  return out;
#endif
}

INLINE void narrow(float x, float* out) { *out = x; }
INLINE void narrow(float x, bf16* out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  out->bits = nan ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE void narrow(float x, fp16* out) {
#if defined(__F16C__)
  out->bits = (uint16_t)_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(UNIAD_NEON)
  const __fp16 value = x;
  memcpy(out, &value, 2);
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to more than 65504
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  } else {  // subnormal: adding a half aligns the units, and rounds
    float value;
    memcpy(&value, &magnitude, 4);
    value += 0.5f;
    memcpy(&half, &value, 4);
    half -= 0x3f000000;
  }
  out->bits = (uint16_t)(half | sign);
#endif
}

// LANES neighbours, as float32. `count` may be less at the end of an axis; the rest is 0.
INLINE vfloat widen_vector(const float* p) { return load<vfloat>(p); }
INLINE vfloat widen_vector(const bf16* p) {
#if defined(UNIAD_AVX512)
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(p)), 16);
#elif defined(UNIAD_NEON)
  return (vfloat)vshll_n_u16(load<uint16x4_t>(p), 16);
#else
  vfloat v;
  for (int l = 0; l < LANES; l++) v[l] = widen(p[l]);
  return v;
#endif
}
INLINE vfloat widen_vector(const fp16* p) {
#if defined(UNIAD_AVX512)
  return (vfloat)_mm512_cvtph_ps(load<__m256i>(p));
#elif defined(UNIAD_NEON)
  return (vfloat)vcvt_f32_f16(load<float16x4_t>(p));
#else
  vfloat v;
  for (int l = 0; l < LANES; l++) v[l] = widen(p[l]);
  return v;
#endif
}
template <class T> INLINE vfloat widen_vector(const T* p, int64_t count) {
  if (count >= LANES) return widen_vector(p);
  vfloat v{};
  for (int l = 0; l < count; l++) v[l] = widen(p[l]);
  return v;
}

INLINE void narrow_vector(vfloat v, float* p) { store(p, v); }
INLINE void narrow_vector(vfloat v, bf16* p) {
#if defined(UNIAD_NEON) && defined(UNIAD_BF16)
  store(p, vcvt_bf16_f32((float32x4_t)v));
#elif defined(UNIAD_NEON)
  const vword bits = (vword)v, rounded = bits + 0x7fff + (bits >> 16 & 1);
  store(p, vshrn_n_u32((uint32x4_t)(v == v ? rounded : splat_word(0x7fc00000)), 16));
#elif defined(UNIAD_BF16)
  store(p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif defined(UNIAD_AVX512)
  const __m512i bits = (__m512i)v;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  store(p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#else
  for (int l = 0; l < LANES; l++) narrow(v[l], p + l);
#endif
}
INLINE void narrow_vector(vfloat v, fp16* p) {
#if defined(UNIAD_AVX512)
  store(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(UNIAD_NEON)
  store(p, vcvt_f16_f32((float32x4_t)v));
#else
  for (int l = 0; l < LANES; l++) narrow(v[l], p + l);
#endif
}
template <class T> INLINE void narrow_vector(vfloat v, T* p, int64_t count) {
  if (count >= LANES) return narrow_vector(v, p);
  for (int l = 0; l < count; l++) narrow(v[l], p + l);
}

}  // namespace uniad
