// All that the C++ kernels need of torch, on one thread: torch itself is not there for the processor that is emulated.
#pragma once

#include <cstdint>

namespace at {

inline int get_num_threads() { return 1; }

template <class F> void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  if (begin < end) f(begin, end);
}

}  // namespace at
