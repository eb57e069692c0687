// LRN kernels over NCHW planes of any size. A plane of 55 x 55 pixels has an odd number, so each begins elsewhere
// within 16 bytes, and threads that own pixels reach memory by single elements. Here a block takes a tile, a run of
// pixels of some channels, and its warps copy the rows of it, a channel each, by 16 bytes at a time into shared memory.
// There a thread walks through the channels of one pixel, element by element, and leaves its results where its input
// was; the warps copy them out by 16 bytes at a time again, and single elements at a row's ends.
//
// Rows come in as whole aligned vectors: those at the ends bring up to 15 bytes of what lies beside the row, sectors
// that the next tile reads anyway, and no warp waits for a single element before it asks for the next row.
#pragma once

#include "cuda/common/lrn_walk.cuh"
#include "cuda/common/planes.cuh"

namespace alexnet_fast::cuda {

struct PlaneTiles {
  static constexpr int64_t kTileBytes = 40 * 1024;  // two blocks on sm_86, four on sm_80, five on sm_90
  static constexpr int32_t kStep = 8;               // of channels, that a thread goes
  static constexpr int64_t kFewestPixels = 64;      // fewer leave most of a block's threads without one

  int64_t elements, image;  // of the tensor, of an image
  int32_t pixels, group_channels, chunk;
  int32_t width, stride;  // of a tile's rows in shared memory: a row lies within 16 bytes as it does in device memory
  Divider in_group, chunks, in_plane;  // chunks of a group and of an image, tiles of a plane

  static bool take(const LrnShape& shape) {
    return !shape.channels_last && shape.pixels >= kFewestPixels && shape.pixels <= INT32_MAX / 8;
  }

  // rows(chunk): what is in shared memory for so many channels, each of `element` bytes a pixel.
  template <class Rows>
  PlaneTiles(const LrnShape& shape, int64_t groups, int64_t element, int64_t longest_chunk, const Rows& rows)
      : elements(shape.batch * shape.channels * shape.pixels),
        image(shape.channels * shape.pixels),
        pixels(static_cast<int32_t>(shape.pixels)),
        group_channels(static_cast<int32_t>(shape.channels / groups)),
        in_group(ceil_div<int64_t>(group_channels, longest_chunk)),
        chunks(groups * in_group.divisor) {
    chunk = ceil_div(ceil_div(group_channels, static_cast<int32_t>(in_group.divisor)), kStep) * kStep;
    const int64_t V = 16 / element, beside = 2 * (V - 1);
    // A warp's 32 vectors have one that is not full where the row begins between two of them.
    const int64_t most = std::min(32 * V - (V - 1), kTileBytes / (rows(chunk) * element) - beside - (V - 1));
    in_plane = Divider(ceil_div(shape.pixels, most));
    width = static_cast<int32_t>(ceil_div(shape.pixels, in_plane.divisor));
    const int64_t least = width + beside;
    stride = static_cast<int32_t>(least + ((pixels - least) % V + V) % V);
  }

  int32_t bytes(int32_t rows, int32_t element) const { return ceil_div(rows * stride * element, 16) * 16; }
  int64_t items() const { return elements / image * in_plane.divisor; }  // tiles, each of all channels
  dim3 grid() const { return dim3(items() * chunks.divisor); }
  dim3 block() const { return dim3(ceil_div(width, 32) * 32); }
};

// Whether tensors begin alike within 16 bytes, so that results may lie where the input was.
template <class A, class... Others>
bool alike_in_16(const A* a, const Others*... others) {
  return ((reinterpret_cast<uintptr_t>(a) % 16 == reinterpret_cast<uintptr_t>(others) % 16) && ...);
}

// What this block takes: channels begin ... end of a group, counted from its first one, first_channel. Consecutive
// blocks take the chunks of the same pixels, so what two chunks both read comes out of L2.
struct PlaneTile {
  const PlaneTiles& lie;
  int64_t origin;  // offset of the tile's first pixel in the group's first channel
  uint32_t item;
  int32_t first_channel, begin, end, width;

  __device__ __forceinline__ explicit PlaneTile(const PlaneTiles& lie) : lie(lie) {
    uint32_t number, place, in_group;
    item = lie.chunks.divide_small(blockIdx.x, number);
    const int32_t image = lie.in_plane.divide_small(item, place);
    first_channel = lie.in_group.divide_small(number, in_group) * lie.group_channels;
    begin = in_group * lie.chunk;
    end = min(begin + lie.chunk, lie.group_channels);
    const int32_t first = place * lie.width;
    width = min(lie.width, lie.pixels - first);
    origin = image * lie.image + int64_t{first_channel} * lie.pixels + first;
  }

  __device__ __forceinline__ int64_t offset(int32_t channel) const { return origin + int64_t{channel} * lie.pixels; }
  // Whether the group has that channel.
  __device__ __forceinline__ bool has(int32_t channel) const {
    return static_cast<uint32_t>(channel) < static_cast<uint32_t>(lie.group_channels);
  }
  __device__ __forceinline__ int32_t channels() const { return end - begin; }

  // Begins to copy rows of channels `first` and on to shared memory, where the first one lies at `to`; zeros where the
  // group has no such channel.
  template <class T>
  __device__ __forceinline__ void fetch(T* to, const T* tensor, int32_t first, int32_t count) const {
    constexpr int32_t V = kVector<T>;
    const int32_t lane = threadIdx.x % 32;
    const int32_t there = max(first, 0), beyond = min(first + count, lie.group_channels);
    const auto copy = [&](auto is_within) {
      along_rows(to + (there - first) * lie.stride, tensor, there, beyond, [&](T* row, const T* run) {
        const int32_t pixel = lane * V - lead(run);
        if (pixel >= width) {
          return;
        }
        const int64_t from = run - tensor + pixel;
        if constexpr (!decltype(is_within)::value) {
          if (from < 0 || from + V > lie.elements) {
#pragma unroll 1
            for (int32_t i = max(pixel, 0); i < min(pixel + V, width); ++i) {
              store_shared(row + i, load<1>(run + i));
            }
            return;
          }
        }
        async_copy<16>(row + pixel, run + pixel);
      });
    };
    // Vectors that are not in the tensor belong to the first tile or to the last two: the last may be a pixel wide.
    if (item > 0 && blockIdx.x + 2 * static_cast<uint32_t>(lie.chunks.divisor) < gridDim.x) {
      copy(std::true_type{});
    } else {
      copy(std::false_type{});
    }
    const auto clear = [&](int32_t begin, int32_t end) {
      along_rows(to + (begin - first) * lie.stride, tensor, begin, end, [&](T* row, const T* /*run*/) {
#pragma unroll 1
        for (int32_t i = lane; i < width; i += 32) {
          store_shared(row + i, Pack<T, 1>{});
        }
      });
    };
    clear(first, there);
    clear(beyond, first + count);
  }

  // Copies rows of channels begin ... end out; the first one lies at `from`.
  template <class T>
  __device__ __forceinline__ void put(T* from, T* tensor) const {
    constexpr int32_t V = kVector<T>;
    const int32_t lane = threadIdx.x % 32;
    along_rows(from, tensor, begin, end, [&](const T* row, T* run) {
      const int32_t head = min(-lead(run) & (V - 1), width), tail = head + ((width - head) & -V);
      if (const int32_t pixel = head + lane * V; pixel < tail) {
        store(run + pixel, load<V>(row + pixel));
      }
      if (const int32_t pixel = lane < head ? lane : tail + lane - head; pixel < width) {
        store(run + pixel, load<1>(row + pixel));
      }
    });
  }

 private:
  // Calls body(row, run) for this warp's of channels first ... last: where each is in shared memory, the first one at
  // `row`, and in the tensor.
  template <class T, class Element, class Body>
  __device__ __forceinline__ void along_rows(T* row, Element* run, int32_t first, int32_t last,
                                             const Body& body) const {
    const int32_t warp = threadIdx.x / 32, warps = blockDim.x / 32;
    row += warp * lie.stride;
    run += offset(first + warp);
    // A compiler that sees where these come from works them out anew in every turn.
    const int32_t row_step = anew(warps * lie.stride);
    const uint32_t run_step = anew(warps * lie.pixels);
#pragma unroll 1
    for (int32_t channel = first + warp; channel < last; channel += warps) {
      body(row, run);
      row += row_step;
      run += run_step;
    }
  }
};

// Calls body(Lrn or LrnOfFive): kernels over tiles are for AlexNet's windows or for all.
template <class Body>
int with_tiled_lrn(const LrnWindow& window, Body&& body) {
  return LrnOfFive::is(window) ? body(LrnOfFive(window)) : body(Lrn(window));
}

template <class L>
constexpr int kTiledHalo = std::is_same_v<L, LrnOfFive> ? 2 : kWidestHalo;

// Blocks of a multiprocessor that backward's registers leave room for.
template <class L>
constexpr int kTiledBlocks = std::is_same_v<L, LrnOfFive> ? 3 : 2;

}  // namespace alexnet_fast::cuda
