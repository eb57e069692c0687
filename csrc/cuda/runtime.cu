// What the bindings ask about CUDA itself, so that they need neither the toolkit's headers nor its version.
#include <cuda_runtime.h>

#include "launchers.h"

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

namespace alexnet_fast::cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

const char* build() {
  return TEXT(__CUDACC_VER_MAJOR__) "." TEXT(__CUDACC_VER_MINOR__) " for " ALEXNET_FAST_ARCHITECTURES;
}

}  // namespace alexnet_fast::cuda
