// Hopper's own instructions on a CPU: barriers that count bytes, bulk tensor copies, and products of a warpgroup.
// csrc/cuda/common/{mbarrier,tma,wgmma}.cuh say what they do. A card leaves open when they do it; a run here draws
// that:
//
//   bulk load   Its bytes land in pieces, in any order, at moments that are drawn. No thread may touch them before it
//               has waited for the end of the barrier's phase.
//   bulk store  Reads shared memory either when it is issued or when it is waited for.
//   wgmma       Reads its operands at either of these moments too; its sums are NaN until they are waited for. A's
//               registers must still hold then what they held when it was issued.
//
// Descriptors, boxes and swizzles are decoded from the bits that the kernel made. Reports come from the build
// `threads`:
//
//   race           reading what has not landed; writing or loading over what a product or a store may still read, or
//                  what was read by a thread whose release the writer has not waited for; a thread's writes read by a
//                  product or a store without async_proxy_fence(); a block that ends before its copies
//   divergence     a wait that never ends: the wrong phase, arrivals or bytes
//   uninitialized  a barrier that is not initialized, or not shown to the copies that come to it
//   registers      setmaxnreg that hands out more than there is; products without wgmma_fence()
//
// What threads know of each other goes through vector clocks, which run in launches for an architecture alone.
#pragma once

#include "host_simt/host_simt.h"

namespace host_simt {

// ---------------------------------------------------------------- programmatic dependent launch

// A kernel that is launched early may begin while the one before it still runs, and if that one lets its dependents go
// before it has itself waited, while the one before that does, and so on. Here they run one after the other all the
// same. What is checked, by the build `threads` and in every schedule, is each access to global memory by a thread that
// has not waited: it must not read what one of those kernels wrote, nor write what one of them read or wrote (a race).
void next_is_early();  // the launch that follows
void dependency_wait();
void launch_dependents();

// ---------------------------------------------------------------- mbarrier

// Of dynamic shared memory, with the lower ten bits of its place on the host.
uint32_t shared_address(const void* at);

void mbarrier_init(uint64_t* barrier, uint32_t arrivals, Site site = Site::here());
void mbarrier_init_fence();
void mbarrier_expect(uint64_t* barrier, uint32_t bytes, Site site = Site::here());
void mbarrier_arrive(uint64_t* barrier, Site site = Site::here());
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site = Site::here());

// ---------------------------------------------------------------- bulk copies

enum class Elements : uint8_t { bits16, bits32, tf32 };
inline int bytes_of(Elements elements) { return elements == Elements::bits16 ? 2 : 4; }

struct alignas(64) TensorMap {
  const char* tensor = nullptr;
  uint64_t strides[4] = {};
  uint32_t extents[5] = {1, 1, 1, 1, 1};
  uint32_t box[5] = {1, 1, 1, 1, 1};  // of im2col: channels, pixels
  int32_t lower[2] = {}, upper[2] = {};
  uint8_t rank = 0, swizzle = 128;
  bool im2col = false;
  Elements elements = Elements::bits16;
};
static_assert(sizeof(TensorMap) == 128);

int encode_tensor_map(TensorMap& map, Elements elements, const void* tensor, int rank, const uint64_t* extents,
                      const uint64_t* strides);

enum class Swizzle { none, bytes_128 };

template <int kRank, Swizzle kSwizzle = Swizzle::bytes_128>
int encode_tiled(TensorMap& map, Elements elements, const void* tensor, const uint64_t (&extents)[kRank],
                 const uint64_t (&strides)[kRank - 1], const uint32_t (&box)[kRank]) {
  static_assert(kRank <= 5);
  if (const int error = encode_tensor_map(map, elements, tensor, kRank, extents, strides)) {
    return error;
  }
  for (int i = 0; i < kRank; ++i) {
    if (box[i] < 1 || box[i] > 256) {
      return cudaErrorInvalidValue;
    }
    map.box[i] = box[i];
  }
  map.swizzle = kSwizzle == Swizzle::none ? 0 : 128;
  const uint32_t line = box[0] * bytes_of(elements);
  const bool right = map.swizzle == 0 ? line % 16 == 0 : line == 128;  // a line of the swizzle
  return right ? cudaSuccess : cudaErrorInvalidValue;
}

int encode_im2col(TensorMap& map, Elements elements, const void* tensor, const uint64_t (&extents)[4],
                  const uint64_t (&strides)[3], const int32_t (&lower)[2], const int32_t (&upper)[2], uint32_t channels,
                  uint32_t pixels);

void bulk_load(void* to, const TensorMap& map, uint64_t* barrier, const int32_t (&at)[4], Site site = Site::here());
void bulk_load(void* to, const TensorMap& map, uint64_t* barrier, const int32_t (&at)[5], Site site = Site::here());
void bulk_load_im2col(void* to, const TensorMap& map, uint64_t* barrier, int32_t c, int32_t w, int32_t h, int32_t n,
                      uint16_t s, uint16_t r, Site site = Site::here());
void bulk_store(const TensorMap& map, const void* from, const int32_t (&at)[3], Site site = Site::here());
void bulk_commit();
void wait_stores(int still_flying);

template <int kInFlight>
void bulk_wait_read() {
  wait_stores(kInFlight);
}

void async_proxy_fence();

// ---------------------------------------------------------------- products of a warpgroup

// `turn`: the operand's lines are 64 rows (columns) at one place in depth. TF32 takes the upper 19 bits of float32.
void wgmma(Element element, int columns, uint64_t a, bool turn_a, uint64_t b, bool turn_b, float* d, bool accumulate,
           Site site);
void wgmma(Element element, int columns, const uint32_t (&a)[4], uint64_t b, float* d, bool accumulate, Site site);
void wgmma_fence(Site site = Site::here());
void wgmma_commit(Site site = Site::here());
void wait_products(int still_flying, Site site);

template <int kInFlight>
void wgmma_wait(Site site = Site::here()) {
  wait_products(kInFlight, site);
}

void set_registers(int count, Site site);

}  // namespace host_simt
