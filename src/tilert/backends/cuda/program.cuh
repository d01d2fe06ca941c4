// What the host hands over, and the state of one block (a worker): its queue, ring and hand-offs.
// One block runs on each multiprocessor: kWarps warps compute, one more streams weights ahead of
// them.
#pragma once
#include "constants.h"
#include "ptx.cuh"

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;  // that compute
constexpr int kLoaderThreads = 128;    // one works; registers are dealt to groups of four warps
constexpr int kPollWarp = kWarps - 1;
constexpr int kMaxTokens = 8;
// Output rows whose partial sums are kept until they are added up: 32 sums at least, a warp's.
constexpr int kChunkRows = kTokens == 1 ? 32 : 16;
constexpr int kPartialPitch = kWarps + 1;  // no two rows of a warp in one bank
constexpr u64 kPatience = 1'500'000'000;   // ns that a wait may take before it is an error
constexpr float kLog2e = 1.44269504088896340736f;

enum Verdict : u32 { kGoOn = 0, kStopped = 1, kFailed = 2 };

struct Wait {
  u16 counter;
  u16 threshold;  // with kLagged: of the step before
  u32 total;      // signals of the counter in each step
};
constexpr u16 kLagged = 0x8000;

// One run of the queue, with everything that its op needs resolved to addresses. 96 bytes.
struct Run {
  u16 variant;  // which specialisation of which op, its shape (shapes.cuh), and its pass: see below
  u16 wait_begin, wait_count;  // begin: from the run itself, in sizes of a wait
  u16 signal;                  // counter, or kNoSignal
  u32 first, count;            // linear: output rows; other ops: tiles
  const u8* w;                 // first byte of the first row; attend: the cache of keys
  const u8* w_up;              // attend: the cache of values
  const u8* norm;
  const u8* norm2;     // attend: norm of keys
  const u8* bias;      // experts: weights of the choice
  const u8* bias_up;   // attend: the rope table; experts: the choice
  const float* scale;  // of all of w, one for each block
  const float* scale_up;
  // Operands in the arena: offset in floats, and in the top byte the rank of the tag (ir/tags.py).
  u32 x, y;
  // attend: k and v; x2 of linear: the residual, often y itself; x3 of experts: see choice_waits
  u32 x2, x3;

  __device__ __forceinline__ const Wait* waits() const {
    return reinterpret_cast<const Wait*>(this) + wait_begin;
  }
};
constexpr u16 kNoSignal = 0xffff;
// x3 of a run whose weights are chosen. Its top byte: the rank of the choice's tag.
// How many of its waits, the first ones, are for the choice.
__device__ __forceinline__ u32 choice_waits(const Run& run) { return run.x3 & 0xffff; }
// Whether x' may be made before the run's waits hold, for words say that x is there.
__device__ __forceinline__ bool x_at_hand(const Run& run) { return run.x3 >> 16 & 1; }
// Whether an earlier run of the queue had the same choice.
__device__ __forceinline__ bool choice_known(const Run& run) { return run.x3 >> 17 & 1; }
static_assert(kEntryBytes >= sizeof(Run) && kEntryBytes % 16 == 0, "an entry begins with its run");
constexpr int kShapeShift = 6, kPassShift = 12;
__device__ __forceinline__ u32 variant_of(const Run& run) {
  return run.variant & ((1u << kShapeShift) - 1);
}
__device__ __forceinline__ u32 shape_of(const Run& run) {
  return run.variant >> kShapeShift & ((1u << (kPassShift - kShapeShift)) - 1);
}
__device__ __forceinline__ u32 pass_of(const Run& run) {
  return kPasses > 1 ? run.variant >> kPassShift : 0;
}

// What a block was waiting for when it gave up; the host finds the cause among all of them.
struct Failure {
  u32 run, step, counter, have, want;
};

// With kTrace: when a run began to wait, to work, and when it had ended, in ns.
struct Stamps {
  u64 wait, start, end;
};

struct Params {
  const u8* queues;        // of all workers: runs and waits, see Block
  const u32* queue_begin;  // [workers + 1], in pieces of 16 bytes
  const u32* run_begin;    // [workers + 1]
  u32* counters;           // [counters * kCounterPitch]
  float* arena;
  u32* tokens;          // [kTokens] the step's token ids
  u32* passes;          // with several passes: see Passes
  const u32* pages;     // [sequences, page_cols] page tables
  const u32* stop_ids;  // kMaxStops, 0xffffffff where unused
  u32* mailbox;         // host memory, [steps, kTokens]
  u32* reports;         // host memory, [steps, kReportWords], where a program has log-probabilities
  const u32* cancel;    // host memory
  u32* verdict;
  Failure* failures;  // [workers]
  Stamps* stamps;     // [steps, runs of all workers], with kTrace
  // Of the tokens of the first step: position and row of the page table. Tokens of one sequence
  // stand together, in the order of their positions; tokens from `count` on are none.
  u32 positions[kMaxTokens], sequences[kMaxTokens];
  u32 count, page_cols, steps;
};
constexpr int kCounterPitch = 32;  // words; a line for each counter
constexpr u32 kTags = 255;
constexpr u32 kTagMask = 0xff, kRankShift = 24;
constexpr u32 kChoiceShift = kChoiceTagged ? 8 : 0;  // of an expert's number, beside its tag
constexpr u32 kByTag = 0xffffffffu;                  // in a Failure: it was words that did not come
constexpr u32 kByUnit = 0xfffffffeu;  // in a Failure: it was a unit of weights or of the cache
constexpr u32 kByRun = 0xfffffffdu;   // in a Failure: it was the run itself, from the queue
constexpr int kMaxStops = 16;
constexpr int kMaxChosen = 32;  // experts of a token: one for each lane

// Where a pass stands and what it has, in steps of several: a model, whose tokens but the first are
// guesses, and a layer that guesses, once for the tokens that count and once for each guess but the
// last. All tokens are of one sequence, each behind the one before it.
struct Pass {
  u32 first, count;  // position of its first token, tokens
};
struct Passes {
  Pass at[kPasses];
  u32 following[kTokens];  // tokens of the layer's first pass
  u32 guess[kTokens];      // token of its further passes, and zeros
};

struct Shared {
  u64 full[kSlots], empty[kSlots];
  u64 fetched[kEntries ? kEntries : 1];  // of entries of the queue
  u32 verdict;                           // told to all threads of the block
  u32 listed;  // lists of chosen rows that have been made so far in this launch
  // Where entries are fetched, or a step has several passes: runs in this launch whose waits have
  // held; and where they are fetched those that the loader has left behind.
  u32 progress, streamed;
  // 1 + runs in this launch before that in which the loader lost a unit, or in which a warp stopped
  // to wait for one; 0: none.
  u32 lost, stopped;
  Pass passes[2][kPasses];           // of this step and the next or the one before
  u32 chosen[kTokens * kMaxChosen];  // what the loader knows: experts of the run that it streams
  float scales[kShapeScales ? kShapeScales : 1];  // see AnyShape
  float squares[kWarps][kTokens];
  float partial[2][kTokens][2 * kChunkRows * kPartialPitch];
};

// Where a thread stands in the ring. Loader and consumers count the same units in the same order.
struct Cursor {
  u32 slot = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ Cursor after(u32 units) const {  // at most kSlots
    const bool around = slot + units >= kSlots;
    return {around ? slot + units - kSlots : slot + units, around ? parity ^ 1 : parity};
  }
};

// The queue is in shared memory: all runs, then their waits; or, where that would take slots from
// the ring, kEntries of its runs at a time, each with its waits behind it (fetch_queue).
struct Block {
  const Params& params;
  Shared& shared;
  u8* ring;     // kSlots slots of kSlotPitch bytes
  u8* scratch;  // kScratchBytes; between the barriers of one op
  u8* queue;
  u32 length;                // runs in the queue
  u32 step = 0, number = 0;  // number: of the run in the queue
  u32 pass = 0;              // of the run
  u32 turn = 0;              // added to the ranks of tags, in this step
  Cursor cursor;
  u32 chunk = 0;    // chunks of rows so far: picks the buffer of partial sums
  u32 lists = 0;    // of chosen rows, so far
  u64 started = 0;  // with kTrace: when the inputs of the run were there

  __device__ __forceinline__ u8* slot() const { return slot(cursor); }
  __device__ __forceinline__ u8* slot(const Cursor& at) const {
    return ring + at.slot * kSlotPitch;
  }
  __device__ __forceinline__ u32 index() const { return step * length + number; }  // of the run
  __device__ __forceinline__ const Run& run() const {
    const u32 entry = kEntries ? index() % (kEntries ? kEntries : 1) : number;
    return *reinterpret_cast<const Run*>(queue + entry * kEntryBytes);
  }
  // Whether the run's entry is there.
  __device__ __forceinline__ bool fetched() const {
    if constexpr (kEntries == 0) return true;
    constexpr u32 kCount = kEntries ? kEntries : 1;
    return barrier_test(&shared.fetched[index() % kCount], index() / kCount % 2);
  }
  __device__ __forceinline__ u32 position(int token) const {
    if constexpr (kPasses > 1) return load_shared(&here().first) + token;
    return params.positions[token] + step;
  }
  // Tokens of the pass; behind an ordered wait, as positions.
  __device__ __forceinline__ u32 count() const {
    if constexpr (kPasses > 1) return load_shared(&here().count);
    return params.count;
  }
  __device__ __forceinline__ Pass& here() const { return shared.passes[step % 2][pass]; }
  __device__ __forceinline__ Passes& passes() const {
    return *reinterpret_cast<Passes*>(params.passes);
  }
  __device__ __forceinline__ float* at(u32 operand) const {
    return params.arena + (operand & ((1u << kRankShift) - 1));
  }
  __device__ __forceinline__ u32 tag(u32 operand) const {
    u32 t = (operand >> kRankShift) + turn;
    return 1 + (t < kTags ? t : t - kTags);
  }
};

// What an op makes of a thread's place (addresses, above all) does not change from run to run, so
// the compiler keeps it, of all ops at once, and spills it where there are many. There it is made
// anew at each use.
constexpr bool kMadeAnew = kVariants > 16;
__device__ __forceinline__ int thread() { return kMadeAnew ? opaque(threadIdx.x) : threadIdx.x; }
__device__ __forceinline__ int warp() { return thread() / 32; }
__device__ __forceinline__ int lane() { return thread() % 32; }
// The same for one op in any program, made once where this is.
struct Here {
  int thread, warp, lane;
  __device__ __forceinline__ Here() {
    const u32 index = opaque(threadIdx.x);
    thread = index, warp = index / 32, lane = index % 32;
  }
};
__device__ __forceinline__ void sync_consumers() { sync_threads<1, kThreads>(); }

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  return v;
}

// Sums over the warp of kCount values; lane l gets the one of index l / (32 / kCount).
template <int kCount>
__device__ __forceinline__ float warp_sums(float (&v)[kCount]) {
  int offset = 16;
#pragma unroll
  for (int n = kCount; n > 1; n /= 2, offset /= 2) {
    bool upper = lane() & offset;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      float send = upper ? v[i] : v[i + n / 2], keep = upper ? v[i + n / 2] : v[i];
      v[i] = keep + __shfl_xor_sync(~0u, send, offset);
    }
  }
  for (; offset; offset /= 2) v[0] += __shfl_xor_sync(~0u, v[0], offset);
  return v[0];
}

// Polled by spinning threads now and then: has somebody ended the launch, or has it taken too long?
// Everybody who is still waiting when a launch fails says for what.
__device__ __noinline__ bool given_up(const Params& p, u64 since, u32 run, u32 step, u32 counter,
                                      u32 have, u32 want) {
  u32 verdict = load_relaxed(p.verdict);
  if (verdict == kGoOn) {
    if (nanoseconds() - since < kPatience) return false;
    verdict = swap_if(p.verdict, kGoOn, kFailed);
  }
  if (verdict != kStopped) {
    Failure& f = p.failures[blockIdx.x];
    if (f.want) return true;  // whoever waits in vain for words goes on and fails again
    f.run = run, f.step = step, f.counter = counter, f.have = have, f.want = want;
  }
  return true;
}

// Until the run's entry of the queue is there; at once where the whole queue is. False: the launch
// has ended.
__device__ __forceinline__ bool wait_for_run(const Block& b) {
  u64 since = 0;
  for (u32 spins = 1; !b.fetched(); ++spins) {
    if (spins % 64) continue;
    if (!since) since = nanoseconds();
    if (!given_up(b.params, since, b.number, b.step, kByRun, 0, 1)) continue;
    store_shared(&b.shared.verdict, 1);
    return false;
  }
  return true;
}

// One warp polls all waits of a run, a lane for each; the others stay at the barrier. False: the
// launch has ended. What producers wrote before their signals can be read afterwards, but where all
// inputs are tagged: those say themselves whether they are there.
__device__ __forceinline__ bool wait_for_inputs(Block& b, const Run& run, bool tagged) {
  if (warp() == kPollWarp) {
    for (u32 first = 0; first < run.wait_count; first += 32) {
      u32 at = first + lane(), want = 0;
      const u32* counter = nullptr;
      Wait w{};
      if (at < run.wait_count) {
        w = run.waits()[at];
        u32 lag = (w.threshold & kLagged) ? 1 : 0;
        if (b.step >= lag) {
          counter = b.params.counters + w.counter * kCounterPitch;
          want = (b.step - lag) * w.total + (w.threshold & ~kLagged);
        }
      }
      u64 since = 0;
      for (u32 spins = 1;; ++spins) {
        u32 have = !counter ? want : tagged ? load_relaxed(counter) : load_acquire(counter);
        if (__all_sync(~0u, static_cast<int>(have - want) >= 0)) break;
        if (spins % 64 == 0) {
          if (!since) since = nanoseconds();
          bool late = static_cast<int>(have - want) < 0;
          if (__any_sync(~0u, late && given_up(b.params, since, b.number, b.step, w.counter, have,
                                               want))) {
            if (lane() == 0) store_shared(&b.shared.verdict, 1);
            break;
          }
        }
      }
    }
    if constexpr (kPasses > 1 || kEntries > 0) {
      __syncwarp();  // the other threads of the block may rely on what any lane has acquired
      if (lane() == 0) {
        if (kPasses > 1 && !tagged) {
          const Pass& pass = b.passes().at[b.pass];
          store_shared(&b.here().first, load_relaxed(&pass.first));
          store_shared(&b.here().count, load_relaxed(&pass.count));
        }
        store_shared(&b.shared.progress, b.index() + 1);
      }
    }
  }
  sync_consumers();
  if constexpr (kTrace) b.started = timestamp();
  return load_shared(&b.shared.verdict) == 0;
}
template <bool kTagged>
__device__ __forceinline__ bool wait_for_inputs(Block& b, const Run& run) {
  return wait_for_inputs(b, run, kTagged);
}

// By one thread, after a barrier (of its warp or block) behind all stores of the run. Silent: what
// was stored has tags, so the signal need not wait until it is seen.
__device__ __forceinline__ void signal(const Block& b, const Run& run, bool silent) {
  if (run.signal == kNoSignal) return;
  u32* counter = b.params.counters + run.signal * kCounterPitch;
  silent ? add_relaxed(counter) : add_release(counter);
}
template <bool kSilent>
__device__ __forceinline__ void signal(const Block& b, const Run& run) {
  signal(b, run, kSilent);
}

// Rounded to the bits that a tag leaves; a NaN stays one.
__device__ __forceinline__ float rounded_for_tag(float v) {
  u32 bits = v == v ? __float_as_uint(v) + (kTagMask + 1) / 2 : 0x7fc00000u;
  return __uint_as_float(bits & ~kTagMask);
}
__device__ __forceinline__ float tagged(float v, u32 tag) {
  return __uint_as_float(__float_as_uint(rounded_for_tag(v)) | tag);
}
__device__ __forceinline__ void store_tagged(float* p, float v, u32 tag) {
  store_float(p, tagged(v, tag));
}
__device__ __forceinline__ float untagged(float v) {
  return __uint_as_float(__float_as_uint(v) & ~kTagMask);
}
__device__ __forceinline__ u32 other_tag(float v, u32 tag) {
  return (__float_as_uint(v) ^ tag) & kTagMask;
}

// An output: f32, with a tag or without, or in bf16, by way of what a tag would leave of it.
template <bool kTagged, bool kNarrow>
__device__ __forceinline__ void store_output(float* buffer, u32 at, float v, u32 tag) {
  if constexpr (kNarrow)
    store_half(reinterpret_cast<u16*>(buffer) + at, u16(pack_bf16(rounded_for_tag(v), 0)));
  else
    kTagged ? store_tagged(buffer + at, v, tag) : store_float(buffer + at, v);
}

// Words with other tags than wanted are read again; true when that has gone on for too long.
struct Retry {
  u32 spins = 0;
  u64 since = 0;
  __device__ __forceinline__ bool in_vain(const Block& b, u32 tag) {
    read_again();
    if (++spins % 64) return false;
    if (!since) since = nanoseconds();
    if (!given_up(b.params, since, b.number, b.step, kByTag, 0, tag)) return false;
    store_shared(&b.shared.verdict, 1);  // the block ends at its next wait
    return true;
  }
};

// By one warp: until the words of a choice are there, `count` numbers of experts. The other warps
// are told by the barrier of the run's wait.
__device__ __forceinline__ void await_choice(const Block& b, const Run& run, u32 count) {
  if (!kChoiceTagged || choice_known(run) || warp() != kPollWarp) return;
  const u32* chosen = reinterpret_cast<const u32*>(run.bias_up) + min(u32(lane()), count - 1);
  const u32 tag = b.tag(run.x3);
  Retry retry;
  for (bool late = true; late;)
    late = __any_sync(~0u, ((load_relaxed(chosen) ^ tag) & kTagMask) != 0) &&
           !__any_sync(~0u, retry.in_vain(b, tag));
}

// As wait_for_inputs, and until the `count` words of the choice are there. A run that has waits for
// it looks behind them.
__device__ __forceinline__ bool wait_for_choice(Block& b, const Run& run, u32 count) {
#pragma unroll 1
  for (int turn = kChoiceTagged && choice_waits(run) ? 0 : 1; turn < 2; ++turn) {
    if (turn == 1) await_choice(b, run, count);
    if (!wait_for_inputs(b, run, false)) return false;
  }
  return true;
}

// Words at several places, each with its tag; 0 where there is none.
template <int kCount>
__device__ __forceinline__ void load_tagged(const Block& b, const float* const (&from)[kCount],
                                            const u32 (&tag)[kCount], float (&v)[kCount]) {
  Retry retry;
  for (u32 other = 1; other;) {
    other = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = from[i] ? load_float(from[i]) : 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) other |= from[i] ? other_tag(v[i], tag[i]) : 0;
    if (other && retry.in_vain(b, tag[0])) break;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = untagged(v[i]);
}

// Until the bytes of the next unit are in its slot; the loader has asked for them or soon will, and
// tells when they do not come.
__device__ __forceinline__ void wait_full(const Block& b, const Cursor& unit) {
  while (!barrier_test(&b.shared.full[unit.slot], unit.parity)) {
    if (!load_shared(&b.shared.verdict)) continue;
    store_shared(&b.shared.stopped, b.index() + 1);
    break;  // the block ends at its next wait for inputs
  }
}

__device__ __forceinline__ void wait_full(const Block& b) { wait_full(b, b.cursor); }

// By one thread at the end of the block: a lost unit is why all others waited in vain.
__device__ __forceinline__ void tell_lost(const Block& b) {
  const u32 lost = load_shared(&b.shared.lost), stopped = load_shared(&b.shared.stopped);
  if (!lost) return;
  const u32 at = (stopped ? stopped : lost) - 1;
  b.params.failures[blockIdx.x] = {at % b.length, at / b.length, kByUnit, 0, 1};
  swap_if(b.params.verdict, kGoOn, kFailed);
}

// This warp has read what it needs of the unit.
__device__ __forceinline__ void release_slot(Block& b) {
  __syncwarp();
  if (lane() == 0) barrier_arrive(&b.shared.empty[b.cursor.slot]);
  b.cursor.advance();
}

// The loader: one thread that walks the same queue and never waits for an activation, but where one
// says which weights to stream.
struct Loader {
  Block& b;
  Cursor landed;                // the oldest unit under way
  u32 issued = 0, arrived = 0;  // units
  u32 lists = 0;                // of chosen rows, so far

  // Until the next list of chosen rows is made. False: the launch has ended.
  __device__ __forceinline__ bool listed() {
    ++lists;
    while (load_shared(&b.shared.listed) < lists)
      if (!idle()) return false;
    fence_proxy();
    return true;
  }
  // While something is awaited: what is under way is watched as ever; when all of it is in, the
  // warps can come to this run, and it is they who give up and say for what they waited.
  __device__ __forceinline__ bool idle() {
    if (arrived < issued && !land()) return false;
    return load_shared(&b.shared.verdict) == 0;
  }
  // Until a wait of a run holds.
  __device__ __forceinline__ bool holds(const Wait& w) {
    const u32 lag = w.threshold & kLagged ? 1 : 0;
    if (b.step < lag) return true;
    const u32* counter = b.params.counters + w.counter * kCounterPitch;
    const u32 want = (b.step - lag) * w.total + (w.threshold & ~kLagged);
    while (static_cast<int>(load_acquire(counter) - want) < 0)
      if (!idle()) return false;
    return true;
  }
  // Tokens of a pass that has begun, as who made a choice in it must have seen.
  __device__ __forceinline__ u32 count() const {
    if constexpr (kPasses > 1) return load_relaxed(&b.passes().at[b.pass].count);
    return b.params.count;
  }
  // Until rows of the past can be streamed: the run has waits for all that the step before has
  // appended (verified as rule `stream`). With several passes, once all of its waits hold: they say
  // where its tokens are, too.
  __device__ __forceinline__ bool past(const Run& run) {
    if constexpr (kPasses > 1) return started();
    if (b.step == 0) return true;
    for (u32 at = 0; at < run.wait_count; ++at) {
      const Wait& w = run.waits()[at];
      if ((w.threshold & kLagged) && !holds(w)) return false;
    }
    fence_proxy();
    return true;
  }
  // Until the waits of the run hold.
  __device__ __forceinline__ bool started() {
    while (load_shared(&b.shared.progress) < b.index() + 1)
      if (!idle()) return false;
    fence_proxy();
    return true;
  }
  // Until the run's entry of the queue is there. False: the launch has ended.
  __device__ __forceinline__ bool next_run() {
    if constexpr (kEntries > 0) {
      store_shared(&b.shared.streamed, b.index());
      while (!b.fetched())
        if (!idle()) return false;
    }
    return true;
  }
  // Until the oldest unit under way has all its bytes. False: they do not come.
  __device__ __forceinline__ bool land() {
    u64 since = 0;
    for (u32 spins = 1; !barrier_test(&b.shared.full[landed.slot], landed.parity); ++spins) {
      if (spins % 64) continue;
      const u64 now = nanoseconds();
      if (!since) since = now;
      if (now - since < kPatience) continue;
      store_shared(&b.shared.lost, b.index() + 1);
      store_shared(&b.shared.verdict, 1);
      return false;
    }
    landed.advance();
    ++arrived;
    return true;
  }
  // A free slot, with at most kWindow units under way. False: the launch has ended. A lost unit is
  // found before its slot is asked for again, which would never become free.
  __device__ __forceinline__ bool acquire() {
    if (issued - arrived >= kWindow && !land()) return false;
    if (issued >= kSlots) {
      while (!barrier_test(&b.shared.empty[b.cursor.slot], b.cursor.parity ^ 1))
        if (load_shared(&b.shared.verdict)) return false;
    }
    return true;
  }
  __device__ __forceinline__ void expect(u32 bytes) {
    barrier_expect(&b.shared.full[b.cursor.slot], bytes);
  }
  __device__ __forceinline__ void copy(u32 offset, const void* from, u32 bytes) {
    copy_bulk(b.slot() + offset, from, bytes, &b.shared.full[b.cursor.slot]);
  }
  __device__ __forceinline__ void next() {
    b.cursor.advance();
    ++issued;
  }
  // No copy may arrive in the memory of a block that has left.
  __device__ __forceinline__ void drain() {
    while (arrived < issued)
      if (!land()) return;
  }
  // Until there is the choice of the weights of a run, `count` numbers, which are left in
  // shared.chosen; at once where they are there from an earlier run. False: the launch has ended.
  __device__ __forceinline__ bool choose(const Run& run, u32 count) {
    if (choice_known(run)) return true;
    for (u32 at = 0; at < choice_waits(run); ++at)
      if (!holds(run.waits()[at])) return false;
    constexpr int kBatch = 8;  // loads that are under way together
    const u32* chosen = reinterpret_cast<const u32*>(run.bias_up);
    const u32 tag = b.tag(run.x3);
#pragma unroll 1
    for (u32 first = 0; first < count; first += kBatch) {
      u32 v[kBatch];
      for (u32 late = 1; late;) {
        late = 0;
#pragma unroll
        for (u32 i = 0; i < kBatch; ++i) v[i] = load_relaxed(chosen + min(first + i, count - 1));
#pragma unroll
        for (u32 i = 0; i < kBatch; ++i) late |= kChoiceTagged ? (v[i] ^ tag) & kTagMask : 0;
        if (late && !idle()) return false;
      }
#pragma unroll
      for (u32 i = 0; i < kBatch; ++i)
        if (first + i < count) store_shared(&b.shared.chosen[first + i], v[i] >> kChoiceShift);
    }
    return true;
  }
};
