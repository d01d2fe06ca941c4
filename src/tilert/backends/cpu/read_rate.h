// How fast the threads of a pool read given bytes with plain vector loads: the yardstick of
// decoding.
#pragma once
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "task.h"

namespace tilert {

// Bytes per second. Each block is cut into one contiguous share per thread.
double read_rate(Pool& pool, const Kernels& kernels, const std::vector<Bytes>& blocks);

}  // namespace tilert
