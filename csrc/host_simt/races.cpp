// Who touched which byte when. See host_simt.h for what is reported.
//
// The compiler calls __tsan_read4(address) and its like before every load and store of a kernel (-fsanitize=thread).
// All memory that threads share lies in one stretch of addresses, so one comparison leaves out the many accesses to a
// thread's own variables. Each byte of the stretch has a Record, which is enough to decide exactly:
//
//   a write races with an earlier read or write, and a read with an earlier write, by another thread, unless a barrier
//   lies between them, or a __syncwarp() if both are of one warp, or the launch is another one.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "host_simt/state.h"

namespace host_simt {
namespace {

constexpr uint16_t kMany = 0xffff, kSeveral = 0xfffe;

// ---------------------------------------------------------------- the record of a byte

struct Fault {
  const char* kind;
  const char* what;
};

// The first epoch whose accesses can collide with those of now: shared memory is the block's alone.
uint32_t begin_of(const Region& region) { return region.shared ? clock_now.block_begin : clock_now.launch_begin; }

// Whether an access in an epoch of an earlier launch, or block if the region is shared, is over.
bool is_over(const Region& region, uint32_t epoch) {
  return region.shared || running.waited || epoch < clock_now.flying_begin;
}

// Whether an access by `thread` in that epoch is ordered before the running thread's next one.
bool ordered(const Region& region, uint32_t epoch, uint32_t warp_epoch, uint16_t thread, uint32_t time) {
  if (epoch < begin_of(region)) {
    return is_over(region, epoch);
  }
  if (epoch < clock_now.block_begin) {
    return false;
  }
  return epoch < clock_now.epoch || thread == running.thread ||
         (thread / 32 == running.warp && warp_epoch < running.warp_epoch) || knows(thread, time);
}

// Where clocks run: the reads of a byte of shared memory since the last barrier that no later one knew of, each a
// thread and its time. If they are several, the record's reader is kSeveral and its read_time their number here.
using Reads = std::vector<std::pair<uint16_t, uint32_t>>;
std::vector<Reads> several;

bool is_known(const Reads::value_type& read) { return read.first == running.thread || knows(read.first, read.second); }

void add_read(Record& record) {
  static uint32_t block = 0;
  if (block != clock_now.block_begin) {
    block = clock_now.block_begin;
    several.clear();
  }
  static Reads reads;
  reads.clear();
  if (record.read_epoch == clock_now.epoch) {
    reads = record.reader == kSeveral ? several[record.read_time] : Reads{{record.reader, record.read_time}};
    reads.erase(std::remove_if(reads.begin(), reads.end(), is_known), reads.end());
  }
  record.reader = running.thread;
  record.read_time = now();
  if (!reads.empty()) {
    reads.push_back({record.reader, record.read_time});
    if (several.empty() || several.back() != reads) {  // else as the byte beside it
      several.push_back(reads);
    }
    record.reader = kSeveral;
    record.read_time = several.size() - 1;
  }
  record.read_epoch = clock_now.epoch;
}

bool reads_ordered(const Region& region, const Record& record) {
  if (record.read_epoch < begin_of(region)) {
    return is_over(region, record.read_epoch);
  }
  if (record.read_by_other_block || record.read_epoch < clock_now.block_begin) {
    return false;
  }
  if (record.read_epoch < clock_now.epoch) {
    return true;
  }
  if (clocks_run && region.shared) {
    if (record.reader != kSeveral) {
      return is_known({record.reader, record.read_time});
    }
    const Reads& reads = several[record.read_time];
    return std::all_of(reads.begin(), reads.end(), is_known);
  }
  if (record.reader_warp != running.warp) {
    return record.reader_warp != kMany && record.reader != kMany && knows(record.reader, record.read_time);
  }
  return record.read_warp_epoch < running.warp_epoch || record.reader == running.thread;
}

void remember_read(const Region& region, Record& record) {
  if (clocks_run && region.shared) {
    add_read(record);
    return;
  }
  if (record.read_epoch != clock_now.epoch) {
    const bool this_launch = record.read_epoch >= begin_of(region);
    record.read_by_other_block =
        this_launch && (record.read_by_other_block || record.read_epoch < clock_now.block_begin);
    record.reader_warp = running.warp;
    record.reader = running.thread;
  } else if (record.reader_warp != running.warp) {
    record.reader_warp = kMany;
  } else if (record.read_warp_epoch != running.warp_epoch) {
    record.reader = running.thread;
  } else if (record.reader != running.thread) {
    record.reader = kMany;
  }
  record.read_epoch = clock_now.epoch;
  record.read_warp_epoch = running.warp_epoch;
  record.read_time = now();
}

void remember_write(Record& record, bool atomic) {
  record.write_epoch = clock_now.epoch;
  record.write_warp_epoch = running.warp_epoch;
  record.write_time = now();
  record.writer = running.thread;
  record.written_atomically = atomic;
}

// What is wrong with this access to this byte, and the thread it collides with; {nullptr} if nothing.
Fault check(const Region& region, Record& record, Access access) {
  if (access == Access::copy_landed) {
    record.flying = 0;
    remember_write(record, false);
    return {nullptr, nullptr};
  }
  if (record.flying && record.write_epoch >= begin_of(region)) {
    return {"race", record.flying == 1 ? "a cp.async to it has not landed: its wait is missing, or comes later"
                                       : "a bulk copy to it has not landed: its wait is missing, or comes later"};
  }
  const bool write = access != Access::read && access != Access::async_read;
  if (!write) {
    const bool written = region.shared ? record.write_epoch >= clock_now.block_begin : record.write_epoch != 0;
    if (!written && !region.defined) {
      return {"uninitialized", region.shared ? "no thread of this block wrote it" : "no kernel wrote it"};
    }
  }
  const bool both_atomic = access == Access::atomic && record.written_atomically;
  if (!both_atomic && !ordered(region, record.write_epoch, record.write_warp_epoch, record.writer, record.write_time)) {
    return {"race", record.write_epoch < begin_of(region)        ? "a kernel wrote it that may still run"
                    : record.write_epoch < clock_now.block_begin ? "another block wrote it in this launch"
                                                                 : "written with no barrier between by"};
  }
  if (write && !reads_ordered(region, record)) {
    return {"race", record.read_epoch < begin_of(region) ? "a kernel read it that may still run"
                    : record.read_epoch < clock_now.block_begin || record.read_by_other_block
                        ? "another block read it in this launch"
                        : "read with no barrier between by"};
  }
  if (access == Access::async_read) {  // bulk.cpp remembers these
    const bool by_thread = region.shared && record.writer < kThreadAgents;
    return {by_thread && !proxy_fenced(record.writer, record.write_time) ? "race" : nullptr,
            "no async_proxy_fence() since it was written by"};
  }
  if (write) {
    remember_write(record, access == Access::atomic);
    record.flying = access == Access::copy_issued ? 1 : access == Access::bulk_issued ? 2 : 0;
  } else {
    remember_read(region, record);
  }
  return {nullptr, nullptr};
}

// ---------------------------------------------------------------- reports

const char* verb(Access access) {
  switch (access) {
    case Access::read:
      return "reads";
    case Access::atomic:
      return "atomically changes";
    case Access::copy_issued:
      return "starts a cp.async to";
    case Access::bulk_issued:
      return "starts a bulk copy to";
    case Access::async_read:
      return "lets a product or a bulk store read";
    default:
      return "writes";
  }
}

[[noreturn]] void report(const Fault& fault, const Region& region, size_t byte, const Record& record, Access access,
                         const void* code) {
  char other[64] = "";
  const size_t length = std::strlen(fault.what);
  if (length > 2 && std::strcmp(fault.what + length - 2, "by") == 0) {
    const uint16_t thread = fault.what[0] == 'r' ? record.reader : record.writer;
    if (thread >= kSeveral) {
      std::snprintf(other, sizeof other, " several threads");
    } else if (thread >= kThreadAgents) {
      std::snprintf(other, sizeof other, " a bulk copy whose barrier it has not waited for");
    } else {
      const uint3 index = thread_index(thread);
      std::snprintf(other, sizeof other, " thread (%u,%u,%u)", index.x, index.y, index.z);
    }
  }
  report_line(code);
  fail(fault.kind, "thread (%u,%u,%u) %s byte %zu of %s '%s': %s%s", threadIdx.x, threadIdx.y, threadIdx.z,
       verb(access), byte, region.shared ? "shared" : "global", region.name, fault.what, other);
}

[[noreturn]] void report_outside(const char* address, size_t bytes, Access access, const void* code) {
  report_line(code);
  const Region* nearest = nullptr;
  for (const Region& region : regions) {
    if (region.begin <= address) {
      nearest = &region;
    }
  }
  if (nearest == nullptr) {
    fail("out of bounds", "thread %s %zu bytes before the first tensor", verb(access), bytes);
  }
  const ptrdiff_t past = address - nearest->begin - static_cast<ptrdiff_t>(nearest->bytes);
  const Region* next = nearest + 1;
  const ptrdiff_t before = next < regions.data() + regions.size() ? next->begin - address : PTRDIFF_MAX;
  if (before < past) {
    fail("out of bounds", "thread %s %zu bytes, %td before the start of '%s'", verb(access), bytes, before, next->name);
  }
  fail("out of bounds", "thread %s %zu bytes, %td past the end of '%s' (%zu bytes)", verb(access), bytes, past,
       nearest->name, nearest->bytes);
}

}  // namespace

// The kernel's part of the call chain, if this machine has addr2line.
void report_line(const void* code) {
  char program[4096];
  const ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
  if (code == nullptr || length <= 0) {
    return;
  }
  program[length] = 0;
  char command[8192];
  std::snprintf(command, sizeof command,
                "addr2line -i -e '%s' %p | grep -v -e host_simt/ -e /bits/ | sed 's/^/host_simt: at /' 1>&2", program,
                static_cast<const void*>(static_cast<const char*>(code) - 1));
  if (std::system(command) != 0) {
    std::fprintf(stderr, "host_simt: at %p\n", code);
  }
}

void touch(const void* address, size_t bytes, Access access, const void* code) {
  const char* at = static_cast<const char*>(address);
  if (static_cast<size_t>(at - zone) >= kZoneBytes || !running.active) {
    return;
  }
  static size_t last = 0;
  if (last >= regions.size() || at < regions[last].begin || at >= regions[last].begin + regions[last].bytes) {
    auto above = std::upper_bound(regions.begin(), regions.end(), at,
                                  [](const char* value, const Region& region) { return value < region.begin; });
    if (above == regions.begin()) {
      report_outside(at, bytes, access, code);
    }
    last = above - regions.begin() - 1;
  }
  const Region& region = regions[last];
  const size_t first = at - region.begin;
  if (first + bytes > region.bytes) {
    report_outside(at, bytes, access, code);
  }
  if (clocks_run && region.shared && access != Access::read && access != Access::async_read) {
    expect_no_async_read(at, bytes, code);
  }
  for (size_t i = first; i < first + bytes; ++i) {
    const Record before = region.records[i];
    const Fault fault = check(region, region.records[i], access);
    if (fault.kind != nullptr) {
      report(fault, region, i, before, access, code);
    }
    if (!region.shared && access == Access::read) {
      traffic.read += before.read_epoch < clock_now.block_begin;
    } else if (!region.shared) {
      ++traffic.written;
    }
  }
}

void land(const void* address, size_t bytes, uint16_t agent, uint32_t time) {
  const char* at = static_cast<const char*>(address);
  for (const Region& region : regions) {
    if (at < region.begin || at >= region.begin + region.bytes) {
      continue;
    }
    for (size_t i = at - region.begin; i < at - region.begin + bytes; ++i) {
      Record& record = region.records[i];
      record.flying = 0;
      record.write_epoch = clock_now.epoch;
      record.write_time = time;
      record.writer = agent;
      record.written_atomically = false;
    }
  }
}

}  // namespace host_simt

// ---------------------------------------------------------------- what the compiler calls

using host_simt::Access;

namespace {

inline void aligned_access(void* address, size_t bytes, Access access, const void* code) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0 && host_simt::running.active) {
    host_simt::report_line(code);
    host_simt::fail("misaligned", "%zu bytes at %p", bytes, address);
  }
  host_simt::touch(address, bytes, access, code);
}

}  // namespace

#define ACCESS(bytes)                                                             \
  void __tsan_read##bytes(void* address) {                                        \
    aligned_access(address, bytes, Access::read, __builtin_return_address(0));    \
  }                                                                               \
  void __tsan_write##bytes(void* address) {                                       \
    aligned_access(address, bytes, Access::write, __builtin_return_address(0));   \
  }                                                                               \
  void __tsan_unaligned_read##bytes(void* address) {                              \
    host_simt::touch(address, bytes, Access::read, __builtin_return_address(0));  \
  }                                                                               \
  void __tsan_unaligned_write##bytes(void* address) {                             \
    host_simt::touch(address, bytes, Access::write, __builtin_return_address(0)); \
  }

#define ATOMIC(bits, Type)                                                                          \
  Type __tsan_atomic##bits##_load(const volatile Type* from, int) {                                 \
    aligned_access(const_cast<Type*>(from), bits / 8, Access::atomic, __builtin_return_address(0)); \
    return *from;                                                                                   \
  }                                                                                                 \
  void __tsan_atomic##bits##_store(volatile Type* to, Type value, int) {                            \
    aligned_access(const_cast<Type*>(to), bits / 8, Access::atomic, __builtin_return_address(0));   \
    *to = value;                                                                                    \
  }                                                                                                 \
  Type __tsan_atomic##bits##_fetch_add(volatile Type* to, Type value, int) {                        \
    aligned_access(const_cast<Type*>(to), bits / 8, Access::atomic, __builtin_return_address(0));   \
    const Type old = *to;                                                                           \
    *to = old + value;                                                                              \
    return old;                                                                                     \
  }

extern "C" {
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
ATOMIC(8, uint8_t)  // guards of static variables
ATOMIC(32, uint32_t)
void __tsan_read_range(void* address, size_t bytes) {
  host_simt::touch(address, bytes, Access::read, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  host_simt::touch(address, bytes, Access::write, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
