// What the parts of host_simt know of each other.
#pragma once

#include <cstdint>
#include <vector>

#include "host_simt/host_simt.h"

namespace host_simt {

// Time as the race check counts it. An epoch begins with every block and at every barrier, and numbers are never used
// twice: whatever carries an epoch below `block_begin` belongs to another block, below `launch_begin` to another
// launch.
struct Clock {
  uint32_t epoch = 0;
  uint32_t block_begin = 0;
  uint32_t launch_begin = 0;
};
extern Clock clock_now;

// The thread that runs; `thread` is its number in the block. Nothing runs between launches.
struct Running {
  bool active = false;
  uint16_t thread = 0;
  uint16_t warp = 0;
  uint32_t warp_epoch = 0;  // __syncwarp()s that the warp has passed
};
extern Running running;

uint3 thread_index(unsigned thread);

// ---------------------------------------------------------------- memory.cpp

// What happened to one byte last, as far as it can still collide with something.
struct Record {
  uint32_t write_epoch, write_warp_epoch;
  uint32_t read_epoch, read_warp_epoch;
  uint16_t writer;
  uint16_t reader;       // the last one, or kMany in its warp since its last __syncwarp()
  uint16_t reader_warp;  // kMany: of several warps since the last barrier
  bool written_atomically;
  bool flying;               // a cp.async to this byte has not landed
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

enum class Access { read, write, atomic, copy_issued, copy_landed };

#if defined(__SANITIZE_ADDRESS__)
inline void touch(const void*, size_t, Access, const void*) {}
inline void report_line(const void*) {}
#else
// Checks and remembers an access by the running thread; `code` is the address of the instruction, if known.
void touch(const void* address, size_t bytes, Access access, const void* code);

// Prints the source line of an instruction, where there is addr2line to find it.
void report_line(const void* code);
#endif

// ---------------------------------------------------------------- launches.cpp

// Faults on what limits.h refuses.
void expect_launchable(const Launch& launch);

// The static shared memory that a run of the launch's kernel has shown.
void remember_static(const Launch& launch, size_t bytes);

// ---------------------------------------------------------------- scheduler.cpp

// Prints what runs where.
void print_context();

}  // namespace host_simt
