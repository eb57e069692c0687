// Launchers on tensors of more than 2^31 elements:  large
//
// Memory that nobody touches costs nothing, so the tensors are there in full, and the last blocks of each grid run.
// They read ones from the tensors' ends and must leave there what the same launcher makes of a small tensor of ones: an
// index cut to 32 bits would read zeros, or write elsewhere.
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "host_simt/host_simt.h"
#include "launchers.h"

using namespace alexnet_fast;

namespace {

constexpr uint16_t kOne = 0x3f80;  // in bfloat16

struct Shape {
  int64_t batch, channels, height, width;
  int64_t elements() const { return batch * channels * height * width; }
};

// A tensor that holds ones at its end, and where one channel follows the other at the end of each plane too.
template <class T>
T* ones(const Shape& shape, T one) {
  const int64_t plane = shape.height * shape.width, total = shape.elements();
  T* data = static_cast<T*>(host_simt::allocate("ones", total * sizeof(T), 0, host_simt::Content::defined));
  const int64_t span = std::min<int64_t>(total, 1 << 20);
  for (int64_t end = total; end > 0 && end > total - shape.channels * plane; end -= plane) {
    std::fill(data + std::max<int64_t>(end - span, 0), data + end, one);
  }
  return data;
}

template <class T>
T* output(const Shape& shape) {
  const size_t bytes = shape.elements() * sizeof(T);
  return static_cast<T*>(host_simt::allocate("output", bytes, 0, host_simt::Content::undefined));
}

// The last pixel's channels.
template <class T>
std::vector<T> last(const T* data, const Shape& shape, bool channels_last) {
  std::vector<T> values;
  const int64_t plane = shape.height * shape.width;
  for (int64_t c = shape.channels; c > 0; --c) {
    values.push_back(data[shape.elements() - 1 - (channels_last ? c - 1 : (c - 1) * plane)]);
  }
  return values;
}

using Values = std::vector<uint16_t>;

constexpr LrnWindow kLrn{5, 1, 0.5, 0.75, 1.0};
constexpr Window kOverlapping{3, 3, 2, 2, 0, 0};

Shape pooled(const Shape& shape) {
  return {shape.batch, shape.channels, (shape.height - 1) / 2, (shape.width - 1) / 2};
}

Values lrn(const Shape& shape, bool channels_last, bool backward) {
  const uint16_t* x = ones(shape, kOne);
  const uint16_t* dy = backward ? ones(shape, kOne) : nullptr;
  uint16_t* out = output<uint16_t>(shape);
  const LrnParams p{
      DType::bf16, channels_last, shape.batch, shape.channels, shape.height * shape.width, kLrn, x, out, dy, out};
  if ((backward ? cuda::lrn_bwd(p, nullptr) : cuda::lrn_fwd(p, nullptr)) != cudaSuccess) {
    return {};
  }
  return last(out, shape, channels_last);
}

Values max_pool(const Shape& shape, bool channels_last, bool backward) {
  const Shape small = pooled(shape);
  PoolParams p{DType::bf16, channels_last, shape.batch, shape.channels, shape.height,
               shape.width, small.height,  small.width, kOverlapping};
  if (backward) {
    p.dy = ones(small, kOne);
    p.code = ones<uint8_t>(small, 8);  // the window's last pixel
    p.dx = output<uint16_t>(shape);
    return cuda::max_pool_bwd(p, nullptr) == cudaSuccess ? last(static_cast<uint16_t*>(p.dx), shape, channels_last)
                                                         : Values{};
  }
  p.x = ones(shape, kOne);
  p.y = output<uint16_t>(small);
  p.code = output<uint8_t>(small);
  return cuda::max_pool_fwd(p, nullptr) == cudaSuccess ? last(static_cast<uint16_t*>(p.y), small, channels_last)
                                                       : Values{};
}

Values epilogue(const Shape& shape, bool channels_last, bool backward, bool normalizing, bool pooling) {
  const Shape small = pooling ? pooled(shape) : shape;
  EpilogueParams p{DType::bf16,
                   channels_last,
                   shape.batch,
                   shape.channels,
                   shape.height,
                   shape.width,
                   small.height,
                   small.width,
                   normalizing ? kLrn : LrnWindow{},
                   pooling ? kOverlapping : Window{}};
  if (backward) {
    p.dy = ones(small, kOne);
    p.code = pooling ? ones<uint8_t>(small, 8) : nullptr;
    p.r = normalizing || !pooling ? ones(shape, kOne) : nullptr;
    p.dz = output<uint16_t>(shape);
    return cuda::epilogue_bwd(p, nullptr) == cudaSuccess ? last(static_cast<uint16_t*>(p.dz), shape, channels_last)
                                                         : Values{};
  }
  p.z = ones(shape, kOne);
  p.y = output<uint16_t>(small);
  p.code = pooling ? output<uint8_t>(small) : nullptr;
  p.r = normalizing ? output<uint16_t>(shape) : nullptr;
  return cuda::epilogue_fwd(p, nullptr) == cudaSuccess ? last(static_cast<uint16_t*>(p.y), small, channels_last)
                                                       : Values{};
}

// 3 x 3 windows in one layout, NHWC. Backward: the input's gradient, whose work lies over pixels as forward's does.
ConvParams convolution(const Shape& shape) {
  ConvParams p{};
  p.dtype = DType::bf16;
  p.batch = shape.batch;
  p.channels = p.out_channels = shape.channels;
  p.height = p.out_height = shape.height;
  p.width = p.out_width = shape.width;
  p.window = {3, 3, 1, 1, 1, 1};
  p.dilation_h = p.dilation_w = p.groups = 1;
  p.weight = ones(Shape{1, shape.channels, 3, 3 * shape.channels}, kOne);
  return p;
}

void* workspace(int64_t bytes) { return host_simt::allocate("workspace", bytes, 0, host_simt::Content::undefined); }

Values conv_relu(const Shape& shape, bool backward) {
  ConvParams p = convolution(shape);
  uint16_t* out = output<uint16_t>(shape);
  const uint16_t* in = ones(shape, kOne);
  (backward ? p.dy : p.x) = in;
  (backward ? p.dx : p.y) = out;
  p.workspace = workspace(backward ? cuda::conv_relu_bwd_workspace_bytes(p) : cuda::conv_relu_fwd_workspace_bytes(p));
  const int error = backward ? cuda::conv_relu_bwd(p, nullptr) : cuda::conv_relu_fwd(p, nullptr);
  return error == cudaSuccess ? last(out, shape, true) : Values{};
}

Values conv_stage(const Shape& shape) {
  const Shape small = pooled(shape);
  StageParams p{};
  p.conv = convolution(shape);
  p.conv.x = ones(shape, kOne);
  p.pool = kOverlapping;
  p.pooled_height = small.height;
  p.pooled_width = small.width;
  p.pooled = output<uint16_t>(small);
  p.code = output<uint8_t>(small);
  p.conv.workspace = workspace(cuda::conv_stage_fwd_workspace_bytes(p));
  return cuda::conv_stage_fwd(p, nullptr) == cudaSuccess ? last(static_cast<uint16_t*>(p.pooled), small, true)
                                                         : Values{};
}

struct Case {
  const char* name;
  std::function<Values(const Shape&, bool)> run;
  bool nchw = true, one_image = true;
};

}  // namespace

int main() {
  // Small, and the same but for one side: 2^22 images, or an image of 2^14 x 2^14 pixels.
  const Shape small{2, 8, 9, 11}, many{(1 << 22) + 1, 8, 9, 11}, wide{1, 8, (1 << 14) + 1, (1 << 14) + 3};
  const std::vector<Case> cases = {
      {"lrn_fwd", [](const Shape& s, bool last) { return lrn(s, last, false); }},
      {"lrn_bwd", [](const Shape& s, bool last) { return lrn(s, last, true); }},
      {"max_pool_fwd", [](const Shape& s, bool last) { return max_pool(s, last, false); }},
      {"max_pool_bwd", [](const Shape& s, bool last) { return max_pool(s, last, true); }},
      {"epilogue_fwd", [](const Shape& s, bool last) { return epilogue(s, last, false, false, false); }},
      {"epilogue_fwd with both", [](const Shape& s, bool last) { return epilogue(s, last, false, true, true); }},
      {"epilogue_bwd", [](const Shape& s, bool last) { return epilogue(s, last, true, false, false); }},
      {"epilogue_bwd with both", [](const Shape& s, bool last) { return epilogue(s, last, true, true, true); }},
      {"conv_relu_fwd", [](const Shape& s, bool) { return conv_relu(s, false); }, false},
      {"conv_relu_bwd", [](const Shape& s, bool) { return conv_relu(s, true); }, false},
      // A block of conv_stage_fwd goes through a whole image.
      {"conv_stage_fwd", [](const Shape& s, bool) { return conv_stage(s); }, false, false},
  };
  int wrong = 0;
  for (const Case& one : cases) {
    for (const bool channels_last : {false, true}) {
      if (!channels_last && !one.nchw) {
        continue;
      }
      host_simt::run_last_blocks(UINT32_MAX);
      const Values expected = one.run(small, channels_last);
      host_simt::free_all();
      for (const Shape& shape : {many, wide}) {
        if (shape.batch == 1 && !one.one_image) {
          continue;
        }
        host_simt::run_last_blocks(12);
        const Values found = one.run(shape, channels_last);
        host_simt::free_all();
        const bool right = !found.empty() && found == expected && shape.elements() > (int64_t{1} << 31);
        wrong += !right;
        std::fprintf(stderr, "%s, %s, %s: %s\n", one.name, channels_last ? "NHWC" : "NCHW",
                     shape.batch > 1 ? "many images" : "one image", right ? "right" : "wrong");
      }
    }
  }
  return wrong != 0;
}
