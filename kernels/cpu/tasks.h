// Tasks of equal size among threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace uniad {

// f(i, thread) for every i below `count`: each thread takes its share in order, then what others have not come to. A core that
// somebody else keeps busy for a moment would otherwise be waited for, at the end of each of a network's operations.
template <class F> void over_tasks(int64_t count, F f) {
  struct alignas(64) Taken {
    std::atomic<int64_t> count{0};
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), count);
  std::vector<Taken> taken(threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t i = 0; i < threads; i++) {
        const int64_t owner = (thread + i) % threads, first = count * owner / threads;
        const int64_t size = count * (owner + 1) / threads - first;
        for (int64_t n; (n = taken[owner].count.fetch_add(1, std::memory_order_relaxed)) < size;) f(first + n, thread);
      }
  });
}

}  // namespace uniad
