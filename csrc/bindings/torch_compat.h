// What the bindings need of torch, through its stable ABI alone: dtypes, layouts, outputs, threads, streams.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>
#include <string>

// What failed in torch, for torch >= 2.13; weak, so that the library loads where it is absent.
extern "C" const char* torch_exception_get_what_without_backtrace() __attribute__((weak));

namespace alexnet_fast {

[[noreturn, gnu::noinline]] inline void fail(const char* call) {
  throw std::runtime_error(torch_exception_get_what_without_backtrace
                               ? torch_exception_get_what_without_backtrace()
                               : std::string(call) + " failed: see what torch wrote to standard error");
}

}  // namespace alexnet_fast

// torch's own macro says where a call failed, but not why; its stable headers, which follow, take this one.
#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) {     \
    alexnet_fast::fail(#call);       \
  }

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <type_traits>
#include <vector>

#include "launchers.h"

// torch < 2.13 has no stable way from a stream to its cudaStream_t. The symbol lives in CUDA builds of torch;
// weak, so that the library loads where it is absent (a CPU build of torch).
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream) __attribute__((weak));

namespace alexnet_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, "alexnet_fast: expected float32, float16, bfloat16 or float64, got scalar type ",
                      static_cast<int>(x.scalar_type()));
  }
}

// The rule of torch's suggest_memory_format: do the strides order the axes as N, H, W, C? Ambiguous cases are NCHW.
inline bool is_channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  if (strides[1] == 0) {
    return false;
  }
  int64_t least = 0;
  for (int axis : {1, 3, 2, 0}) {
    const int64_t size = sizes[axis], stride = strides[axis];
    if (size == 0 || stride < least || (axis == 0 && least == strides[1])) {
      return false;
    }
    least = size > 1 ? stride * size : stride;
  }
  return true;
}

inline MemoryFormat memory_format(bool channels_last) {
  return channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Strides of a dense tensor of `size` in that layout.
inline std::array<int64_t, 4> dense_strides(const std::array<int64_t, 4>& size, bool channels_last) {
  const auto [n, c, h, w] = size;
  return channels_last ? std::array<int64_t, 4>{h * w * c, 1, w * c, c}
                       : std::array<int64_t, 4>{c * h * w, h * w, w, 1};
}

inline bool is_dense(const Tensor& x, bool channels_last) {
  if (!channels_last) {
    return x.is_contiguous();
  }
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t stride = 1;
  for (int axis : {1, 3, 2, 0}) {
    const int64_t size = sizes[axis];
    if (size != 1 && strides[axis] != stride) {
      return false;
    }
    stride *= size;
  }
  return true;
}

// x itself if it is dense in that layout, else a copy that is.
inline Tensor dense(const Tensor& x, bool channels_last) {
  return is_dense(x, channels_last) ? x : torch::stable::contiguous(x, memory_format(channels_last));
}

// By a C function of torch's: its dispatcher takes a microsecond for the arguments alone, and a call makes many of
// them.
inline Tensor empty_strided(const Tensor& like, int64_t dim, const int64_t* size, const int64_t* strides,
                            ScalarType dtype) {
  const torch::stable::Device device = like.device();
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, size, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(device.type())), device.index(), &made));
  return Tensor(made);
}

inline Tensor empty(const Tensor& like, const std::array<int64_t, 4>& size, ScalarType dtype, bool channels_last) {
  return empty_strided(like, 4, size.data(), dense_strides(size, channels_last).data(), dtype);
}

inline Tensor empty1d(const Tensor& like, int64_t size, ScalarType dtype) {
  const int64_t stride = 1;
  return empty_strided(like, 1, &size, &stride, dtype);
}

inline void check_4d(const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, " must have 4 dimensions (N, C, H, W), got ", x.dim());
}

// The checks that keep a kernel from reading foreign memory when an operator is called past the Python functions.
inline void check_like(const Tensor& x, const Tensor& like, const char* op, const char* name) {
  STD_TORCH_CHECK(x.dim() == like.dim(), op, ": ", name, " has ", x.dim(), " dimensions, expected ", like.dim());
  const auto sizes = x.sizes(), wanted = like.sizes();
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    STD_TORCH_CHECK(sizes[axis] == wanted[axis], op, ": ", name, " has size ", sizes[axis], " in dimension ", axis,
                    ", expected ", wanted[axis]);
  }
  STD_TORCH_CHECK(x.device() == like.device(), op, ": ", name, " is on another device");
}

inline void check_dtype(const Tensor& x, ScalarType dtype, const char* op, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, op, ": ", name, " has another dtype than expected");
}

inline int64_t out_side(int64_t side, int64_t kernel, int64_t stride, int64_t padding, bool ceil_mode) {
  const int64_t free = side + 2 * padding - kernel + (ceil_mode ? stride - 1 : 0);
  // floor division: free may be negative
  int64_t out = (free >= 0 ? free / stride : -((-free + stride - 1) / stride)) + 1;
  if (ceil_mode && (out - 1) * stride >= side + padding) {
    --out;  // the last window must begin inside the image or its left padding
  }
  return out;
}

// dy's sides are those that pooling an image of height x width gives, rounded down or up.
inline void check_pooled(const Tensor& dy, int64_t height, int64_t width, const std::vector<int64_t>& kernel,
                         const std::vector<int64_t>& stride, const std::vector<int64_t>& padding, const char* op) {
  const int64_t sides[] = {height, width};
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t side = dy.size(2 + axis);
    const auto out = [&](bool up) { return out_side(sides[axis], kernel[axis], stride[axis], padding[axis], up); };
    STD_TORCH_CHECK(side == out(false) || side == out(true), op, ": dy has size ", side, " in dimension ", 2 + axis,
                    ", expected ", out(false), " or ", out(true));
  }
}

inline Window make_window(const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding) {
  const auto narrow = [](int64_t v) { return static_cast<int32_t>(v); };
  return {narrow(kernel[0]), narrow(kernel[1]),  narrow(stride[0]),
          narrow(stride[1]), narrow(padding[0]), narrow(padding[1])};
}

inline void check_window(const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                         const std::vector<int64_t>& padding, const char* op) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2, op,
                  ": kernel size, stride and padding must have two elements each");
  for (int axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(kernel[axis] > 0 && kernel[axis] <= kClosed && stride[axis] > 0 && stride[axis] <= INT32_MAX &&
                        padding[axis] >= 0 && 2 * padding[axis] <= kernel[axis],
                    op, ": pooling window of size ", kernel[axis], ", stride ", stride[axis], ", padding ",
                    padding[axis], " is not one");
  }
  STD_TORCH_CHECK(kernel[0] * kernel[1] <= kClosed, op, ": a pooling window holds at most 255 elements, got ",
                  kernel[0] * kernel[1]);
}

inline void check_lrn(const LrnWindow& lrn, int64_t channels, const char* op) {
  STD_TORCH_CHECK(lrn.size > 0, op, ": size must be positive, got ", lrn.size);
  STD_TORCH_CHECK(lrn.groups > 0 && channels % lrn.groups == 0, op, ": ", channels, " channels do not divide into ",
                  lrn.groups, " groups");
}

template <class Params>
using CudaLauncher = int (*)(const Params&, void* stream);

#if ALEXNET_FAST_CUDA
#define ALEXNET_FAST_CUDA_LAUNCHER(name) &::alexnet_fast::cuda::name
#else
#define ALEXNET_FAST_CUDA_LAUNCHER(name) nullptr
#endif

// Registers implementations that serve CPUs and GPUs: register_all takes the library and calls its impl().
#if ALEXNET_FAST_CUDA
#define ALEXNET_FAST_REGISTER(register_all)                            \
  STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, CPU, m) { register_all(m); } \
  STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, CUDA, m) { register_all(m); }
#else
#define ALEXNET_FAST_REGISTER(register_all) \
  STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, CPU, m) { register_all(m); }
#endif

// With ALEXNET_FAST_HOST_SIMT the launchers of csrc/cuda run on CPU tensors: tests then drive these bindings with them.
#ifdef ALEXNET_FAST_HOST_SIMT
#define ALEXNET_FAST_CUDA_KEY CPU
inline bool runs_cpu_kernels(const Tensor&) { return false; }
#else
#define ALEXNET_FAST_CUDA_KEY CUDA
inline bool runs_cpu_kernels(const Tensor& x) { return x.is_cpu(); }
#endif

#if ALEXNET_FAST_CUDA
// Enqueues on the current stream of x's device.
template <class Params>
void enqueue(const char* op, [[maybe_unused]] const Tensor& x, const Params& params, CudaLauncher<Params> launcher) {
  void* stream = nullptr;
#ifndef ALEXNET_FAST_HOST_SIMT
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "alexnet_fast: this torch has no CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#endif
  const int error = launcher(params, stream);
  STD_TORCH_CHECK(error == 0, op, ": ", cuda::error_string(error));
}
#endif

// Runs a kernel where x is: on torch's threads, or on its GPU.
template <class Params>
void launch(const char* op, const Tensor& x, const Params& params, const cpu::Kernel<Params>& cpu_kernel,
            [[maybe_unused]] std::common_type_t<CudaLauncher<Params>> cuda_launcher) {
  if (runs_cpu_kernels(x)) {
    torch::stable::parallel_for(0, cpu_kernel.items(params), 1,
                                [&](int64_t begin, int64_t end) { cpu_kernel.run(params, begin, end); });
    return;
  }
#if ALEXNET_FAST_CUDA
  enqueue(op, x, params, cuda_launcher);
#else
  STD_TORCH_CHECK(false, op, ": this build has no CUDA kernels");
#endif
}

}  // namespace alexnet_fast
