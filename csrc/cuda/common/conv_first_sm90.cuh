// What conv_relu_fwd.cu and conv_stage_fwd.cu of csrc/cuda/sm90 hand on to conv_first_fwd.cu, and when.
#pragma once

#include <cmath>

#include "cuda/common/conv.cuh"

namespace alexnet_fast::cuda::sm90 {

constexpr int32_t kFirstTiles = 2;  // they go on with the numbers of their callers' tiles

// Max-pooling by windows of 3 with stride 2, behind the convolution; or none.
struct FirstPooling {
  int64_t height = 0, width = 0;  // of the pooled output
  void* y = nullptr;
  uint8_t* code = nullptr;
};

// How the kernel would go through the convolution: with which of its tiles, from 1 on, by bands of how many rows (of
// the pooled output, where there is pooling), and in how many cycles by estimate. No tile if it does not take it.
struct FirstPlan {
  int32_t tile = 0;
  int64_t band_rows = 0;
  double cycles = INFINITY;
};

// The best plan, or the best one with `tile` if that is not 0.
FirstPlan plan_first(const Convolution& convolution, const FirstPooling& pooling, int multiprocessors, int32_t tile);

int launch_first(const Convolution& convolution, const FirstPooling& pooling, const FirstPlan& plan,
                 int multiprocessors, void* stream);

}  // namespace alexnet_fast::cuda::sm90
