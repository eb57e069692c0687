// Division by a number that is known at launch: for dividends of 32 bits, a multiplication and a shift.
#pragma once

#include "cuda/common/launch.cuh"

namespace alexnet_fast::cuda {

// Round-up method (Granlund and Montgomery, 1994): with s = ceil(log2 d) and m = floor(2^32 (2^s - d) / d) + 1,
// n / d = (mulhi(n, m) + n) >> s for every 32-bit n. Larger dividends take the ordinary 64-bit division.
struct Divider {
  int64_t divisor;
  uint32_t multiplier, shift;

  Divider() = default;
  explicit Divider(int64_t d) : divisor(d), multiplier(0), shift(0) {
    if (d <= UINT32_MAX) {
      while ((int64_t{1} << shift) < d) {
        ++shift;
      }
      multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
    }
  }

  __device__ __forceinline__ int64_t divide(int64_t n) const {
    if (((n | divisor) >> 32) != 0) {
      return n / divisor;
    }
    const uint32_t small = static_cast<uint32_t>(n);
    return (static_cast<uint64_t>(__umulhi(small, multiplier)) + small) >> shift;
  }

  // The same for a divisor that has 32 bits as well.
  __device__ __forceinline__ uint32_t divide_small(uint32_t n, uint32_t& rest) const {
    const uint32_t quotient = static_cast<uint32_t>((static_cast<uint64_t>(__umulhi(n, multiplier)) + n) >> shift);
    rest = n - quotient * static_cast<uint32_t>(divisor);
    return quotient;
  }

  // Returns n / divisor and leaves the remainder in `rest`.
  __device__ __forceinline__ int64_t divide(int64_t n, int64_t& rest) const {
    const int64_t quotient = divide(n);
    rest = n - quotient * divisor;
    return quotient;
  }
};

}  // namespace alexnet_fast::cuda
