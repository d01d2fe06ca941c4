// The binary form of a program as tables, checked: what `ir/encode.py` writes.
//
// Knows the word layout (from the generated ops.h) and no op's meaning, no memory and no thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"

namespace tilert {

struct Program {
  Header header;
  std::vector<BufferRecord> buffers;
  std::vector<int32_t> op_words;   // opcode and fields of all ops
  std::vector<int32_t> op_starts;  // of each op in op_words, and the end of the last
  std::vector<CounterRecord> counters;
  std::vector<int32_t> queue_starts;  // of each worker's queue in runs, and the end of the last
  std::vector<RunRecord> runs;
  std::vector<WaitRecord> waits;

  // Throws std::runtime_error when the bytes are not a program or an index leads out of its table.
  static Program parse(const char* data, size_t size);

  Opcode opcode(int op) const { return static_cast<Opcode>(op_words[op_starts[op]]); }

  // The fields of an op whose opcode is known to belong to Fields.
  template <class Fields>
  Fields fields(int op) const {
    if (op_starts[op + 1] - op_starts[op] != 1 + static_cast<int>(sizeof(Fields) / 4)) {
      throw std::runtime_error("op " + std::to_string(op) + " has a wrong number of fields");
    }
    Fields out;
    std::memcpy(&out, &op_words[op_starts[op] + 1], sizeof(Fields));
    return out;
  }
};

}  // namespace tilert
