// One warp's share of a matrix product, by tensor cores or by ordinary multiply-adds, from operands in shared memory.
//
// Both ways keep the product where mma() keeps it (mma.cuh): lane 4 g + t owns, of each 16 x 8 tile, rows g and g + 8
// in columns 2 t and 2 t + 1. So whatever follows a product does not ask how it was made.
//
// Operands lie in shared memory in one of two ways:
//
//   slabs    a row of the operand is contiguous in depth: rows of 64 bytes, that is 32 (16-bit) or 16 (float32) deep
//   columns  the depth is the slow axis: one line for each step in depth, as long as the tile is wide
//
// 16-byte chunks are swizzled within a line, so that the eight rows an ldmatrix phase reads, and the eight chunks a
// quarter-warp copies, fall into different banks.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/vector.cuh"

namespace alexnet_fast::cuda {

// How products are formed. T: f16, bf16, or float for TF32.
template <class T>
struct TensorCores {
  using Element = T;
};

struct MultiplyAdd {
  using Element = float;
};

// ---------------------------------------------------------------- layouts

constexpr int kSlabBytes = 64;
constexpr int kSlabChunks = 4;

// Two rows of 64 bytes share a 128-byte line, hence row / 2.
__device__ __forceinline__ int slab_offset(int row, int chunk) {
  return row * kSlabBytes + ((chunk ^ (row >> 1 & 3)) << 4);
}

// Chunk c of a line lies at c ^ column_swizzle(line). float32 has no transposing ldmatrix: there, four lines are read
// in words, eight neighbours (two chunks) of each.
template <class T>
__device__ __forceinline__ int column_swizzle(int line) {
  return sizeof(T) == 2 ? line & 7 : (line & 3) << 1;
}

// ---------------------------------------------------------------- the product

template <class Math, int kRows, int kColumns>
struct WarpTile {
  using T = typename Math::Element;
  static_assert(kRows % 16 == 0 && kColumns % 16 == 0);
  static constexpr int kRowTiles = kRows / 16, kColumnTiles = kColumns / 8;
  static constexpr bool kTensorCores = !std::is_same_v<Math, MultiplyAdd>;

  float sums[kRowTiles][kColumnTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (float& sum : sums[i][j]) {
          sum = 0;
        }
      }
    }
  }

  // Adds value(column) to each column of this lane's share.
  template <class Value>
  __device__ __forceinline__ void add_to_columns(int lane, Value&& value) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float shift = value(8 * j + 2 * (lane % 4) + e);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          sums[i][j][e] += shift;
          sums[i][j][2 + e] += shift;
        }
      }
    }
  }

  // Calls body(row, column, first, second) for each pair of neighbours in a row of this lane's share.
  template <class Body>
  __device__ __forceinline__ void for_pairs(int lane, Body&& body) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          body(16 * i + 8 * half + lane / 4, 8 * j + 2 * (lane % 4), sums[i][j][2 * half], sums[i][j][2 * half + 1]);
        }
      }
    }
  }

  // sums += A B^T over one slab's depth; `a` and `b` point at the first rows of this warp, multiples of 8. Steps of
  // eight rows leave the swizzle as it is, so they are constants beside one address a lane.
  __device__ __forceinline__ void multiply_slabs(const unsigned char* a, const unsigned char* b, int lane) {
    if constexpr (kTensorCores) {
#pragma unroll
      for (int step = 0; step < kSlabBytes / 32; ++step) {
        const unsigned char* a_lane = a + slab_offset(lane % 16, 2 * step + lane / 16);
        const unsigned char* b_lane = b + slab_offset(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2);
        uint32_t right[kColumnTiles][2];
#pragma unroll
        for (int j = 0; j < kColumnTiles; j += 2) {
          load_fragments(right[j], right[j + 1], b_lane + 8 * j * kSlabBytes);
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          uint32_t left[4];
          load_matrix(left, a_lane + 16 * i * kSlabBytes);
          round_operand(left);
          multiply(i, left, right);
        }
      }
    } else {
#pragma unroll
      for (int chunk = 0; chunk < kSlabChunks; ++chunk) {
        const unsigned char* a_lane = a + slab_offset(lane / 4, chunk);
        const unsigned char* b_lane = b + slab_offset(2 * (lane % 4), chunk);  // and the row after it, in the same line
        Pack<float, 4> right[kColumnTiles][2];
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            right[j][e] = load<4>(floats(b_lane + (8 * j + e) * kSlabBytes));
          }
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto left = load<4>(floats(a_lane + (16 * i + 8 * half) * kSlabBytes));
#pragma unroll
            for (int depth = 0; depth < 4; ++depth) {
#pragma unroll
              for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                  float& sum = sums[i][j][2 * half + e];
                  sum = fmaf(element(left, depth), element(right[j][e], depth), sum);
                }
              }
            }
          }
        }
      }
    }
  }

  // sums += A^T B over kDepth lines; this warp's rows begin at chunk `a_chunk` of A's lines, its columns at `b_chunk`
  // of B's. Both are multiples of the warp's own number of chunks, a power of two: to go from there to any of the
  // warp's chunks, swizzled, is an exclusive or with a constant.
  template <int kDepth, int kLineBytesA, int kLineBytesB>
  __device__ __forceinline__ void multiply_columns(const unsigned char* a, int a_chunk, const unsigned char* b,
                                                   int b_chunk, int lane) {
    static_assert((kRows & (kRows - 1)) == 0 && (kColumns & (kColumns - 1)) == 0);
    static_assert(kLineBytesA % 128 == 0 && kLineBytesB % 128 == 0);
    if constexpr (!kTensorCores) {
#pragma unroll 4
      for (int depth = 0; depth < kDepth; ++depth) {
        const int b_first = (b_chunk + lane % 4 / 2) ^ swizzle(depth), a_first = (a_chunk + lane / 16) ^ swizzle(depth);
        float right[kColumnTiles][2];
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
          const auto pair = load<2>(floats(b + depth * kLineBytesB, b_first ^ 2 * j) + lane % 2 * 2);
          right[j][0] = element(pair, 0);
          right[j][1] = element(pair, 1);
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float left = floats(a + depth * kLineBytesA, a_first ^ (4 * i + 2 * half))[lane / 4 % 4];
#pragma unroll
            for (int j = 0; j < kColumnTiles; ++j) {
              sums[i][j][2 * half] = fmaf(left, right[j][0], sums[i][j][2 * half]);
              sums[i][j][2 * half + 1] = fmaf(left, right[j][1], sums[i][j][2 * half + 1]);
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int depth = 0; depth < kDepth; depth += kMmaDepth<T>) {
        uint32_t right[kColumnTiles][2];
        if constexpr (sizeof(T) == 2) {
          const int line = depth + lane % 16, first = (b_chunk + lane / 16) ^ swizzle(line);
#pragma unroll
          for (int j = 0; j < kColumnTiles; j += 2) {
            uint32_t both[4];
            load_matrix<true>(both, b + line * kLineBytesB + ((first ^ j) << 4));
            right[j][0] = both[0];
            right[j][1] = both[1];
            right[j + 1][0] = both[2];
            right[j + 1][1] = both[3];
          }
        } else {
          const int line = depth + lane % 4, first = (b_chunk + lane / 16) ^ swizzle(line);
#pragma unroll
          for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {  // four lines on, the swizzle is the same
              right[j][k] = tf32(floats(b + (line + 4 * k) * kLineBytesB, first ^ 2 * j)[lane / 4 % 4]);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          uint32_t left[4];
          if constexpr (sizeof(T) == 2) {
            const int line = depth + lane / 16 * 8 + lane % 8, first = (a_chunk + lane / 8 % 2) ^ swizzle(line);
            load_matrix<true>(left, a + line * kLineBytesA + ((first ^ 2 * i) << 4));
          } else {
            const int line = depth + lane % 4, first = (a_chunk + lane / 16) ^ swizzle(line);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              left[k] = tf32(floats(a + (line + k / 2 * 4) * kLineBytesA, first ^ (4 * i + k % 2 * 2))[lane / 4 % 4]);
            }
          }
          multiply(i, left, right);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ const float* floats(const unsigned char* at) {
    return reinterpret_cast<const float*>(at);
  }

  static __device__ __forceinline__ const float* floats(const unsigned char* line, int chunk) {
    return floats(line + (chunk << 4));
  }

  static __device__ __forceinline__ int swizzle(int line) { return column_swizzle<T>(line); }

  static __device__ __forceinline__ void load_fragments(uint32_t (&first)[2], uint32_t (&second)[2], const void* row) {
    uint32_t both[4];
    load_matrix(both, row);
    round_operand(both);
    first[0] = both[0];
    first[1] = both[1];
    second[0] = both[2];
    second[1] = both[3];
  }

  // The tensor core would cut the mantissa of a float32 off after ten bits, which moves every product towards zero.
  static __device__ __forceinline__ void round_operand(uint32_t (&operand)[4]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (uint32_t& word : operand) {
        word = tf32(__uint_as_float(word));
      }
    }
  }

  __device__ __forceinline__ void multiply(int i, const uint32_t (&left)[4], const uint32_t (&right)[kColumnTiles][2]) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
      mma<T>(sums[i][j], left, right[j]);
    }
  }
};

}  // namespace alexnet_fast::cuda
