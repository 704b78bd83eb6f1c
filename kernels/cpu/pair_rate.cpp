// What products of pairs of bfloat16 are worth on the processor at hand, beside products of the floats they stand for.
// A library of its own, compiled before the kernels: the answer decides how those are compiled.
//
// AMD's processors multiply a vector of pairs in the time of a vector of floats. Intel's take four times as long, so that
// floats, which need no rounding either, are twice as fast; their bfloat16 is in tiles, which a guest of a virtual machine
// is not always let near.
#include <algorithm>
#include <chrono>

#include "simd.h"

namespace uniad {
namespace {

#if defined(UNIAD_BF16)

constexpr int64_t FLOATS = 128;  // along the summed axis: the right operand stays in the first-level cache
constexpr int TILES = 256, ROUNDS = 31;

// Seconds of the kernels' own tile product over as many elements.
template <class Mode> double seconds(const uint32_t* left, const uint32_t* right, float* out) {
  constexpr int64_t WORDS = FLOATS / Mode::PAIR;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < TILES; i++) {
    vfloat sum[ROWS][2] = {};
    multiply<Mode, FLOATS>(left, 1, right, 2 * LANES, WORDS, sum);
    for (int r = 0; r < ROWS; r++)
      for (int v = 0; v < 2; v++) store(out + (r * 2 + v) * LANES, sum[r][v]);
    asm volatile("" : : "r"(left), "r"(right), "r"(out) : "memory");  // or one product would do for all, and none either
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

#endif

}  // namespace
}  // namespace uniad

extern "C" {

// How many times as fast as floats pairs are multiplied; 0 where this is compiled for a processor without the instruction.
// The fastest of rounds in turns is compared, since what else the machine does only ever takes time.
double uniad_pairs_gain() {
#if defined(UNIAD_BF16)
  using namespace uniad;
  alignas(64) static uint32_t left[ROWS * FLOATS], right[FLOATS * 2 * LANES];  // zeros: no operand is subnormal
  alignas(64) static float out[ROWS * 2 * LANES];
  double singles = 1e9, pairs = 1e9;
  for (int i = 0; i < ROUNDS; i++) {
    singles = std::min(singles, seconds<Single>(left, right, out));
    pairs = std::min(pairs, seconds<Half>(left, right, out));
  }
  return singles / pairs;
#else
  return 0;
#endif
}
}
