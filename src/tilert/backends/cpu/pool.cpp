#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <utility>
#if defined(__linux__)
#include <pthread.h>
#endif

namespace tilert {
namespace {

constexpr uint32_t kPauses = 128;           // about 4 us before the first yield
constexpr int64_t kSpinAfterJob = 100'000;  // ns until a thread without work sleeps

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

#if defined(__linux__)
std::vector<int> allowed_cpus() {
  cpu_set_t set;
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;  // more CPUs than the set holds
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

void bind(std::thread& thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  // A refusal (a sandbox) costs speed and nothing else.
  (void)pthread_setaffinity_np(thread.native_handle(), sizeof(set), &set);
}
#endif

}  // namespace

void Backoff::pause() {
  if (++count_ < kPauses) {
    cpu_pause();
  } else {
    sched_yield();
  }
}

Pool::Pool(int threads) : process_(getpid()) {
  if (threads < 1) throw std::runtime_error("a pool needs at least one thread");
  threads_.reserve(threads);
  try {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this, i] { serve(i); });
  } catch (const std::system_error&) {
    stop();
    throw std::runtime_error("the system gives " + std::to_string(threads_.size()) +
                             " threads only");
  }
#if defined(__linux__)
  const std::vector<int> cpus = allowed_cpus();
  if (cpus.size() >= threads_.size()) {
    for (int i = 0; i < threads; ++i) bind(threads_[i], cpus[i]);
  }
#endif
}

Pool::~Pool() {
  if (getpid() != process_) {  // a forked child has none of the threads
    for (std::thread& thread : threads_) thread.detach();
    return;
  }
  join();
  stop();
}

void Pool::stop() {
  stop_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::start(int workers, std::function<void(int)> job) {
  if (getpid() != process_) throw std::runtime_error("a pool of threads does not survive fork");
  if (workers < 1 || workers > size()) {
    throw std::runtime_error("a job for " + std::to_string(workers) + " workers on a pool of " +
                             std::to_string(size()));
  }
  std::lock_guard turn(starting_);
  join();
  busy_.store(size(), std::memory_order_relaxed);
  job_ = std::move(job);
  workers_ = workers;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
}

void Pool::join() {
  if (getpid() != process_) return;
  Backoff backoff;
  const int64_t limit = now_ns() + kSpinAfterJob;
  while (busy_.load(std::memory_order_acquire) != 0 && now_ns() < limit) backoff.pause();
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [this] { return busy_.load(std::memory_order_acquire) == 0; });
}

void Pool::serve(int thread) {
  uint32_t seen = 0;
  for (;;) {
    seen = next_job(seen);
    if (stop_) return;
    if (thread < workers_) job_(thread);
    if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      std::lock_guard lock(mutex_);  // so that join() cannot miss it between its look and its sleep
      ended_.notify_all();
    }
  }
}

uint32_t Pool::next_job(uint32_t seen) const {
  Backoff backoff;
  const int64_t limit = now_ns() + kSpinAfterJob;
  for (;;) {
    const uint32_t epoch = epoch_.load(std::memory_order_acquire);
    if (epoch != seen) return epoch;
    if (now_ns() < limit) {
      backoff.pause();
    } else {
      epoch_.wait(seen, std::memory_order_acquire);
    }
  }
}

}  // namespace tilert
