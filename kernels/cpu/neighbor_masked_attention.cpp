// Neighbour-masked attention on a CPU, forward and backward: FlashAttention's scheme, as in the Triton kernel beside.
//
//     a task owns one head's queries (forward) or keys (backward), up to a limit that depends on the shape alone
//     keys are walked in chunks of KEYS; queries in groups, one lane of a vector each, two vectors wide
//
// Scores are kept transposed, a row a key and a lane a query: the softmax then needs no sum across lanes, a row of
// weights is an operand of the next product as it lies, and the window is one bit mask a row. Hidden is where row and
// column are both near, so the mask of key (row, col) is near_row[row] & near_col[col], two short tables a group.
#include "attention_backward.h"
#include "attention_forward.h"
#include "tasks.h"

namespace uniad {
namespace {

int64_t tasks_of(int64_t tokens) { return (tokens + TASK_TOKENS - 1) / TASK_TOKENS; }

Strides strides(const int64_t* s, int i) { return {s[3 * i], s[3 * i + 1], s[3 * i + 2]}; }

// f(plane, number of the task, its first token, its last + 1) for every task, on torch's threads.
template <class F> void over_planes(const Problem& p, F f) {
  const int64_t each = tasks_of(p.tokens()), length = round_up((p.tokens() + each - 1) / each, 64);
  over_tasks(p.batch * p.heads * each, [&](int64_t i, int64_t) {
    const int64_t first = i % each * length;
    if (first < p.tokens()) f(i / each, i % each, first, std::min(first + length, p.tokens()));
  });
}

template <class Mode, class T>
void forward(
    const Problem& p, const void* query, const void* key, const void* value, void* out, float* stats,
    const int64_t* s) {
  const Forward<Mode, T> run{p, (const T*)query, (const T*)key, (const T*)value, (T*)out, stats,
                             strides(s, 0), strides(s, 1), strides(s, 2), strides(s, 3)};
  over_planes(p, [&](int64_t plane, int64_t, int64_t first, int64_t last) { run.task(plane, first, last); });
}

template <class Mode, class T> void backward(const Problem& p, void* const* t, float* query_parts, const int64_t* s) {
  const Backward<Mode, T> run{
      p, (const T*)t[0], (const T*)t[1], (const T*)t[2], (const T*)t[3], (const T*)t[4], (const float*)t[5],
      (T*)t[6], (T*)t[7], (T*)t[8], query_parts, strides(s, 0), strides(s, 1), strides(s, 2), strides(s, 3),
      strides(s, 4), strides(s, 5), strides(s, 6), strides(s, 7)};
  over_planes(p, [&](int64_t plane, int64_t i, int64_t first, int64_t last) { run.task(plane, i, first, last); });
}

}  // namespace
}  // namespace uniad

extern "C" {

using uniad::Problem;

// Parts of a query's gradient that `uniad_attention_backward` writes for so many tokens.
int64_t uniad_attention_splits(int64_t tokens) { return uniad::tasks_of(tokens); }

// dtype 0 float32, 1 bfloat16, 2 float16. strides: (batch, head, token) in elements of query, key, value, out.
// stats: float32 [B * H, 2, N], the softmax of each query in two numbers: the largest product of query and visible key,
// not scaled, and the base-2 logarithm of the sum of exponentials relative to it (0 and inf without a key). One number,
// their sum, would be rounded to the unit of a large product, and the weights of the backward pass with it.
void uniad_attention_forward(
    int dtype, const Problem* p, const void* query, const void* key, const void* value, void* out, float* stats,
    const int64_t* strides) {
  using namespace uniad;
  if (dtype == 0) forward<Single, float>(*p, query, key, value, out, stats, strides);
#if defined(UNIAD_AMX)
  if (dtype == 1 && has_tiles()) return forward<Tiled, bf16>(*p, query, key, value, out, stats, strides);
#endif
  if (dtype == 1) forward<Brain, bf16>(*p, query, key, value, out, stats, strides);
  if (dtype == 2) forward<Single, fp16>(*p, query, key, value, out, stats, strides);
}

// tensors: query, key, value, out, out_gradient, stats, and gradients of query, key, value; strides of all but
// stats. query_parts: float32 [splits, B * H, N, D] to write instead of query's gradient, or null.
void uniad_attention_backward(
    int dtype, const Problem* p, void* const* tensors, float* query_parts, const int64_t* strides) {
  using namespace uniad;
  if (dtype == 0) backward<Single, float>(*p, tensors, query_parts, strides);
#if defined(UNIAD_AMX)
  if (dtype == 1 && has_tiles()) return backward<Tiled, bf16>(*p, tensors, query_parts, strides);
#endif
  if (dtype == 1) backward<Brain, bf16>(*p, tensors, query_parts, strides);
  if (dtype == 2) backward<Single, fp16>(*p, tensors, query_parts, strides);
}
}
