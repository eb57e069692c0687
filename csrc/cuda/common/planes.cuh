// NCHW planes in shared memory. AlexNet's have 55 x 55, 27 x 27 and 13 x 13 pixels: odd numbers, so each begins
// elsewhere within 16 bytes, and threads that own pixels reach memory by single elements. But the rows of a plane, and
// planes that follow each other, are one run of elements. A block copies it by 16 bytes at a time into shared memory,
// where it lies within 16 bytes as it does in device memory; works on single elements there; and copies what comes of
// them back in the same way. Of a run at most 15 bytes on either side are copied by single elements.
#pragma once

#include "cuda/common/async_copy.cuh"
#include "cuda/common/divider.cuh"
#include "cuda/common/packed_max.cuh"
#include "cuda/common/vector.cuh"

namespace alexnet_fast::cuda {

constexpr int kPlaneThreads = 128;  // many small blocks: while some wait for their copies, others compute

// ---------------------------------------------------------------- runs

// Elements from the last multiple of 16 bytes to the run.
template <class T>
__device__ __forceinline__ int32_t lead(const T* run) {
  return static_cast<int32_t>(reinterpret_cast<uintptr_t>(run) % 16 / sizeof(T));
}

// Calls vector(i) for each whole vector of a run, which begins at its element i, and single(i) for the elements before
// the first one and after the last; a block's kBlock threads share them.
template <int kBlock, class T, class Vector, class Single>
__device__ __forceinline__ void along_run(const T* run, int32_t count, const Vector& vector, const Single& single) {
  constexpr int32_t V = kVector<T>;
  const int32_t thread = threadIdx.x;
  const int32_t head = min((V - lead(run)) % V, count), end = head + (count - head) / V * V;
  // A compiler that sees where the loop begins works out its end anew, in some forty instructions.
#pragma unroll 1
  for (int32_t i = anew(head + thread * V); i < end; i += kBlock * V) {
    vector(i);
  }
  if (thread < head) {
    single(thread);
  }
  if (end + thread < count) {
    single(end + thread);
  }
}

// The place of a run's first element in `room`, which begins at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ T* place_run(unsigned char* room, const T* run) {
  return reinterpret_cast<T*>(room) + lead(run);
}

// Begins to copy a run to its place in `room`, which is returned. What is there may be read after await_runs().
template <int kBlock, class T>
__device__ __forceinline__ const T* fetch_run(unsigned char* room, const T* from, int32_t count) {
  T* const to = place_run(room, from);
  along_run<kBlock>(
      from, count, [&](int32_t i) { async_copy<16>(to + i, from + i); },
      [&](int32_t i) { store_shared(to + i, load<1>(from + i)); });
  return to;
}

__device__ __forceinline__ void await_runs() {
  async_commit();
  async_wait<0>();
  __syncthreads();
}

// Copies a run from shared memory, where place_run has put it, to device memory.
template <int kBlock, class T>
__device__ __forceinline__ void put_run(const T* from, T* to, int32_t count) {
  along_run<kBlock>(
      to, count, [&](int32_t i) { store(to + i, load<kVector<T>>(from + i)); },
      [&](int32_t i) { store(to + i, load<1>(from + i)); });
}

// Bytes of shared memory for a run that begins anywhere.
inline int64_t run_bytes(int64_t count, int64_t element) {
  return ceil_div<int64_t>((count - 1) * element + 16, 16) * 16;
}

// ---------------------------------------------------------------- how blocks lie over planes

// A block takes some whole planes, or a band of one plane's rows: rows of whatever a kernel goes through.
struct PlaneBands {
  int64_t planes;
  int32_t plane_rows, rows;  // of a plane, and of a band
  int32_t whole;             // planes a block takes
  Divider bands;             // in a plane

  static constexpr int64_t kTileBytes =
      17920;  // two planes of 55 x 55 in 16 bits; twelve blocks of sm_90, eight of sm_80

  // bytes(planes, rows): what a block needs for so many planes, and for so many rows of each.
  template <class Bytes>
  PlaneBands(int64_t planes, int64_t plane_rows, const Bytes& bytes, int64_t most = kTileBytes)
      : planes(planes), plane_rows(static_cast<int32_t>(plane_rows)), rows(this->plane_rows), whole(0), bands(1) {
    if (bytes(1, 1) > most) {
      return;
    }
    constexpr int64_t kEnoughBlocks = 2048;
    const int64_t plane_bytes = bytes(1, plane_rows);
    whole = static_cast<int32_t>(std::clamp<int64_t>(most / plane_bytes, 1, ceil_div(planes, kEnoughBlocks)));
    if (plane_bytes > most) {
      int64_t number = plane_bytes / most + 1;
      while (bytes(1, ceil_div(plane_rows, number)) > most) {
        ++number;
      }
      rows = static_cast<int32_t>(ceil_div(plane_rows, number));
      bands = Divider(ceil_div<int64_t>(plane_rows, rows));
    }
  }

  // Whether a block has room for a row at all.
  bool fit() const { return whole > 0; }
  dim3 grid() const { return dim3(ceil_div<int64_t>(planes, whole) * bands.divisor); }
};

// What this block takes: rows begin ... end of `number` planes from the one that is `first` in the batch.
struct PlaneBand {
  int64_t first;
  int32_t number, index, begin, end;

  __device__ __forceinline__ explicit PlaneBand(const PlaneBands& lie) {
    uint32_t band;
    first = int64_t{lie.bands.divide_small(blockIdx.x, band)} * lie.whole;
    number = static_cast<int32_t>(min(int64_t{lie.whole}, lie.planes - first));
    index = band;
    begin = index * lie.rows;
    end = min(begin + lie.rows, lie.plane_rows);
  }
};

// Strips of a column, some kRows rows or fewer, for a thread to go down: AlexNet's pools have 27, 13 and 6 rows of
// outputs, which are strips of 9, 7 and 6.
struct StripsInPlanes {
  static constexpr int32_t kRows = 9;
  Divider columns, in_column;
  int32_t rows;

  StripsInPlanes(const PlaneBands& lie, int64_t columns)
      : columns(columns),
        in_column(ceil_div(lie.rows, kRows)),
        rows(ceil_div(lie.rows, static_cast<int32_t>(in_column.divisor))) {}
};

// The strips of a thread of a block of kBlock, one after the other, of `planes` planes. `row` counts from the band's
// first one.
template <int kBlock>
struct StripInPlanes {
  const StripsInPlanes& lie;
  const int32_t band_rows;
  const uint32_t count;
  uint32_t unit;
  int32_t plane, row, column, rows;

  __device__ __forceinline__ StripInPlanes(const StripsInPlanes& lie, const PlaneBand& band, int32_t planes)
      : lie(lie),
        band_rows(band.end - band.begin),
        count(planes * static_cast<uint32_t>(lie.in_column.divisor * lie.columns.divisor)),
        unit(threadIdx.x) {
    find();
  }

  __device__ __forceinline__ bool there() const { return unit < count; }

  __device__ __forceinline__ void next() {
    unit += kBlock;
    find();
  }

 private:
  __device__ __forceinline__ void find() {
    uint32_t strip, rest;
    plane = lie.in_column.divide_small(lie.columns.divide_small(unit, rest), strip);
    column = rest;
    row = strip * lie.rows;
    rows = min(lie.rows, band_rows - row);  // the last band may have fewer strips
  }
};

}  // namespace alexnet_fast::cuda
