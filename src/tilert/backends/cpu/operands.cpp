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
      return 1;
  }
  return 0;
}

DType dtype_of(const BufferRecord& buffer) { return static_cast<DType>(buffer.dtype); }

}  // namespace

Weight Operands::weight(int buffer, int64_t rows, int64_t cols) const {
  const BufferRecord& b = find(buffer, rows, cols);
  if (b.bank != 1 || memory_[buffer].size() != 1) {
    reject("weight " + std::to_string(buffer) + " is several matrices");
  }
  return {memory_[buffer].front().data, float_type(buffer, b, cols)};
}

Bank Operands::bank(int buffer, int bank, int64_t rows, int64_t cols) const {
  const BufferRecord& b = find(buffer, int64_t{bank} * rows, cols);
  Bank out{{}, float_type(buffer, b, cols)};
  const size_t bytes = rows * cols * bytes_of(out.dtype);
  for (const Bytes& part : memory_[buffer]) {
    for (size_t at = 0; at + bytes <= part.size; at += bytes)
      out.matrices.push_back(part.data + at);
  }
  if (b.bank != bank || static_cast<int>(out.matrices.size()) != bank) {
    reject("weight " + std::to_string(buffer) + " is no bank of " + std::to_string(bank));
  }
  return out;
}

DType Operands::float_type(int buffer, const BufferRecord& b, int64_t cols) const {
  const DType dtype = dtype_of(b);
  if (dtype != DType::kF32 && dtype != DType::kBF16 && dtype != DType::kF16) {
    reject("weight " + std::to_string(buffer) + " is not f32, bf16 or f16");
  }
  if (b.scale >= 0) reject("weight " + std::to_string(buffer) + " has block scales");
  if (b.cols != cols) reject("weight " + std::to_string(buffer) + " has longer rows");
  return dtype;
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
  const BufferRecord& b = find(buffer, 1, kv_heads * head_dim);
  if (b.cols != kv_heads * head_dim)
    reject("cache " + std::to_string(buffer) + " has more columns");
  if (static_cast<Kind>(b.kind) != Kind::kCACHE || dtype_of(b) != DType::kF32) {
    reject("buffer " + std::to_string(buffer) + " is not a cache of f32");
  }
  const int64_t page_bytes = kv_heads * head_dim * kPage * 4;
  const int64_t pages = static_cast<int64_t>(memory_[buffer].front().size) / page_bytes;
  return {reinterpret_cast<float*>(memory_[buffer].front().data), pages};
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
