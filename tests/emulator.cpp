// Runs the kernel's threads as fibers, in an order that a seed decides; see emulator.h.
#include "emulator.h"

#include "kernel.cu"

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

std::vector<BlockState> blocks;
std::deque<Copy> copies;
Fiber* current = nullptr;
u64 rounds = 0, progress = 0;
void* host_stack_pointer = nullptr;
const Params* launch_params = nullptr;
extern "C" int emulator_lost = -1;  // the copy that never lands, by the order of landing
int landed = 0;

BlockState& block() { return blocks[blockIdx.x]; }

// Saves the callee's registers on this stack, the stack pointer at `from`, and goes on at `to`.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void yield() { emulator_switch(&current->stack_pointer, host_stack_pointer); }

void start() {
  tilert_program(*launch_params);
  current->ended = true;
  yield();
}

void prepare(Fiber& f) {
  f.stack = static_cast<u8*>(std::malloc(kStackBytes));
  u64 top = reinterpret_cast<u64>(f.stack + kStackBytes) / 16 * 16;
  u64* sp = reinterpret_cast<u64*>(top);
  *--sp = 0;  // keeps the stack aligned as after a call
  *--sp = reinterpret_cast<u64>(&start);
  for (int i = 0; i < 6; ++i) *--sp = 0;
  f.stack_pointer = sp;
}

// xorshift64*, by Vigna; std::mt19937 takes longer to compile than to run.
struct Random {
  u64 state;
  explicit Random(u32 seed) : state(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}
  u32 operator()() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return u32(state * 0x2545f4914f6cdd1du >> 32);
  }
  void shuffle(std::vector<int>& order) {
    for (u32 i = order.size(); i > 1; --i) std::swap(order[i - 1], order[(*this)() % i]);
  }
};

void land(Random& random) {
  std::swap(copies.front(), copies[random() % copies.size()]);
  Copy c = copies.front();
  copies.pop_front();
  if (landed++ == emulator_lost) return;
  std::memcpy(c.to, c.from, c.bytes);
  Phase& p = phase(c.barrier);
  p.state -= c.bytes << 1;
  p.settle();
}

// Returns 0, or 1 when no thread could go on any more.
extern "C" int emulate(const Params* params, int num_blocks, int num_threads, int shared_bytes,
                       unsigned seed) {
  Random random(seed);
  launch_params = params;
  blockDim.x = num_threads, gridDim.x = num_blocks;
  copies.clear();
  landed = 0;
  blocks = std::vector<BlockState>(num_blocks);
  std::vector<Fiber> fibers(num_blocks * num_threads);
  for (BlockState& b : blocks) {
    b.memory.assign(shared_bytes + 1024, 0xff);  // NaNs wherever nothing was written
    b.base = reinterpret_cast<u8*>((reinterpret_cast<u64>(b.memory.data()) + 1023) / 1024 * 1024);
    b.warps.resize((num_threads + 31) / 32);
  }
  for (size_t i = 0; i < fibers.size(); ++i) {
    fibers[i].block = i / num_threads, fibers[i].thread = i % num_threads;
    prepare(fibers[i]);
  }
  const int warps = num_threads / 32;
  std::vector<int> order(num_blocks * warps);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  size_t left = fibers.size();
  u64 idle = 0;
  while (left) {
    random.shuffle(order);
    ++rounds;
    const u64 before = progress;
    for (int w : order) {
      if (random() % 8 == 0) continue;  // some warps are slow
      for (int lane = 0; lane < 32; ++lane) {
        Fiber& f = fibers[w * 32 + lane];
        if (f.ended || (f.awaited && *f.awaited < f.until)) continue;
        current = &f;
        blockIdx.x = f.block, threadIdx.x = f.thread;
        emulator_switch(&host_stack_pointer, f.stack_pointer);
        if (f.ended) --left, ++progress;
      }
    }
    for (size_t n = copies.size(); n > 0; --n)
      if (random() % 3 == 0) land(random);
    idle = progress == before && copies.empty() ? idle + 1 : 0;
    if (idle > 200'000) break;
  }
  for (Fiber& f : fibers) std::free(f.stack);
  return left ? 1 : 0;
}

}  // namespace emulator
