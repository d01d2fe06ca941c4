// What tasks read from state that the host writes before a launch, checked where it is read.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "operands.h"

namespace tilert {

// Rows of this step: tokens (which 0) or outputs (which 1), at most as many as the op has room for.
class Count {
 public:
  Count(const Operands& in, int counts, int which, int capacity)
      : at_(in.ints(counts, 1, 2) + which), capacity_(capacity) {
    in.require(which == 0 || which == 1, "count_index is not 0 or 1");
  }

  int operator()() const {
    const int32_t value = *at_;
    if (value < 0 || value > capacity_) {
      throw std::runtime_error("the step has " + std::to_string(value) + " rows, room is for " +
                               std::to_string(capacity_));
    }
    return value;
  }

 private:
  const int32_t* at_;
  int capacity_;
};

inline int32_t checked(int32_t value, int64_t limit, const char* what) {
  if (value < 0 || value >= limit) {
    throw std::runtime_error(std::string(what) + " " + std::to_string(value) + " is outside [0, " +
                             std::to_string(limit) + ")");
  }
  return value;
}

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Where the tokens of a step stand: their positions, and the pages of their sequences.
class Places {
 public:
  template <class Fields>
  Places(const Operands& in, const Fields& f, int64_t cache_pages)
      : positions_(in.ints(f.positions, 1, f.rows)),
        sequences_(in.ints(f.sequences, 1, f.rows)),
        pages_(in.ints(f.pages, f.page_rows, f.page_cols)),
        page_rows_(f.page_rows),
        page_cols_(f.page_cols),
        cache_pages_(cache_pages) {}

  int32_t position(int t) const {
    return checked(positions_[t], int64_t{page_cols_} * kPage, "position");
  }
  int32_t sequence(int t) const { return checked(sequences_[t], page_rows_, "sequence"); }

  // The row of the page table of token t.
  const int32_t* pages(int t) const { return pages_ + int64_t{sequence(t)} * page_cols_; }

  // The same, when positions [lo, hi) are in pages that exist.
  const int32_t* pages(int t, int lo, int hi) const {
    const int32_t* row = pages(t);
    for (int page = lo / kPage; page < ceil_div(hi, kPage); ++page) {
      checked(row[page], cache_pages_, "page");
    }
    return row;
  }

 private:
  const int32_t *positions_, *sequences_, *pages_;
  int page_rows_, page_cols_;
  int64_t cache_pages_;
};

// Floats from one row of scratch to the next, so that each starts a cache line.
inline size_t padded(size_t floats) { return (floats + 15) / 16 * 16; }

// out = x of `rope` columns, rotated; out may be x. Pairs are halves, or with `interleave`
// neighbours, whose first elements are then stored before the second ones. scratch: `rope` floats.
inline void rotate(const Kernels& kernels, float* out, const float* x, const float* angles,
                   int rope, bool interleave, float* scratch) {
  if (interleave) {
    for (int i = 0; i < rope / 2; ++i) {
      scratch[i] = x[2 * i];
      scratch[rope / 2 + i] = x[2 * i + 1];
    }
    x = scratch;
  }
  kernels.rope(out, x, Weight{nullptr, DType::kF32}, 0.0f, angles, rope);
}

}  // namespace tilert
