// Global and shared memory, and cp.async. See host_simt.h for the model.
//
// Under AddressSanitizer every tensor and shared array is a malloc of its very size, whose ends are watched. In the
// other build they all lie in one stretch of addresses, at least a page apart, where races.cpp finds them.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "host_simt/state.h"

namespace host_simt {

std::vector<Region> regions;
Traffic traffic;

namespace {

std::map<const void*, char*> shared_declarations;
const char dynamic_declaration = 0;
size_t dynamic_shared_size = 0;
size_t tensors = 0;  // regions before the launch

#if defined(__SANITIZE_ADDRESS__)

char* new_region(const char* name, size_t bytes, size_t offset, bool shared, bool defined) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, offset + bytes) != 0) {
    std::abort();
  }
  regions.push_back({name, static_cast<char*>(memory) + offset, bytes, shared, defined, nullptr, memory});
  return regions.back().begin;
}

void release_from(size_t first) {
  for (size_t i = first; i < regions.size(); ++i) {
    std::free(regions[i].allocation);
  }
  regions.resize(first);
}

#else

void* map_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) {
    std::perror("host_simt: mmap");
    std::exit(1);
  }
  return pages;
}

char* zone_end = nullptr;

size_t whole_pages(size_t bytes) { return (bytes + 4095) / 4096 * 4096; }

char* new_region(const char* name, size_t bytes, size_t offset, bool shared, bool defined) {
  if (zone == nullptr) {
    zone = static_cast<char*>(map_pages(kZoneBytes));
    zone_end = zone + 4096;
  }
  void* page = zone_end;
  char* begin = zone_end + offset;
  zone_end += whole_pages(offset + bytes) + 4096;
  if (zone_end > zone + kZoneBytes) {
    std::fprintf(stderr, "host_simt: tensors take more than %zu bytes\n", kZoneBytes);
    std::exit(1);
  }
  Record* records = static_cast<Record*>(map_pages(std::max<size_t>(bytes, 1) * sizeof(Record)));
  regions.push_back({name, begin, bytes, shared, defined, records, page});
  return begin;
}

void release_from(size_t first) {
  if (first == regions.size()) {
    return;
  }
  for (size_t i = first; i < regions.size(); ++i) {
    munmap(regions[i].records, std::max<size_t>(regions[i].bytes, 1) * sizeof(Record));
  }
  zone_end = static_cast<char*>(regions[first].allocation);
  regions.resize(first);
}

#endif

}  // namespace

#if !defined(__SANITIZE_ADDRESS__)
char* zone = nullptr;
#endif

// ---------------------------------------------------------------- tensors

void* allocate(const char* name, size_t bytes, size_t offset, Content content) {
  return new_region(name, bytes, offset, false, content == Content::defined);
}

void free_all() { release_from(0); }

Traffic take_traffic() {
  const Traffic taken = traffic;
  traffic = Traffic{};
  return taken;
}

void expect_global(const void* address) {
  for (const Region& region : regions) {
    if (region.shared && address >= region.begin && address < region.begin + region.bytes) {
      fail("misdirected", "a store to global memory goes to '%s', which is shared", region.name);
    }
  }
}

// ---------------------------------------------------------------- shared memory

void begin_launch(size_t dynamic_shared_bytes) {
  tensors = regions.size();
  dynamic_shared_size = dynamic_shared_bytes;
  clock_now.launch_begin = clock_now.epoch + 1;
}

void begin_block() {
  clock_now.block_begin = ++clock_now.epoch;
  for (size_t i = tensors; i < regions.size(); ++i) {
    std::memset(regions[i].begin, 0xff, regions[i].bytes);  // NaN in every format, and -1
  }
}

size_t end_launch() {
  size_t bytes = 0;
  for (const auto& [declaration, array] : shared_declarations) {
    const auto region =
        std::find_if(regions.begin(), regions.end(), [&](const Region& known) { return known.begin == array; });
    bytes += declaration == &dynamic_declaration ? 0 : (region->bytes + 15) / 16 * 16;
  }
  release_from(tensors);
  shared_declarations.clear();
  return bytes;
}

void* shared_array(const void* declaration, const char* name, size_t bytes) {
  char*& begin = shared_declarations[declaration];
  if (begin == nullptr) {
    // What a card puts before dynamic memory, which is aligned to 128 bytes and no more.
    const size_t before = clocks_run && declaration == &dynamic_declaration ? 128 * (1 + draw(7)) : 0;
    begin = new_region(name, bytes, before, true, false);
    std::memset(begin, 0xff, bytes);
  }
  return begin;
}

unsigned char* dynamic_shared() {
  return static_cast<unsigned char*>(shared_array(&dynamic_declaration, "dynamic_shared()", dynamic_shared_size));
}

// Addresses within dynamic memory's window, which begins at a multiple of 1024, and not with 0.
uint32_t shared_address(const void* at) {
  const char* begin = reinterpret_cast<const char*>(dynamic_shared());
  const char* window = begin - reinterpret_cast<uintptr_t>(begin) % 1024;
  return static_cast<uint32_t>(static_cast<const char*>(at) - window + 1024);
}

char* shared_pointer(uint32_t address) {
  char* begin = reinterpret_cast<char*>(dynamic_shared());
  return begin - reinterpret_cast<uintptr_t>(begin) % 1024 + address - 1024;
}

// ---------------------------------------------------------------- cp.async

namespace {

struct Copy {
  char* to;
  const char* from;
  size_t bytes, room;
  int group;
};

struct Copies {
  std::vector<Copy> flying;
  int group = 0;  // the open one
};

Copies copies[1024];

}  // namespace

void copy_async(void* to, const void* from, size_t bytes, size_t room) {
  const void* code = __builtin_return_address(0);
  if (reinterpret_cast<uintptr_t>(to) % room != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % room != 0)) {
    report_line(code);
    fail("misaligned", "cp.async of %zu bytes from %p to %p", room, from, to);
  }
  if (bytes > 0) {
    touch(from, bytes, Access::read, code);
  }
  touch(to, room, Access::copy_issued, code);
  std::memset(to, 0xff, room);
  copies[running.thread].flying.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, room, copies[running.thread].group});
}

void commit_copies() { ++copies[running.thread].group; }

void wait_copies(int still_flying) {
  Copies& mine = copies[running.thread];
  std::vector<Copy> rest;
  for (const Copy& copy : mine.flying) {
    if (copy.group >= mine.group - still_flying) {
      rest.push_back(copy);
      continue;
    }
    touch(copy.to, copy.room, Access::copy_landed, nullptr);
    std::fill(std::copy_n(copy.from, copy.bytes, copy.to), copy.to + copy.room, 0);
  }
  mine.flying = std::move(rest);
}

void forget_copies(unsigned thread) { copies[thread].flying.clear(); }

}  // namespace host_simt

// ---------------------------------------------------------------- what the sanitizers call before a report

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_on_error() { host_simt::print_context(); }
extern "C" void __ubsan_on_report() { host_simt::print_context(); }
#endif
