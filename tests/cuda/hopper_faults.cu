// Hopper's words with one fault each, and without:  hopper_faults NAME right|wrong
//
// A small convolution as csrc/cuda/sm90 makes it, of 64 pixels x 64 output channels a block and 64 input channels a
// stage, a product over pixels as the weight's gradient is, and two taps of a row with the weights in registers, as the
// first convolution has them. The right ones must come out right under many schedules, the wrong ones must be reported,
// or at least give a wrong result.
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/common/tma.cuh"
#include "cuda/common/vector.cuh"
#include "cuda/common/wgmma.cuh"

using namespace alexnet_fast::cuda;

namespace {

enum class Fault {
  none,
  missing_expect,
  expects_too_much,
  wrong_phase,
  missing_wait,
  missing_free_wait,
  released_too_early,
  released_by_one_warp,
  arrival_missing,
  arrival_too_many,
  missing_init_fence,
  missing_init_barrier,
  missing_proxy_fence,
  missing_syncwarp,
  staging_overwritten,
  missing_store_wait,
  missing_product_fence,
  missing_product_wait,
  wrong_depth_step,
  wrong_swizzle,
  wrong_corner,
  wrong_offset,
  misaligned_stage,
  lanes_differ,
  register_overwritten,
  register_missing_fence,
  row_missing_wait,
  wrong_leading,
  wrong_stride,
  wrong_tap,
  wrong_layout,
  wrong_axes,
};

constexpr int kImages = 2, kSide = 6, kChannels = 64, kTaps = 9, kPixels = kImages * kSide * kSide;
constexpr int kStages = 2, kBox = 64 * 128, kStage = 2 * kBox, kThreads = 160;

constexpr int kRead = 65, kPlane = kRead * 16;  // of a row: pixels, and their first or second eight channels

struct Arguments {
  TensorMap x, weight, y, row;
  const f16* of_weight;
  f16* of_y;
};

template <Fault kFault>
__global__ void small_convolution(const ALEXNET_FAST_GRID_CONSTANT Arguments args) {
  constexpr auto is = [](Fault fault) { return kFault == fault; };
  unsigned char* const ring = dynamic_shared_at<1024>() + (is(Fault::misaligned_stage) ? 64 : 0);
  ALEXNET_FAST_SHARED(Mbarrier[kStages], full);
  ALEXNET_FAST_SHARED(Mbarrier[kStages], empty);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(empty + stage, is(Fault::arrival_missing) ? 5 : is(Fault::released_by_one_warp) ? 1 : 4);
    }
    if (!is(Fault::missing_init_fence)) {
      mbarrier_init_fence();
    }
  }
  if (!is(Fault::missing_init_barrier)) {
    __syncthreads();
  }
  const int first = blockIdx.x * 64, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  RingPlace<kStages> place;
  if (warp == 4) {
    if (lane == 0) {
      const int n = first / (kSide * kSide), p = first / kSide % kSide, q = first % kSide;
      for (int tap = 0; tap < kTaps; ++tap) {
        if (!is(Fault::missing_free_wait)) {
          mbarrier_wait(empty + place.stage, place.parity ^ 1);
        }
        if (is(Fault::missing_expect)) {
          mbarrier_arrive(full + place.stage);
        } else {
          mbarrier_expect(full + place.stage, kStage + (is(Fault::expects_too_much) ? 128 : 0));
        }
        unsigned char* stage = ring + place.stage * kStage;
        const int r = tap / 3, s = tap % 3 + (is(Fault::wrong_offset) ? 1 : 0);
        bulk_load_im2col(stage, args.x, full + place.stage, 0, q - 1, p - 1, n, s, r);
        bulk_load(stage + kBox, args.weight, full + place.stage, {0, tap, 0, 0});
        place.advance();
      }
    }
    return;
  }
  float sums[32];
  for (int tap = 0; tap < kTaps; ++tap) {
    if (!is(Fault::missing_wait)) {
      mbarrier_wait(full + place.stage, place.parity ^ is(Fault::wrong_phase));
    }
    const uint64_t a = matrix_descriptor(ring + place.stage * kStage) + (is(Fault::lanes_differ) && lane == 9 ? 2 : 0);
    const uint64_t b = matrix_descriptor(ring + place.stage * kStage + kBox);
    if (!is(Fault::missing_product_fence)) {
      wgmma_fence();
    }
    for (int step = 0; step < 4; ++step) {
      const uint64_t on = step * (is(Fault::wrong_depth_step) ? 4 : kDepthStep<Major::depth>);
      wgmma<f16, 64>(sums, a + on, b + on, tap + step);
    }
    wgmma_commit();
    if (!is(Fault::released_too_early) && !is(Fault::missing_product_wait)) {
      wgmma_wait<0>();
    }
    const bool releases = is(Fault::released_by_one_warp) ? threadIdx.x == 0 : lane == 0;
    if (releases || (is(Fault::arrival_too_many) && lane == 1 && warp == 0)) {
      mbarrier_arrive(empty + place.stage);
    }
    if (is(Fault::released_too_early)) {
      wgmma_wait<0>();
    }
    place.advance();
  }
  wgmma_done(sums);
  // Two pieces through one place: both halves of the output channels would do, and the same one twice is simpler.
  unsigned char* const piece = ring + kStages * kStage + warp * 16 * 128;
  for (int turn = 0; turn < 2; ++turn) {
    if (turn == 1 && !is(Fault::staging_overwritten)) {
      if (lane == 0) {
        bulk_wait_read<0>();
      }
      __syncwarp();
    }
    for (int i = 0; i < 32; i += 2) {
      const float pair[2] = {sums[i], sums[i + 1]};
      const int row = lane / 4 + i / 2 % 2 * 8, chunk = i / 4 ^ row % 8;
      store_shared(reinterpret_cast<f16*>(piece + row * 128 + chunk * 16) + lane % 4 * 2, pack<f16>(pair));
    }
    if (!is(Fault::missing_proxy_fence)) {
      async_proxy_fence();
    }
    if (!is(Fault::missing_syncwarp)) {
      __syncwarp();
    }
    if (lane == 0) {
      bulk_store(args.y, piece, {0, 0, first + warp * 16});
      bulk_commit();
    }
  }
  if (lane == 0 && !is(Fault::missing_store_wait)) {
    bulk_wait_read<0>();
  }
}

// y[k][c] = sum over 64 pixels of x[pixel][k] x[pixel][c]: both operands with a line for each place in depth.
template <Fault kFault>
__global__ void product_over_pixels(const ALEXNET_FAST_GRID_CONSTANT Arguments args) {
  unsigned char* const tile = dynamic_shared_at<1024>();
  ALEXNET_FAST_SHARED(Mbarrier[1], full);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
    mbarrier_expect(full, kBox);
    bulk_load_im2col(tile, args.x, full, 0, -1, -1, 0, 1, 1);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  float sums[32];
  const uint64_t both = matrix_descriptor(tile);
  wgmma_fence();
  for (int step = 0; step < 4; ++step) {
    const uint64_t on = step * kDepthStep < kFault == Fault::none ? Major::pixels : Major::depth > ;
    wgmma<f16, 64, Major::pixels, Major::pixels>(sums, both + on, both + on, step);
  }
  wgmma_commit();
  wgmma_wait<0>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char* const piece = tile + kBox + warp * 16 * 128;
  for (int i = 0; i < 32; i += 2) {
    const float pair[2] = {sums[i], sums[i + 1]};
    const int row = lane / 4 + i / 2 % 2 * 8, chunk = i / 4 ^ row % 8;
    store_shared(reinterpret_cast<f16*>(piece + row * 128 + chunk * 16) + lane % 4 * 2, pack<f16>(pair));
  }
  async_proxy_fence();
  __syncwarp();
  if (lane == 0) {
    bulk_store(args.y, piece, {0, 0, warp * 16});
    bulk_commit();
    bulk_wait_read<0>();
  }
}

// y[k][p] = sum over two taps s and 16 channels c of weight[k][s][c] x[p - 1 + s][c]: the pixels are one row, and
// before them there is nothing.
template <Fault kFault>
__global__ void product_of_registers(const ALEXNET_FAST_GRID_CONSTANT Arguments args) {
  constexpr auto is = [](Fault fault) { return kFault == fault; };
  unsigned char* const row = dynamic_shared_at<1024>();
  ALEXNET_FAST_SHARED(Mbarrier[1], full);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_expect(full, 2 * kPlane);
    bulk_load(row, args.row, full, {0, -1, 0, 0, 0});
  }
  if (!is(Fault::row_missing_wait)) {
    mbarrier_wait(full, 0);
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto weight = [&](int tap, int i) {
    const int k = 16 * warp + lane / 4 + i % 2 * 8, c = lane % 4 * 2 + i / 2 * 8;
    return load<2>(args.of_weight + (k * kTaps + tap) * kChannels + c).words[0];
  };
  uint32_t a[2][4];
  for (int i = 0; i < 4; ++i) {
    a[0][i] = weight(0, i);
    a[1][i] = weight(1, i);
  }
  float sums[32];
  const uint64_t b = is(Fault::wrong_layout) ? matrix_descriptor(row)
                                             : plain_descriptor(row, is(Fault::wrong_leading) ? 128 : kPlane,
                                                                is(Fault::wrong_stride) ? 256 : 128);
  if (!is(Fault::register_missing_fence)) {
    wgmma_fence();
  }
  for (int tap = 0; tap < 2; ++tap) {
    uint32_t (&of_tap)[4] = a[is(Fault::register_overwritten) ? 0 : tap];
    for (int i = 0; tap == 1 && is(Fault::register_overwritten) && i < 4; ++i) {
      of_tap[i] = a[1][i];
    }
    wgmma<f16, 64>(sums, of_tap, b + tap * (is(Fault::wrong_tap) ? 2 : 1), tap);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_done(sums);
  for (int i = 0; i < 32; i += 2) {
    const float pair[2] = {sums[i], sums[i + 1]};
    const int k = 16 * warp + lane / 4 + i / 2 % 2 * 8;
    store(args.of_y + k * 64 + i / 4 * 8 + lane % 4 * 2, pack<f16>(pair));
  }
}

template <Fault kFault>
__global__ void registers() {
  if (threadIdx.x < 128) {
    fewer_registers<kFault == Fault::none ? 24 : 32>();
  } else {
    more_registers<240>();
  }
}

// ---------------------------------------------------------------- the host's part

struct Tensors {
  f16 *x, *weight, *y;
};

f16 whole(int value) {
  f16 result;
  from_float(static_cast<float>(value), result);
  return result;
}

int encode(const Tensors& t, Fault fault, Arguments& args) {
  constexpr uint64_t kWeight = 64 * 2, kLine = kSide * kWeight;
  const int32_t lower[] = {-1, -1}, upper[] = {fault == Fault::wrong_corner ? 0 : -1, -1};
  int error = encode_im2col(args.x, Elements::bits16, t.x, {kChannels, kSide, kSide, kImages},
                            {kWeight, kLine, kSide * kLine}, lower, upper, 64, 64);
  error |= encode_tiled<4>(args.weight, Elements::bits16, t.weight, {kChannels, kTaps, 64, 1},
                           {kWeight, kTaps * kWeight, 64 * kTaps * kWeight}, {64, 1, 64, 1});
  error |= encode_tiled<3>(args.y, Elements::bits16, t.y, {64, 1, kPixels}, {kWeight, kWeight}, {64, 1, 16});
  if (fault == Fault::wrong_swizzle) {
    args.x.swizzle = 64;
  }
  const bool turned = fault == Fault::wrong_axes;
  error |= encode_tiled<5, Swizzle::none>(
      args.row, Elements::bits16, t.x, {8, turned ? kChannels / 8u : kPixels, turned ? kPixels : kChannels / 8u, 1, 1},
      {turned ? 16 : kWeight, turned ? kWeight : 16, kWeight, kWeight},
      {8, turned ? 2u : kRead, turned ? uint32_t{kRead} : 2, 1, 1});
  args.of_weight = t.weight;
  args.of_y = t.y;
  return error;
}

float pixel(const Tensors& t, int n, int h, int w, int c) {
  const bool inside = h >= 0 && h < kSide && w >= 0 && w < kSide;
  return inside ? to_float(t.x[((n * kSide + h) * kSide + w) * kChannels + c]) : 0;
}

float weight(const Tensors& t, int k, int tap, int c) { return to_float(t.weight[(k * kTaps + tap) * kChannels + c]); }

float of_convolution(const Tensors& t, int row, int column) {
  float sum = 0;
  const int n = row / (kSide * kSide), p = row / kSide % kSide, q = row % kSide;
  for (int tap = 0; tap < kTaps; ++tap) {
    for (int c = 0; c < kChannels; ++c) {
      sum += pixel(t, n, p + tap / 3 - 1, q + tap % 3 - 1, c) * weight(t, column, tap, c);
    }
  }
  return sum;
}

float of_product_over_pixels(const Tensors& t, int row, int column) {
  float sum = 0;
  for (int i = 0; i < 64; ++i) {
    sum += to_float(t.x[i * kChannels + row]) * to_float(t.x[i * kChannels + column]);
  }
  return sum;
}

float of_product_of_registers(const Tensors& t, int row, int column) {
  float sum = 0;
  for (int tap = column == 0; tap < 2; ++tap) {
    for (int c = 0; c < 16; ++c) {
      sum += to_float(t.x[(column - 1 + tap) * kChannels + c]) * weight(t, row, tap, c);
    }
  }
  return sum;
}

struct Case {
  const char* name;
  int rows;  // of the result; 0 where there is none
  float (*expected)(const Tensors& t, int row, int column);
  int (*run)(const Arguments& args, bool wrong);
  Fault fault;
};

template <Fault kFault>
int convolve(const Arguments& args, bool wrong) {
  constexpr int kBlocks = (kPixels + 63) / 64, kShared = kStages * kStage + 64 * 128 + 1024 + 64;
  return wrong ? launch_on<90, small_convolution<kFault>>(kBlocks, kThreads, kShared, nullptr, args)
               : launch_on<90, small_convolution<Fault::none>>(kBlocks, kThreads, kShared, nullptr, args);
}

int multiply(const Arguments& args, bool wrong) {
  constexpr int kShared = 2 * kBox + 1024;
  return wrong ? launch_on<90, product_over_pixels<Fault::wrong_depth_step>>(1, 128, kShared, nullptr, args)
               : launch_on<90, product_over_pixels<Fault::none>>(1, 128, kShared, nullptr, args);
}

template <Fault kFault>
int multiply_registers(const Arguments& args, bool wrong) {
  constexpr int kShared = 3 * 1024 + 1024;
  return wrong ? launch_on<90, product_of_registers<kFault>>(1, 128, kShared, nullptr, args)
               : launch_on<90, product_of_registers<Fault::none>>(1, 128, kShared, nullptr, args);
}

int hand_out(const Arguments&, bool wrong) {
  return wrong ? launch_on<90, registers<Fault::wrong_phase>>(1, 384, 0, nullptr)
               : launch_on<90, registers<Fault::none>>(1, 384, 0, nullptr);
}

#define CONVOLUTION(name) {#name, kPixels, of_convolution, convolve<Fault::name>, Fault::name}
#define OF_REGISTERS(name) {#name, 64, of_product_of_registers, multiply_registers<Fault::name>, Fault::name}

const Case cases[] = {
    CONVOLUTION(missing_expect),
    CONVOLUTION(expects_too_much),
    CONVOLUTION(wrong_phase),
    CONVOLUTION(missing_wait),
    CONVOLUTION(missing_free_wait),
    CONVOLUTION(released_too_early),
    CONVOLUTION(released_by_one_warp),
    CONVOLUTION(arrival_missing),
    CONVOLUTION(arrival_too_many),
    CONVOLUTION(missing_init_fence),
    CONVOLUTION(missing_init_barrier),
    CONVOLUTION(missing_proxy_fence),
    CONVOLUTION(missing_syncwarp),
    CONVOLUTION(staging_overwritten),
    CONVOLUTION(missing_store_wait),
    CONVOLUTION(missing_product_fence),
    CONVOLUTION(missing_product_wait),
    CONVOLUTION(wrong_depth_step),
    CONVOLUTION(wrong_swizzle),
    CONVOLUTION(wrong_corner),
    CONVOLUTION(wrong_offset),
    CONVOLUTION(misaligned_stage),
    CONVOLUTION(lanes_differ),
    OF_REGISTERS(register_overwritten),
    OF_REGISTERS(register_missing_fence),
    OF_REGISTERS(row_missing_wait),
    OF_REGISTERS(wrong_leading),
    OF_REGISTERS(wrong_stride),
    OF_REGISTERS(wrong_tap),
    OF_REGISTERS(wrong_layout),
    OF_REGISTERS(wrong_axes),
    {"product_over_pixels", 64, of_product_over_pixels, multiply, Fault::none},
    {"registers", 0, nullptr, hand_out, Fault::none},
};

}  // namespace

int main(int count, char** arguments) {
  for (const Case& one : cases) {
    if (count != 3 || std::strcmp(one.name, arguments[1]) != 0) {
      continue;
    }
    const bool wrong = std::strcmp(arguments[2], "wrong") == 0;
    for (int seed = 0; seed < (wrong ? 1 : 5); ++seed) {
      host_simt::set_seed(seed);
      constexpr size_t kX = kPixels * kChannels, kWeights = 64 * kTaps * kChannels;
      const auto tensor = [](const char* name, size_t elements, host_simt::Content content) {
        return static_cast<f16*>(host_simt::allocate(name, elements * 2, 0, content));
      };
      const Tensors t{tensor("x", kX, host_simt::Content::defined),
                      tensor("weight", kWeights, host_simt::Content::defined),
                      tensor("y", kX, host_simt::Content::undefined)};
      for (size_t i = 0; i < kX; ++i) {
        t.x[i] = whole(static_cast<int>(i * 2654435761u >> 7) % 3 - 1);
      }
      for (size_t i = 0; i < kWeights; ++i) {
        t.weight[i] = whole(static_cast<int>(i * 2246822519u >> 9) % 3 - 1);
      }
      Arguments args{};
      if (encode(t, wrong ? one.fault : Fault::none, args) != 0 || one.run(args, wrong) != cudaSuccess) {
        return 3;
      }
      for (int row = 0; row < one.rows; ++row) {
        for (int column = 0; column < 64; ++column) {
          const float is = to_float(t.y[row * 64 + column]);
          const float wanted = one.expected(t, row, column);
          if (!(is == wanted)) {
            host_simt::fail("wrong result", "row %d, column %d is %g, expected %g", row, column, is, wanted);
          }
        }
      }
      host_simt::free_all();
    }
    return 0;
  }
  std::fprintf(stderr, "usage: hopper_faults NAME right|wrong\n");
  return 2;
}
