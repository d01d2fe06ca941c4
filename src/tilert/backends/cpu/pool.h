// Persistent threads that run one job at a time; shared by all programs of a model.
//
// Knows nothing of programs. Between jobs the threads spin for some microseconds, then sleep.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace tilert {

inline int64_t now_ns() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

// Waits a little: some pauses first, then the rest of the time slice goes to whoever can use it.
class Backoff {
 public:
  void pause();
  uint32_t count() const { return count_; }

 private:
  uint32_t count_ = 0;
};

class Pool {
 public:
  // Thread i is bound to the i-th CPU that this process may use, when there are at least `threads`.
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return static_cast<int>(threads_.size()); }

  // Starts job(i) on threads i < workers and returns; jobs take turns, so it first blocks until the
  // last one has ended. The job must not throw. Throws std::runtime_error in a forked child.
  void start(int workers, std::function<void(int)> job);

  // Blocks until the current job, if any, has ended on all threads.
  void join();
  void stop();  // ends the threads; for the constructor and the destructor

 private:
  void serve(int thread);
  uint32_t next_job(uint32_t seen) const;

  std::vector<std::thread> threads_;
  std::atomic<uint32_t> epoch_{0};  // number of jobs started; threads sleep on it
  std::atomic<int> busy_{0};        // threads that have not ended the current job
  std::function<void(int)> job_;
  int workers_ = 0;
  bool stop_ = false;
  std::mutex starting_;
  std::mutex mutex_;  // for ended_
  std::condition_variable ended_;
  pid_t process_;
};

}  // namespace tilert
