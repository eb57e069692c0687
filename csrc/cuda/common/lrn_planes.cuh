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
#include "cuda/common/source.cuh"

namespace alexnet_fast::cuda {

// Threads that share a row of a tile as it is copied out, each with 16 bytes of it; half as many copy it in, each twice
// as much. Tiles are some 120 pixels wide, for kPlaneThreads, and deep.
template <class T>
constexpr int kRowLanes = 8 * sizeof(T);
template <class T>
constexpr int kFetchLanes = kRowLanes<T> / 2;

template <class T>
__device__ __forceinline__ Pack<T, 2> pack_two(T first, T second) {
  if constexpr (sizeof(T) == 4) {
    return {{__float_as_uint(first), __float_as_uint(second)}};
  } else {
    return {{first.bits | static_cast<uint32_t>(second.bits) << 16}};
  }
}

struct PlaneTiles {
  static constexpr int64_t kTileBytes = 40 * 1024;  // two blocks on sm_86, four on sm_80, five on sm_90
  static constexpr int32_t kStep = 8;               // of channels, that a thread goes
  static constexpr int64_t kFewestPixels = 64;      // fewer leave most of a block's threads without one

  int64_t elements, image;  // of the tensor, of an image
  int32_t pixels, group_channels, chunk;
  int32_t width, stride;  // of a tile's rows in shared memory: a row lies within 16 bytes as it does in device memory
  Divider in_group, chunks, in_plane;  // chunks of a group and of an image, tiles of a plane

  // With a ReLU there are kernels for AlexNet's windows alone.
  template <bool kRectified>
  static bool take(const LrnShape& shape, const LrnWindow& window) {
    return !shape.channels_last && shape.pixels >= kFewestPixels && shape.pixels <= INT32_MAX / 8 &&
           (!kRectified || LrnOfFive::is(window));
  }

  // rows(chunk): what is in shared memory for so many channels, each of `element` bytes a pixel.
  template <class Rows>
  PlaneTiles(const LrnShape& shape, int64_t groups, int64_t element, int64_t longest_chunk, const Rows& rows)
      : PlaneTiles(shape, groups, longest_chunk) {
    const int64_t V = 16 / element;
    const int64_t most =
        std::min(longest_run(element, 8 * element), kTileBytes / (rows(chunk) * element) - 3 * (V - 1));
    cut(ceil_div<int64_t>(pixels, ceil_div<int64_t>(pixels, most)), element);
  }

  PlaneTiles(const LrnShape& shape, int64_t groups, int64_t longest_chunk)
      : elements(shape.batch * shape.channels * shape.pixels),
        image(shape.channels * shape.pixels),
        pixels(static_cast<int32_t>(shape.pixels)),
        group_channels(static_cast<int32_t>(shape.channels / groups)),
        in_group(ceil_div<int64_t>(group_channels, longest_chunk)),
        chunks(groups * in_group.divisor) {
    chunk = ceil_div(ceil_div(group_channels, static_cast<int32_t>(in_group.divisor)), kStep) * kStep;
  }

  // Planes into tiles of so many pixels.
  void cut(int64_t tile_pixels, int64_t element) {
    in_plane = Divider(ceil_div<int64_t>(pixels, tile_pixels));
    width = static_cast<int32_t>(tile_pixels);
    stride = static_cast<int32_t>(apart(tile_pixels, pixels, 16 / element));
  }

  // Elements that `lanes` vectors hold wherever they begin: one is not full where that is between two of them.
  static int64_t longest_run(int64_t element, int64_t lanes) { return lanes * (16 / element) - (16 / element - 1); }

  // The fewest elements from one row of `count` to the next that are as many within vectors of V as `step`, and leave
  // no vector that holds some of both, wherever the first row begins: that ends in the vector which is whole + 1 behind
  // the one in which it begins, or, if it begins late enough there, the next.
  static int64_t apart(int64_t count, int64_t step, int64_t V) {
    const int64_t whole = (count - 1) / V, rest = count - 1 - whole * V, beyond = step % V;
    return (whole + (beyond >= rest ? 1 : 2)) * V + beyond;
  }

  int32_t bytes(int32_t rows, int32_t element) const { return ceil_div(rows * stride * element, 16) * 16; }
  int64_t items() const { return elements / image * in_plane.divisor; }  // tiles, each of all channels
  dim3 grid() const { return dim3(items() * chunks.divisor); }
  dim3 block() const { return dim3(ceil_div(width, 32) * 32); }
};

// Whether tensors begin alike within 16 bytes, so that results may lie where the input was. There may be none of them.
template <class A, class... Others>
bool alike_in_16(const A* a, const Others*... others) {
  return ((others == nullptr || reinterpret_cast<uintptr_t>(a) % 16 == reinterpret_cast<uintptr_t>(others) % 16) &&
          ...);
}

// Threads that share a copy: all of a block, or `warps` of its warps from one on.
struct Crew {
  int32_t thread, threads;

  __device__ __forceinline__ Crew() : thread(threadIdx.x), threads(blockDim.x) {}
  __device__ __forceinline__ Crew(int32_t first_warp, int32_t warps)
      : thread(static_cast<int32_t>(threadIdx.x) - 32 * first_warp), threads(32 * warps) {}

  __device__ __forceinline__ bool has_this() const { return thread >= 0 && thread < threads; }
};

// What this block takes: channels begin ... end of a group, counted from its first one, first_channel. Consecutive
// blocks take the chunks of the same pixels, so what two chunks both read comes out of L2.
struct PlaneTile {
  const PlaneTiles& lie;
  int64_t origin;        // offset of the tile's first pixel in the group's first channel
  uint32_t item, place;  // of all tiles, and in the plane
  int32_t image, first_channel, begin, end, width;

  __device__ __forceinline__ explicit PlaneTile(const PlaneTiles& lie) : lie(lie) {
    uint32_t number, in_group;
    item = lie.chunks.divide_small(blockIdx.x, number);
    image = lie.in_plane.divide_small(item, place);
    first_channel = lie.in_group.divide_small(number, in_group) * lie.group_channels;
    begin = in_group * lie.chunk;
    end = min(begin + lie.chunk, lie.group_channels);
    const int32_t first = place * lie.width;
    width = min(lie.width, lie.pixels - first);
    origin = image * lie.image + int64_t{first_channel} * lie.pixels + first;
  }

  // The same channels of that image in another tensor, `width` pixels from `first` on.
  __device__ __forceinline__ PlaneTile(const PlaneTile& tile, const PlaneTiles& lie, int32_t first, int32_t width)
      : lie(lie),
        origin(tile.image * lie.image + int64_t{tile.first_channel} * lie.pixels + first),
        item(tile.item),
        place(tile.place),
        image(tile.image),
        first_channel(tile.first_channel),
        begin(tile.begin),
        end(tile.end),
        width(width) {}

  __device__ __forceinline__ int64_t offset(int32_t channel) const { return origin + int64_t{channel} * lie.pixels; }
  // Whether the group has that channel.
  __device__ __forceinline__ bool has(int32_t channel) const {
    return static_cast<uint32_t>(channel) < static_cast<uint32_t>(lie.group_channels);
  }
  __device__ __forceinline__ int32_t channels() const { return end - begin; }

  // Begins to copy rows of channels `first` and on to shared memory, where the first one lies at `to`; zeros where the
  // group has no such channel. kLanes threads share a row, kVectors of it each; it is no longer than longest_run().
  template <int kLanes, int kVectors = 1, class T>
  __device__ __forceinline__ void fetch(T* to, const T* tensor, int32_t first, int32_t count, Crew crew = {}) const {
    const int32_t there = max(first, 0), beyond = min(first + count, lie.group_channels);
    along_vectors<kLanes, kVectors>(
        crew, to, tensor, first, count, [](int32_t /*channel*/) { return nullptr; },
        [](T* place, const T* from, std::nullptr_t) { async_copy<16>(place, from); },
        [](T* place, const T* from, std::nullptr_t) { store_shared(place, load<1>(from)); });
    // By whole vectors, which hold nothing of other rows.
    const auto clear = [&](int32_t begin, int32_t end) {
      constexpr int32_t V = kVector<T>;
      T* const rows = to + (begin - first) * lie.stride;
      const int32_t beside = lead(rows), beyond = beside + (end - begin - 1) * lie.stride + width;
#pragma unroll 1
      for (int32_t i = crew.thread * V; begin < end && i < beyond; i += crew.threads * V) {
        store_shared_16(rows - beside + i, Pack<T, V>{});
      }
    };
    clear(first, there);
    clear(beyond, first + count);
  }

  // Turns rows that fetch has copied from source.z into the ReLU's output. Each lane does what it has fetched, so it
  // need not wait for others; nor have others what it did before a barrier.
  template <int kLanes, int kVectors = 1, class T>
  __device__ __forceinline__ void rectify(T* rows, const Rectified<T, false>& source, int32_t begin,
                                          int32_t count) const {
    constexpr int32_t V = kVector<T>;
    async_commit();
    async_wait<0>();
    along_vectors<kLanes, kVectors>(
        Crew(), rows, source.z, begin, count,
        [&](int32_t channel) { return source.template local<V>(first_channel + channel).bias; },
        [](T* place, const T* /*from*/, const Pack<T, V>& bias) {
          store_shared_16(place, add_relu(load<V>(place), bias));
        },
        [](T* place, const T* /*from*/, const Pack<T, V>& bias) {
          store_shared(place, add_relu(load<1>(place), first(bias)));
        });
  }

  // Copies rows of channels begin ... end out; the first one lies at `from`. kLanes threads share a row, which has up
  // to kVectors whole vectors for each, and up to V - 1 elements before and after those: one for each. With kHalves
  // vectors lie at multiples of 8 bytes in shared memory.
  template <int kLanes, int kVectors = 1, bool kHalves = false, class T>
  __device__ __forceinline__ void put(T* from, T* tensor) const {
    constexpr int32_t V = kVector<T>;
    static_assert(kLanes >= 2 * (V - 1));
    const int32_t lane = threadIdx.x % kLanes;
    along_rows<kLanes>(Crew(), from, tensor, begin, end, [&](const T* row, T* run) {
      const int32_t head = min(-lead(run) & (V - 1), width), tail = head + ((width - head) & -V);
      const int32_t whole = head + lane * V, single = lane < head ? lane : tail + lane - head;
      const int32_t wholes = ceil_div(tail - whole, kLanes * V);
      const bool has_single = single < width;
      return [=, whole_row = row + whole, whole_run = run + whole, row = row + single, run = run + single](
                 int32_t /*channel*/, int32_t row_step, uint32_t run_step) mutable {
#pragma unroll
        for (int32_t i = 0; i < kVectors; ++i) {
          if (i < wholes) {
            store(whole_run + i * kLanes * V, load_in<kHalves ? 2 : 1, V>(whole_row + i * kLanes * V));
          }
        }
        if (has_single) {
          store(run, load<1>(row));
        }
        whole_row += row_step;
        whole_run += run_step;
        row += row_step;
        run += run_step;
      };
    });
  }

 private:
  // Calls vector(place, from, known(channel)) for each vector that this lane has of the rows fetch copies, and single
  // for each element of those that the tensor has not whole.
  template <int kLanes, int kVectors, class T, class Known, class Vector, class Single>
  __device__ __forceinline__ void along_vectors(const Crew& crew, T* to, const T* tensor, int32_t first, int32_t count,
                                                const Known& known, const Vector& vector, const Single& single) const {
    constexpr int32_t V = kVector<T>;
    const int32_t lane = threadIdx.x % kLanes;
    const int32_t there = max(first, 0), beyond = min(first + count, lie.group_channels);
    const auto go = [&](auto is_within) {
      along_rows<kLanes>(crew, to + (there - first) * lie.stride, tensor, there, beyond, [&](T* row, const T* run) {
        const int32_t pixel = lane * V - lead(run);
        return [=, &known, &vector, &single, place = row + pixel, from = run + pixel](int32_t channel, int32_t row_step,
                                                                                      uint32_t run_step) mutable {
          const auto of_row = known(channel);
#pragma unroll
          for (int32_t at = 0; at < kVectors * kLanes * V; at += kLanes * V) {
            bool whole = pixel + at < width;
            if constexpr (!decltype(is_within)::value) {
              if (whole && (from + at < tensor || from + at + V > tensor + lie.elements)) {
#pragma unroll 1
                for (int32_t i = max(-pixel - at, 0); i < min(V, width - pixel - at); ++i) {
                  single(place + at + i, from + at + i, of_row);
                }
                whole = false;
              }
            }
            if (whole) {
              vector(place + at, from + at, of_row);
            }
          }
          place += row_step;
          from += run_step;
        };
      });
    };
    const uint32_t in_image = static_cast<uint32_t>(lie.chunks.divisor * lie.in_plane.divisor);
    const bool within = blockIdx.x >= in_image && blockIdx.x + in_image < gridDim.x;  // between other images
    if (within || (offset(there) >= V && offset(beyond - 1) + width + V <= lie.elements)) {
      go(std::true_type{});
    } else {
      go(std::false_type{});
    }
  }

  // Calls prepare(row, run)(channel, row_step, run_step) for these kLanes threads' of channels first ... last: where
  // each is in shared memory, the first one at `row`, and in the tensor. Rows as many apart as a vector has elements
  // lie alike within 16 bytes: prepare is called once for those, and what it returns goes on by itself from one to the
  // next.
  template <int kLanes, class T, class Element, class Prepare>
  __device__ __forceinline__ void along_rows(const Crew& crew, T* row, Element* tensor, int32_t first, int32_t last,
                                             const Prepare& prepare) const {
    const int32_t warp = crew.thread / kLanes, warps = crew.threads / kLanes;
    const int32_t step = ceil_div(warps, kVector<T>) * kVector<T>;
    // A compiler that sees where these come from works them out anew in every turn.
    const int32_t row_step = anew(step * lie.stride);
    const uint32_t run_step = anew(step * lie.pixels);
#pragma unroll 1
    for (int32_t alike = first + warp; alike < min(first + step, last); alike += warps) {
      auto body = prepare(row + (alike - first) * lie.stride, tensor + offset(alike));
#pragma unroll 1
      for (int32_t channel = alike; channel < last; channel += step) {
        body(channel, row_step, run_step);
      }
    }
  }
};

template <class L>
constexpr int kTiledHalo = std::is_same_v<L, LrnOfFive> ? 2 : kWidestHalo;

}  // namespace alexnet_fast::cuda
