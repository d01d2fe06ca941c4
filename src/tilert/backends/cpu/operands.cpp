#include "operands.h"

#include <stdexcept>

namespace tilert {
namespace {

int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kF8E4M3:
    case DType::kU8:
      return 1;
  }
  return 0;
}

DType dtype_of(const BufferRecord& buffer) { return static_cast<DType>(buffer.dtype); }

}  // namespace

Weight Operands::weight(int buffer, int64_t rows, int64_t cols) const {
  const Weight out = matrix(buffer, rows, cols);
  if (out.scales) reject("weight " + std::to_string(buffer) + " has block scales");
  return out;
}

Weight Operands::matrix(int buffer, int64_t rows, int64_t cols) const {
  return bank(buffer, 1, find(buffer, rows, cols).rows, cols)[0];
}

Bank Operands::bank(int buffer, int bank, int64_t rows, int64_t cols) const {
  const std::string name = "weight " + std::to_string(buffer);
  const BufferRecord& b = find(buffer, int64_t{bank} * rows, cols);
  Weight one{nullptr, dtype_of(b)};
  if (one.dtype == DType::kI32 || one.dtype == DType::kU8) reject(name + " is not of floats");
  if ((one.dtype == DType::kF8E4M3) != (b.scale >= 0)) {
    reject(name + " has block scales and no e4m3, or lacks them");
  }
  if (b.cols != cols) reject(name + " has longer rows");
  std::vector<char*> scales(bank, nullptr);
  if (b.scale >= 0) {
    if (b.block_rows < 1 || b.block_cols < 1) reject(name + " has empty blocks of scales");
    one.block_rows = b.block_rows, one.block_cols = b.block_cols;
    const int64_t down = (rows + b.block_rows - 1) / b.block_rows;
    const int64_t across = (cols + b.block_cols - 1) / b.block_cols;
    if (floats(b.scale, bank * down, across).stride != across) {
      reject(name + " has longer rows of scales");
    }
    scales = split(b.scale, bank, down * across * sizeof(float));
  }
  Bank out;
  const std::vector<char*> matrices = split(buffer, bank, rows * cols * bytes_of(one.dtype));
  for (int i = 0; i < bank; ++i) {
    one.data = matrices[i], one.scales = reinterpret_cast<float*>(scales[i]);
    out.push_back(one);
  }
  if (b.bank != bank) reject(name + " is no bank of " + std::to_string(bank));
  return out;
}

std::vector<char*> Operands::split(int buffer, int count, size_t bytes) const {
  std::vector<char*> out;
  for (const Bytes& part : memory_[buffer]) {
    for (size_t at = 0; at + bytes <= part.size; at += bytes) out.push_back(part.data + at);
  }
  if (static_cast<int>(out.size()) != count) {
    reject("weight " + std::to_string(buffer) + " is not of " + std::to_string(count) +
           " matrices");
  }
  return out;
}

Weight Operands::weight_or_none(int buffer, int64_t rows, int64_t cols) const {
  return buffer < 0 ? Weight{nullptr, DType::kF32} : weight(buffer, rows, cols);
}

Floats Operands::floats(int buffer, int64_t rows, int64_t cols) const {
  const BufferRecord& b = find(buffer, rows, cols);
  if (dtype_of(b) != DType::kF32) reject("buffer " + std::to_string(buffer) + " is not f32");
  return {reinterpret_cast<float*>(memory_[buffer].front().data), b.cols};
}

int32_t* Operands::ints(int buffer, int64_t rows, int64_t cols) const {
  const BufferRecord& b = find(buffer, rows, cols);
  if (dtype_of(b) != DType::kI32) reject("buffer " + std::to_string(buffer) + " is not i32");
  if (rows > 1 && b.cols != cols) reject("buffer " + std::to_string(buffer) + " is too wide");
  return reinterpret_cast<int32_t*>(memory_[buffer].front().data);
}

Cache Operands::cache(int buffer, int64_t kv_heads, int64_t head_dim) const {
  const PagedRows found = rows(buffer, DType::kF32, kv_heads * head_dim);
  return {reinterpret_cast<float*>(found.data), found.pages};
}

PagedRows Operands::rows(int buffer, DType dtype, int64_t cols) const {
  const BufferRecord& b = find(buffer, 1, cols);
  if (b.cols != cols) reject("cache " + std::to_string(buffer) + " has more columns");
  if (static_cast<Kind>(b.kind) != Kind::kCACHE || dtype_of(b) != dtype) {
    reject("buffer " + std::to_string(buffer) + " is not a cache of " +
           (dtype == DType::kF32 ? "f32" : "bytes"));
  }
  const Bytes& memory = memory_[buffer].front();
  const int64_t row_bytes = cols * bytes_of(dtype);
  return {memory.data, static_cast<int64_t>(memory.size) / (row_bytes * kPage), row_bytes};
}

void Operands::require(bool condition, const char* what) const {
  if (!condition) reject(what);
}

const BufferRecord& Operands::find(int buffer, int64_t rows, int64_t cols) const {
  const std::string name = "buffer " + std::to_string(buffer);
  if (buffer < 0 || buffer >= static_cast<int>(memory_.size())) reject(name + " does not exist");
  const BufferRecord& b = program_.buffers[buffer];
  if (rows < 1 || cols < 1) reject("a size in its fields is not positive");
  if (b.device != 0) reject(name + " is on another device");
  const bool cache = static_cast<Kind>(b.kind) == Kind::kCACHE;
  const int64_t stored = cache ? 0 : int64_t{b.rows} * b.cols * bytes_of(dtype_of(b));
  int64_t held = 0;
  for (const Bytes& part : memory_[buffer]) held += part.data ? static_cast<int64_t>(part.size) : 0;
  if (held < stored) reject(name + " has too little memory");
  if (b.rows < rows || b.cols < cols) {
    reject(name + " is [" + std::to_string(b.rows) + ", " + std::to_string(b.cols) +
           "], the op needs [" + std::to_string(rows) + ", " + std::to_string(cols) + "]");
  }
  return b;
}

void Operands::reject(const std::string& what) const {
  throw std::runtime_error("op " + std::to_string(op_) + " (" + op_name(program_.opcode(op_)) +
                           "): " + what);
}

}  // namespace tilert
