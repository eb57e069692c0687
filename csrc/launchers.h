// Every native entry point, one line each: the contents page of csrc/.
//
// CPU kernels are compiled once per instruction set (csrc/cpu/dispatch.cpp picks one at run time). A kernel cuts its
// work into `items` independent pieces; the number depends on the shape alone, so results do not depend on the number
// of threads.
//
// CUDA launchers enqueue on `stream` and return a cudaError_t as int; they never synchronize or allocate.
#pragma once

#include "params.h"

namespace alexnet_fast {

#define ALEXNET_FAST_CPU_KERNELS(X)    \
  X(lrn_fwd, LrnParams)                \
  X(lrn_bwd, LrnParams)                \
  X(max_pool_fwd, PoolParams)          \
  X(max_pool_bwd, PoolParams)          \
  X(epilogue_fwd, EpilogueParams)      \
  X(epilogue_bwd, EpilogueParams)      \
  X(augment_fwd, AugmentParams)        \
  X(lpips_layer_fwd, LpipsParams)      \
  X(lpips_layer_bwd, LpipsParams)      \
  X(linear_int8_fwd, LinearInt8Params) \
  X(sgd, SgdParams)

namespace cpu {

template <class Params>
struct Kernel {
  int64_t (*items)(const Params&);
  void (*run)(const Params&, int64_t begin, int64_t end);
};

struct Kernels {
  const char* isa;
#define X(name, Params) Kernel<Params> name;
  ALEXNET_FAST_CPU_KERNELS(X)
#undef X
};

// The table for the widest instruction set this processor has, or for the one ALEXNET_FAST_ISA names.
const Kernels& kernels();

}  // namespace cpu

namespace cuda {

const char* error_string(int error);
const char* build();  // "13.0 sm_80 sm_86 …": nvcc's version and the architectures it compiled for

// One line a kernel file. Tests build their table of launchers from this list.
#define ALEXNET_FAST_CUDA_LAUNCHERS(X) \
  X(lrn_fwd, LrnParams)                \
  X(lrn_bwd, LrnParams)                \
  X(max_pool_fwd, PoolParams)          \
  X(max_pool_bwd, PoolParams)          \
  X(epilogue_fwd, EpilogueParams)      \
  X(epilogue_bwd, EpilogueParams)      \
  X(conv_prepare, ConvParams)          \
  X(conv_relu_fwd, ConvParams)         \
  X(conv_relu_bwd, ConvParams)         \
  X(conv_stage_fwd, StageParams)       \
  X(lpips_layer_fwd, LpipsParams)      \
  X(lpips_layer_bwd, LpipsParams)      \
  X(linear_int8_fwd, LinearInt8Params) \
  X(linear_relu_fwd, LinearParams)

#define X(name, Params) int name(const Params& params, void* stream);
ALEXNET_FAST_CUDA_LAUNCHERS(X)
#undef X

// The same for one architecture: csrc/cuda/sm90 is for compute capability 9.0. On other cards, and for what they do not
// cover, these launchers return cudaErrorNotSupported and write no output. The forward one has enqueued nothing then;
// the backward one may have enqueued work on its workspace.
#define ALEXNET_FAST_CUDA_SM90_LAUNCHERS(X) \
  X(conv_relu_fwd, ConvParams)              \
  X(conv_relu_bwd, ConvParams)              \
  X(conv_stage_fwd, StageParams)

namespace sm90 {
#define X(name, Params)                         \
  int name(const Params& params, void* stream); \
  int64_t name##_workspace_bytes(const Params& params);
ALEXNET_FAST_CUDA_SM90_LAUNCHERS(X)
#undef X
}  // namespace sm90

// name##_workspace_bytes: how many bytes the launcher needs at Params::workspace. They depend on shapes and on the
// alignment of the other pointers. conv_prepare has its result there: the weight
// as forward launchers read it where it is `prepared`.
#define ALEXNET_FAST_CUDA_WORKSPACES(X) \
  X(conv_prepare, ConvParams)           \
  X(conv_relu_fwd, ConvParams)          \
  X(conv_relu_bwd, ConvParams)          \
  X(conv_stage_fwd, StageParams)

#define X(name, Params) int64_t name##_workspace_bytes(const Params& params);
ALEXNET_FAST_CUDA_WORKSPACES(X)
#undef X

// Rows of EpilogueParams::db_partial and of LpipsParams::partial, which likewise depend on shapes and alignment.
int64_t epilogue_bwd_partial_rows(const EpilogueParams& params);
int64_t lpips_layer_bwd_partial_rows(const LpipsParams& params);
// Sums of a pair in the forward launcher's LpipsParams::partial; on CPUs lpips_units().
int64_t lpips_layer_fwd_partial_units(const LpipsParams& params);

}  // namespace cuda
}  // namespace alexnet_fast
