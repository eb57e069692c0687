// Whether a card would accept a launch. See host_simt.h for the model, limits.h for the numbers.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>
#include <string>

#include "host_simt/limits.h"
#include "host_simt/state.h"

namespace host_simt {
namespace {

struct Architecture {
  int number;
  int64_t block_shared;  // bytes
};

#define X(number, threads, blocks, shared, block_shared) {number, block_shared * 1024},
constexpr Architecture architectures[] = {HOST_SIMT_ARCHITECTURES(X)};
#undef X

int from_environment(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? 0 : std::atoi(text);
}

int architecture_now = from_environment("HOST_SIMT_ARCHITECTURE");

std::map<const void*, size_t> static_bytes, allowed_bytes;  // by the kernel's address

[[noreturn]] void refuse(std::string_view kernel, dim3 block, const std::string& what) {
  fail("launch", "%.*s, blocks of (%u,%u,%u): %s", static_cast<int>(kernel.size()), kernel.data(), block.x, block.y,
       block.z, what.c_str());
}

void expect(const Launch& launch, const char* what, int64_t value, int64_t most, int64_t least = 1) {
  if (value < least || value > most) {
    refuse(launch.kernel, launch.block,
           std::string(what) + " is " + std::to_string(value) + ", and a card takes " + std::to_string(least) + " to " +
               std::to_string(most));
  }
}

}  // namespace

bool is_only_named(const Launch& launch) {
  static const char* path = std::getenv("HOST_SIMT_LAUNCHES");
  if (path == nullptr) {
    return false;
  }
  static std::set<std::string> noted;
  const std::string line = std::string(launch.kernel) + "\t" +
                           std::to_string(launch.block.x * launch.block.y * launch.block.z) + "\t" +
                           std::to_string(launch.shared_bytes) + "\n";
  if (noted.insert(line).second) {
    std::FILE* file = std::fopen(path, "a");
    if (file == nullptr || std::fputs(line.c_str(), file) < 0 || std::fclose(file) != 0) {
      std::perror("host_simt: HOST_SIMT_LAUNCHES");
      std::exit(1);
    }
  }
  return true;
}

void set_architecture(int architecture) { architecture_now = architecture; }

void expect_launchable(const Launch& launch) {
  const auto [x, y, z] = launch.block;
  expect(launch, "the block's x", x, kBlockX);
  expect(launch, "the block's y", y, kBlockY);
  expect(launch, "the block's z", z, kBlockZ);
  expect(launch, "the number of threads", int64_t{x} * y * z, kBlockThreads);
  expect(launch, "the grid's x", launch.grid.x, kGridX);
  expect(launch, "the grid's y", launch.grid.y, kGridY);
  expect(launch, "the grid's z", launch.grid.z, kGridZ);
  expect(launch, "the size of the parameters in bytes", launch.parameter_bytes, kParameterBytes, 0);
  const dim3 cluster = launch.cluster;
  const int64_t together = int64_t{cluster.x} * cluster.y * cluster.z;
  const bool clusters = std::max(architecture_now, launch.only) >= kClusterFrom;
  expect(launch, "the number of blocks in a cluster", together, clusters ? kClusterBlocks : 1);
  if (launch.grid.x % cluster.x + launch.grid.y % cluster.y + launch.grid.z % cluster.z != 0) {
    refuse(launch.kernel, launch.block, "its grid is no whole number of clusters");
  }
  if (launch.only != 0 && architecture_now != 0 && launch.only != architecture_now) {
    refuse(launch.kernel, launch.block,
           "it is for sm_" + std::to_string(launch.only) + ", not for sm_" + std::to_string(architecture_now));
  }
}

void remember_static(const Launch& launch, size_t bytes) {
  size_t& known = static_bytes[launch.address];
  known = std::max(known, bytes);
}

size_t static_shared_bytes(const void* address) { return static_bytes[address]; }

void allow_dynamic(const void* address, size_t bytes) { allowed_bytes[address] = bytes; }

void expect_allowed(const void* address, std::string_view kernel, dim3 block, size_t dynamic_bytes, int only) {
  const int64_t both = static_bytes[address] + dynamic_bytes;
  const std::string sum = std::to_string(static_bytes[address]) + " static and " + std::to_string(dynamic_bytes) +
                          " dynamic bytes of shared memory are " + std::to_string(both);
  if (both > kSharedBytes && allowed_bytes[address] < dynamic_bytes) {
    refuse(kernel, block,
           sum + ", more than " + std::to_string(kSharedBytes) + ", and " + std::to_string(allowed_bytes[address]) +
               " dynamic were asked for");
  }
  bool found = false;
  for (const Architecture& architecture : architectures) {
    const int counts = only != 0 ? only : architecture_now;
    if (counts != 0 && counts != architecture.number) {
      continue;
    }
    found = true;
    if (both > architecture.block_shared) {
      refuse(kernel, block,
             sum + ", and sm_" + std::to_string(architecture.number) + " has " +
                 std::to_string(architecture.block_shared));
    }
  }
  if (!found) {
    refuse(kernel, block, "nothing is known of an architecture sm_" + std::to_string(architecture_now));
  }
}

}  // namespace host_simt

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int architecture = host_simt::architecture_now == 0 ? 90 : host_simt::architecture_now;
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? architecture / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? architecture % 10
                                                            : 3;
  return cudaSuccess;
}
