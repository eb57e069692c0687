// What csrc/bindings need beside the launchers where no GPU is: see bindings.py.
#include "host_simt/host_simt.h"
#include "launchers.h"

namespace alexnet_fast {

namespace cuda {
const char* error_string(int error) {
  return error == 0 ? "no error" : error == cudaErrorNotSupported ? "operation not supported" : "invalid argument";
}
}  // namespace cuda

namespace cpu {
// Named by bindings that choose between the two kinds of kernels, and never called.
const Kernels& kernels() {
  static const Kernels none{};
  return none;
}
}  // namespace cpu

}  // namespace alexnet_fast
