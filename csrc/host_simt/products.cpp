// wgmma and setmaxnreg. See hopper.h for the model.
//
// A warp's lanes meet at each instruction, and lane 0 computes the warp's part, 16 of the product's 64 rows. The warps
// of a warpgroup do not wait for one another. A card allows less freedom than that, so a kernel is correct here only if
// each warp by itself gives back what it has read.
#include <algorithm>
#include <map>

#include "host_simt/state.h"

#pragma GCC optimize("O3")

namespace host_simt {
namespace {

constexpr int kRows = 16;        // a warp's part
constexpr int kDepthBytes = 32;  // of a product

struct Operand {
  uint64_t descriptor;
  bool turn;
};

// A in registers: whose they are, and what they hold at the issue.
struct Registers {
  const uint32_t* lanes[32] = {};  // null: A is in shared memory
  uint32_t values[32][4];
  int group;
  Site site;
};

struct Product {
  Element element;
  int columns;
  Operand a, b;
  Registers registers;
  bool accumulate;
  int group;
};

// One register tile of a warp: its sums while they are not the threads' to see.
struct Sums {
  float* lanes[32];
  std::vector<float> values;  // kRows x columns
  std::vector<Product> waiting;
  int group;  // of the last product
};

struct WarpState {
  bool fenced = false;
  int group = 0;  // the open one
  uint32_t time = 0;
  int registers = 0;  // of a thread; 0: as many as at the start
  std::map<float*, Sums> sums;
  std::vector<Registers> read;  // of products that are not waited for
};

WarpState warps[kThreadAgents / 32];

WarpState& mine() { return warps[running.warp]; }
uint16_t agent() { return static_cast<uint16_t>(kThreadAgents + kBarrierAgents + running.warp); }

// ---------------------------------------------------------------- operands

bool is_plain(uint64_t descriptor) { return descriptor >> 62 == 0; }

// What lies so many bytes behind the operand's beginning, with the swizzle that the descriptor names.
char* chunk_at(uint64_t descriptor, uint32_t offset, Site site) {
  if (descriptor >> 62 > 1 || (descriptor >> 49 & 7) != 0) {
    fail("launch", "a wgmma descriptor for another swizzle than of 128 bytes, or of none, in %s:%d", site.file,
         site.line);
  }
  const uint32_t address = static_cast<uint32_t>(descriptor & 0x3fff) * 16 + offset;
  return shared_pointer(is_plain(descriptor) ? address : address ^ (address >> 7 & 7) << 4);
}

struct Shape {
  uint32_t leading, stride;
};

Shape shape_of(uint64_t descriptor) {
  return {static_cast<uint32_t>(descriptor >> 16 & 0x3fff) * 16, static_cast<uint32_t>(descriptor >> 32 & 0x3fff) * 16};
}

// Calls body(line, chunk of 16 bytes, its place) for all that `rows` rows from `first` on take. line: a row, and the
// chunk is of depth; with `turn`, which 16-bit elements can have, a place in depth, and the chunk is of rows.
template <class Body>
void for_chunks(const Operand& operand, int first, int rows, Site site, Body&& body) {
  const auto [leading, stride] = shape_of(operand.descriptor);
  const bool plain = is_plain(operand.descriptor);
  if (plain && operand.turn) {
    fail("launch", "a wgmma of an operand without swizzle whose lines are rows, in %s:%d", site.file, site.line);
  }
  if (!operand.turn) {
    const uint32_t line = plain ? 16 : 128, next = plain ? leading : 16;
    for (int row = first; row < first + rows; ++row) {
      for (int chunk = 0; chunk < kDepthBytes / 16; ++chunk) {
        body(row, chunk, chunk_at(operand.descriptor, row / 8 * stride + row % 8 * line + chunk * next, site));
      }
    }
    return;
  }
  for (int depth = 0; depth < kDepthBytes / 2; ++depth) {
    for (int row = first; row < first + rows; row += 8) {
      const uint32_t offset = row / 64 * leading + row % 64 * 2 + depth / 8 * stride + depth % 8 * 128;
      body(depth, row / 8, chunk_at(operand.descriptor, offset, site));
    }
  }
}

int bytes_of(Element element) { return element == Element::tf32 ? 4 : 2; }

float decode(Element element, const char* at) {
  if (element == Element::tf32) {
    uint32_t bits;
    std::memcpy(&bits, at, 4);
    return __uint_as_float(bits & 0xffffe000);
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return element == Element::f16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

// (depth, rows) in float32.
std::vector<float> load_operand(Element element, const Operand& operand, int first, int rows, Site site) {
  const int bytes = bytes_of(element), count = 16 / bytes;
  std::vector<float> values(kDepthBytes / bytes * rows);
  for_chunks(operand, first, rows, site, [&](int line, int chunk, const char* at) {
    for (int i = 0; i < count; ++i) {
      const int along = count * chunk + i;
      const int depth = operand.turn ? line : along, row = (operand.turn ? along : line) - first;
      values[depth * rows + row] = decode(element, at + i * bytes);
    }
  });
  return values;
}

// The same of a warp's registers, whose elements have 16 bits.
std::vector<float> load_registers(Element element, const Registers& registers) {
  std::vector<float> values(kDepthBytes / 2 * kRows);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, depth = lane % 4 * 2 + i / 4 * 8 + i % 2;
      values[depth * kRows + row] = decode(element, reinterpret_cast<const char*>(registers.values[lane]) + 2 * i);
    }
  }
  return values;
}

void expect_unchanged(const Registers& registers) {
  for (int lane = 0; lane < 32; ++lane) {
    if (std::memcmp(registers.lanes[lane], registers.values[lane], sizeof registers.values[lane]) != 0) {
      const uint3 thread = thread_index(running.warp * 32 + lane);
      fail("race", "thread (%u,%u,%u) writes a register of A before it has waited for the wgmma, issued in %s:%d",
           thread.x, thread.y, thread.z, registers.site.file, registers.site.line);
    }
  }
}

// What the product may read from now on: nothing that is on its way or not there, and nobody else's.
void claim(const Operand& operand, int first, int rows, Site site) {
  char *begin = nullptr, *end = nullptr;
  for_chunks(operand, first, rows, site, [&](int, int, char* at) {
    for (int byte = 0; byte < 16; byte += 4) {
      touch(at + byte, 1, Access::async_read, nullptr);
    }
    char* line = at - reinterpret_cast<uintptr_t>(at) % 128;
    begin = begin == nullptr ? line : std::min(begin, line);
    end = std::max(end, line + 128);
  });
  begin_async_read({begin, end, agent(), mine().group, true, 0, "a wgmma", site});
}

void perform(const Product& product, std::vector<float>& sums) {
  const int n = product.columns;
  const Site site{"", 0};
  const std::vector<float> a = product.registers.lanes[0] != nullptr
                                   ? load_registers(product.element, product.registers)
                                   : load_operand(product.element, product.a, running.warp % 4 * kRows, kRows, site);
  const std::vector<float> b = load_operand(product.element, product.b, 0, n, site);
  if (!product.accumulate) {
    std::fill(sums.begin(), sums.end(), 0.0f);
  }
  for (int depth = 0; depth < kDepthBytes / bytes_of(product.element); ++depth) {
    const float* right = b.data() + depth * n;
    for (int row = 0; row < kRows; ++row) {
      const float left = a[depth * kRows + row];
      float* sum = sums.data() + row * n;
      for (int column = 0; column < n; ++column) {
        sum[column] += left * right[column];
      }
    }
  }
}

// Between a lane's registers and the tile: d[4 j + 2 h + e] is row g + 8 h, column 8 j + 2 t + e.
template <class Body>
void for_registers(int columns, Body&& body) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < columns / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      body(lane, i, row * columns + column);
    }
  }
}

struct ShownProduct {
  uint64_t a, b;  // a: a descriptor, or where the lane's registers are
  float* d;
  uint32_t how;
};

void issue(Element element, int columns, uint64_t a, bool of_registers, bool turn_a, uint64_t b, bool turn_b, float* d,
           bool accumulate, Site site) {
  const ShownProduct shown{a, b, d, static_cast<uint32_t>(accumulate)};
  const Shown* all = meet(Meeting::products, 0xffffffff, &shown, sizeof shown, site);
  if (lane() != 0) {
    return;
  }
  WarpState& warp = mine();
  if (!warp.fenced) {
    fail("registers", "thread (%u,%u,%u): no wgmma_fence() before the wgmma in %s:%d", threadIdx.x, threadIdx.y,
         threadIdx.z, site.file, site.line);
  }
  Sums& sums = warp.sums[d];
  const bool fresh = sums.values.empty();
  if (fresh) {
    sums.values.assign(kRows * columns, 0);
  }
  Registers registers;
  registers.group = warp.group;
  registers.site = site;
  for (int lane = 0; lane < 32; ++lane) {
    ShownProduct theirs;
    std::memcpy(&theirs, all[lane], sizeof theirs);
    if (of_registers) {
      registers.lanes[lane] = reinterpret_cast<const uint32_t*>(theirs.a);
      std::memcpy(registers.values[lane], registers.lanes[lane], sizeof registers.values[lane]);
    }
    if ((theirs.a != a && !of_registers) || theirs.b != b || theirs.how != shown.how) {
      fail("divergence", "thread (%u,%u,%u): lanes of its warp ask for different products in %s:%d", threadIdx.x,
           threadIdx.y, threadIdx.z, site.file, site.line);
    }
    sums.lanes[lane] = theirs.d;
  }
  if (fresh) {
    for_registers(columns, [&](int lane, int i, int place) {
      sums.values[place] = accumulate ? sums.lanes[lane][i] : 0;
      sums.lanes[lane][i] = NAN;
    });
  }
  const Product product{element, columns, {a, turn_a}, {b, turn_b}, registers, accumulate, warp.group};
  if (of_registers) {
    warp.read.push_back(registers);
  }
  if (clocks_run) {
    if (!of_registers) {
      claim(product.a, running.warp % 4 * kRows, kRows, site);
    }
    claim(product.b, 0, columns, site);
  }
  sums.group = warp.group;
  sums.waiting.push_back(product);
  if (draw(2) == 0) {
    for (const Product& one : sums.waiting) {
      perform(one, sums.values);
    }
    sums.waiting.clear();
  }
}

}  // namespace

// ---------------------------------------------------------------- what kernels call

void wgmma(Element element, int columns, uint64_t a, bool turn_a, uint64_t b, bool turn_b, float* d, bool accumulate,
           Site site) {
  issue(element, columns, a, false, turn_a, b, turn_b, d, accumulate, site);
}

void wgmma(Element element, int columns, const uint32_t (&a)[4], uint64_t b, float* d, bool accumulate, Site site) {
  issue(element, columns, reinterpret_cast<uint64_t>(a), true, false, b, false, d, accumulate, site);
}

void wgmma_fence(Site site) {
  meet(Meeting::products, 0xffffffff, nullptr, 0, site);
  mine().fenced = true;
}

void wgmma_commit(Site site) {
  meet(Meeting::products, 0xffffffff, nullptr, 0, site);
  if (lane() == 0) {
    ++mine().group;
  }
}

void wait_products(int still_flying, Site site) {
  meet(Meeting::products, 0xffffffff, nullptr, 0, site);
  if (lane() == 0) {
    WarpState& warp = mine();
    const int over = warp.group - still_flying - 1;
    const auto is_over = [&](const Registers& read) { return read.group <= over; };
    const auto end = std::find_if_not(warp.read.begin(), warp.read.end(), is_over);
    std::for_each(warp.read.begin(), end, expect_unchanged);
    warp.read.erase(warp.read.begin(), end);
    for (auto at = warp.sums.begin(); at != warp.sums.end();) {
      Sums& sums = at->second;
      while (!sums.waiting.empty() && sums.waiting.front().group <= over) {
        perform(sums.waiting.front(), sums.values);
        sums.waiting.erase(sums.waiting.begin());
      }
      if (sums.group > over) {
        ++at;
        continue;
      }
      const int columns = static_cast<int>(sums.values.size()) / kRows;
      for_registers(columns, [&](int lane, int i, int place) { sums.lanes[lane][i] = sums.values[place]; });
      at = warp.sums.erase(at);
    }
    ++warp.time;
    end_async_reads(agent(), over, warp.time);
    for (int lane = 0; lane < 32; ++lane) {
      known[32 * running.warp + lane].of[agent()] = warp.time;
    }
    warp.fenced = false;
  }
  meet(Meeting::products, 0xffffffff, nullptr, 0, site);
}

void set_registers(int count, Site site) {
  meet(Meeting::products, 0xffffffff, nullptr, 0, site);
  if (count % 8 != 0 || count < 24 || count > 256) {
    fail("registers", "thread (%u,%u,%u): setmaxnreg to %d in %s:%d", threadIdx.x, threadIdx.y, threadIdx.z, count,
         site.file, site.line);
  }
  mine().registers = count;
}

// ---------------------------------------------------------------- what the rest of host_simt calls

void begin_block_products() { std::fill(std::begin(warps), std::end(warps), WarpState{}); }

void end_thread_products() {
  for (const auto& [d, sums] : mine().sums) {
    if (sums.lanes[lane()] != nullptr) {
      fail("race", "thread (%u,%u,%u) ends before its last wgmma is waited for", threadIdx.x, threadIdx.y, threadIdx.z);
    }
  }
}

void end_block_products() {
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const int each = 65536 / threads / 8 * 8;
  int taken = 0, changed = 0;
  for (int warp = 0; warp < (threads + 31) / 32; ++warp) {
    const int registers = warps[warp].registers;
    changed += registers != 0;
    taken += 32 * (registers != 0 ? registers : each);
    if (registers != warps[warp / 4 * 4].registers) {
      fail("registers", "setmaxnreg in some warps of the warpgroup of thread (%d,0,0), and not in all", 32 * warp);
    }
  }
  if (changed != 0 && taken > each * threads) {
    fail("registers", "setmaxnreg hands out %d registers to the threads from (0,0,0) on, and there are %d", taken,
         each * threads);
  }
}

}  // namespace host_simt
