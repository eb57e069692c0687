// What Hopper's convolutions share (csrc/cuda/sm90): the ring of stages between producer and consumers, and the image
// as bulk copies in im2col mode walk through it.
#pragma once

#include "cuda/common/conv.cuh"
#include "cuda/common/dependent.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/common/wgmma.cuh"

namespace alexnet_fast::cuda::sm90 {

constexpr int kLine = 128;  // bytes of a pixel, or of an output channel, that a copy brings
template <class T>
constexpr int kSlab = kLine / sizeof(T);  // channels in them
constexpr int kConsumers = 2;  // warpgroups that multiply, beside one that asks for copies, unless a tile says more
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kAlignment = 1024;  // of a box that is swizzled
constexpr int kMaxGroups = 4;     // each has a map of its own, so that a slab ends where the group does

// Registers of a thread after the ring has begun; 168 at the start: 128 x 24 + 256 x 240 are as many.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

template <int kStages>
struct Ring {
  Mbarrier full[kStages];   // by the producer's expectation and the copies' bytes
  Mbarrier empty[kStages];  // by each of the consumers' warps
};

template <int kStages>
__device__ __forceinline__ void begin_ring(Ring<kStages>& ring, int consumers = kConsumers) {
  if (threadIdx.x == 0) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(ring.full + stage, 1);
      mbarrier_init(ring.empty + stage, 4 * consumers);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
}

// Where the walk through the image begins for an output pixel: its window's first pixel, perhaps in the padding.
struct FirstPixel {
  int32_t n, h, w;
};

struct Walk {
  Divider image, row;  // output pixels of an image, of a row
  int32_t pad_h, pad_w, dilation_h, dilation_w;

  Walk() = default;
  explicit Walk(const Gather& g)
      : image(g.image),
        row(g.row),
        pad_h(g.pad_h),
        pad_w(g.pad_w),
        dilation_h(g.dilation_h),
        dilation_w(g.dilation_w) {}

  __device__ __forceinline__ FirstPixel first(int32_t pixel) const {
    int64_t within, q;
    const int32_t n = static_cast<int32_t>(image.divide(pixel, within));
    const int32_t p = static_cast<int32_t>(row.divide(within, q));
    return {n, p - pad_h, static_cast<int32_t>(q) - pad_w};
  }

  // A slab of channels from `channel` on of the pixels from `at` on, as the tap (r, s) sees them.
  __device__ __forceinline__ void load(void* to, const TensorMap& map, Mbarrier* barrier, int32_t channel,
                                       const FirstPixel& at, int32_t r, int32_t s) const {
    bulk_load_im2col(to, map, barrier, channel, at.w, at.h, at.n, static_cast<uint16_t>(s * dilation_w),
                     static_cast<uint16_t>(r * dilation_h));
  }
};

inline int32_t channels_of(const Gather& g, DType dtype) {
  return g.chunks * kChunkBytes / static_cast<int32_t>(element_bytes(dtype));
}

// Of what is multiplied, and of what is stored.
inline Elements operand_elements(DType dtype) { return dtype == DType::f32 ? Elements::tf32 : Elements::bits16; }
inline Elements stored_elements(DType dtype) { return dtype == DType::f32 ? Elements::bits32 : Elements::bits16; }

// Whether the maps can say what the convolution reads: stride 1, perhaps after a fold, corners and offsets in their
// ranges.
inline bool walks(const Gather& g, int32_t groups) {
  const auto corner = [](int64_t at) { return at >= -128 && at <= 127; };
  const int64_t spread_h = int64_t{g.kernel_h - 1} * g.dilation_h, spread_w = int64_t{g.kernel_w - 1} * g.dilation_w;
  return groups <= kMaxGroups && (g.stride_h | g.stride_w | g.spread_h | g.spread_w) == 1 &&
         g.pixels <= INT32_MAX - 512 && corner(-int64_t{g.pad_h}) && corner(-int64_t{g.pad_w}) &&
         corner(g.pad_h - spread_h) && corner(g.pad_w - spread_w) && spread_h <= 255 && spread_w <= 255;
}

// A map of x for each group, in whose boxes there are so many pixels.
inline int encode_image(TensorMap (&maps)[kMaxGroups], DType dtype, const Gather& g, int32_t groups, const void* x,
                        int pixels) {
  const uint64_t channels = channels_of(g, dtype), bytes = element_bytes(dtype), images = g.pixels / g.image.divisor;
  const int32_t lower[] = {-g.pad_w, -g.pad_h};
  const int32_t upper[] = {g.pad_w - (g.kernel_w - 1) * g.dilation_w, g.pad_h - (g.kernel_h - 1) * g.dilation_h};
  for (int group = 0; group < groups; ++group) {
    const int error =
        encode_im2col(maps[group], operand_elements(dtype), static_cast<const char*>(x) + group * channels * bytes,
                      {channels, uint64_t(g.width), uint64_t(g.height), images},
                      {uint64_t(g.pixel_stride), uint64_t(g.line_stride), uint64_t(g.image_stride)}, lower, upper,
                      kLine / bytes, pixels);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace alexnet_fast::cuda::sm90
