#include "executor.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <utility>

namespace tilert {
namespace {

constexpr int64_t kCancelled = int64_t{1} << 62;
constexpr uint32_t kPollsPerLook = 64;           // polls of a counter between looks at the clock
constexpr int64_t kLongestLook = 1'000'000'000;  // ns; more between two looks is a stop, not a wait

std::string number(int64_t value) { return std::to_string(value); }

std::string seconds(int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", 1e-9 * static_cast<double>(ns));
  return text;
}

// Whether the tokens of a step are known after the op.
bool chooses(Opcode code) { return code == Opcode::kNextToken || code == Opcode::kAccept; }

// The buffer of the tokens, and how many it has.
template <class Fields>
std::pair<int, int> chosen(const Fields& f) {
  return {f.sampled, f.rows};
}

}  // namespace

Executor::Executor(std::shared_ptr<Pool> pool, const Kernels& kernels, Program program,
                   const Memory& memory)
    : pool_(std::move(pool)), program_(std::move(program)) {
  const Header& h = program_.header;
  if (memory.size() != program_.buffers.size() ||
      std::any_of(memory.begin(), memory.end(), [](const auto& parts) { return parts.empty(); })) {
    throw std::runtime_error("one entry per buffer");
  }
  if (h.num_workers > pool_->size()) {
    throw std::runtime_error("the program has " + number(h.num_workers) +
                             " workers, the pool only " + number(pool_->size()));
  }
  for (int op = 0; op < h.num_ops; ++op) {
    tasks_.push_back(make_task(program_, op, memory, kernels));
    if (!chooses(program_.opcode(op))) continue;
    if (sampled_) throw std::runtime_error("more than one op samples the next token");
    const auto [sampled, rows] = program_.opcode(op) == Opcode::kAccept
                                     ? chosen(program_.fields<AcceptFields>(op))
                                     : chosen(program_.fields<NextTokenFields>(op));
    if (rows > h.outputs) throw std::runtime_error("more rows are sampled than the program has");
    sampled_ = reinterpret_cast<const int32_t*>(memory[sampled].front().data);
    sampled_rows_ = rows;
  }
  bind_runs();
  make_scratch();
}

Executor::~Executor() {
  cancel();
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return working_ == 0; });
}

void Executor::bind_runs() {
  counters_ = std::make_unique<Counter[]>(program_.counters.size());
  for (const WaitRecord& w : program_.waits) {
    waits_.push_back(
        {&counters_[w.counter], program_.counters[w.counter].total, w.threshold, w.lag});
  }
  workers_.resize(program_.header.num_workers);
  for (int i = 0; i < program_.header.num_workers; ++i) {
    for (int r = program_.queue_starts[i]; r < program_.queue_starts[i + 1]; ++r) {
      const RunRecord& run = program_.runs[r];
      const Task* task = tasks_[run.op].get();
      if (run.hi > task->tiles()) {
        throw std::runtime_error("run " + number(r) + " ends at tile " + number(run.hi) + " of " +
                                 number(task->tiles()));
      }
      if (run.ring >= 0) throw std::runtime_error("run " + number(r) + " streams through a ring");
      workers_[i].queue.push_back({task, run.signal < 0 ? nullptr : &counters_[run.signal],
                                   waits_.data() + run.wait_begin, waits_.data() + run.wait_end,
                                   run.op, run.lo, run.hi, chooses(program_.opcode(run.op))});
    }
  }
}

void Executor::make_scratch() {
  size_t most = 0;
  for (const auto& task : tasks_) most = std::max(most, task->scratch_bytes());
  most = (most + 127) / 64 * 64;  // a line between workers
  scratch_.resize(most * workers_.size() + 64);
  const auto first = (reinterpret_cast<uintptr_t>(scratch_.data()) + 63) / 64 * 64;
  for (size_t i = 0; i < workers_.size(); ++i) {
    workers_[i].scratch = reinterpret_cast<float*>(first + i * most);
  }
}

void Executor::launch(int64_t steps, bool trace) {
  if (steps < 1) throw std::runtime_error("a launch has at least one step");
  int busy = 0;
  for (const Worker& worker : workers_) busy += !worker.queue.empty();
  {
    std::lock_guard lock(mutex_);
    if (working_ != 0) throw std::runtime_error("the last launch has not ended");
    working_ = busy;
    error_.clear();
  }
  steps_ = steps;
  trace_ = trace;
  history_.assign(sampled_ ? steps * outputs() : 0, 0);
  for (size_t i = 0; i < program_.counters.size(); ++i) {
    counters_[i].value.store(0, std::memory_order_relaxed);
  }
  for (Worker& worker : workers_) worker.records.resize(trace ? steps * worker.queue.size() : 0);
  begun_.store(0, std::memory_order_relaxed);
  completed_.store(busy ? 0 : steps, std::memory_order_relaxed);
  aborted_.store(false, std::memory_order_relaxed);
  if (busy == 0) return;
  try {
    pool_->start(static_cast<int>(workers_.size()), [this](int i) { work(i); });
  } catch (...) {
    std::lock_guard lock(mutex_);
    working_ = 0;
    throw;
  }
}

void Executor::cancel() { begun_.fetch_or(kCancelled, std::memory_order_relaxed); }

Progress Executor::wait(int64_t step, double seconds) {
  std::unique_lock lock(mutex_);
  waiting_.fetch_add(1);  // sequentially consistent, as in publish()
  changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                    [&] { return working_ == 0 || completed_.load() >= step; });
  waiting_.fetch_sub(1);
  return {completed_.load(), working_ != 0};
}

Progress Executor::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return working_ == 0; });
  if (!error_.empty()) throw std::runtime_error(error_);
  return {completed_.load(), false};
}

std::vector<TraceRecord> Executor::trace() const {
  std::vector<TraceRecord> all;
  for (const Worker& w : workers_) all.insert(all.end(), w.records.begin(), w.records.end());
  return all;
}

void Executor::work(int number) {
  Worker& worker = workers_[number];
  if (worker.queue.empty()) return;
  try {
    if (trace_) {
      walk<true>(number, worker);
    } else {
      walk<false>(number, worker);
    }
  } catch (const Aborted&) {
  } catch (const std::exception& error) {
    fail(number, error.what());
  }
  if (trace_) worker.records.resize(worker.step * worker.queue.size() + worker.run);
  leave();
}

template <bool kTrace>
void Executor::walk(int number, Worker& worker) {
  worker.run = 0;
  for (worker.step = 0; worker.step < steps_ && begin_step(worker.step); ++worker.step) {
    for (const Run& run : worker.queue) {
      const int64_t wait_begin = kTrace ? now_ns() : 0;
      for (const Wait* wait = run.wait_begin; wait != run.wait_end; ++wait) {
        hold(*wait, worker.step);
      }
      const int64_t start = kTrace ? now_ns() : 0;
      run.task->run(run.lo, run.hi, worker.scratch);
      if constexpr (kTrace) {
        const auto index = static_cast<int64_t>(worker.run);
        worker.records[worker.step * worker.queue.size() + worker.run] = {
            number, index, worker.step, wait_begin, start, now_ns()};
      }
      if (run.signal) run.signal->value.fetch_add(1, std::memory_order_release);
      if (run.samples) publish(worker.step);
      ++worker.run;
    }
    worker.run = 0;
  }
}

// A step is begun by all workers or by none: whoever comes first decides, and after cancel() nobody
// comes first any more.
bool Executor::begin_step(int64_t step) {
  if (aborted_.load(std::memory_order_relaxed)) throw Aborted{};
  int64_t begun = begun_.load(std::memory_order_relaxed);
  while ((begun & ~kCancelled) <= step) {
    if (begun & kCancelled) return false;
    if (begun_.compare_exchange_weak(begun, step + 1, std::memory_order_relaxed)) break;
  }
  return true;
}

void Executor::hold(const Wait& wait, int64_t step) const {
  if (step < wait.lag) return;
  const int64_t want = (step - wait.lag) * wait.total + wait.threshold;
  if (wait.counter->value.load(std::memory_order_acquire) >= want) return;
  int64_t waited = 0, seen = now_ns();
  for (Backoff backoff;; backoff.pause()) {
    const int64_t have = wait.counter->value.load(std::memory_order_acquire);
    if (have >= want) return;
    if (aborted_.load(std::memory_order_relaxed)) throw Aborted{};
    if (backoff.count() % kPollsPerLook != 0) continue;
    const int64_t now = now_ns();
    waited +=
        std::min(now - seen, kLongestLook);  // time in which the process was stopped is no wait
    seen = now;
    if (waited > wait_limit_ns_) {
      throw std::runtime_error("waited " + seconds(wait_limit_ns_) + " s for counter " +
                               number(wait.counter - counters_.get()) + ": it has " + number(have) +
                               ", wants " + number(want));
    }
  }
}

void Executor::publish(int64_t step) {
  std::copy_n(sampled_, sampled_rows_, &history_[step * outputs()]);
  completed_.store(step + 1);
  if (waiting_.load() == 0)
    return;  // sequentially consistent: a waiter is seen, or it sees the step
  std::lock_guard lock(mutex_);
  changed_.notify_all();
}

void Executor::fail(int number_of_worker, const std::string& why) {
  const Worker& worker = workers_[number_of_worker];
  const int op = worker.queue[worker.run].op;
  std::lock_guard lock(mutex_);
  if (error_.empty()) {
    error_ = "worker " + number(number_of_worker) + ", step " + number(worker.step) + ", run " +
             number(worker.run) + " (op " + number(op) + ", " + op_name(program_.opcode(op)) +
             "): " + why;
  }
  aborted_.store(true, std::memory_order_relaxed);
}

void Executor::leave() {
  std::lock_guard lock(mutex_);
  if (--working_ != 0) return;
  if (!sampled_ && error_.empty()) completed_ = begun_.load() & ~kCancelled;
  changed_.notify_all();
}

}  // namespace tilert
