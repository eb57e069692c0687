// What the parts of host_simt know of each other.
#pragma once

#include <cstdint>
#include <vector>

#include "host_simt/hopper.h"

namespace host_simt {

// Time as the race check counts it. A new epoch begins with every block and at every barrier, and no number is used
// twice: an access with an epoch below `block_begin` was made by another block, one below `launch_begin` by another
// launch, one from `flying_begin` on to there by one that may still run, unless the thread has waited for it.
struct Clock {
  uint32_t epoch = 0;
  uint32_t block_begin = 0;
  uint32_t launch_begin = 0;
  uint32_t flying_begin = 0;
};
extern Clock clock_now;

// The thread that runs; `thread` is its number in the block. Nothing runs between launches.
struct Running {
  bool active = false;
  uint16_t thread = 0;
  uint16_t warp = 0;
  uint32_t warp_epoch = 0;  // __syncwarp()s that the warp has passed
  bool waited = true;       // for the launches before this one
};
extern Running running;

uint3 thread_index(unsigned thread);

// ---------------------------------------------------------------- clocks.cpp

// Vector clocks, which run in launches for one architecture. A thread knows its own time and, for each other thread,
// the time up to which all that thread did happened before what it does next itself. Phases of barriers and products of
// warps have times as well.
constexpr int kThreadAgents = 1024, kBarrierAgents = 64, kWarpAgents = 32;
constexpr int kAgents = kThreadAgents + kBarrierAgents + kWarpAgents;

struct Times {
  uint32_t of[kAgents] = {};
  void join(const Times& other);
};
extern bool clocks_run;
extern Times* known;  // of each thread of the block

void begin_clocks(bool run);
inline uint32_t now() { return clocks_run ? known[running.thread].of[running.thread] : 0; }
inline bool knows(uint16_t agent, uint32_t time) { return clocks_run && known[running.thread].of[agent] >= time; }
// What the running thread knows is known to whoever joins `to`; what it does next is not.
void release(Times& to);
void join_threads(unsigned first, unsigned count);  // as a barrier among them does

// ---------------------------------------------------------------- memory.cpp

// What happened to one byte last, as far as it can still collide with something.
struct Record {
  uint32_t write_epoch, write_warp_epoch;
  uint32_t read_epoch, read_warp_epoch;
  uint32_t write_time, read_time;  // as clocks.cpp has it
  uint16_t writer;                 // a thread, or what else has a time
  uint16_t reader;                 // the last one, or kMany in its warp since its last __syncwarp(), or kSeveral
  uint16_t reader_warp;            // kMany: of several warps since the last barrier
  bool written_atomically;
  uint8_t flying;            // 1: a cp.async to this byte has not landed; 2: a bulk copy has not
  bool read_by_other_block;  // of this launch, besides the last reader's
};

// A tensor or a shared array.
struct Region {
  const char* name;
  char* begin;
  size_t bytes;
  bool shared;
  bool defined;      // holds data before any kernel writes
  Record* records;   // one a byte, from mmap: zero, and no memory until touched
  void* allocation;  // what was allocated for it, begin less its offset
};
extern std::vector<Region> regions;  // ordered by address in the build with races.cpp
extern Traffic traffic;

// The stretch of addresses that holds them there.
constexpr size_t kZoneBytes = size_t{1} << 36;
extern char* zone;

void begin_launch(size_t dynamic_shared_bytes);
void begin_block();
// Returns the bytes of the launch's static shared arrays, each at a multiple of 16.
size_t end_launch();

// cp.async of the thread with this number.
void forget_copies(unsigned thread);

// ---------------------------------------------------------------- races.cpp

enum class Access { read, write, atomic, copy_issued, copy_landed, bulk_issued, async_read };

#if defined(__SANITIZE_ADDRESS__)
inline void touch(const void*, size_t, Access, const void*) {}
inline void report_line(const void*) {}
inline void land(const void*, size_t, uint16_t, uint32_t) {}
#else
// Checks and remembers an access by the running thread; `code` is the address of the instruction, if known.
void touch(const void* address, size_t bytes, Access access, const void* code);

// A bulk copy's bytes, from the end of the barrier's phase on.
void land(const void* address, size_t bytes, uint16_t agent, uint32_t time);

// Prints the source line of an instruction, where there is addr2line to find it.
void report_line(const void* code);
#endif

// ---------------------------------------------------------------- launches.cpp

// Faults on what limits.h refuses.
void expect_launchable(const Launch& launch);

// Whether the environment's HOST_SIMT_LAUNCHES names a file. Tests find there which kernels were launched, how, a line
// for each difference, and nothing is run.
bool is_only_named(const Launch& launch);

// The static shared memory that a run of the launch's kernel has shown.
void remember_static(const Launch& launch, size_t bytes);

// ---------------------------------------------------------------- scheduler.cpp

// Prints what runs where.
void print_context();

uint32_t draw(uint32_t below);

// Another thread may run; or the running one waits until somebody wakes it.
void pause();
void park(Site site);
void wake(unsigned thread);

// ---------------------------------------------------------------- bulk.cpp, products.cpp

// Some of a copy lands. False if none is on its way.
bool land_some();
bool copies_fly();

// Whether `address` may be written to as far as stores and products that read it are concerned; fails if not.
void expect_no_async_read(const char* address, size_t bytes, const void* code);
// Whether an async_proxy_fence() of `thread` lies between its write at `time` and the running thread's next read.
bool proxy_fenced(uint16_t thread, uint32_t time);

// What stores and products of an agent read, until `finish` or the running thread's wait for it says otherwise.
struct AsyncRead {
  const char* begin;
  const char* end;
  uint16_t agent;
  int group;
  bool pending;
  uint32_t time;
  const char* what;
  Site site;
};
void begin_async_read(const AsyncRead& read);
// Those of the agent up to that group are over at `time`.
void end_async_reads(uint16_t agent, int group, uint32_t time);

char* shared_pointer(uint32_t address);  // what shared_address() was given
void begin_block_bulk();
void begin_block_products();
void end_thread_bulk();
void end_thread_products();
void end_block_products();

}  // namespace host_simt
