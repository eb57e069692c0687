// Kernels with one fault each, and the same kernels without it:  faults NAME right|wrong
//
// The right ones must run to their end under many schedules, the wrong ones must be reported.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/common/async_copy.cuh"
#include "cuda/common/dependent.cuh"
#include "cuda/common/vector.cuh"

using namespace alexnet_fast::cuda;

namespace {

constexpr int kThreads = 64;

// Each thread takes its neighbour's value. Fault: the neighbour may not have written it.
template <bool kFault>
__global__ void missing_barrier(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  tile[threadIdx.x] = x[threadIdx.x];
  if constexpr (!kFault) {
    __syncthreads();
  }
  y[threadIdx.x] = tile[(threadIdx.x + 1) % kThreads];
}

// Fault: a thread writes the next value while its neighbour may still read the last one.
template <bool kFault>
__global__ void missing_second_barrier(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    tile[threadIdx.x] = x[threadIdx.x] + i;
    __syncthreads();
    sum += tile[(threadIdx.x + 1) % kThreads];
    if constexpr (!kFault) {
      __syncthreads();
    }
  }
  y[threadIdx.x] = sum;
}

// Neighbours of one warp need no more than __syncwarp(); a shuffle between the two orders no memory.
template <bool kFault>
__global__ void missing_syncwarp(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  tile[threadIdx.x] = x[threadIdx.x];
  if constexpr (kFault) {
    y[threadIdx.x] = __shfl_sync(0xffffffff, x[threadIdx.x], 0);
  } else {
    __syncwarp();
  }
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// __syncwarp() does not order two warps.
template <bool kFault>
__global__ void syncwarp_across_warps(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  tile[threadIdx.x] = x[threadIdx.x];
  if constexpr (kFault) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = tile[threadIdx.x ^ 32];
}

template <bool kFault>
__global__ void missing_copy_wait(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  async_copy<4>(&tile[threadIdx.x], x + threadIdx.x);
  async_commit();
  if constexpr (!kFault) {
    async_wait<0>();
  }
  __syncthreads();
  y[threadIdx.x] = tile[(threadIdx.x + 1) % kThreads];
}

// Fault: waits for the group before the one that is read.
template <bool kFault>
__global__ void wait_for_wrong_group(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[2][kThreads], tile);
  for (int i = 0; i < 2; ++i) {
    async_copy<4>(&tile[i][threadIdx.x], x + threadIdx.x);
    async_commit();
  }
  async_wait<kFault ? 1 : 0>();
  __syncthreads();
  y[threadIdx.x] = tile[1][(threadIdx.x + 1) % kThreads];
}

// A wait is for the thread's own copies: the neighbour's need a barrier as well.
template <bool kFault>
__global__ void missing_barrier_after_wait(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  async_copy<4>(&tile[threadIdx.x], x + threadIdx.x);
  async_commit();
  async_wait<0>();
  if constexpr (!kFault) {
    __syncthreads();
  }
  y[threadIdx.x] = tile[(threadIdx.x + 1) % kThreads];
}

// Fault: a copy into a stage that a neighbour may still read.
template <bool kFault>
__global__ void copy_over_what_is_read(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    async_copy<4>(&tile[threadIdx.x], x + threadIdx.x);
    async_commit();
    async_wait<0>();
    __syncthreads();
    sum += tile[(threadIdx.x + 1) % kThreads];
    if constexpr (!kFault) {
      __syncthreads();
    }
  }
  y[threadIdx.x] = sum;
}

template <bool kFault>
__global__ void read_past_tensor(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x + kFault];
}

template <bool kFault>
__global__ void read_before_tensor(const float* x, float* y) {
  y[threadIdx.x] = x[static_cast<int>(threadIdx.x) - kFault];
}

template <bool kFault>
__global__ void write_past_tensor(const float* x, float* y) {
  y[threadIdx.x + kFault] = x[threadIdx.x];
}

template <bool kFault>
__global__ void copy_past_tensor(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  async_copy<4>(&tile[threadIdx.x], x + threadIdx.x + kFault);
  async_commit();
  async_wait<0>();
  y[threadIdx.x] = tile[threadIdx.x];
}

template <bool kFault>
__global__ void past_shared_array(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  float* from = tile;
  from[threadIdx.x + kFault] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = from[threadIdx.x];
}

template <bool kFault>
__global__ void past_dynamic_shared(const float* x, float* y) {  // launched with kThreads floats
  float* tile = reinterpret_cast<float*>(dynamic_shared());
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[(threadIdx.x + 1) % (kThreads + kFault)];
}

template <bool kFault>
__global__ void past_local_array(const float* x, float* y) {
  float mine[4] = {1, 2, 3, 4};
  mine[static_cast<int>(x[threadIdx.x]) % (4 + kFault)] = 5;  // x counts up
  y[threadIdx.x] = mine[0] + mine[3];
}

template <bool kFault>
__global__ void overflow(const float* x, float* y) {
  const int big = 1 << 20;
  const int factor = static_cast<int>(x[threadIdx.x]) * (kFault ? 1 << 10 : 1);
  y[threadIdx.x] = static_cast<float>(big * factor);
}

template <bool kFault>
__global__ void barrier_in_branch(const float* x, float* y) {
  if (!kFault || threadIdx.x % 2 == 0) {
    __syncthreads();
  }
  y[threadIdx.x] = x[threadIdx.x];
}

template <bool kFault>
__global__ void barriers_in_two_branches(const float* x, float* y) {
  if (kFault && threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = x[threadIdx.x];
}

template <bool kFault>
__global__ void return_before_barrier(const float* x, float* y) {
  if (kFault && threadIdx.x == 7) {
    return;
  }
  y[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
}

// Fault: half of the warp is not there.
template <bool kFault>
__global__ void shuffle_in_branch(const float* x, float* y) {
  float value = x[threadIdx.x];
  if (!kFault || threadIdx.x % 32 < 16) {
    value += __shfl_xor_sync(0xffffffff, value, 1);
  }
  if (kFault && threadIdx.x % 32 >= 16) {
    __syncwarp();
  }
  y[threadIdx.x] = value;
}

template <bool kFault>
__global__ void shuffle_from_ended_lane(const float* x, float* y) {
  y[threadIdx.x] = 0;
  if (kFault && threadIdx.x % 32 >= 16) {
    return;
  }
  y[threadIdx.x] = __shfl_xor_sync(0xffffffff, x[threadIdx.x], 16);
}

template <bool kFault>
__global__ void uninitialized_shared(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  if (!kFault || threadIdx.x != 5) {
    tile[threadIdx.x] = x[threadIdx.x];
  }
  __syncthreads();
  y[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// What an earlier block left in shared memory counts for nothing.
template <bool kFault>
__global__ void shared_of_another_block(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  if (!kFault || blockIdx.x % 2 == 0) {
    tile[threadIdx.x] = x[threadIdx.x];
  }
  __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

template <bool kFault>
__global__ void uninitialized_output(const float* x, float* y) {
  if constexpr (!kFault) {
    y[threadIdx.x] = 0;
  }
  y[threadIdx.x] += x[threadIdx.x];
}

template <bool kFault>
__global__ void misaligned(const float* x, float* y) {
  if (threadIdx.x < kThreads / 4) {
    store(y + 4 * threadIdx.x, load<4>(x + 4 * threadIdx.x + (kFault && threadIdx.x == 0)));
  }
}

template <bool kFault>
__global__ void misdirected(const float* x, float* y) {
  ALEXNET_FAST_SHARED(float[kThreads], tile);
  if (threadIdx.x < kThreads / 4) {
    float* const own = tile + 4 * threadIdx.x;
    kFault ? store(own, load<4>(x + 4 * threadIdx.x)) : store_shared(own, load<4>(x + 4 * threadIdx.x));
    store(y + 4 * threadIdx.x, load<4>(own));
  }
}

template <bool kFault>
__global__ void blocks_write_one_element(const float* x, float* y) {
  y[(kFault ? 0 : blockIdx.x * kThreads) + threadIdx.x] = x[threadIdx.x];
}

template <bool kFault>
__global__ void blocks_read_what_others_write(const float* x, float* y) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  y[i] = x[threadIdx.x];
  if (kFault && blockIdx.x > 0) {
    y[i] += y[i - kThreads];
  }
}

// Additions of whole numbers in any order; fault: one of them is not atomic.
template <bool kFault>
__global__ void mixed_atomics(const float* x, float* y) {
  ALEXNET_FAST_SHARED(int[1], count);
  if (threadIdx.x == 0) {
    count[0] = 0;
  }
  __syncthreads();
  if (kFault && threadIdx.x == 9) {
    count[0] += 1;
  } else {
    atomicAdd(&count[0], 1);
  }
  __syncthreads();
  y[threadIdx.x] = x[threadIdx.x] + count[0];
}

// ---------------------------------------------------------------- programmatic dependent launch

// What is in flight as the kernels below begin: y[0] was written by a launch that is over, and is read by one that
// writes y[1]. They have y[2] to themselves.
__global__ void first_row(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

__global__ void second_row(const float*, float* y) { y[kThreads + threadIdx.x] = y[threadIdx.x]; }

template <bool kFault>
__global__ void read_before_dependency_wait(const float*, float* y) {
  const float early = kFault ? y[kThreads + threadIdx.x] : y[threadIdx.x];
  dependency_wait();
  y[2 * kThreads + threadIdx.x] = y[kThreads + threadIdx.x] + early;
}

template <bool kFault>
__global__ void write_before_dependency_wait(const float*, float* y) {
  if (kFault) {
    y[threadIdx.x] = 1;
  }
  y[2 * kThreads + threadIdx.x] = 2;
  dependency_wait();
  y[threadIdx.x] = 3;
}

// A wait is the waiting thread's alone.
template <bool kFault>
__global__ void waited_by_another_thread(const float*, float* y) {
  if (!kFault || threadIdx.x == 0) {
    dependency_wait();
  }
  __syncthreads();
  y[2 * kThreads + threadIdx.x] = y[kThreads + threadIdx.x];
}

// Though it touches nothing of theirs: who waits for it takes them to be over.
template <bool kFault>
__global__ void missing_dependency_wait(const float* x, float* y) {
  y[2 * kThreads + threadIdx.x] = x[threadIdx.x];
  if (!kFault && threadIdx.x == 5) {
    dependency_wait();
  }
}

// Fault: the kernel between lets its dependents go while the one that writes y[1] may still run.
template <bool kFault>
__global__ void let_dependents_go(const float*, float*) {
  if (kFault) {
    launch_dependents();
  }
  dependency_wait();
  launch_dependents();
}

template <bool kFault>
__global__ void dependents_let_go_before_wait(const float*, float* y) {
  y[2 * kThreads + threadIdx.x] = y[kThreads + threadIdx.x];
  dependency_wait();
}

template <auto... kernels>
int launch_behind_others(const float* x, float* y) {
  int error = launch<first_row>(1, kThreads, 0, nullptr, x, y);
  error |= launch<second_row>(1, kThreads, 0, nullptr, x, y);
  return (error | ... | launch_early<90, kernels>(1, kThreads, 0, nullptr, x, y));
}

// ---------------------------------------------------------------- launches that a card refuses

template <bool kFault>
__global__ void nothing(const float*, float*) {}

struct Large {
  char bytes[4096 - 3 * sizeof(void*)];  // fills 4 KB together with the pointers
};

template <bool kFault>
__global__ void parameters(const float*, float*, Large, std::conditional_t<kFault, uint4, char*>) {}

// 2 KB of static memory and a ring of 48 KB: each alone is what a block has without asking, not both.
template <bool kFault>
__global__ void ring_and_places(const float*, float*) {
  ALEXNET_FAST_SHARED(int[512], places);
  places[threadIdx.x] = dynamic_shared()[0] = 0;
}

// launch() as it was: it asks where dynamic memory alone is more than what there is without asking.
template <auto kernel, class... Args>
int launch_asking_too_late(dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  const int error = host_simt::launch<kernel>(grid, block, shared_bytes, args...);
  if (shared_bytes > 48 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  host_simt::expect_allowed<kernel>(block, shared_bytes);
  return error;
}

template <auto kernel>
int launch_nothing(dim3 grid, dim3 block, dim3 cluster = 1) {
  host_simt::run_last_blocks(1);  // the largest grids would take an hour
  return host_simt::run({host_simt::kernel_name(__PRETTY_FUNCTION__), grid, block, 0, 0, [] {},
                         reinterpret_cast<const void*>(kernel), cluster});
}

struct Fault {
  const char* name;
  int blocks;
  int (*run)(bool wrong, int blocks, const float* x, float* y);
};

#define FAULT(name, blocks)                                                                        \
  {#name, blocks, [](bool wrong, int count, const float* x, float* y) {                            \
     return wrong ? launch<name<true>>(dim3(count), dim3(kThreads), kThreads * 4, nullptr, x, y)   \
                  : launch<name<false>>(dim3(count), dim3(kThreads), kThreads * 4, nullptr, x, y); \
   }}

#define EARLY(name)                                                                                   \
  {#name, 3, [](bool wrong, int, const float* x, float* y) {                                          \
     return wrong ? launch_behind_others<name<true>>(x, y) : launch_behind_others<name<false>>(x, y); \
   }}

// What `launch` returns with `kernel` an instantiation of name<wrong>, and sizes that differ by `wrong`.
#define LAUNCH(name, kernel, call) \
  {#name, 1,                       \
   [](bool wrong, int, const float*, float*) { return wrong ? call(kernel<true>, 1) : call(kernel<false>, 0); }}
#define THREADS(kernel, more) launch_nothing<kernel>(1, dim3(32, 32, 1 + more))
#define BLOCK_X(kernel, more) launch_nothing<kernel>(1, 1024 + more)
#define BLOCK_Y(kernel, more) launch_nothing<kernel>(1, dim3(1, 1024 + more))
#define BLOCK_Z(kernel, more) launch_nothing<kernel>(1, dim3(1, 1, 64 + more))
#define GRID_X(kernel, more) launch_nothing<kernel>(2147483647u + more, 1)
#define GRID_Y(kernel, more) launch_nothing<kernel>(dim3(1, 65535 + more), 1)
#define GRID_Z(kernel, more) launch_nothing<kernel>(dim3(1, 1, 65535 + more), 1)
#define NO_BLOCKS(kernel, more) launch_nothing<kernel>(dim3(1, 1 - more), 1)
#define CLUSTER(kernel, more) launch_nothing<kernel>(144, 1, 8 + more)
#define CLUSTERS(kernel, more) launch_nothing<kernel>(16 + more, 1, 8)

const Fault faults[] = {
    LAUNCH(block_threads, nothing, THREADS),
    LAUNCH(block_x, nothing, BLOCK_X),
    LAUNCH(block_y, nothing, BLOCK_Y),
    LAUNCH(block_z, nothing, BLOCK_Z),
    LAUNCH(grid_x, nothing, GRID_X),
    LAUNCH(grid_y, nothing, GRID_Y),
    LAUNCH(grid_z, nothing, GRID_Z),
    LAUNCH(no_blocks, nothing, NO_BLOCKS),
    LAUNCH(cluster_blocks, nothing, CLUSTER),
    LAUNCH(part_of_a_cluster, nothing, CLUSTERS),
    {"parameter_bytes", 1,
     [](bool wrong, int, const float* x, float* y) {
       return wrong ? launch<parameters<true>>(1, 1, 0, nullptr, x, y, Large{}, uint4{})
                    : launch<parameters<false>>(1, 1, 0, nullptr, x, y, Large{}, static_cast<char*>(nullptr));
     }},
    {"asked_too_late", 1,
     [](bool wrong, int, const float* x, float* y) {
       return wrong ? launch_asking_too_late<ring_and_places<true>>(1, 1, 48 * 1024, x, y)
                    : launch<ring_and_places<false>>(1, 1, 48 * 1024, nullptr, x, y);
     }},
    // What a block may ask for, in KB, less the 2 KB that ring_and_places has anyway.
    {"block_shared", 1,
     [](bool wrong, int, const float* x, float* y) {
       const size_t most = 1024 * std::strtoul(std::getenv("BLOCK_SHARED"), nullptr, 10) - 2048;
       return wrong ? launch<ring_and_places<true>>(1, 1, most + 16, nullptr, x, y)
                    : launch<ring_and_places<false>>(1, 1, most, nullptr, x, y);
     }},
    FAULT(missing_barrier, 1),
    FAULT(missing_second_barrier, 1),
    FAULT(missing_syncwarp, 1),
    FAULT(syncwarp_across_warps, 1),
    FAULT(missing_copy_wait, 1),
    FAULT(wait_for_wrong_group, 1),
    FAULT(missing_barrier_after_wait, 1),
    FAULT(copy_over_what_is_read, 1),
    FAULT(read_past_tensor, 1),
    FAULT(read_before_tensor, 1),
    FAULT(write_past_tensor, 1),
    FAULT(copy_past_tensor, 1),
    FAULT(past_shared_array, 1),
    FAULT(past_dynamic_shared, 1),
    FAULT(past_local_array, 1),
    FAULT(overflow, 1),
    FAULT(barrier_in_branch, 1),
    FAULT(barriers_in_two_branches, 1),
    FAULT(return_before_barrier, 1),
    FAULT(shuffle_in_branch, 1),
    FAULT(shuffle_from_ended_lane, 1),
    FAULT(uninitialized_shared, 1),
    FAULT(shared_of_another_block, 4),
    FAULT(uninitialized_output, 1),
    FAULT(misaligned, 1),
    FAULT(misdirected, 1),
    FAULT(blocks_write_one_element, 4),
    FAULT(blocks_read_what_others_write, 4),
    FAULT(mixed_atomics, 1),
    EARLY(read_before_dependency_wait),
    EARLY(write_before_dependency_wait),
    EARLY(waited_by_another_thread),
    EARLY(missing_dependency_wait),
    {"dependents_let_go_before_wait", 3,
     [](bool wrong, int, const float* x, float* y) {
       return wrong ? launch_behind_others<let_dependents_go<true>, dependents_let_go_before_wait<true>>(x, y)
                    : launch_behind_others<let_dependents_go<false>, dependents_let_go_before_wait<false>>(x, y);
     }},
};

}  // namespace

int main(int count, char** arguments) {
  for (const Fault& fault : faults) {
    if (count != 3 || std::strcmp(fault.name, arguments[1]) != 0) {
      continue;
    }
    const bool wrong = std::strcmp(arguments[2], "wrong") == 0;
    // A fault must be seen in the first schedule, whichever it is; a right kernel must pass all of them.
    for (int seed = 0; seed < (wrong ? 1 : 50); ++seed) {
      host_simt::set_seed(seed);
      const size_t bytes = kThreads * sizeof(float);
      float* x = static_cast<float*>(host_simt::allocate("x", bytes, 0, host_simt::Content::defined));
      float* y = static_cast<float*>(host_simt::allocate("y", fault.blocks * bytes, 0, host_simt::Content::undefined));
      for (int i = 0; i < kThreads; ++i) {
        x[i] = static_cast<float>(i);
      }
      if (fault.run(wrong, fault.blocks, x, y) != cudaSuccess) {
        return 3;
      }
      host_simt::free_all();
    }
    return 0;
  }
  std::fprintf(stderr, "usage: faults NAME right|wrong\n");
  return 2;
}
