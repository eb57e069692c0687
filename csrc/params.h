// Plain structs that kernels receive: no torch type, no ownership, nothing optional but null pointers.
//
// Axes: N batch, C channels, H height, W width, P = H * W pixels of one image.
// Every tensor is dense in one of two layouts: NCHW (`channels_last == false`) or NHWC (`channels_last == true`).
// All counts are 64-bit; the bindings have checked shapes, dtypes and devices before a kernel sees a struct.
#pragma once

#include <cstdint>

namespace alexnet_fast {

enum class DType : int32_t { f32, f16, bf16, f64 };

// A pooling window, or where a convolution's kernel goes. The bindings work out the size of the output and pass it on.
struct Window {
  int32_t kernel_h, kernel_w;
  int32_t stride_h, stride_w;
  int32_t pad_h, pad_w;
};

// y = x * t^-beta with t = k + alpha / size * (sum of x^2 over the window of `size` channels around c),
// the window being c - size/2 ... c + (size-1)/2, cut off at the ends of c's group.
struct LrnWindow {
  int32_t size;  // 0: no normalization (epilogue and conv_stage alone)
  int32_t groups;
  double alpha, beta, k;
};

struct LrnParams {
  DType dtype;
  bool channels_last;
  int64_t batch, channels, pixels;
  LrnWindow lrn;
  const void* x;
  void* y;         // forward
  const void* dy;  // backward
  void* dx;        // backward
};

// code: for each output, the winner's place kernel_w * row + column in the whole (uncut) window.
struct PoolParams {
  DType dtype;
  bool channels_last;
  int64_t batch, channels, height, width, out_height, out_width;
  Window window;
  const void* x;
  void* y;
  uint8_t* code;   // written forward unless null, read backward
  const void* dy;  // backward
  void* dx;        // backward
};

// y = pool(lrn(relu(z + bias))), the last two optional.
// With pooling and without LRN `code` also says "max <= 0" (kClosed): it is the ReLU's mask, and backward needs no
// other tensor. With LRN, `r` = relu(z + bias) is kept. With neither, backward reads y, which then is the ReLU's
// output.
constexpr uint8_t kClosed = 255;

struct EpilogueParams {
  DType dtype;
  bool channels_last;
  int64_t batch, channels, height, width, out_height, out_width;  // out_* = height, width without pooling
  LrnWindow lrn;                                                  // size 0: none
  Window window;                                                  // kernel_h 0: no pooling
  const void* z;
  const void* bias;  // C elements of dtype, or null
  void* y;
  uint8_t* code;     // forward: written unless null. backward: read when pooling
  void* r;           // forward: written unless null. backward: the ReLU's output, read when there is LRN or no pooling
  const void* dy;    // backward
  void* dz;          // backward
  void* db_partial;  // backward: rows of C sums in the accumulation type (double for f64, else float), or null
  void* db;          // backward on CUDA, whose launcher adds the rows up: C elements of dtype
};

// y = (x - shift) / scale over crops of uint8 NHWC images of three channels, mirrored or not. y is (N, out_height,
// out_width, factor_h, factor_w, 3): pixel (i, j, a, b) is (i factor_h + a - pad_h, j factor_w + b - pad_w) of the
// crop, and 0 outside of it. Factors of 1 and no padding leave the crop as it is.
struct AugmentParams {
  DType dtype;  // of y
  int64_t batch, height, width, crop_height, crop_width, out_height, out_width;
  int64_t factor_h, factor_w, pad_h, pad_w;
  const uint8_t* x;
  const int32_t* place;  // (N, 3): the crop's first row, its first column, and 1 if it is mirrored
  const float* shift;    // (N, 3)
  const float* scale;    // (3)
  void* y;
};

// d = sum over channels of weight * (a / (|a| + eps) - b / (|b| + eps))^2 at each pixel, a and b being the features of
// images n and n + pairs in x; y is d, or its mean over pixels.
constexpr double kLpipsEpsilon = 1e-10;
constexpr int64_t kLpipsUnit = 64;  // pixels whose distances are added up as one partial sum

struct LpipsParams {
  DType dtype;  // of x and dx; all other tensors have the accumulation type
  bool channels_last, spatial;
  int64_t pairs, channels, pixels;
  const void* x;       // 2 * pairs images
  const void* weight;  // C
  void* y;             // forward: (pairs, P) if spatial, else (pairs), which on CPUs the bindings add up
  void* partial;       // forward unless spatial: (pairs, units) sums. backward: rows of C numbers, or null
  const void* dy;      // backward: as y
  void* dx;            // backward
  void* dweight;       // backward on CUDA, whose launcher adds the rows up: C
};

inline int64_t lpips_units(const LpipsParams& p) { return (p.pixels + kLpipsUnit - 1) / kLpipsUnit; }

// y = scales * (x weight^T) + bias, of int8 weights with a scale for each output.
struct LinearInt8Params {
  DType dtype;  // of x, bias and y; scales have the accumulation type
  int64_t rows, inputs, outputs;
  const void* x;         // (rows, inputs)
  const int8_t* weight;  // (outputs, inputs)
  const void* scales;    // (outputs)
  const void* bias;      // (outputs), or null
  void* y;               // (rows, outputs)
};

// y = x weight^T + bias, or max(0, ...) of it.
struct LinearParams {
  DType dtype;
  bool relu;
  int64_t rows, inputs, outputs;
  const void* x;       // (rows, inputs)
  const void* weight;  // (outputs, inputs)
  const void* bias;    // (outputs), or null
  void* y;             // (rows, outputs)
};

// One step of SGD:
//   torch  g = g + weight_decay * w; v = momentum * v + keep * g, or g at first; g = v, or g + momentum * v (nesterov);
//          w = w - lr * g
//   2012   v = momentum * v - decayed_lr * w - lr * g; w = w + v
struct SgdParams {
  DType dtype;  // of grad and copy
  int64_t count;
  float lr, momentum, keep, weight_decay, decayed_lr;  // keep: 1 - dampening; decayed_lr: weight_decay * lr
  bool nesterov, rule_2012, first;
  float* weight;
  const void* grad;
  float* velocity;  // null without momentum
  void* copy;       // the weight in 16 bits, written; or null
};

// y = relu(w * x + bias) over NHWC tensors, and its gradients. K output channels, kernel R x S, output P x Q.
struct ConvParams {
  DType dtype;
  bool allow_tf32;  // float32 operands may be rounded to TF32
  bool prepared;    // forward: weight is what conv_prepare has written, at a multiple of 16 bytes
  bool mask_dx;     // backward, of csrc/cuda/sm90 alone: dx is 0 where x, then a ReLU's output, is not positive
  int32_t tile;     // 0: by the kernel's table; else that row of it, counted from 1 (for measurements and tests)
  int64_t batch, channels, height, width, out_channels, out_height, out_width;
  Window window;
  int32_t dilation_h, dilation_w;
  int32_t groups;
  const void* x;       // (N, H, W, C)
  const void* weight;  // (K, R, S, C / groups)
  const void* bias;    // (K) or null
  void* y;             // (N, P, Q, K). forward: written. backward: the ReLU's output, or null if dy is masked already
  const void* dy;      // backward
  void* dx;            // backward; these three may be null: not wanted
  void* dweight;
  void* dbias;
  void* workspace;  // as many bytes as the launcher's *_workspace_bytes says, at a multiple of 256
};

// y = pool(lrn(relu(w * x + bias))), at least one of the two; the convolution's fields as above, but for y.
struct StageParams {
  ConvParams conv;
  LrnWindow lrn;  // size 0: none
  Window pool;    // kernel_h 0: none
  int64_t pooled_height, pooled_width;
  void* pooled;   // (N, pooled height, pooled width, K)
  uint8_t* code;  // as EpilogueParams::code, or null
  void* r;        // as EpilogueParams::r, or null
};

}  // namespace alexnet_fast
