// A succession of layers, or one alone, as one operator. alexnet_fast.ops.run plans it for one shape of the input;
// run() carries it out, and run_backward() is its gradient.
#include "run.h"

#include <pybind11/stl.h>
#include <structmember.h>

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "conv.h"
#include "direct.h"
#include "operators.h"
#include "sums.h"

namespace py = pybind11;

namespace alexnet_fast {
namespace {

using torch::stable::detail::from, torch::stable::detail::to;

enum class Kind { conv, packed_conv, linear, onednn_linear, epilogue, flatten, lrn, max_pool };

const std::unordered_map<std::string, Kind> KINDS{{"conv", Kind::conv},
                                                  {"packed_conv", Kind::packed_conv},
                                                  {"linear", Kind::linear},
                                                  {"flatten", Kind::flatten},
                                                  {"onednn_linear", Kind::onednn_linear},
                                                  {"lrn", Kind::lrn},
                                                  {"max_pool", Kind::max_pool},
                                                  {"epilogue", Kind::epilogue}};

struct Layer {
  Kind kind;
  bool bias, relu, ceil_mode, channels_last;  // channels_last: what a packed weight was
  bool tuned;                                 // computes by what alexnet_fast/tuning.py chooses for the call
  Ints stride, padding, dilation;
  int64_t groups, lrn_size, lrn_groups;
  double alpha, beta, k;
  Ints pool_kernel, pool_stride, pool_padding;
  Ints sides;        // what backward cannot see: flatten's input but for the batch; else the sides of what is pooled
  size_t parameter;  // the first one's place: the weight's, if there is one

  bool has_weight() const { return kind <= Kind::onednn_linear; }
  bool convolves() const { return kind <= Kind::packed_conv; }
  size_t bias_place() const { return parameter + has_weight(); }
  size_t end() const { return bias_place() + bias; }
  bool normalizes() const { return lrn_size != 0; }
  // An LRN alone keeps its input instead.
  bool keeps_r() const { return normalizes() && kind != Kind::lrn; }
  bool pools() const { return pool_kernel[0] != 0; }
  // With neither LRN nor pooling the result is the ReLU's output, so its mask.
  bool masks_by_output() const { return relu && !normalizes() && !pools(); }
  // Whether its backward saves a pass where dy is masked already.
  bool takes_masked() const { return kind == Kind::conv && tuned && masks_by_output(); }
};

// What of a call is wanted: bit 0 stands for the input, then one for each parameter.
struct Wanted {
  uint64_t bits;
  bool operator()(size_t place) const { return (bits >> place) & 1; }
};

class Run {
 public:
  static constexpr const char* NAME = "run: there is no run ";
  Run(const std::vector<py::object>& planned, std::vector<Ints> shapes) : shapes_(std::move(shapes)) {
    size_t parameter = 1;
    for (const py::object& from : planned) {
      const auto ints = [&](const char* name) { return from.attr(name).cast<Ints>(); };
      const auto number = [&](const char* name) { return from.attr(name).cast<int64_t>(); };
      const auto real = [&](const char* name) { return from.attr(name).cast<double>(); };
      const auto flag = [&](const char* name) { return from.attr(name).cast<bool>(); };
      Layer layer{KINDS.at(from.attr("kind").cast<std::string>()),
                  flag("bias"),
                  flag("relu"),
                  flag("ceil_mode"),
                  flag("channels_last"),
                  flag("tuned"),
                  ints("stride"),
                  ints("padding"),
                  ints("dilation"),
                  number("groups"),
                  number("lrn_size"),
                  number("lrn_groups"),
                  real("alpha"),
                  real("beta"),
                  real("k"),
                  ints("pool_kernel"),
                  ints("pool_stride"),
                  ints("pool_padding"),
                  ints("sides"),
                  parameter};
      packable_.resize(parameter, false);
      packable_.push_back(layer.kind == Kind::packed_conv || layer.kind == Kind::onednn_linear);
      parameter = layer.end();
      packable_.resize(parameter, false);
      layers_.push_back(std::move(layer));
    }
    STD_TORCH_CHECK(parameter == shapes_.size() && parameter <= 64, "run: ", shapes_.size(), " shapes for ", parameter,
                    " tensors; at most 64");
  }

  // Whether the tensors are those that the run was planned for.
  bool takes(const Tensor& x, const std::vector<Tensor>& parameters) const {
    if (parameters.size() + 1 != shapes_.size() || !has_shape(x, 0)) {
      return false;
    }
    const ScalarType dtype = x.scalar_type();
    const torch::stable::Device device = x.device();
    for (size_t i = 0; i < parameters.size(); ++i) {
      const Tensor& parameter = parameters[i];
      if (parameter.scalar_type() != dtype || parameter.device() != device || !has_shape(parameter, i + 1)) {
        return false;
      }
    }
    return true;
  }

  std::vector<Tensor> forward(const Tensor& input, const std::vector<Tensor>& parameters, Wanted wanted) const {
    const size_t first = first_of(wanted);
    std::vector<Tensor> results{input};
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& layer = layers_[i];
      const bool training = i >= first;
      auto [y, code, r] = apply(layer, results[0], i == 0, parameters, training);
      results[0] = std::move(y);
      if (keeps_output(i, first, wanted)) results.push_back(results[0]);
      if (training) {
        if (layer.pools()) results.push_back(std::move(*code));
        if (layer.keeps_r()) results.push_back(std::move(*r));
      }
    }
    return results;
  }

  // x: the input, or any tensor if it was not kept. weights: of the layers from the first one on that gets a gradient,
  // but not of a linear layer whose input gets none. kept: what forward returned after its result; each tensor of it is
  // let go with the layer that it was kept for, so that no more memory is held than by one node a layer.
  // The gradients that are wanted, in order.
  std::vector<Tensor> backward(Tensor dy, const Tensor& x, const std::vector<Tensor>& weights, std::vector<Tensor> kept,
                               Wanted wanted) const {
    const size_t first = first_of(wanted), last = layers_.size();
    std::vector<Tensor*> outputs(last), codes(last), rs(last);
    std::vector<const Tensor*> weight_of(last);
    std::vector<Maybe> gradients(shapes_.size());
    size_t next = 0, weight = 0;
    const auto take = [&] { return next < kept.size() ? &kept[next++] : (next = kept.size() + 1, nullptr); };
    for (size_t i = 0; i < last; ++i) {
      if (keeps_output(i, first, wanted)) outputs[i] = take();
      if (i < first) continue;
      if (layers_[i].pools()) codes[i] = take();
      if (layers_[i].keeps_r()) rs[i] = take();
      if (layers_[i].convolves() || (layers_[i].has_weight() && (i > first || wanted(0)))) {
        weight_of[i] = weight < weights.size() ? &weights[weight] : nullptr;
        ++weight;
      }
    }
    STD_TORCH_CHECK(next == kept.size() && weight == weights.size(),
                    "run_backward: these are not the tensors that were kept");
    const auto let_go = [](Tensor* tensor) {
      if (tensor) const Tensor gone = std::move(*tensor);
    };
    bool masked = false;  // whether dy is, by the layer's own ReLU
    for (size_t i = last; i-- > first;) {
      const Layer& layer = layers_[i];
      const Tensor& in = i == 0 || !outputs[i - 1] ? x : *outputs[i - 1];
      const bool want_x = i > first || wanted(0), want_bias = layer.bias && wanted(layer.bias_place());
      const bool want_weight = layer.has_weight() && wanted(layer.parameter);
      bool masks = i > first && layer.kind == Kind::conv && layers_[i - 1].takes_masked();
      Maybe dx, dweight, dbias;
      switch (layer.kind) {
        case Kind::conv:
          if (layer.takes_masked()) {
            const Maybe y = masked ? std::nullopt : Maybe(*outputs[i]);
            std::tie(dx, dweight, dbias) =
                conv_relu_backward(layer, dy, in, *weight_of[i], y, {want_x, want_weight, want_bias}, masks);
            break;
          }
          [[fallthrough]];
        case Kind::epilogue:
          // What stands after the convolution first: what was kept for it goes before the convolution's gradients come.
          std::tie(dy, dbias) =
              epilogue_backward(dy, layer.pools() ? *codes[i] : dy,
                                layer.masks_by_output() ? *outputs[i] : (layer.normalizes() ? *rs[i] : dy),
                                layer.sides[0], layer.sides[1], want_bias, layer.lrn_size, layer.alpha, layer.beta,
                                layer.k, layer.lrn_groups, layer.pool_kernel, layer.pool_stride, layer.pool_padding);
          let_go(outputs[i]);
          let_go(codes[i]);
          let_go(rs[i]);
          if (layer.kind == Kind::epilogue) {
            dx = dy;
          } else if (want_x || want_weight) {
            std::tie(dx, dweight, std::ignore) =
                conv_relu_backward(layer, dy, in, *weight_of[i], std::nullopt, {want_x, want_weight, false}, masks);
          }
          break;
        case Kind::linear:
          if (layer.relu) {
            std::tie(dy, dbias) = relu_backward(dy, *outputs[i], want_bias);
          } else if (want_bias) {
            dbias = sum_of_rows(dy);
          }
          if (want_weight) dweight = product(transposed(dy), in);
          if (want_x) dx = product(dy, *weight_of[i]);
          break;
        case Kind::flatten: {
          Ints shape = layer.sides;
          shape.insert(shape.begin(), dy.size(0));
          dx = with_shape(dy, shape);
          break;
        }
        case Kind::lrn:
          dx = lrn_backward(dy, in, layer.lrn_size, layer.alpha, layer.beta, layer.k, layer.lrn_groups);
          break;
        case Kind::max_pool:
          dx = max_pool_backward(dy, *codes[i], layer.sides[0], layer.sides[1], layer.pool_kernel, layer.pool_stride,
                                 layer.pool_padding);
          let_go(codes[i]);
          break;
        default:
          STD_TORCH_CHECK(false, "run_backward: a packed weight has no gradient");
      }
      let_go(outputs[i]);
      if (want_weight) gradients[layer.parameter] = std::move(dweight);
      if (want_bias) gradients[layer.bias_place()] = std::move(dbias);
      if (want_x) dy = std::move(*dx);
      masked = masks;
    }
    if (wanted(0)) gradients[0] = dy;
    std::vector<Tensor> results;
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (wanted(i)) results.push_back(std::move(*gradients[i]));
    }
    return results;
  }

 private:
  // And is an ordinary tensor, but where a packed weight may be.
  bool has_shape(const Tensor& x, size_t place) const {
    const auto sizes = x.sizes();
    int32_t layout = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
    if (layout != aoti_torch_layout_strided() && !packable_[place]) return false;
    const Ints& shape = shapes_[place];
    return sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin());
  }

  // The first layer that takes part in backward: the first with a wanted parameter, or all if the input is wanted.
  size_t first_of(Wanted wanted) const {
    if (wanted(0)) return 0;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& layer = layers_[i];
      for (size_t place = layer.parameter; place < layer.end(); ++place) {
        if (wanted(place)) return i;
      }
    }
    return layers_.size();
  }

  bool keeps_input(size_t i, Wanted wanted) const {
    const Layer& layer = layers_[i];
    return layer.convolves() || layer.kind == Kind::lrn || (layer.kind == Kind::linear && wanted(layer.parameter));
  }

  // Layer `first` and those after it take part in backward.
  bool keeps_output(size_t i, size_t first, Wanted wanted) const {
    return (i >= first && layers_[i].masks_by_output()) ||
           (i + 1 >= first && i + 1 < layers_.size() && keeps_input(i + 1, wanted));
  }

  // The output, and what pooling and normalization keep in training. is_input: x is the caller's.
  static std::tuple<Tensor, Maybe, Maybe> apply(const Layer& layer, const Tensor& x, bool is_input,
                                                const std::vector<Tensor>& parameters, bool training) {
    const auto weight = [&]() -> const Tensor& { return parameters[layer.parameter - 1]; };
    const auto alone = [](Tensor y) { return std::tuple(std::move(y), Maybe(), Maybe()); };
    const Maybe bias = layer.bias ? Maybe(parameters[layer.bias_place() - 1]) : std::nullopt;
    switch (layer.kind) {
      case Kind::conv:
        if (layer.tuned) return tuned_conv(layer, x, weight(), bias, training);
        if (layer.masks_by_output()) {
          return alone(library_conv_relu(x, weight(), bias, layer.stride, layer.padding, layer.dilation, layer.groups));
        }
        return library_conv_stage(x, weight(), bias, layer.stride, layer.padding, layer.dilation, layer.groups,
                                  layer.lrn_size, layer.alpha, layer.beta, layer.k, layer.lrn_groups, layer.pool_kernel,
                                  layer.pool_stride, layer.pool_padding, layer.ceil_mode, training);
      case Kind::packed_conv:
        return alone(packed_stage(x, weight(), bias, layer.stride, layer.padding, layer.dilation, layer.groups,
                                  layer.lrn_size, layer.alpha, layer.beta, layer.k, layer.lrn_groups, layer.pool_kernel,
                                  layer.pool_stride, layer.pool_padding, layer.ceil_mode, layer.channels_last));
      case Kind::onednn_linear:
        return alone(onednn_linear(x, weight(), bias, layer.relu));
      case Kind::epilogue:
        return epilogue(x, bias, layer.lrn_size, layer.alpha, layer.beta, layer.k, layer.lrn_groups, layer.pool_kernel,
                        layer.pool_stride, layer.pool_padding, layer.ceil_mode, training);
      case Kind::linear: {
        if (layer.tuned) return alone(tuned_linear(x, weight(), bias, layer.relu));
        const Tensor y = linear(x, weight(), bias);
        return alone(layer.relu ? relu_(y) : y);
      }
      case Kind::flatten:  // of the caller's tensor a view as torch makes it, which shares its version
        return alone(is_input ? torch::stable::flatten(x, 1) : with_shape(x, {x.size(0), x.numel() / x.size(0)}));
      case Kind::lrn:
        return alone(lrn(x, layer.lrn_size, layer.alpha, layer.beta, layer.k, layer.lrn_groups));
      case Kind::max_pool: {
        auto [y, code] =
            max_pool(x, layer.pool_kernel, layer.pool_stride, layer.pool_padding, layer.ceil_mode, training);
        return {std::move(y), std::move(code), std::nullopt};
      }
    }
    STD_TORCH_CHECK(false, "run: unknown layer");
  }

  // By the operators of alexnet_fast/ops, which choose among implementations for each call's shapes.
  static Tensor tuned_linear(const Tensor& x, const Tensor& weight, const Maybe& bias, bool relu) {
    std::array<StableIValue, 4> stack{from(x), from(weight), from(bias), from(relu)};
    call_torch("alexnet_fast::linear_relu_tuned", stack);
    return to<Tensor>(stack[0]);
  }

  static std::tuple<Tensor, Maybe, Maybe> tuned_conv(const Layer& layer, const Tensor& x, const Tensor& weight,
                                                     const Maybe& bias, bool training) {
    const StableIValue stride = from(layer.stride), padding = from(layer.padding), dilation = from(layer.dilation);
    if (layer.masks_by_output()) {
      std::array<StableIValue, 7> stack{from(x), from(weight), from(bias),        stride,
                                        padding, dilation,     from(layer.groups)};
      call_torch("alexnet_fast::conv_relu_tuned", stack);
      return {to<Tensor>(stack[0]), std::nullopt, std::nullopt};
    }
    std::array<StableIValue, 17> stack{from(x),
                                       from(weight),
                                       from(bias),
                                       stride,
                                       padding,
                                       dilation,
                                       from(layer.groups),
                                       from(layer.lrn_size),
                                       from(layer.alpha),
                                       from(layer.beta),
                                       from(layer.k),
                                       from(layer.lrn_groups),
                                       from(layer.pool_kernel),
                                       from(layer.pool_stride),
                                       from(layer.pool_padding),
                                       from(layer.ceil_mode),
                                       from(training)};
    call_torch("alexnet_fast::conv_stage_tuned", stack);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  }

  // masks: whether dx may be masked where x, the output of the ReLU before, is not positive; afterwards, whether it is.
  static std::tuple<Maybe, Maybe, Maybe> conv_relu_backward(const Layer& layer, const Tensor& dy, const Tensor& x,
                                                            const Tensor& weight, const Maybe& y,
                                                            std::array<bool, 3> wanted, bool& masks) {
    if (!layer.tuned) {
      masks = false;
      return library_conv_relu_backward(dy, x, weight, y, layer.stride, layer.padding, layer.dilation, layer.groups,
                                        wanted);
    }
    std::array<StableIValue, 10> stack{from(dy),
                                       from(x),
                                       from(weight),
                                       from(y),
                                       from(layer.stride),
                                       from(layer.padding),
                                       from(layer.dilation),
                                       from(layer.groups),
                                       from(torch::headeronly::HeaderOnlyArrayRef<bool>(wanted.data(), 3)),
                                       from(masks)};
    call_torch("alexnet_fast::conv_relu_backward_in_run", stack);
    masks = to<Tensor>(stack[3]).numel() != 0;
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
  }

  static Tensor sum_of_rows(const Tensor& x) {
    if (x.is_cpu() && accumulation(x) == x.scalar_type() && x.is_contiguous()) {
      Tensor sum = empty1d(x, x.size(1), x.scalar_type());
      add_rows(x, sum);
      return sum;
    }
    const int64_t rows = 0;
    return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1));
  }

  // x's memory as another tensor, past torch's dispatcher; autograd does not know of it. The 0 counts from x's offset.
  template <size_t N>
  static Tensor view(const Tensor& x, const std::array<int64_t, N>& size, const std::array<int64_t, N>& strides) {
    AtenTensorHandle made = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), N, size.data(), strides.data(), 0, &made));
    return Tensor(made);
  }

  static Tensor transposed(const Tensor& x) { return view<2>(x, {x.size(1), x.size(0)}, {x.stride(1), x.stride(0)}); }

  // As torch's reshape.
  static Tensor with_shape(const Tensor& x, const Ints& shape) {
    if (x.is_contiguous() && shape.size() == 2) return view<2>(x, {shape[0], shape[1]}, {shape[1], 1});
    if (x.is_contiguous() && shape.size() == 4) {
      const std::array<int64_t, 4> size{shape[0], shape[1], shape[2], shape[3]};
      return view(x, size, dense_strides(size, false));
    }
    return torch::stable::reshape(x, {shape.data(), shape.size()});
  }

  static Tensor unwritten(const Tensor& like, int64_t rows, int64_t columns) {
    const int64_t size[] = {rows, columns}, strides[] = {columns, 1};
    return empty_strided(like, 2, size, strides, like.scalar_type());
  }

  static Tensor product(const Tensor& a, const Tensor& b) {
    if (!a.is_cpu()) {
      std::array<StableIValue, 2> stack{from(a), from(b)};
      call_torch("aten::mm", stack);
      return to<Tensor>(stack[0]);
    }
    const Tensor y = unwritten(a, a.size(0), b.size(1));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(y.get(), a.get(), b.get()));
    return y;
  }

  static Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    if (!x.is_cpu()) {
      std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
      call_torch("aten::linear", stack);
      return to<Tensor>(stack[0]);
    }
    if (!bias) {
      return product(x, transposed(weight));
    }
    const Tensor y = unwritten(x, x.size(0), weight.size(0));
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(y.get(), bias->get(), x.get(), transposed(weight).get(), 1, 1));
    return y;
  }

  std::vector<Layer> layers_;
  std::vector<Ints> shapes_;    // the input's, then the parameters'
  std::vector<bool> packable_;  // of the same
};

// Objects by number: an operator may be called with any number.
template <class T>
class Registry {
 public:
  int64_t add(std::shared_ptr<T> object) {
    const std::unique_lock lock(mutex_);
    objects_.emplace(++newest_, std::move(object));
    return newest_;
  }
  void remove(int64_t number) {
    const std::unique_lock lock(mutex_);
    objects_.erase(number);
  }
  std::shared_ptr<T> operator[](int64_t number) {
    const std::shared_lock lock(mutex_);
    const auto found = objects_.find(number);
    STD_TORCH_CHECK(found != objects_.end(), T::NAME, number);
    return found->second;
  }
  static Registry& all() {
    static auto* const objects = new Registry;  // never destroyed: Python may drop runs after static objects have gone
    return *objects;
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<T>> objects_;
  int64_t newest_ = 0;
};

// What a call keeps for backward where nobody may look at it: it need not pass through Python.
struct Kept {
  static constexpr const char* NAME = "run: nothing is kept under ";
  std::mutex mutex;
  std::vector<Tensor> tensors;
};

// Python's hold on an object. A graph may outlive the module that made it.
template <class T>
struct Registered {
  int64_t number;
  explicit Registered(std::shared_ptr<T> object) : number(Registry<T>::all().add(std::move(object))) {}
  Registered(const Registered&) = delete;
  ~Registered() { Registry<T>::all().remove(number); }
};

// The result, then what backward needs, unless that is kept under the number `held`; nothing at all for tensors that
// the run was not planned for.
std::vector<Tensor> run(const Tensor& x, const std::vector<Tensor>& parameters, int64_t number, int64_t wanted,
                        int64_t held) {
  const auto planned = Registry<const Run>::all()[number];
  if (!planned->takes(x, parameters)) {
    return {};
  }
  std::vector<Tensor> results = planned->forward(x, parameters, {static_cast<uint64_t>(wanted)});
  if (held != 0) {
    const auto kept = Registry<Kept>::all()[held];
    const std::lock_guard lock(kept->mutex);
    kept->tensors.assign(std::make_move_iterator(results.begin() + 1), std::make_move_iterator(results.end()));
    results.resize(1, x);
  }
  return results;
}

// again: backward may come again, and what is held stays.
std::vector<Tensor> run_backward(const Tensor& dy, const Tensor& x, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& kept, int64_t number, int64_t wanted, int64_t held,
                                 bool again) {
  const auto planned = Registry<const Run>::all()[number];
  std::vector<Tensor> tensors;
  if (held != 0) {
    const auto found = Registry<Kept>::all()[held];
    const std::lock_guard lock(found->mutex);
    again ? void(tensors = found->tensors) : tensors.swap(found->tensors);
  } else {
    tensors = kept;
  }
  return planned->backward(dy, x, weights, std::move(tensors), {static_cast<uint64_t>(wanted)});
}

// What run_backward would take, for whoever computes gradients by other operators. like: of the device.
std::vector<Tensor> run_kept([[maybe_unused]] const Tensor& like, int64_t held) {
  const auto found = Registry<Kept>::all()[held];
  const std::lock_guard lock(found->mutex);
  return found->tensors;
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("run", TORCH_BOX(&run));
  m.impl("run_backward", TORCH_BOX(&run_backward));
  m.impl("run_kept", TORCH_BOX(&run_kept));
}

PyMethodDef DIRECT[] = {direct_method<&run>("run"), direct_method<&run_backward>("run_backward")};

// Python's hold on a Kept. Each call for training makes one: by pybind11 that would take as long as a small layer.
struct Hold {
  PyObject_HEAD int64_t number;
};

PyObject* make_hold(PyTypeObject* type, PyObject*, PyObject*) {
  PyObject* const self = type->tp_alloc(type, 0);
  if (self) reinterpret_cast<Hold*>(self)->number = Registry<Kept>::all().add(std::make_shared<Kept>());
  return self;
}

void drop_hold(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  Registry<Kept>::all().remove(reinterpret_cast<Hold*>(self)->number);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef NUMBER[] = {{"number", T_LONGLONG, offsetof(Hold, number), READONLY, nullptr}, {}};
PyType_Slot SLOTS[] = {{Py_tp_new, reinterpret_cast<void*>(&make_hold)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(&drop_hold)},
                       {Py_tp_members, NUMBER},
                       {Py_tp_doc, const_cast<char*>("What alexnet_fast::run keeps for alexnet_fast::run_backward.")},
                       {}};
PyType_Spec HOLD{"alexnet_fast._C.Kept", sizeof(Hold), 0, Py_TPFLAGS_DEFAULT, SLOTS};

}  // namespace

ALEXNET_FAST_REGISTER(register_all)
STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, MkldnnCPU, m) { m.impl("run", TORCH_BOX(&run)); }

void define_runs(py::module_& m) {
  py::class_<Registered<const Run>>(m, "Run",
                                    "A succession of layers that alexnet_fast::run carries out; see "
                                    "alexnet_fast.ops.run.")
      .def(py::init([](const std::vector<py::object>& layers, std::vector<Ints> shapes) {
             return std::make_unique<Registered<const Run>>(std::make_shared<const Run>(layers, std::move(shapes)));
           }),
           py::arg("layers"), py::arg("shapes"))
      .def_readonly("number", &Registered<const Run>::number);
  m.def(
      "direct",
      [](const std::string& name, py::object op, std::vector<py::object> looks, std::vector<py::object> plain,
         py::object capsule_of_tensor, py::object tensors_of_capsules) {
        const auto has_name = [&](const PyMethodDef& method) { return method.ml_name == name; };
        return function_of(*std::find_if(std::begin(DIRECT), std::end(DIRECT), has_name),
                           new Direct{std::move(op), std::move(looks), std::move(plain), std::move(capsule_of_tensor),
                                      std::move(tensors_of_capsules)});
      },
      "An operator of this name, run or run_backward, as a function that calls it past the dispatcher where none of\n"
      "`looks` says that somebody looks and all tensors are of the types `plain`; elsewhere `op`. See\n"
      "alexnet_fast.ops.run.",
      py::arg("name"), py::arg("op"), py::arg("looks"), py::arg("plain"), py::arg("capsule_of_tensor"),
      py::arg("tensors_of_capsules"));
  m.attr("Kept") = py::reinterpret_steal<py::object>(PyType_FromSpec(&HOLD));
}

}  // namespace alexnet_fast
