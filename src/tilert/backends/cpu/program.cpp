#include "program.h"

namespace tilert {
namespace {

[[noreturn]] void reject(const std::string& why) {
  throw std::runtime_error("not a valid program: " + why);
}

// Copies tables off the front of the bytes.
class Reader {
 public:
  Reader(const char* data, size_t size) : data_(data), left_(size) {}

  template <class Record>
  std::vector<Record> table(int64_t count) {
    if (count < 0 || static_cast<uint64_t>(count) > left_ / sizeof(Record)) {
      reject("the bytes end inside a table");
    }
    std::vector<Record> out(count);
    const size_t bytes = count * sizeof(Record);
    if (bytes) std::memcpy(out.data(), data_, bytes);
    data_ += bytes;
    left_ -= bytes;
    return out;
  }

  size_t left() const { return left_; }

 private:
  const char* data_;
  size_t left_;
};

// The starts of consecutive pieces that fill a table of `size` records.
void check_starts(const std::vector<int32_t>& starts, int64_t size, const char* what) {
  if (starts.front() != 0 || starts.back() != size) reject(std::string(what) + " has gaps");
  for (size_t i = 0; i + 1 < starts.size(); ++i) {
    if (starts[i] > starts[i + 1]) reject(std::string(what) + " runs backwards");
  }
}

void check_index(int64_t index, int64_t first, int64_t size, const char* what) {
  if (index < first || index >= size) {
    reject(std::string(what) + " " + std::to_string(index) + " is outside its table of " +
           std::to_string(size));
  }
}

void check_runs(const Program& p) {
  for (const RunRecord& run : p.runs) {
    check_index(run.op, 0, p.header.num_ops, "op");
    check_index(run.signal, -1, p.header.num_counters, "counter");
    check_index(run.wait_begin, 0, int64_t{run.wait_end} + 1, "first wait");
    check_index(run.wait_end, 0, int64_t{p.header.num_waits} + 1, "last wait");
    if (run.lo < 0 || run.lo > run.hi) reject("a run has a negative range of tiles");
  }
  for (const WaitRecord& wait : p.waits) {
    check_index(wait.counter, 0, p.header.num_counters, "counter");
    if (wait.threshold < 0 || wait.lag < 0) reject("a wait has a negative threshold or lag");
  }
  for (const CounterRecord& counter : p.counters) {
    if (counter.total < 0) reject("a counter has a negative total");
  }
}

}  // namespace

Program Program::parse(const char* data, size_t size) {
  Reader read(data, size);
  Program p;
  p.header = read.table<Header>(1)[0];
  const Header& h = p.header;
  if (static_cast<uint32_t>(h.magic) != kMagic) reject("it does not start with the magic word");
  if (h.version != kVersion) {
    reject("version " + std::to_string(h.version) + ", this build reads " +
           std::to_string(kVersion));
  }
  if (h.tokens < 1 || h.outputs < 1 || h.sequences < 1 || h.context < 1 || h.num_workers < 1) {
    reject("a capacity in its header is not positive");
  }
  p.buffers = read.table<BufferRecord>(h.num_buffers);
  p.op_words = read.table<int32_t>(h.num_op_words);
  p.op_starts = read.table<int32_t>(int64_t{h.num_ops} + 1);
  p.counters = read.table<CounterRecord>(h.num_counters);
  p.queue_starts = read.table<int32_t>(int64_t{h.num_workers} + 1);
  p.runs = read.table<RunRecord>(h.num_runs);
  p.waits = read.table<WaitRecord>(h.num_waits);
  if (static_cast<int64_t>(read.left()) != h.num_tail_bytes) reject("the tail has a wrong length");
  for (const BufferRecord& b : p.buffers) {
    if (b.rows < 0 || b.cols < 0) reject("a buffer has a negative shape");
  }
  if (p.op_starts.empty() || p.queue_starts.empty()) reject("it has no ops or no workers");
  check_starts(p.op_starts, h.num_op_words, "the table of ops");
  check_starts(p.queue_starts, h.num_runs, "the table of queues");
  for (int op = 0; op < h.num_ops; ++op) {
    if (p.op_starts[op] == p.op_starts[op + 1]) reject("an op has no opcode");
  }
  check_runs(p);
  return p;
}

}  // namespace tilert
