#include "read_rate.h"

#include <algorithm>
#include <atomic>

namespace tilert {

double read_rate(Pool& pool, const Kernels& kernels, const std::vector<Bytes>& blocks) {
  const size_t threads = pool.size();
  std::atomic<uint64_t> sink{0};
  std::vector<int64_t> begins(threads), ends(threads);
  pool.start(pool.size(), [&](int thread) {
    const size_t i = thread;
    uint64_t sum = 0;
    begins[i] = now_ns();
    for (const Bytes& block : blocks) {
      const auto border = [&](size_t n) {
        return n == threads ? block.size : block.size / threads * n / 64 * 64;
      };
      sum += kernels.read(block.data + border(i), border(i + 1) - border(i));
    }
    ends[i] = now_ns();
    sink += sum;
  });
  pool.join();
  size_t bytes = 0;
  for (const Bytes& block : blocks) bytes += block.size;
  const int64_t took =
      *std::max_element(ends.begin(), ends.end()) - *std::min_element(begins.begin(), begins.end());
  return 1e9 * static_cast<double>(bytes) / static_cast<double>(std::max<int64_t>(took, 1));
}

}  // namespace tilert
