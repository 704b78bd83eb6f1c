// Products of bfloat16 by the tile registers of AMX: 16 x 16 sums over 32 elements an instruction.
//
// Operands lie as the products by vectors have them (see simd.h): left ones as rows of words along the summed axis, right
// ones as words of pairs, a row a pair of the summed axis. Nothing is packed for the tiles.
#pragma once

#include "simd.h"

#if defined(UNIAD_BF16) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define UNIAD_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace uniad {

constexpr int64_t SIDE = 16;  // of a tile: its rows, columns, and words along the summed axis

struct Tiled;
template <class Mode> constexpr bool IN_TILES = std::is_same_v<Mode, Tiled>;

#if defined(UNIAD_AMX)

struct Tiled : Half {};  // how bfloat16 tensors are multiplied where the system lets this process have tiles

// Whether it does: asked once, for all threads. A sandbox may refuse what the processor has.
inline bool has_tiles() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return granted;
}

// Tiles of this thread, all of the largest size, until it is destroyed.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) shape.bytes[i] = 4 * SIDE, shape.rows[i] = SIDE;
    asm volatile("" : : "r"(&shape) : "memory");  // to GCC, the next line reads eight bytes of it
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// sums [rows][cols] = (ADD: +=) left [rows][words] times right [words][cols]; rows, cols and words are multiples of SIDE,
// strides in words.
template <bool ADD>
inline void multiply_tiles(
    const uint32_t* left, int64_t left_stride, const uint32_t* right, int64_t right_stride, int64_t words, int64_t rows,
    int64_t cols, float* sums, int64_t stride) {
  // To a compiler, loading a tile reads nothing.
  asm volatile("" ::: "memory");
  const int64_t l = 4 * left_stride, r = 4 * right_stride, s = 4 * stride;  // in bytes
  int64_t i = 0;
  for (; i + 2 * SIDE <= rows; i += 2 * SIDE)
    for (int64_t c = 0; c < cols; c += 2 * SIDE) {
      const bool two = c + SIDE < cols;
      float *upper = sums + i * stride + c, *lower = upper + SIDE * stride;
      if constexpr (ADD) {
        _tile_loadd(0, upper, s);
        _tile_loadd(2, lower, s);
        if (two) {
          _tile_loadd(1, upper + SIDE, s);
          _tile_loadd(3, lower + SIDE, s);
        }
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < words; k += SIDE) {
        _tile_loadd(4, left + i * left_stride + k, l);
        _tile_loadd(5, left + (i + SIDE) * left_stride + k, l);
        _tile_loadd(6, right + k * right_stride + c, r);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(2, 5, 6);
        if (!two) continue;
        _tile_loadd(7, right + k * right_stride + c + SIDE, r);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, upper, s);
      _tile_stored(2, lower, s);
      if (two) {
        _tile_stored(1, upper + SIDE, s);
        _tile_stored(3, lower + SIDE, s);
      }
    }
  for (; i < rows; i += SIDE)
    for (int64_t c = 0; c < cols; c += SIDE) {
      float* at = sums + i * stride + c;
      if constexpr (ADD) {
        _tile_loadd(0, at, s);
      } else {
        _tile_zero(0);
      }
      for (int64_t k = 0; k < words; k += SIDE) {
        _tile_loadd(4, left + i * left_stride + k, l);
        _tile_loadd(6, right + k * right_stride + c, r);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, at, s);
    }
  asm volatile("" ::: "memory");
}

#else

inline bool has_tiles() { return false; }

// For code that nobody reaches.
struct Tiles {};
template <bool ADD>
inline void multiply_tiles(
    const uint32_t*, int64_t, const uint32_t*, int64_t, int64_t, int64_t, int64_t, float*, int64_t) {}

#endif

}  // namespace uniad
