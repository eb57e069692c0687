// Blocks, threads, barriers and warp meetings. See host_simt.h for the model.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "host_simt/fiber.h"
#include "host_simt/state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace host_simt {

Clock clock_now;
Running running;

namespace {

// ---------------------------------------------------------------- state

enum class State { ready, at_barrier, at_meeting, at_mbarrier, finished };

struct Fiber {
  Stack stack;
  uint16_t thread;
  State state;
  Site site;           // where it waits
  uint32_t took_part;  // lanes of its last meeting
  bool waited;         // for the launches before this one
};

// Lanes of one warp that meet under one mask. What they show is kept in turns of two: a lane that left the meeting may
// show something at the next one while another has not yet looked.
struct Gathering {
  uint32_t mask;
  uint32_t arrived = 0;
  Meeting kind;
  Site site;
  unsigned turn = 0;
  Shown shown[2][32];
};

struct Warp {
  uint32_t alive;
  uint32_t epoch;
  std::deque<Gathering> gatherings;  // one per mask ever used; a deque leaves them where they are
};

struct Barrier {
  unsigned arrived = 0;
  unsigned votes = 0;
  Site site;
  int result = 0;
};

const Launch* current = nullptr;
unsigned last_blocks = UINT32_MAX;
unsigned block_threads = 0;
unsigned finished = 0;
Stack program;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<Fiber*> ready;
Fiber* self = nullptr;
Barrier barrier_state;

// Of the launches so far: the first epoch of those that a launch which is early now may find running, and of those that
// the one after the current launch may.
uint32_t flying = UINT32_MAX, flying_next = UINT32_MAX;
bool early = false, early_next = false;  // the current launch, and the one that follows

// ---------------------------------------------------------------- chance

uint64_t random_state = 1;

}  // namespace

// xorshift64*
uint32_t draw(uint32_t below) {
  random_state ^= random_state >> 12;
  random_state ^= random_state << 25;
  random_state ^= random_state >> 27;
  return static_cast<uint32_t>((random_state * 0x2545f4914f6cdd1d >> 32) * below >> 32);
}

namespace {

// ---------------------------------------------------------------- switching

int lane_of(const Fiber& fiber) { return fiber.thread % 32; }
Warp& warp_of(const Fiber& fiber) { return warps[fiber.thread / 32]; }

void enter(Fiber* fiber) {
  self = fiber;
  running.active = fiber != nullptr;
  if (fiber != nullptr) {
    threadIdx = thread_index(fiber->thread);
    running.thread = fiber->thread;
    running.warp = fiber->thread / 32;
    running.warp_epoch = warp_of(*fiber).epoch;
    running.waited = fiber->waited;
  }
}

// Lets any ready thread run, perhaps the same one; without one, the program, which ends the block or finds out why not.
void yield() {
  Stack& from = self->stack;
  Fiber* const me = self;
  Fiber* next = nullptr;
  if (clocks_run && copies_fly() && draw(8) == 0) {
    land_some();
  }
  while (ready.empty() && copies_fly()) {
    land_some();
  }
  if (!ready.empty()) {
    std::swap(ready[draw(ready.size())], ready.back());
    next = ready.back();
    ready.pop_back();
  }
  enter(next);  // also when it is the same one: its warp may have moved on
  if (next != me) {
    from.switch_to(next == nullptr ? program : next->stack);
  }
}

void wake(Fiber& fiber) {
  fiber.state = State::ready;
  ready.push_back(&fiber);
}

std::string name(unsigned thread) {
  const uint3 index = thread_index(thread);
  char text[64];
  std::snprintf(text, sizeof text, "(%u,%u,%u)", index.x, index.y, index.z);
  return text;
}

// ---------------------------------------------------------------- warp meetings

void finish(Warp& warp, unsigned number, Gathering& gathering) {
  const uint32_t arrived = gathering.arrived;
  gathering.arrived = 0;
  ++gathering.turn;
  if (gathering.kind == Meeting::syncwarp && (arrived & warp.alive) == warp.alive) {
    ++warp.epoch;
    join_threads(32 * number, std::min(32u, block_threads - 32 * number));
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (arrived >> lane & 1) {
      Fiber& fiber = *fibers[32 * number + lane];
      fiber.took_part = arrived;
      wake(fiber);
    }
  }
}

bool complete(const Warp& warp, const Gathering& gathering) {
  return gathering.arrived != 0 && (gathering.arrived & warp.alive) == (gathering.mask & warp.alive);
}

// ---------------------------------------------------------------- a thread's life

void leave_block() {
  self->state = State::finished;
  ++finished;
  forget_copies(self->thread);
  if (clocks_run) {
    end_thread_bulk();
    end_thread_products();
  }
  if (barrier_state.arrived != 0) {
    fail("divergence", "thread %s ends while %u threads wait at the barrier in %s:%d", name(self->thread).c_str(),
         barrier_state.arrived, barrier_state.site.file, barrier_state.site.line);
  }
  Warp& warp = warp_of(*self);
  warp.alive &= ~(1u << lane_of(*self));
  for (Gathering& gathering : warp.gatherings) {
    if (complete(warp, gathering)) {
      finish(warp, self->thread / 32, gathering);
    }
  }
  yield();
}

// Fibers outlive their blocks: each runs one thread after the other.
void fiber_main() {
  self->stack.arrived();
  for (;;) {
    current->thread();
    leave_block();
  }
}

void run_block() {
  begin_block();
  begin_clocks(current->only != 0);
  if (clocks_run) {
    begin_block_bulk();
    begin_block_products();
  }
  finished = 0;
  barrier_state = Barrier{};
  warps.resize((block_threads + 31) / 32);
  for (size_t i = 0; i < warps.size(); ++i) {
    const unsigned lanes = std::min(32u, block_threads - 32 * static_cast<unsigned>(i));
    warps[i].alive = lanes == 32 ? 0xffffffff : (1u << lanes) - 1;
    warps[i].epoch = 0;
    warps[i].gatherings.clear();
  }
  for (unsigned thread = 0; thread < block_threads; ++thread) {
    fibers[thread]->waited = !early;
    wake(*fibers[thread]);
  }
  std::swap(ready[draw(ready.size())], ready.back());
  Fiber* first = ready.back();
  ready.pop_back();
  enter(first);
  program.switch_to(first->stack);
  if (finished == block_threads) {
    if (clocks_run) {
      end_block_products();
    }
    if (std::none_of(fibers.begin(), fibers.begin() + block_threads, [](const auto& fiber) { return fiber->waited; })) {
      fail("dependency", "thread (0,0,0) and all others of its block end without dependency_wait()");
    }
    if (copies_fly()) {
      fail("race", "the block ends before a bulk copy to thread (0,0,0)'s shared memory has landed");
    }
    return;
  }
  for (unsigned thread = 0; thread < block_threads; ++thread) {
    const Fiber& fiber = *fibers[thread];
    if (fiber.state == State::at_barrier || fiber.state == State::at_meeting || fiber.state == State::at_mbarrier) {
      const char* place = fiber.state == State::at_barrier   ? "barrier"
                          : fiber.state == State::at_meeting ? "warp meeting"
                                                             : "mbarrier";
      fail("divergence", "thread %s waits forever at the %s in %s:%d: %u of %u threads have ended",
           name(thread).c_str(), place, fiber.site.file, fiber.site.line, finished, block_threads);
    }
  }
}

}  // namespace

uint3 thread_index(unsigned thread) {
  return {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
}

int lane() { return lane_of(*self); }

void pause() {
  wake(*self);
  yield();
}

void park(Site site) {
  self->state = State::at_mbarrier;
  self->site = site;
  yield();
}

void wake(unsigned thread) { wake(*fibers[thread]); }

void next_is_early() { early_next = true; }

void dependency_wait() {
  pause();
  self->waited = running.waited = true;
}

void launch_dependents() {
  if (!self->waited) {
    flying_next = clock_now.flying_begin;
  }
}

void run_last_blocks(unsigned count) { last_blocks = count; }

void set_seed(uint64_t seed) {
  random_state = (seed + 1) * 0x9e3779b97f4a7c15;  // neighbouring seeds begin far apart
}

// ---------------------------------------------------------------- what kernels call

const Shown* meet(Meeting kind, uint32_t mask, const void* shown, size_t bytes, Site site) {
  const int lane = lane_of(*self);
  Warp& warp = warp_of(*self);
  if ((mask >> lane & 1) == 0) {
    fail("divergence", "lane %d is not in the mask %08x that it meets under in %s:%d", lane, mask, site.file,
         site.line);
  }
  Gathering* gathering = nullptr;
  for (Gathering& known : warp.gatherings) {
    if (known.mask == mask) {
      gathering = &known;
    }
  }
  if (gathering == nullptr) {
    gathering = &warp.gatherings.emplace_back();
    gathering->mask = mask;
  }
  if (gathering->arrived == 0) {
    gathering->kind = kind;
    gathering->site = site;
  } else if (gathering->kind != kind || gathering->site.line != site.line) {
    fail("divergence", "lane %d is in %s:%d while lanes %08x of its warp wait in %s:%d", lane, site.file, site.line,
         gathering->arrived, gathering->site.file, gathering->site.line);
  }
  const Shown* seen = gathering->shown[gathering->turn % 2];
  if (bytes > 0) {
    std::memcpy(gathering->shown[gathering->turn % 2][lane], shown, bytes);
  }
  gathering->arrived |= 1u << lane;
  self->state = State::at_meeting;
  self->site = site;
  if (complete(warp, *gathering)) {
    finish(warp, self->thread / 32, *gathering);
  }
  yield();
  return seen;
}

bool took_part(uint32_t mask, int lane) {
  if ((mask & self->took_part) >> lane & 1) {
    return true;
  }
  fail("divergence", "lane %d takes a value from lane %d, which is not there (mask %08x, present %08x)", lane_of(*self),
       lane, mask, self->took_part);
}

int barrier(Combine combine, bool predicate, Site site) {
  if (finished > 0) {
    fail("divergence", "thread %s is at the barrier in %s:%d that %u ended threads never reach",
         name(self->thread).c_str(), site.file, site.line, finished);
  }
  if (barrier_state.arrived == 0) {
    barrier_state.site = site;
    barrier_state.votes = 0;
  } else if (barrier_state.site.line != site.line || std::strcmp(barrier_state.site.file, site.file) != 0) {
    fail("divergence", "thread %s is at the barrier in %s:%d while %u threads wait at the one in %s:%d",
         name(self->thread).c_str(), site.file, site.line, barrier_state.arrived, barrier_state.site.file,
         barrier_state.site.line);
  }
  ++barrier_state.arrived;
  barrier_state.votes += predicate;
  self->state = State::at_barrier;
  self->site = site;
  if (barrier_state.arrived == block_threads) {
    const unsigned votes = barrier_state.votes;
    // Nobody reaches the next barrier's release before everybody has read this one's result.
    barrier_state.result = combine == Combine::any   ? votes > 0
                           : combine == Combine::all ? votes == block_threads
                                                     : static_cast<int>(votes);
    barrier_state.arrived = 0;
    ++clock_now.epoch;
    join_threads(0, block_threads);
    for (unsigned thread = 0; thread < block_threads; ++thread) {
      wake(*fibers[thread]);
    }
  }
  yield();
  return barrier_state.result;
}

// ---------------------------------------------------------------- grid

int run(const Launch& launch) {
  expect_launchable(launch);
  if (is_only_named(launch)) {
    return cudaSuccess;
  }
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  block_threads = launch.block.x * launch.block.y * launch.block.z;
  current = &launch;
  gridDim = launch.grid;
  blockDim = launch.block;
  for (unsigned thread = fibers.size(); thread < block_threads; ++thread) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->thread = thread;
    fibers.back()->stack.start(fiber_main);
  }
  begin_launch(launch.shared_bytes);
  early = std::exchange(early_next, false);
  clock_now.flying_begin = early ? std::min(flying, clock_now.launch_begin) : clock_now.launch_begin;
  flying_next = clock_now.launch_begin;
  const unsigned columns = std::min(gridDim.x, last_blocks);
  std::vector<uint32_t> order(columns * (blocks / gridDim.x));
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = 0; i < order.size(); ++i) {
    std::swap(order[i], order[i + draw(order.size() - i)]);
    const unsigned row = order[i] / columns;
    blockIdx = {gridDim.x - columns + order[i] % columns, row % gridDim.y, row / gridDim.y};
    run_block();
  }
  remember_static(launch, end_launch());
  flying = flying_next;
  current = nullptr;
  return cudaSuccess;
}

// ---------------------------------------------------------------- reports

void print_context() {
  if (current == nullptr) {
    std::fprintf(stderr, "host_simt: outside of any kernel\n");
    return;
  }
  std::fprintf(stderr, "host_simt: kernel %.*s, grid (%u,%u,%u), block (%u,%u,%u)",
               static_cast<int>(current->kernel.size()), current->kernel.data(), gridDim.x, gridDim.y, gridDim.z,
               blockIdx.x, blockIdx.y, blockIdx.z);
  if (self != nullptr) {
    std::fprintf(stderr, ", thread %s of (%u,%u,%u)", name(self->thread).c_str(), blockDim.x, blockDim.y, blockDim.z);
  }
  std::fprintf(stderr, "\n");
}

void fail(const char* kind, const char* format, ...) {
  std::fprintf(stderr, "host_simt: %s: ", kind);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  print_context();
  std::_Exit(kFaultExit);
}

}  // namespace host_simt
