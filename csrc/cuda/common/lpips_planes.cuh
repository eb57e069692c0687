// A run of pixels of a pair of NCHW images, whose sums over channels a block makes out of shared memory.
//
// A pixel's channels lie a plane apart, so at any place within 16 bytes. But planes that are as many channels apart as
// 16 bytes have elements begin alike: what lies at the aligned 16 bytes of one of them are the same pixels as in the
// others. So a thread has a line of 16 bytes, a row of channels V, 2 V ... apart, and adds those pixels up in
// registers, as kernels over NHWC add up channels. Only then are the sums of a block's rows, whose lines begin up to V
// - 1 pixels apart, brought together: once for up to eight lines of each image.
//
// All lines are copied into shared memory at once, past the registers: they come from device memory once, however many
// times they are gone through, and no barrier is needed, for a thread reads none but its own. Beside a run of pixels
// lie up to V - 1 more, sectors that the next run reads anyway: of 121 pixels of 16 bits, 6% more lines (64 channels),
// of 57, 12% (192 and 256), of 33, 21% (384).
#pragma once

#include "cuda/common/lpips.cuh"
#include "cuda/common/planes.cuh"

namespace alexnet_fast::cuda {

template <class T>
struct LpipsTiles {
  using Element = T;
  static constexpr int32_t V = kVector<T>;
  static constexpr int32_t kSteps = 8;  // lines of an image that a thread has, at most
  // As many rows leave a block four lines of a plane; of 16 bits, 25 pixels.
  static constexpr int32_t kMostRows = 64;
  static constexpr int32_t kEnoughThreads = 128;
  static constexpr int32_t kRoom = kEnoughThreads + V;  // for a number of each pixel in lines, and of V before them

  const T* x;
  const float* weight;
  int64_t image, second;  // elements of an image, and from an image to the one that it is compared with
  int32_t pixels, channels;
  int32_t rows, lines, width;  // of a block: rows of channels, lines of a plane, and pixels that are its own
  Divider units;               // runs of a plane

  // Where both images' planes begin alike, and lines are within the tensors.
  static bool take(const LpipsParams& p) {
    return !p.channels_last && rows_of(p.channels) <= kMostRows && p.pixels <= INT32_MAX / kMostRows &&
           p.pairs * p.channels * p.pixels % V == 0 && p.pairs * p.pixels <= INT32_MAX && aligned_16(p.x) &&
           aligned_16(p.dx);
  }

  static int64_t rows_of(int64_t channels) { return ceil_div<int64_t>(channels, V * kSteps) * V; }

  explicit LpipsTiles(const LpipsParams& p)
      : x(static_cast<const T*>(p.x)),
        weight(static_cast<const float*>(p.weight)),
        image(p.channels * p.pixels),
        second(p.pairs * image),
        pixels(static_cast<int32_t>(p.pixels)),
        channels(static_cast<int32_t>(p.channels)),
        rows(static_cast<int32_t>(rows_of(channels))) {
    const int32_t most = std::max(kEnoughThreads / rows, std::min(8, kThreads / rows)) * V - (V - 1);
    units = Divider(ceil_div(pixels, most));
    width = static_cast<int32_t>(ceil_div<int64_t>(pixels, units.divisor));
    lines = ceil_div(width + V - 1, V);
    rows = std::max(rows, ceil_div(32, lines * V) * V);  // a warp at least, which adds up the run's pixels
  }

  dim3 grid() const { return dim3(blocks()); }
  dim3 block() const { return dim3(lines, rows); }
  int64_t blocks() const { return second / image * units.divisor; }
  // Two images' lines, and two sums for each of their pixels. A sum for each of a thread's lines fits there too.
  static_assert(2 * V >= kSteps);
  size_t bytes() const {
    return int64_t{lines} * rows * (ceil_div(channels, rows) * 32 + 2 * V * static_cast<int64_t>(sizeof(float)));
  }
};

template <class T>
struct LpipsTile {
  static constexpr int32_t V = kVector<T>;

  const LpipsTiles<T>& lie;
  int64_t pair, first;  // the run's first pixel
  int32_t count;        // of its pixels
  int32_t thread, threads;
  int32_t pixel;  // where this thread's lines begin, counted from `first`: before it, or beyond `count` perhaps
  const T* line;  // the first one
  T* mine;        // where it is in shared memory

  __device__ __forceinline__ explicit LpipsTile(const LpipsTiles<T>& lie)
      : lie(lie), thread(threadIdx.y * blockDim.x + threadIdx.x), threads(blockDim.x * blockDim.y) {
    uint32_t unit;
    pair = lie.units.divide_small(blockIdx.x, unit);
    first = int64_t{unit} * lie.width;
    count = static_cast<int32_t>(min(int64_t{lie.width}, lie.pixels - first));
    const T* const run = origin() + int64_t{threadIdx.y} * lie.pixels;
    pixel = threadIdx.x * V - lead(run);
    line = run + pixel;
    mine = reinterpret_cast<T*>(dynamic_shared()) + thread * V;
  }

  __device__ __forceinline__ bool whole() const { return pixel >= 0 && pixel + V <= count; }
  __device__ __forceinline__ bool has(int v) const {
    return static_cast<uint32_t>(pixel + v) < static_cast<uint32_t>(count);
  }

  // Copies this thread's lines to shared memory; zeros where all of a line is others'.
  __device__ __forceinline__ void fetch() const {
    const int bytes = pixel < count ? 16 : 0;
    const T* from = line;
    for_each([&](T* a, T* b, int32_t /*channel*/) {
      async_copy<16>(a, bytes ? from : lie.x, bytes);
      async_copy<16>(b, bytes ? from + lie.second : lie.x, bytes);
      from += int64_t{lie.rows} * lie.pixels;
    });
    async_commit();
    async_wait<0>();
  }

  // Calls body(a, b, channel) for each channel of this thread's: where the two images' lines are in shared memory.
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
    T* a = mine;
    for (int32_t channel = threadIdx.y; channel < lie.channels; channel += lie.rows) {
      body(a, a + threads * V, channel);
      a += 2 * threads * V;
    }
  }

  // Copies out what threads have left in shared memory of the lines that are not whole() in place of the first image's
  // and of the second's: single elements, up to V - 1 at either end of a row's runs, shared by the row's threads. `to`
  // lies over x. All threads come together.
  __device__ __forceinline__ void put_ends(T* to) const {
    __syncthreads();
    const T* const run = origin() + int64_t{threadIdx.y} * lie.pixels;
    const int32_t head = min(-lead(run) & (V - 1), count), tail = head + ((count - head) & -V);
    const int32_t singles = head + count - tail;
#pragma unroll 1
    for (int32_t single = threadIdx.x; single < singles; single += lie.lines) {
      const int32_t own = single < head ? single : tail + single - head;
      const T* from = mine + own + lead(run) - static_cast<int32_t>(threadIdx.x) * V;
      T *first_to = to + (run + own - lie.x), *second_to = first_to + lie.second;
#pragma unroll 1
      for (int32_t channel = threadIdx.y; channel < lie.channels; channel += lie.rows) {
        store(first_to, load<1>(from));
        store(second_to, load<1>(from + threads * V));
        from += 2 * threads * V;
        first_to += int64_t{lie.rows} * lie.pixels;
        second_to += int64_t{lie.rows} * lie.pixels;
      }
    }
  }

  // Room for two sums of each of a thread's V pixels, behind the lines.
  __device__ __forceinline__ float* sums() const {
    return reinterpret_cast<float*>(dynamic_shared() + ceil_div(lie.channels, lie.rows) * 32 * threads);
  }

  // Zeros in the V places before the run's, which read() reads and nobody else.
  template <class... Numbers>
  __device__ __forceinline__ void clear_before(Numbers&... numbers) const {
    if (thread < V) {
      ((numbers[thread] = 0), ...);
    }
  }

  // Calls finish(place, sum) for each place of read() from the run's first pixel on, with the block's sums of total[0
  // ... N - 1] for its pixel; 0 where that is no pixel of the run. Begins and ends with all threads together.
  template <int N, class Finish>
  __device__ __forceinline__ void add_up(const float (&total)[N][V], const Finish& finish) const {
    const int32_t row = lie.lines * V;
    float* const sums = this->sums();
#pragma unroll
    for (int k = 0; k < N; ++k) {
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        store_shared_16(sums + (k * threads + thread) * V + v,
                        pack<float>({total[k][v], total[k][v + 1], total[k][v + 2], total[k][v + 3]}));
      }
    }
    __syncthreads();
    int32_t before[V];  // the run, in each of V rows
#pragma unroll
    for (int32_t j = 0; j < V; ++j) {
      before[j] = j * row + ((lead(origin()) + j * lie.pixels) & (V - 1));
    }
    if (thread < row) {  // a thread each: there are V rows or more
      const float* from = sums + thread;
      float sum[N] = {};
#pragma unroll 1
      for (int32_t r = thread < count ? 0 : lie.rows; r < lie.rows; r += V) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          float some[V];
#pragma unroll
          for (int32_t j = 0; j < V; ++j) {
            some[j] = from[k * threads * V + before[j]];
          }
#pragma unroll
          for (int32_t step = V / 2; step > 0; step /= 2) {  // a tree: fewer roundings of the whole sum
#pragma unroll
            for (int32_t j = 0; j < step; ++j) {
              some[j] += some[j + step];
            }
          }
          sum[k] += some[0];
        }
        from += V * row;
      }
      finish(V + thread, sum);
    }
    __syncthreads();
  }

  // Of what finish() has left, the numbers of the pixels of this thread's lines.
  __device__ __forceinline__ void read(const float* numbers, float (&own)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      own[v] = numbers[V + pixel + v];
    }
  }

  // squares[0 .. 1]: |a|^2 and |b|^2; scales[0 .. 1]: what inverse_length() makes of them.
  template <class Finish>
  __device__ __forceinline__ void measure(const Finish& finish) const {
    float total[2][V] = {};
    for_each([&](const T* a, const T* b, int32_t /*channel*/) {
      float x[V], y[V];
      unpack(load<V>(a), x);
      unpack(load<V>(b), y);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        total[0][v] += x[v] * x[v];
        total[1][v] += y[v] * y[v];
      }
    });
    add_up(total, finish);
  }

 private:
  // The run's first pixel in the first channel.
  __device__ __forceinline__ const T* origin() const { return lie.x + pair * lie.image + first; }
};

// Calls over_tiles(LpipsTiles<T>) where tiles take the images, else over_units(T{}, V, Last), the last two as integral
// constants.
template <class Tiles, class Units>
int with_lpips_kernel(const LpipsParams& p, const Tiles& over_tiles, const Units& over_units) {
  return with_dtype(p.dtype, [&](auto type) -> int {
    using T = decltype(type);
    using One = std::integral_constant<int, 1>;
    if (LpipsTiles<T>::take(p)) {
      return over_tiles(LpipsTiles<T>(p));
    }
    if (!p.channels_last) {
      return over_units(type, One{}, std::false_type{});
    }
    constexpr int V = kVector<T>;
    const bool vectors = p.channels % V == 0 && aligned_16(p.x) && aligned_16(p.weight) && aligned_16(p.dx);
    return vectors ? over_units(type, std::integral_constant<int, V>{}, std::true_type{})
                   : over_units(type, One{}, std::true_type{});
  });
}

}  // namespace alexnet_fast::cuda
