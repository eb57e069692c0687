// The launches that a card accepts. There is no other table of this: host_simt checks launches by it, and
// tests/cuda/limits.py reads this file for the checks of machine code. Numbers are those of "Technical Specifications
// per Compute Capability" in the CUDA C++ Programming Guide, which are the same for all architectures but for the four
// in the rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace host_simt {

constexpr int64_t kBlockThreads = 1024;
constexpr int64_t kBlockX = 1024;
constexpr int64_t kBlockY = 1024;
constexpr int64_t kBlockZ = 64;
constexpr int64_t kGridX = 2147483647;
constexpr int64_t kGridY = 65535;
constexpr int64_t kGridZ = 65535;
constexpr int64_t kRegisters = 65536;      // of a block: threads by registers of a thread, in whole pieces
constexpr int64_t kParameterBytes = 4096;  // 32,764 from sm_70 on with CUDA 12.1 and its drivers: not counted upon
constexpr int64_t kClusterBlocks = 8;      // on sm_90; more is not portable
constexpr int64_t kClusterFrom = 90;
constexpr int64_t kSharedBytes = 49152;   // of a block, static and dynamic together, without asking for more
constexpr int64_t kReservedBytes = 1024;  // of shared memory, that the system takes for each block

// sm, and of its multiprocessors: threads, blocks, KB of shared memory; KB that a block may ask for, static and dynamic
// together.
#define HOST_SIMT_ARCHITECTURES(X) \
  X(80, 2048, 32, 164, 163)        \
  X(86, 1536, 16, 100, 99)         \
  X(89, 1536, 24, 100, 99)         \
  X(90, 2048, 32, 228, 227)

}  // namespace host_simt
