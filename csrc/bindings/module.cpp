// alexnet_fast._C: importing it registers the native implementations; it answers questions about the build.
#include <pybind11/pybind11.h>

#include "launchers.h"
#include "run.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of alexnet_fast. Importing this module registers them with torch's dispatcher.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cpu_isa"] = alexnet_fast::cpu::kernels().isa;
        info["stable_abi"] = ALEXNET_FAST_STABLE_ABI;
        info["sources"] = ALEXNET_FAST_SOURCES;
#if ALEXNET_FAST_CUDA
        info["cuda"] = alexnet_fast::cuda::build();
#else
        info["cuda"] = py::none();
#endif
        return info;
      },
      "What this build is: its compiler, the instruction set the CPU kernels take on this processor (cpu_isa), the\n"
      "oldest torch it runs under (stable_abi), the fingerprint of its sources (sources), and nvcc's version with the\n"
      "GPU architectures compiled for, or None where CUDA was left out (cuda).");
  alexnet_fast::define_runs(m);
  alexnet_fast::define_guard(m);
  alexnet_fast::define_forms(m);
}
