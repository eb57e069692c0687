#include "torch_compat.h"

namespace alexnet_fast {
namespace {

// place: int32 (N, 3), the crop's first row and column, and whether it is mirrored. shift: float32 (N, 3).
// scale: float32 (3). factor, padding, sides: how crops of height x width are folded, see params.h.
Tensor augment(const Tensor& input, const Tensor& place, const Tensor& shift, const Tensor& scale, int64_t height,
               int64_t width, ScalarType dtype, const Ints& factor, const Ints& padding, const Ints& sides) {
  check_4d(input, "augment", "images");
  check_dtype(input, ScalarType::Byte, "augment", "images");
  check_dtype(place, ScalarType::Int, "augment", "place");
  check_dtype(shift, ScalarType::Float, "augment", "shift");
  check_dtype(scale, ScalarType::Float, "augment", "scale");
  const int64_t batch = input.size(0);
  STD_TORCH_CHECK(input.size(1) == 3 && place.numel() == batch * 3 && shift.numel() == batch * 3 && scale.numel() == 3,
                  "augment: images must have 3 channels; place and shift, 3 numbers an image; scale, 3");
  STD_TORCH_CHECK(factor.size() == 2 && padding.size() == 2 && sides.size() == 2,
                  "augment: factor, padding and sides must have two elements each");
  for (int axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(factor[axis] > 0 && factor[axis] <= INT32_MAX && padding[axis] >= 0 && padding[axis] <= INT32_MAX &&
                        sides[axis] > 0 && sides[axis] <= INT32_MAX,
                    "augment: factor ", factor[axis], ", padding ", padding[axis], " and side ", sides[axis],
                    " are no fold");
  }
  const Tensor images = dense(input, true);
  const Tensor places = torch::stable::contiguous(place), shifts = torch::stable::contiguous(shift),
               scales = torch::stable::contiguous(scale);
  Tensor y = empty(images, {batch, factor[0] * factor[1] * 3, sides[0], sides[1]}, dtype, true);
  AugmentParams params{};
  params.dtype = dtype_of(y);
  STD_TORCH_CHECK(params.dtype != DType::f64, "augment: float64 is not supported");
  params.batch = batch;
  params.height = images.size(2);
  params.width = images.size(3);
  params.crop_height = height;
  params.crop_width = width;
  params.out_height = sides[0];
  params.out_width = sides[1];
  params.factor_h = factor[0];
  params.factor_w = factor[1];
  params.pad_h = padding[0];
  params.pad_w = padding[1];
  params.x = static_cast<const uint8_t*>(images.const_data_ptr());
  params.place = static_cast<const int32_t*>(places.const_data_ptr());
  params.shift = static_cast<const float*>(shifts.const_data_ptr());
  params.scale = static_cast<const float*>(scales.const_data_ptr());
  params.y = y.mutable_data_ptr();
  for (int64_t image = 0; image < batch; ++image) {
    const int32_t* const at = params.place + image * 3;
    STD_TORCH_CHECK(at[0] >= 0 && at[0] + height <= params.height && at[1] >= 0 && at[1] + width <= params.width,
                    "augment: the crop of image ", image, " reaches beyond it");
  }
  if (y.numel() > 0) {
    launch("augment", images, params, cpu::kernels().augment_fwd, nullptr);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, CPU, m) { m.impl("augment", TORCH_BOX(&augment)); }

}  // namespace alexnet_fast
