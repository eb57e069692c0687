// Vector clocks: what has happened before what. See state.h.
#include "host_simt/state.h"

// The joins are most of what a launch with clocks costs.
#pragma GCC optimize("O3")

namespace host_simt {

bool clocks_run = false;
Times* known = nullptr;

namespace {

std::vector<Times> all;
unsigned threads = 0;

}  // namespace

void Times::join(const Times& other) {
  for (unsigned i = 0; i < threads; ++i) {
    of[i] = of[i] < other.of[i] ? other.of[i] : of[i];
  }
  for (int i = kThreadAgents; i < kAgents; ++i) {
    of[i] = of[i] < other.of[i] ? other.of[i] : of[i];
  }
}

void begin_clocks(bool run) {
  clocks_run = run;
  if (!run) {
    return;
  }
  threads = blockDim.x * blockDim.y * blockDim.z;
  all.assign(threads, Times{});
  known = all.data();
  for (unsigned thread = 0; thread < threads; ++thread) {
    known[thread].of[thread] = 1;
  }
}

void release(Times& to) {
  Times& mine = known[running.thread];
  to.join(mine);
  ++mine.of[running.thread];
}

void join_threads(unsigned first, unsigned count) {
  if (!clocks_run) {
    return;
  }
  Times together{};
  for (unsigned thread = first; thread < first + count; ++thread) {
    together.join(known[thread]);
  }
  for (unsigned thread = first; thread < first + count; ++thread) {
    known[thread].join(together);
    ++known[thread].of[thread];
  }
}

}  // namespace host_simt
