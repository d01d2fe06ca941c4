// Runs a program on the threads of a pool: queues, counters, steps, cancelling, the trace.
//
// The meaning of waits and signals is that of ir/program.py. Owns no buffer; knows no ops but
// NextToken and Accept, after which the step's tokens are copied out for the host.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "pool.h"
#include "program.h"
#include "task.h"

namespace tilert {

// One executed run; times in ns of a steady clock.
struct TraceRecord {
  int64_t worker, run, step, wait_begin, start, end;
};

struct Progress {
  int64_t completed;  // steps whose tokens are known, counted from the first
  bool running;       // false: all workers have left, `completed` will not change
};

class Executor {
 public:
  // memory: one entry per buffer of the program; it must outlive the executor.
  Executor(std::shared_ptr<Pool> pool, const Kernels& kernels, Program program,
           const Memory& memory);
  ~Executor();

  // Starts `steps` steps and returns; blocks first while the pool runs another executor's launch.
  // Throws std::runtime_error when the last launch of this one has not ended.
  void launch(int64_t steps, bool trace);

  // No worker begins a step that none has begun; those begun are finished by all.
  void cancel();

  // Blocks until `step` steps are completed, the launch has ended, or the time is over.
  Progress wait(int64_t step, double seconds);

  // Blocks until the launch has ended. Throws std::runtime_error when it was aborted.
  Progress finish();

  // Row s holds what was sampled in step s < completed; header.outputs columns.
  const std::vector<int32_t>& history() const { return history_; }
  int outputs() const { return program_.header.outputs; }

  // Of the last launch that was traced, ordered by worker, step and run. Call after finish().
  std::vector<TraceRecord> trace() const;

  // Longest time that one wait of a worker may take.
  void set_wait_limit(double seconds) { wait_limit_ns_ = static_cast<int64_t>(seconds * 1e9); }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  struct Wait {
    const Counter* counter;
    int64_t total, threshold, lag;
  };
  struct Run {
    const Task* task;
    Counter* signal;  // null for none
    const Wait *wait_begin, *wait_end;
    int op, lo, hi;
    bool samples;  // it is NextToken or Accept
  };
  struct alignas(64) Worker {
    std::vector<Run> queue;
    std::vector<TraceRecord> records;
    float* scratch = nullptr;
    int64_t step = 0;  // where it is, for messages
    size_t run = 0;
  };
  struct Aborted {};  // another worker has failed

  void bind_runs();
  void make_scratch();
  void work(int number);
  template <bool kTrace>
  void walk(int number, Worker& worker);
  bool begin_step(int64_t step);
  void hold(const Wait& wait, int64_t step) const;
  void publish(int64_t step);
  void fail(int number, const std::string& why);
  void leave();

  std::shared_ptr<Pool> pool_;
  const Program program_;
  std::vector<std::unique_ptr<Task>> tasks_;
  std::vector<Wait> waits_;
  std::unique_ptr<Counter[]> counters_;
  std::vector<Worker> workers_;
  std::vector<char> scratch_;
  const int32_t* sampled_ = nullptr;  // null when the program samples nothing
  int sampled_rows_ = 0;
  int64_t wait_limit_ns_ = 60'000'000'000;

  // Of the current launch.
  int64_t steps_ = 0;
  bool trace_ = false;
  std::vector<int32_t> history_;
  alignas(64) std::atomic<int64_t> begun_{0};  // steps that some worker has begun, and kCancelled
  alignas(64) std::atomic<bool> aborted_{false};
  std::atomic<int64_t> completed_{0};
  std::atomic<int> waiting_{0};  // host threads in wait()
  std::mutex mutex_;             // for the three below
  std::condition_variable changed_;
  int working_ = 0;  // workers that have not left
  std::string error_;
};

}  // namespace tilert
