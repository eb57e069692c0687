// Runs launchers on cases from a file:  runner CASES RESULTS
//
// A case names a launcher, holds the bytes of its params struct, and lists the tensors that the struct's pointers name.
// Each tensor gets memory of its exact size; outputs start as 0xff bytes. A case runs under `schedules` seeds, whose
// outputs must agree to the last bit. Everything is little-endian and written by tests/cuda/host_build.py:
//
//   case    u32 name bytes, name; u32 struct bytes, struct; u64 first seed; u32 schedules; u32 tensors; tensor...
//   tensor  u32 offset of the pointer in the struct; u32 role; u64 bytes; u64 offset from 256-byte alignment; an
//   input's data
//           role 0: input. 1: output. 2: workspace, of the launcher's own size: comes last, and is not given back
//   result  i32 cudaError; i64 bytes read, written (one schedule); the data of every output
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "host_simt/host_simt.h"
#include "launchers.h"

namespace {

struct Launcher {
  const char* name;
  size_t params_bytes;
  int (*run)(const void* params, void* stream);
};

#define X(name, Params)                                                                          \
  {#name, sizeof(alexnet_fast::Params), [](const void* params, void* stream) {                   \
     return alexnet_fast::cuda::name(*static_cast<const alexnet_fast::Params*>(params), stream); \
   }},
#define Y(name, Params)                                                                                \
  {"sm90::" #name, sizeof(alexnet_fast::Params), [](const void* params, void* stream) {                \
     return alexnet_fast::cuda::sm90::name(*static_cast<const alexnet_fast::Params*>(params), stream); \
   }},
const Launcher launchers[] = {ALEXNET_FAST_CUDA_LAUNCHERS(X) ALEXNET_FAST_CUDA_SM90_LAUNCHERS(Y)};
#undef X
#undef Y

struct Workspace {
  const char* name;
  int64_t (*bytes)(const void* params);
};

#define X(name, Params)                                                                                    \
  {#name, [](const void* params) {                                                                         \
     return alexnet_fast::cuda::name##_workspace_bytes(*static_cast<const alexnet_fast::Params*>(params)); \
   }},
#define Y(name, Params)                                                                                          \
  {"sm90::" #name, [](const void* params) {                                                                      \
     return alexnet_fast::cuda::sm90::name##_workspace_bytes(*static_cast<const alexnet_fast::Params*>(params)); \
   }},
const Workspace workspaces[] = {
    ALEXNET_FAST_CUDA_WORKSPACES(X) ALEXNET_FAST_CUDA_SM90_LAUNCHERS(Y)  //
    {"epilogue_bwd",
     [](const void* params) {
       const auto& p = *static_cast<const alexnet_fast::EpilogueParams*>(params);
       return alexnet_fast::cuda::epilogue_bwd_partial_rows(p) * p.channels * int64_t{sizeof(float)};
     }},
    {"lpips_layer_fwd",
     [](const void* params) {
       const auto& p = *static_cast<const alexnet_fast::LpipsParams*>(params);
       return p.pairs * alexnet_fast::cuda::lpips_layer_fwd_partial_units(p) * int64_t{sizeof(float)};
     }},
    {"lpips_layer_bwd",
     [](const void* params) {
       const auto& p = *static_cast<const alexnet_fast::LpipsParams*>(params);
       return alexnet_fast::cuda::lpips_layer_bwd_partial_rows(p) * p.channels * int64_t{sizeof(float)};
     }},
};
#undef X
#undef Y

constexpr uint32_t kInput = 0, kOutput = 1, kWorkspace = 2;

struct Tensor {
  uint32_t pointer_offset, role;
  uint64_t bytes, misalignment;
  std::vector<char> data;
};

template <class T>
bool read(std::ifstream& file, T& value) {
  return static_cast<bool>(file.read(reinterpret_cast<char*>(&value), sizeof value));
}

template <class T>
void write(std::ofstream& file, const T& value) {
  file.write(reinterpret_cast<const char*>(&value), sizeof value);
}

std::string read_bytes(std::ifstream& file, size_t bytes) {
  std::string text(bytes, '\0');
  file.read(text.data(), bytes);
  return text;
}

[[noreturn]] void die(const std::string& text) {
  std::fprintf(stderr, "runner: %s\n", text.c_str());
  std::exit(2);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    die("usage: runner CASES RESULTS");
  }
  std::ifstream cases(arguments[1], std::ios::binary);
  std::ofstream results(arguments[2], std::ios::binary);
  if (!cases || !results) {
    die("cannot open the files");
  }
  uint32_t length;
  for (int number = 0; read(cases, length); ++number) {
    const std::string name = read_bytes(cases, length);
    const Launcher* launcher = nullptr;
    for (const Launcher& known : launchers) {
      if (name == known.name) {
        launcher = &known;
      }
    }
    read(cases, length);
    std::string params = read_bytes(cases, length);
    if (launcher == nullptr || launcher->params_bytes != length) {
      die(launcher == nullptr ? "no launcher " + name
                              : name + ": its params have " + std::to_string(launcher->params_bytes) + " bytes, not " +
                                    std::to_string(length));
    }
    uint64_t seed;
    uint32_t schedules, tensor_count;
    read(cases, seed);
    read(cases, schedules);
    read(cases, tensor_count);
    std::vector<Tensor> tensors(tensor_count);
    for (Tensor& tensor : tensors) {
      read(cases, tensor.pointer_offset);
      read(cases, tensor.role);
      read(cases, tensor.bytes);
      read(cases, tensor.misalignment);
      tensor.data.assign(tensor.bytes, '\xff');
      if (tensor.role == kInput) {
        cases.read(tensor.data.data(), tensor.bytes);
      }
    }
    if (!cases) {
      die("case " + std::to_string(number) + " is cut off");
    }
    std::fprintf(stderr, "runner: case %d, %s\n", number, name.c_str());
    std::vector<std::string> outputs(tensor_count);
    int error = cudaSuccess;
    host_simt::Traffic traffic{};
    for (uint32_t schedule = 0; schedule < schedules; ++schedule) {
      host_simt::set_seed(seed + schedule);
      std::vector<char*> memory(tensor_count);
      // A params struct as its type wants it aligned.
      std::vector<uint64_t> aligned((params.size() + 7) / 8);
      std::memcpy(aligned.data(), params.data(), params.size());
      for (uint32_t i = 0; i < tensor_count; ++i) {
        Tensor& tensor = tensors[i];
        if (tensor.role == kWorkspace) {
          for (const Workspace& workspace : workspaces) {
            if (name == workspace.name) {
              tensor.bytes = workspace.bytes(aligned.data());
            }
          }
          tensor.data.assign(tensor.bytes, '\xff');
        }
        constexpr const char* kNames[] = {"input", "output", "workspace"};
        memory[i] = static_cast<char*>(
            host_simt::allocate(kNames[tensor.role], tensor.bytes, tensor.misalignment,
                                tensor.role == kInput ? host_simt::Content::defined : host_simt::Content::undefined));
        std::copy(tensor.data.begin(), tensor.data.end(), memory[i]);
        std::memcpy(reinterpret_cast<char*>(aligned.data()) + tensor.pointer_offset, &memory[i], sizeof memory[i]);
      }
      host_simt::take_traffic();
      error = launcher->run(aligned.data(), nullptr);
      traffic = host_simt::take_traffic();
      for (uint32_t i = 0; i < tensor_count; ++i) {
        if (tensors[i].role != kOutput) {
          continue;
        }
        const std::string output(memory[i], tensors[i].bytes);
        if (schedule > 0 && output != outputs[i]) {
          die("case " + std::to_string(number) + ": seeds " + std::to_string(seed) + " and " +
              std::to_string(seed + schedule) + " disagree in the pointer at " +
              std::to_string(tensors[i].pointer_offset));
        }
        outputs[i] = output;
      }
      host_simt::free_all();
    }
    write(results, error);
    write(results, traffic.read);
    write(results, traffic.written);
    for (const std::string& output : outputs) {
      results.write(output.data(), output.size());
    }
  }
}
