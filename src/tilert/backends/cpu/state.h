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

// Floats from one row of scratch to the next, so that each starts a cache line.
inline size_t padded(size_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace tilert
