// How LRN kernels lie over NCHW, where channels are a plane apart: a thread owns V pixels of an image, a column of
// the tensor, and walks through a chunk of its channels. Chunks end where groups end. Consecutive blocks take the
// chunks of the same columns, so what two chunks both read comes out of L2.
#pragma once

#include "cuda/common/divider.cuh"
#include "cuda/common/lrn.cuh"
#include "cuda/common/units.cuh"

namespace alexnet_fast::cuda {

struct LrnShape {
  DType dtype;
  bool channels_last;
  int64_t batch, channels, pixels;
};

// Whether threads may own V > 1 neighbours in memory: a group's channels, or a plane's pixels, must be a multiple of V.
inline bool lrn_in_vectors(const LrnShape& shape, const LrnWindow& window, int V) {
  return (shape.channels_last ? shape.channels / window.groups : shape.pixels) % V == 0;
}

struct Columns {
  int64_t count;          // vectors of pixels in the batch
  Divider plane_vectors;  // vectors in a plane
  Divider chunks;         // in a column
  int64_t channels, pixels;
  int32_t group_channels, group_chunks, chunk;

  Columns(const LrnShape& shape, int64_t groups, int V, int64_t longest_chunk)
      : count(shape.batch * shape.pixels / V),
        plane_vectors(shape.pixels / V),
        channels(shape.channels),
        pixels(shape.pixels),
        group_channels(static_cast<int32_t>(shape.channels / groups)) {
    group_chunks = static_cast<int32_t>(ceil_div<int64_t>(group_channels, longest_chunk));
    chunk = ceil_div(group_channels, group_chunks);
    chunks = Divider(groups * group_chunks);
  }

  int64_t items() const { return ceil_div<int64_t>(count, kThreads); }
  // At most `items` blocks go through the columns of a chunk.
  dim3 grid(int64_t items = INT32_MAX) const { return dim3(std::min(this->items(), items) * chunks.divisor); }
};

// The chunk of this block: channels begin ... end of a group, counted from the group's first, which is first_channel.
struct Walk {
  int64_t item;
  int32_t first_channel, begin, end;

  __device__ __forceinline__ explicit Walk(const Columns& columns) {
    int64_t number;
    item = columns.chunks.divide(blockIdx.x, number);
    const int32_t group = static_cast<int32_t>(number) / columns.group_chunks;
    first_channel = group * columns.group_channels;
    begin = (static_cast<int32_t>(number) - group * columns.group_chunks) * columns.chunk;
    end = min(begin + columns.chunk, columns.group_channels);
  }

  // Offset of the group's first channel in that column.
  __device__ __forceinline__ int64_t origin(const Columns& columns, int64_t column, int V) const {
    int64_t place;
    const int64_t image = columns.plane_vectors.divide(column, place);
    return (image * columns.channels + first_channel) * columns.pixels + place * V;
  }
};

}  // namespace alexnet_fast::cuda
