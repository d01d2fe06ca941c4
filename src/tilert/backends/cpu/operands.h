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
using Bank = std::vector<Weight>;

// The paged keys or values of one layer, `pages` pages of kPage positions.
struct Cache {
  float* data = nullptr;
  int64_t pages = 0;
};

// A cache of one row for each position, of elements of any type.
struct PagedRows {
  char* data = nullptr;
  int64_t pages = 0, row_bytes = 0;

  char* at(int64_t page, int position) const {
    return data + (page * kPage + position % kPage) * row_bytes;
  }
};

class Operands {
 public:
  Operands(const Program& program, int op, const Memory& memory)
      : program_(program), op_(op), memory_(memory) {}

  // Each throws std::runtime_error unless the buffer has at least that many rows and columns;
  // weights, caches and tables of several rows have exactly as many columns.
  Weight weight(int buffer, int64_t rows, int64_t cols) const;
  Weight matrix(int buffer, int64_t rows, int64_t cols) const;  // e4m3 with block scales, too
  Weight weight_or_none(int buffer, int64_t rows, int64_t cols) const;
  // `bank` matrices of [rows, cols] each, of e4m3, too.
  Bank bank(int buffer, int bank, int64_t rows, int64_t cols) const;
  Floats floats(int buffer, int64_t rows, int64_t cols) const;
  int32_t* ints(int buffer, int64_t rows, int64_t cols) const;
  Cache cache(int buffer, int64_t kv_heads, int64_t head_dim) const;
  PagedRows rows(int buffer, DType dtype, int64_t cols) const;

  // Throws unless the condition holds; `what` completes "op 3 (linear): ".
  void require(bool condition, const char* what) const;

 private:
  // Where `count` pieces of `bytes` each are; throws unless the buffer is made of just those.
  std::vector<char*> split(int buffer, int count, size_t bytes) const;
  const BufferRecord& find(int buffer, int64_t rows, int64_t cols) const;
  [[noreturn]] void reject(const std::string& what) const;

  const Program& program_;
  int op_;
  const Memory& memory_;
};

}  // namespace tilert
