// The passes between a transformer's products, on a CPU: dropout, add and LayerNorm in one, ReLU and dropout in one.
//
// Rows are tokens. The noise of element (row, col) is stream KEEP's of plane 0, redrawn in the backward pass.
#include <algorithm>
#include <cmath>

#include "philox.h"
#include "scratch.h"
#include "storage.h"
#include "tasks.h"

namespace uniad {
namespace {

constexpr int64_t SPLIT_ROWS = 256;  // of a task; fixes the order of sums over rows

struct Problem {
  int64_t rows, width, residual_rows;  // row r of x meets row r % residual_rows of the residual
  float eps, keep_scale;
  uint32_t keep_threshold;  // 0: no dropout
  int64_t seed, first_row;  // of the noise

  int64_t blocks() const { return (width + 63) / 64; }
  uint32_t noise_row(int64_t row) const { return (uint32_t)(first_row + row); }
};

int64_t splits_of(int64_t rows) { return (rows + SPLIT_ROWS - 1) / SPLIT_ROWS; }

// f(scratch, split, first row, last row + 1)
template <class F> void over_splits(const Problem& p, F f) {
  over_tasks(splits_of(p.rows), [&](int64_t i, int64_t) {
    Scratch scratch;
    f(scratch, i, i * SPLIT_ROWS, std::min((i + 1) * SPLIT_ROWS, p.rows));
  });
}

// Bits of the LANES columns from `col` on, a multiple of LANES.
INLINE mask_t bits_at(const uint64_t* keep, int64_t col) { return (mask_t)(keep[col / 64] >> col % 64); }

INLINE vfloat dropped(const Problem& p, const uint64_t* keep, int64_t col, vfloat x) {
  return p.keep_threshold == 0 ? x : where(bits_at(keep, col), x * p.keep_scale);
}

// sums[width] = residual + dropout(x), zeros to a whole vector; returns the sum of them.
template <class T>
float add_row(const Problem& p, const T* x, const T* residual, int64_t row, uint64_t* keep, float* sums) {
  if (p.keep_threshold != 0) keep_columns(Key(p.seed), 0, p.noise_row(row), p.blocks(), p.keep_threshold, keep);
  x += row * p.width;
  residual += row % p.residual_rows * p.width;
  vfloat total{};
  for (int64_t c = 0; c < p.width; c += LANES) {
    const int64_t left = p.width - c;
    const vfloat z = widen_vector(residual + c, left) + dropped(p, keep, c, widen_vector(x + c, left));
    total += z;
    store(sums + c, z);
  }
  return sum_lanes(total);
}

INLINE mask_t valid_lanes(int64_t left) { return left >= LANES ? ~mask_t{0} : (mask_t{1} << left) - 1; }

template <class T>
void norm_forward(
    const Problem& p, const T* x, const T* residual, const float* weight, const float* bias, T* out, float* stats) {
  over_splits(p, [&](Scratch& scratch, int64_t, int64_t first, int64_t last) {
    uint64_t* keep = scratch.take<uint64_t>(p.blocks());
    float* sums = scratch.take<float>(round_up(p.width, LANES));
    for (int64_t row = first; row < last; row++) {
      const float mean = add_row(p, x, residual, row, keep, sums) / (float)p.width;
      vfloat squares{};
      for (int64_t c = 0; c < p.width; c += LANES) {
        const vfloat d = where(valid_lanes(p.width - c), load<vfloat>(sums + c) - mean);
        squares += d * d;
      }
      const float rstd = 1.f / std::sqrt(sum_lanes(squares) / (float)p.width + p.eps);
      stats[2 * row] = mean;
      stats[2 * row + 1] = rstd;
      for (int64_t c = 0; c < p.width; c += LANES) {
        const int64_t left = p.width - c;
        const vfloat normed = (load<vfloat>(sums + c) - mean) * rstd;
        const vfloat scaled = normed * widen_vector(weight + c, left) + widen_vector(bias + c, left);
        narrow_vector(scaled, out + row * p.width + c, left);
      }
    }
  });
}

// Gradients of the sum (which is the residual's) and of x; parts [splits][2][width] of the gradients of weight and bias.
template <class T>
void norm_backward(
    const Problem& p, const T* out_gradient, const T* x, const T* residual, const float* weight, const float* stats,
    T* sum_gradient, T* x_gradient, float* parts) {
  over_splits(p, [&](Scratch& scratch, int64_t split, int64_t first, int64_t last) {
    const int64_t padded = round_up(p.width, LANES);
    uint64_t* keep = scratch.take<uint64_t>(p.blocks());
    float* sums = scratch.take<float>(padded);
    float* totals = scratch.take<float>(2 * padded);
    std::fill(totals, totals + 2 * padded, 0.f);
    for (int64_t row = first; row < last; row++) {
      add_row(p, x, residual, row, keep, sums);
      const float mean = stats[2 * row], rstd = stats[2 * row + 1];
      const T* gradient = out_gradient + row * p.width;
      vfloat along{}, across{};
      for (int64_t c = 0; c < p.width; c += LANES) {
        const int64_t left = p.width - c;
        const vfloat g = widen_vector(gradient + c, left), normed = (load<vfloat>(sums + c) - mean) * rstd;
        store(totals + c, load<vfloat>(totals + c) + g * normed);
        store(totals + padded + c, load<vfloat>(totals + padded + c) + g);
        const vfloat scaled = g * widen_vector(weight + c, left);  // 0 beyond the width
        store(sums + c, normed);
        along += scaled * normed;
        across += scaled;
      }
      const float slope = sum_lanes(along) / (float)p.width, offset = sum_lanes(across) / (float)p.width;
      for (int64_t c = 0; c < p.width; c += LANES) {
        const int64_t left = p.width - c;
        const vfloat scaled = widen_vector(gradient + c, left) * widen_vector(weight + c, left);
        const vfloat d = (scaled - offset - load<vfloat>(sums + c) * slope) * rstd;
        narrow_vector(d, sum_gradient + row * p.width + c, left);
        narrow_vector(dropped(p, keep, c, d), x_gradient + row * p.width + c, left);
      }
    }
    for (int i = 0; i < 2; i++) {
      const float* total = totals + i * padded;
      std::copy(total, total + p.width, parts + (2 * split + i) * p.width);
    }
  });
}

// out = dropout(x), or dropout(relu(x)).
template <class T> void forward(const Problem& p, bool relu, const T* x, T* out) {
  over_splits(p, [&](Scratch& scratch, int64_t, int64_t first, int64_t last) {
    uint64_t* keep = scratch.take<uint64_t>(p.blocks());
    for (int64_t row = first; row < last; row++) {
      if (p.keep_threshold != 0) keep_columns(Key(p.seed), 0, p.noise_row(row), p.blocks(), p.keep_threshold, keep);
      for (int64_t c = 0; c < p.width; c += LANES) {
        const int64_t left = p.width - c;
        vfloat v = widen_vector(x + row * p.width + c, left);
        if (relu) v = vmax(vfloat{}, v);
        narrow_vector(dropped(p, keep, c, v), out + row * p.width + c, left);
      }
    }
  });
}

// With ReLU, an output above 0 says that its input was and that it was kept: nothing is redrawn.
template <class T> void backward(const Problem& p, bool relu, const T* out_gradient, const T* out, T* gradient) {
  over_splits(p, [&](Scratch& scratch, int64_t, int64_t first, int64_t last) {
    uint64_t* keep = scratch.take<uint64_t>(p.blocks());
    for (int64_t row = first; row < last; row++) {
      if (!relu) keep_columns(Key(p.seed), 0, p.noise_row(row), p.blocks(), p.keep_threshold, keep);
      for (int64_t c = 0; c < p.width; c += LANES) {
        const int64_t left = p.width - c, at = row * p.width + c;
        const vfloat g = widen_vector(out_gradient + at, left);
        if (relu)
          narrow_vector(widen_vector(out + at, left) > 0.f ? g * p.keep_scale : vfloat{}, gradient + at, left);
        else
          narrow_vector(dropped(p, keep, c, g), gradient + at, left);
      }
    }
  });
}

template <class F> void with_type(int dtype, F f) {
  if (dtype == 0) f(float{});
  if (dtype == 1) f(bf16{});
  if (dtype == 2) f(fp16{});
}

}  // namespace
}  // namespace uniad

extern "C" {

// Parts of the gradients of weight and bias that `uniad_norm_backward` writes for so many rows.
int64_t uniad_norm_splits(int64_t rows) { return uniad::splits_of(rows); }

// dtype 0 float32, 1 bfloat16, 2 float16, of x, residual, out and their gradients; the rest is float32. Contiguous.
void uniad_norm_forward(
    int dtype, const uniad::Problem* p, const void* x, const void* residual, const float* weight, const float* bias,
    void* out, float* stats) {
  uniad::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    uniad::norm_forward(*p, (const T*)x, (const T*)residual, weight, bias, (T*)out, stats);
  });
}

void uniad_norm_backward(
    int dtype, const uniad::Problem* p, const void* out_gradient, const void* x, const void* residual,
    const float* weight, const float* stats, void* sum_gradient, void* x_gradient, float* parts) {
  uniad::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    uniad::norm_backward(*p, (const T*)out_gradient, (const T*)x, (const T*)residual, weight, stats, (T*)sum_gradient,
                         (T*)x_gradient, parts);
  });
}

void uniad_dropout_forward(int dtype, const uniad::Problem* p, int relu, const void* x, void* out) {
  uniad::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    uniad::forward(*p, relu != 0, (const T*)x, (T*)out);
  });
}

void uniad_dropout_backward(
    int dtype, const uniad::Problem* p, int relu, const void* out_gradient, const void* out, void* gradient) {
  uniad::with_type(dtype, [&](auto type) {
    using T = decltype(type);
    uniad::backward(*p, relu != 0, (const T*)out_gradient, (const T*)out, (T*)gradient);
  });
}
}
