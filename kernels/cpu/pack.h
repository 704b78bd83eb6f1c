// Rows of tensors as the words (see simd.h) that matrix products take.
#pragma once

#include <algorithm>

#include "storage.h"

namespace uniad {

constexpr int GROUP = 2 * LANES;  // tokens whose results are computed together, one a lane of two vectors

// `count` rows of `dim` elements as words [padded][width / PAIR], zeros beyond them.
template <class Mode, class T>
inline void pack_rows(
    const T* in, int64_t stride, int64_t count, int64_t padded, int64_t dim, int64_t width, uint32_t* out) {
  constexpr int64_t AHEAD = 16;  // rows of a head lie far apart, where no hardware prefetcher looks
  for (int64_t t = 0; t < padded; t++, out += width / Mode::PAIR) {
    if (t + AHEAD < count) __builtin_prefetch(in + (t + AHEAD) * stride);
    if (t < count && dim == width && sizeof(T) * Mode::PAIR == 4) {  // elements are what words hold
      for (int64_t w = 0; w < width / Mode::PAIR; w += LANES)
        store(out + w, load<vword>((const uint32_t*)(in + t * stride) + w));
    } else if constexpr (Mode::PAIR == 2) {
      const int64_t used = t < count ? dim : 0;
      memcpy(out, in + t * stride, used * 2);
      memset((char*)out + used * 2, 0, (width - used) * 2);
    } else {
      for (int64_t c = 0; c < width; c += LANES) {
        const int64_t left = t < count ? std::max<int64_t>(dim - c, 0) : 0;
        store(out + c, widen_vector(in + t * stride + c, left));
      }
    }
  }
}

// Rows of words [count][width / PAIR] -> [count / PAIR][width], words of tokens that are neighbours.
template <class Mode> inline void pair_rows(const uint32_t* rows, int64_t count, int64_t width, uint32_t* out) {
#if defined(UNIAD_NEON) && defined(UNIAD_BF16)
  if constexpr (Mode::PAIR == 2) {
    for (int64_t t = 0; t < count; t += 2, rows += width, out += width) {
      for (int64_t c = 0; c < width; c += 8) {
        const uint16x8_t first = load<uint16x8_t>(rows + c / 2), second = load<uint16x8_t>(rows + (width + c) / 2);
        store(out + c, vzip1q_u16(first, second));
        store(out + c + 4, vzip2q_u16(first, second));
      }
    }
    return;
  }
#elif defined(UNIAD_BF16)
  if constexpr (Mode::PAIR == 2) {
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; i++) order[i] = (uint16_t)(i / 2 + 32 * (i % 2));
    const __m512i low = load<__m512i>(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t t = 0; t < count; t += 2, rows += width, out += width) {
      for (int64_t c = 0; c < width; c += 32) {
        const __m512i first = load<__m512i>(rows + c / 2), second = load<__m512i>(rows + (width + c) / 2);
        store(out + c, _mm512_permutex2var_epi16(first, low, second));
        store(out + c + 16, _mm512_permutex2var_epi16(first, high, second));
      }
    }
    return;
  }
#endif
  memcpy(out, rows, count * width * 4);
}

// Rows of words [count][words], both multiples of LANES -> [words][stride].
inline void transpose_rows(const uint32_t* rows, int64_t count, int64_t words, uint32_t* out, int64_t stride) {
  for (int64_t t = 0; t < count; t += LANES)
    for (int64_t w = 0; w < words; w += LANES) transpose(rows + t * words + w, words, out + w * stride + t, stride);
}

// Two rows of lanes as one row of words; for single words, the first row alone.
template <class Mode> INLINE vword pair_lanes(vfloat first, vfloat second) {
#if defined(UNIAD_NEON) && defined(UNIAD_BF16)
  if constexpr (Mode::PAIR == 2) {
    const auto narrow = [](vfloat v) { return (uint16x8_t)vcvtq_low_bf16_f32((float32x4_t)v); };
    return (vword)vzip1q_u16(narrow(first), narrow(second));
  }
#elif defined(UNIAD_BF16)
  if constexpr (Mode::PAIR == 2) {
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    return (vword)_mm512_permutexvar_epi16(load<__m512i>(order), both);
  }
#endif
  return (vword)first;
}

// PAIR * LANES neighbours of a row as words.
template <class Mode> INLINE vword join_lanes(const float* p) {
#if defined(UNIAD_NEON) && defined(UNIAD_BF16)
  if constexpr (Mode::PAIR == 2)
    return (vword)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(load<float32x4_t>(p)), load<float32x4_t>(p + LANES));
#elif defined(UNIAD_BF16)
  if constexpr (Mode::PAIR == 2) return (vword)_mm512_cvtne2ps_pbh(load<__m512>(p + LANES), load<__m512>(p));
#endif
  return load<vword>(p);
}

}  // namespace uniad
