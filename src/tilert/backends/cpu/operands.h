// Looks up an op's operands in memory and checks that they are what its fields say.
//
// Every check that can be made once is made here, so that a task's pointers are good for its tiles.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "program.h"
#include "task.h"

namespace tilert {

// A row-major array of floats; `stride` elements from row to row.
struct Floats {
  float* data = nullptr;
  int64_t stride = 0;

  float* row(int64_t i) const { return data + i * stride; }
};

// Matrices of one type, each of which may lie anywhere.
struct Bank {
  std::vector<const void*> matrices;
  DType dtype;

  Weight operator[](int i) const { return {matrices[i], dtype}; }
};

// The paged keys or values of one layer, `pages` pages of kPage positions.
struct Cache {
  float* data = nullptr;
  int64_t pages = 0;
};

class Operands {
 public:
  Operands(const Program& program, int op, const Memory& memory)
      : program_(program), op_(op), memory_(memory) {}

  // Each throws std::runtime_error unless the buffer has at least that many rows and columns;
  // weights, caches and tables of several rows have exactly as many columns.
  Weight weight(int buffer, int64_t rows, int64_t cols) const;
  Weight weight_or_none(int buffer, int64_t rows, int64_t cols) const;
  // `bank` matrices of [rows, cols] each.
  Bank bank(int buffer, int bank, int64_t rows, int64_t cols) const;
  Floats floats(int buffer, int64_t rows, int64_t cols) const;
  int32_t* ints(int buffer, int64_t rows, int64_t cols) const;
  Cache cache(int buffer, int64_t kv_heads, int64_t head_dim) const;

  // Throws unless the condition holds; `what` completes "op 3 (linear): ".
  void require(bool condition, const char* what) const;

 private:
  DType float_type(int buffer, const BufferRecord& b, int64_t cols) const;
  const BufferRecord& find(int buffer, int64_t rows, int64_t cols) const;
  [[noreturn]] void reject(const std::string& what) const;

  const Program& program_;
  int op_;
  const Memory& memory_;
};

}  // namespace tilert
