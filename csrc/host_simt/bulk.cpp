// mbarriers and bulk tensor copies. See hopper.h for the model.
#include <algorithm>
#include <cstdio>
#include <map>

#include "host_simt/state.h"

namespace host_simt {
namespace {

// ---------------------------------------------------------------- state of a block

struct Barrier {
  uint16_t agent;
  uint32_t arrivals;        // of a phase
  uint32_t pending;         // still to come
  int64_t bytes = 0;        // still to land; less than none if they came before they were expected
  uint32_t phase = 0;       // the one that runs
  uint32_t time = 0;        // of the last phase's end, as its agent counts
  bool shown = false;       // to bulk copies
  uint16_t initialized_by;  // the thread
  Times gathered, ended;    // what arrivals know; the same when the last phase ended
  std::vector<uint16_t> waiting;
  std::vector<std::pair<char*, size_t>> landed;  // in this phase
};

// A load. Its box is lines along the fastest axis, which land in some pieces.
struct Load {
  TensorMap map;
  char* to;
  uint64_t* barrier;
  int32_t at[5];
  uint32_t offset[2];
  std::vector<std::pair<uint32_t, uint32_t>> pieces;  // of lines, still to land
};

struct Store {
  TensorMap map;
  const char* from;
  int32_t at[3];
  int group;
  bool done;
  Site site;
};

struct Stores {
  std::vector<Store> flying;
  int group = 0;  // the open one
};

std::map<uint64_t*, Barrier> barriers;
std::vector<Load> loads;
std::vector<AsyncRead> reads;
Stores stores[kThreadAgents];
std::vector<uint32_t> fences[kThreadAgents];  // times of each thread's

// ---------------------------------------------------------------- mbarrier

Barrier& find(uint64_t* barrier, Access access, Site site) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0) {
    fail("misaligned", "thread (%u,%u,%u): the mbarrier at %p in %s:%d", threadIdx.x, threadIdx.y, threadIdx.z,
         static_cast<void*>(barrier), site.file, site.line);
  }
  touch(barrier, 8, access, nullptr);
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) {
    fail("uninitialized", "thread (%u,%u,%u) comes to an mbarrier that nobody initialized in %s:%d", threadIdx.x,
         threadIdx.y, threadIdx.z, site.file, site.line);
  }
  return found->second;
}

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) {
    return;
  }
  ++barrier.phase;
  ++barrier.time;
  barrier.pending = barrier.arrivals;
  barrier.ended.join(barrier.gathered);
  barrier.ended.of[barrier.agent] = barrier.time;
  for (const auto& [begin, bytes] : barrier.landed) {
    land(begin, bytes, barrier.agent, barrier.time);
  }
  barrier.landed.clear();
  for (const uint16_t thread : barrier.waiting) {
    wake(thread);
  }
  barrier.waiting.clear();
}

void arrive(Barrier& barrier, Site site) {
  if (barrier.pending == 0) {
    fail("divergence", "thread (%u,%u,%u) is one more than the %u arrivals of an mbarrier's phase in %s:%d",
         threadIdx.x, threadIdx.y, threadIdx.z, barrier.arrivals, site.file, site.line);
  }
  release(barrier.gathered);
  --barrier.pending;
  end_phase_if_complete(barrier);
  pause();
}

// ---------------------------------------------------------------- boxes

uint32_t lines(const TensorMap& map) {
  return map.im2col ? map.box[1] : map.box[1] * map.box[2] * map.box[3] * map.box[4];
}
uint32_t line_bytes(const TensorMap& map) { return map.box[0] * bytes_of(map.elements); }

// Chunk `chunk` of a line, both counted from the box's beginning at `base`.
char* swizzled(const TensorMap& map, char* base, uint32_t line, uint32_t chunk) {
  char* at = base + line * line_bytes(map) + chunk * 16;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(at);
  const uintptr_t changed = map.swizzle == 128  ? bits ^ (bits >> 7 & 7) << 4
                            : map.swizzle == 64 ? bits ^ (bits >> 7 & 3) << 4
                                                : bits;
  return at + (changed - bits);
}

// The place in the tensor of the first byte of a line, or nothing outside of it. `inside` is how many of the line's
// bytes are in the tensor, and `before` how many are not, at its beginning.
const char* line_of(const TensorMap& map, const int32_t* at, const uint32_t* offset, uint32_t line, int64_t& before,
                    int64_t& inside) {
  int64_t place[5] = {};
  std::copy(at, at + map.rank, place);
  if (map.im2col) {
    // The rectangle of first pixels, walked row by row, image by image.
    const int64_t width = int64_t{map.extents[1]} + map.upper[0] - map.lower[0];
    const int64_t height = int64_t{map.extents[2]} + map.upper[1] - map.lower[1];
    const int64_t w = place[1] - map.lower[0] + line, h = place[2] - map.lower[1] + w / width;
    place[1] = map.lower[0] + w % width + offset[0];
    place[2] = map.lower[1] + h % height + offset[1];
    place[3] += h / height;
  } else {
    place[1] += line % map.box[1];
    place[2] += line / map.box[1] % map.box[2];
    place[3] += line / map.box[1] / map.box[2] % map.box[3];
    place[4] += line / map.box[1] / map.box[2] / map.box[3];
  }
  const int bytes = bytes_of(map.elements);
  const char* from = map.tensor + place[0] * bytes;
  for (int i = 1; i < 5; ++i) {
    if (place[i] < 0 || place[i] >= map.extents[i]) {
      return nullptr;
    }
    from += i < map.rank ? place[i] * static_cast<int64_t>(map.strides[i - 1]) : 0;
  }
  before = std::max<int64_t>(-place[0], 0) * bytes;
  inside = std::min<int64_t>(map.extents[0] - place[0], map.box[0]) * bytes - before;
  return inside > 0 ? from : nullptr;
}

// A line of float32, NaN and infinity as they are. A tie goes up or down by its other bits: no document says which.
void round_to_tf32(std::vector<char>& line) {
  for (size_t i = 0; i < line.size(); i += 4) {
    uint32_t bits;
    std::memcpy(&bits, line.data() + i, 4);
    if ((bits & 0x7f800000) != 0x7f800000) {
      bits = (bits + 0xfff + __builtin_parity(bits >> 13)) & 0xffffe000;
      std::memcpy(line.data() + i, &bits, 4);
    }
  }
}

void land_line(const Load& load, uint32_t line) {
  std::vector<char> bytes(line_bytes(load.map));
  int64_t before, inside;
  if (const char* from = line_of(load.map, load.at, load.offset, line, before, inside)) {
    std::memcpy(bytes.data() + before, from + before, inside);
  }
  if (load.map.elements == Elements::tf32) {
    round_to_tf32(bytes);
  }
  for (uint32_t chunk = 0; chunk < bytes.size() / 16; ++chunk) {
    std::memcpy(swizzled(load.map, load.to, line, chunk), bytes.data() + 16 * chunk, 16);
  }
}

void start(void* to, const TensorMap& map, uint64_t* barrier, const int32_t* at, const uint32_t* offset, Site site) {
  const Barrier& known_barrier = find(barrier, Access::atomic, site);
  if (!known_barrier.shown) {
    fail("uninitialized", "thread (%u,%u,%u): no mbarrier_init_fence() shows the mbarrier to the bulk copy in %s:%d",
         threadIdx.x, threadIdx.y, threadIdx.z, site.file, site.line);
  }
  if (shared_address(to) % 128 != 0 || reinterpret_cast<uintptr_t>(&map) % 64 != 0) {
    fail("misaligned", "thread (%u,%u,%u): a bulk copy to %p by the map at %p in %s:%d", threadIdx.x, threadIdx.y,
         threadIdx.z, to, static_cast<const void*>(&map), site.file, site.line);
  }
  const uint32_t count = lines(map);
  touch(to, count * line_bytes(map), Access::bulk_issued, __builtin_return_address(0));
  std::memset(to, 0xff, count * line_bytes(map));
  Load load{map, static_cast<char*>(to), barrier, {}, {offset[0], offset[1]}, {}};
  std::copy(at, at + map.rank, load.at);
  for (uint32_t line = 0; line < count; ++line) {
    int64_t before, inside;
    if (const char* from = line_of(map, load.at, load.offset, line, before, inside)) {
      touch(from + before, inside, Access::read, __builtin_return_address(0));
    }
  }
  const uint32_t step = std::max(1u, count / 3);  // three or four pieces
  for (uint32_t line = draw(step); line < count; line += step) {
    const uint32_t begin = load.pieces.empty() ? 0 : load.pieces.back().second;
    load.pieces.push_back({begin, std::min(line + 1, count)});
  }
  if (load.pieces.back().second < count) {
    load.pieces.push_back({load.pieces.back().second, count});
  }
  loads.push_back(load);
  pause();
}

// ---------------------------------------------------------------- stores

void perform(Store& store) {
  const uint32_t none[2] = {};
  for (uint32_t line = 0; line < lines(store.map); ++line) {
    std::vector<char> bytes(line_bytes(store.map));
    for (uint32_t chunk = 0; chunk < bytes.size() / 16; ++chunk) {
      std::memcpy(bytes.data() + 16 * chunk, swizzled(store.map, const_cast<char*>(store.from), line, chunk), 16);
    }
    int64_t before, inside;
    if (const char* to = line_of(store.map, store.at, none, line, before, inside)) {
      touch(to + before, inside, Access::write, nullptr);
      std::memcpy(const_cast<char*>(to) + before, bytes.data() + before, inside);
    }
  }
  store.done = true;
}

}  // namespace

// ---------------------------------------------------------------- what kernels call

void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Site site) {
  touch(barrier, 8, Access::write, __builtin_return_address(0));
  if (arrivals < 1 || arrivals >= 1 << 20) {
    fail("launch", "an mbarrier for %u arrivals in %s:%d", arrivals, site.file, site.line);
  }
  std::memset(barrier, 0, 8);
  const size_t agent = kThreadAgents + barriers.size();
  Barrier fresh{};
  fresh.agent = static_cast<uint16_t>(agent);
  fresh.arrivals = fresh.pending = arrivals;
  fresh.initialized_by = running.thread;
  barriers[barrier] = fresh;
  if (barriers.size() > kBarrierAgents) {
    fail("launch", "more than %d mbarriers in a block", kBarrierAgents);
  }
}

void mbarrier_init_fence() {
  for (auto& [place, barrier] : barriers) {
    barrier.shown = barrier.shown || barrier.initialized_by == running.thread;
  }
}

void mbarrier_expect(uint64_t* barrier, uint32_t bytes, Site site) {
  Barrier& known_barrier = find(barrier, Access::atomic, site);
  known_barrier.bytes += bytes;
  arrive(known_barrier, site);
}

void mbarrier_arrive(uint64_t* barrier, Site site) { arrive(find(barrier, Access::atomic, site), site); }

void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site) {
  Barrier& known_barrier = find(barrier, Access::atomic, site);
  pause();
  while ((known_barrier.phase & 1) == parity) {
    known_barrier.waiting.push_back(running.thread);
    park(site);
  }
  known[running.thread].join(known_barrier.ended);
}

int encode_tensor_map(TensorMap& map, Elements elements, const void* tensor, int rank, const uint64_t* extents,
                      const uint64_t* strides) {
  map = TensorMap{};
  map.elements = elements;
  map.tensor = static_cast<const char*>(tensor);
  map.rank = static_cast<uint8_t>(rank);
  bool right = tensor != nullptr && reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
  for (int i = 0; i < rank; ++i) {
    right = right && extents[i] >= 1 && extents[i] < uint64_t{1} << 32;
    map.extents[i] = static_cast<uint32_t>(extents[i]);
  }
  for (int i = 0; i < rank - 1; ++i) {
    right = right && strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40;
    map.strides[i] = strides[i];
  }
  return right ? cudaSuccess : cudaErrorInvalidValue;
}

int encode_im2col(TensorMap& map, Elements elements, const void* tensor, const uint64_t (&extents)[4],
                  const uint64_t (&strides)[3], const int32_t (&lower)[2], const int32_t (&upper)[2], uint32_t channels,
                  uint32_t pixels) {
  if (const int error = encode_tensor_map(map, elements, tensor, 4, extents, strides)) {
    return error;
  }
  map.im2col = true;
  map.box[0] = channels;
  map.box[1] = pixels;
  bool right = channels * bytes_of(elements) == 128 && pixels >= 1 && pixels <= 1024;
  for (int i = 0; i < 2; ++i) {
    map.lower[i] = lower[i];
    map.upper[i] = upper[i];
    right = right && lower[i] >= -128 && lower[i] <= 127 && upper[i] >= -128 && upper[i] <= 127 &&
            int64_t{map.extents[1 + i]} + upper[i] - lower[i] >= 1;
  }
  return right ? cudaSuccess : cudaErrorInvalidValue;
}

void bulk_load(void* to, const TensorMap& map, uint64_t* barrier, const int32_t (&at)[4], Site site) {
  const uint32_t none[2] = {};
  if (map.im2col || map.rank != 4) {
    fail("launch", "a tiled load of four axes by another kind of map in %s:%d", site.file, site.line);
  }
  start(to, map, barrier, at, none, site);
}

void bulk_load(void* to, const TensorMap& map, uint64_t* barrier, const int32_t (&at)[5], Site site) {
  const uint32_t none[2] = {};
  if (map.im2col || map.rank != 5) {
    fail("launch", "a tiled load of five axes by another kind of map in %s:%d", site.file, site.line);
  }
  start(to, map, barrier, at, none, site);
}

void bulk_load_im2col(void* to, const TensorMap& map, uint64_t* barrier, int32_t c, int32_t w, int32_t h, int32_t n,
                      uint16_t s, uint16_t r, Site site) {
  const int32_t at[4] = {c, w, h, n};
  const uint32_t offset[2] = {s, r};
  if (!map.im2col || s > 255 || r > 255) {
    fail("launch", "an im2col load by another kind of map, or more than 255 pixels off, in %s:%d", site.file,
         site.line);
  }
  start(to, map, barrier, at, offset, site);
}

void bulk_store(const TensorMap& map, const void* from, const int32_t (&at)[3], Site site) {
  if (map.im2col || map.rank != 3 || shared_address(from) % 128 != 0) {
    fail("misaligned", "thread (%u,%u,%u): a bulk store of three axes from %p in %s:%d", threadIdx.x, threadIdx.y,
         threadIdx.z, from, site.file, site.line);
  }
  const char* begin = static_cast<const char*>(from);
  const size_t bytes = lines(map) * line_bytes(map);
  touch(begin, bytes, Access::async_read, __builtin_return_address(0));
  Stores& mine = stores[running.thread];
  Store store{map, begin, {at[0], at[1], at[2]}, mine.group, false, site};
  if (draw(2) == 0) {
    perform(store);
  }
  mine.flying.push_back(store);
  begin_async_read({begin, begin + bytes, running.thread, mine.group, true, 0, "a bulk store", site});
}

void bulk_commit() { ++stores[running.thread].group; }

void wait_stores(int still_flying) {
  Stores& mine = stores[running.thread];
  const int over = mine.group - still_flying - 1;  // the newest group that is waited for
  std::vector<Store> rest;
  for (Store& store : mine.flying) {
    if (store.group > over) {
      rest.push_back(store);
    } else if (!store.done) {
      perform(store);
    }
  }
  mine.flying = std::move(rest);
  if (clocks_run) {
    end_async_reads(running.thread, over, now());
  }
}

void async_proxy_fence() {
  if (clocks_run) {
    fences[running.thread].push_back(now());
    ++known[running.thread].of[running.thread];
  }
}

// ---------------------------------------------------------------- what the rest of host_simt calls

bool copies_fly() { return !loads.empty(); }

bool land_some() {
  if (loads.empty()) {
    return false;
  }
  std::swap(loads[draw(loads.size())], loads.back());
  Load& load = loads.back();
  std::swap(load.pieces[draw(load.pieces.size())], load.pieces.back());
  const auto [begin, end] = load.pieces.back();
  load.pieces.pop_back();
  for (uint32_t line = begin; line < end; ++line) {
    land_line(load, line);
  }
  Barrier& barrier = barriers.at(load.barrier);
  const size_t each = line_bytes(load.map);
  barrier.bytes -= static_cast<int64_t>((end - begin) * each);
  barrier.landed.push_back({load.to + begin * each, (end - begin) * each});
  if (load.pieces.empty()) {
    loads.pop_back();
  }
  end_phase_if_complete(barrier);
  return true;
}

void begin_async_read(const AsyncRead& read) {
  const auto same = [&](const AsyncRead& other) {
    return other.agent == read.agent && other.begin == read.begin && other.end == read.end;
  };
  reads.erase(std::remove_if(reads.begin(), reads.end(), same), reads.end());
  reads.push_back(read);
}

void end_async_reads(uint16_t agent, int group, uint32_t time) {
  for (AsyncRead& read : reads) {
    if (read.agent == agent && read.pending && read.group <= group) {
      read.pending = false;
      read.time = time;
    }
  }
}

void expect_no_async_read(const char* address, size_t bytes, const void* code) {
  for (const AsyncRead& read : reads) {
    if (address >= read.end || address + bytes <= read.begin || (!read.pending && knows(read.agent, read.time))) {
      continue;
    }
    report_line(code);
    fail("race", "thread (%u,%u,%u) writes, or lets a bulk copy write, what %s reads that %s, issued in %s:%d",
         threadIdx.x, threadIdx.y, threadIdx.z, read.what,
         read.pending ? "nobody has waited for" : "was waited for with no barrier between", read.site.file,
         read.site.line);
  }
}

bool proxy_fenced(uint16_t thread, uint32_t time) {
  if (!clocks_run) {
    return true;
  }
  const auto fence = std::lower_bound(fences[thread].begin(), fences[thread].end(), time);
  return fence != fences[thread].end() && (thread == running.thread || knows(thread, *fence));
}

void begin_block_bulk() {
  barriers.clear();
  loads.clear();
  reads.clear();
  for (unsigned thread = 0; thread < kThreadAgents; ++thread) {
    fences[thread].clear();
    stores[thread] = Stores{};
  }
}

void end_thread_bulk() {
  for (const Store& store : stores[running.thread].flying) {
    fail("race", "thread (%u,%u,%u) ends before its bulk store in %s:%d is known to have read shared memory",
         threadIdx.x, threadIdx.y, threadIdx.z, store.site.file, store.site.line);
  }
}

}  // namespace host_simt
