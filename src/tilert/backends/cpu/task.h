// An op bound to memory: what a run of tiles calls.
//
// All pointers, sizes and types are resolved and checked once, when the task is made, so that
// running tiles looks nothing up. Knows ops and kernels; knows no counters, queues or threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "program.h"

namespace tilert {

struct Bytes {
  char* data;
  size_t size;
};

// Of each buffer of the program the tensors that it consists of, in order: one, but for banks.
using Memory = std::vector<std::vector<Bytes>>;

class Task {
 public:
  virtual ~Task() = default;

  // Computes tiles [lo, hi). `scratch`: scratch_bytes() bytes of this worker, aligned to 64. Throws
  // std::runtime_error when state names a token, a position or a page that does not exist.
  virtual void run(int lo, int hi, float* scratch) const = 0;

  virtual int tiles() const = 0;
  virtual size_t scratch_bytes() const { return 0; }
};

// Throws std::runtime_error when the op is not one that this back end runs, or when an operand is
// absent or smaller than the op's fields say.
std::unique_ptr<Task> make_task(const Program& program, int op, const Memory& memory,
                                const Kernels& kernels);

// The name of an op for messages.
const char* op_name(Opcode code);

}  // namespace tilert
