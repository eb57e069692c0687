// A succession of layers as one operator. alexnet_fast.nn.runs plans it for one shape of the input; run() carries it
// out, and run_backward() is its gradient.
#include "run.h"

#include <pybind11/stl.h>

#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "conv.h"
#include "operators.h"

namespace py = pybind11;

namespace alexnet_fast {
namespace {

using torch::stable::detail::from, torch::stable::detail::to;

enum class Kind { conv, packed_conv, linear, onednn_linear, flatten, lrn, max_pool };

const std::unordered_map<std::string, Kind> KINDS{
    {"conv", Kind::conv},        {"packed_conv", Kind::packed_conv},     {"linear", Kind::linear},
    {"flatten", Kind::flatten},  {"onednn_linear", Kind::onednn_linear}, {"lrn", Kind::lrn},
    {"max_pool", Kind::max_pool}};

struct Layer {
  Kind kind;
  bool bias, relu, ceil_mode, channels_last;  // channels_last: what a packed weight was
  Ints stride, padding, dilation;
  int64_t groups, lrn_size, lrn_groups;
  double alpha, beta, k;
  Ints pool_kernel, pool_stride, pool_padding;
  Ints sides;        // what backward cannot see: flatten's input but for the batch; else the sides of what is pooled
  size_t parameter;  // the first one's place

  bool has_weight() const { return kind <= Kind::onednn_linear; }
  bool convolves() const { return kind <= Kind::packed_conv; }
  bool normalizes() const { return lrn_size != 0; }
  bool pools() const { return pool_kernel[0] != 0; }
  // With neither LRN nor pooling the result is the ReLU's output, so its mask.
  bool masks_by_output() const { return relu && !normalizes() && !pools(); }
};

// What of a call is wanted: bit 0 stands for the input, then one for each parameter.
struct Wanted {
  uint64_t bits;
  bool operator()(size_t place) const { return (bits >> place) & 1; }
};

class Run {
 public:
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
      parameter += layer.has_weight() ? 1 + layer.bias : 0;
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
    std::vector<Tensor> results(1);
    const size_t first = first_of(wanted);
    Tensor x = input, code, r;
    for (size_t i = 0; i < layers_.size(); ++i) {
      const Layer& layer = layers_[i];
      const bool training = i >= first;
      x = apply(layer, x, parameters, training, code, r);
      if (keeps_output(i, first, wanted)) results.push_back(x);
      if (training) {
        if (layer.pools()) results.push_back(code);
        if (layer.convolves() && layer.normalizes()) results.push_back(r);
      }
    }
    results[0] = x;
    return results;
  }

  // x: the input, or any tensor if it was not kept. weights: of the layers from the first one on that gets a gradient,
  // but not of a linear layer whose input gets none.
  // The gradients that are wanted, in order.
  std::vector<Tensor> backward(Tensor dy, const Tensor& x, const std::vector<Tensor>& weights,
                               const std::vector<Tensor>& kept, Wanted wanted) const {
    const size_t first = first_of(wanted), last = layers_.size();
    std::vector<Tensor> outputs(last), codes(last), rs(last), gradients(shapes_.size());
    std::vector<const Tensor*> weight_of(last);
    auto next = kept.begin();
    auto weight = weights.begin();
    for (size_t i = 0; i < last; ++i) {
      if (keeps_output(i, first, wanted)) outputs[i] = *next++;
      if (i < first) continue;
      if (layers_[i].pools()) codes[i] = *next++;
      if (layers_[i].convolves() && layers_[i].normalizes()) rs[i] = *next++;
      if (layers_[i].convolves() || (layers_[i].has_weight() && (i > first || wanted(0)))) weight_of[i] = &*weight++;
    }
    for (size_t i = last; i-- > first;) {
      const Layer& layer = layers_[i];
      const Tensor& in = i == 0 ? x : outputs[i - 1];
      const bool want_x = i > first || wanted(0), want_bias = layer.bias && wanted(layer.parameter + 1);
      const bool want_weight = layer.has_weight() && wanted(layer.parameter);
      Tensor dbias;
      switch (layer.kind) {
        case Kind::conv: {
          const Tensor& w = *weight_of[i];
          Tensor dweight;
          if (layer.masks_by_output()) {
            std::tie(dy, dweight, dbias) =
                library_conv_relu_backward(dy, in, w, outputs[i], layer.stride, layer.padding, layer.dilation,
                                           layer.groups, {want_x, want_weight, want_bias});
          } else {
            std::tie(dy, dbias) =
                epilogue_backward(dy, layer.pools() ? codes[i] : dy, layer.normalizes() ? rs[i] : dy, layer.sides[0],
                                  layer.sides[1], want_bias, layer.lrn_size, layer.alpha, layer.beta, layer.k,
                                  layer.lrn_groups, layer.pool_kernel, layer.pool_stride, layer.pool_padding);
            if (want_x || want_weight) {
              std::tie(dy, dweight, std::ignore) =
                  library_conv_relu_backward(dy, in, w, std::nullopt, layer.stride, layer.padding, layer.dilation,
                                             layer.groups, {want_x, want_weight, false});
            }
          }
          if (want_weight) gradients[layer.parameter] = dweight;
          break;
        }
        case Kind::linear: {
          if (layer.relu) {
            std::tie(dy, dbias) = relu_backward(dy, outputs[i], want_bias);
          } else if (want_bias) {
            dbias = sum_of_rows(dy);
          }
          if (want_weight) gradients[layer.parameter] = product(transposed(dy), in);
          if (want_x) dy = product(dy, *weight_of[i]);
          break;
        }
        case Kind::flatten: {
          Ints shape = layer.sides;
          shape.insert(shape.begin(), dy.size(0));
          dy = torch::stable::reshape(dy, {shape.data(), shape.size()});
          break;
        }
        case Kind::lrn:
          dy = lrn_backward(dy, in, layer.lrn_size, layer.alpha, layer.beta, layer.k, layer.lrn_groups);
          break;
        case Kind::max_pool:
          dy = max_pool_backward(dy, codes[i], layer.sides[0], layer.sides[1], layer.pool_kernel, layer.pool_stride,
                                 layer.pool_padding);
          break;
        default:
          STD_TORCH_CHECK(false, "run_backward: a packed weight has no gradient");
      }
      if (want_bias) gradients[layer.parameter + 1] = dbias;
    }
    if (wanted(0)) gradients[0] = dy;
    std::vector<Tensor> results;
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (wanted(i)) results.push_back(gradients[i]);
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
      if (layer.has_weight() && (wanted(layer.parameter) || (layer.bias && wanted(layer.parameter + 1)))) return i;
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

  static Tensor apply(const Layer& layer, const Tensor& x, const std::vector<Tensor>& parameters, bool training,
                      Tensor& code, Tensor& r) {
    const auto weight = [&]() -> const Tensor& { return parameters[layer.parameter - 1]; };
    const std::optional<Tensor> bias = layer.bias ? std::make_optional(parameters[layer.parameter]) : std::nullopt;
    Tensor y;
    switch (layer.kind) {
      case Kind::conv:
        if (layer.masks_by_output()) {
          return library_conv_relu(x, weight(), bias, layer.stride, layer.padding, layer.dilation, layer.groups);
        }
        std::tie(y, code, r) =
            library_conv_stage(x, weight(), bias, layer.stride, layer.padding, layer.dilation, layer.groups,
                               layer.lrn_size, layer.alpha, layer.beta, layer.k, layer.lrn_groups, layer.pool_kernel,
                               layer.pool_stride, layer.pool_padding, layer.ceil_mode, training);
        return y;
      case Kind::packed_conv:
        return packed_stage(x, weight(), bias, layer.stride, layer.padding, layer.dilation, layer.groups,
                            layer.lrn_size, layer.alpha, layer.beta, layer.k, layer.lrn_groups, layer.pool_kernel,
                            layer.pool_stride, layer.pool_padding, layer.ceil_mode, layer.channels_last);
      case Kind::onednn_linear:
        return onednn_linear(x, weight(), bias, layer.relu);
      case Kind::linear: {
        y = linear(x, weight(), bias);
        return layer.relu ? relu_(y) : y;
      }
      case Kind::flatten:
        return torch::stable::flatten(x, 1);
      case Kind::lrn:
        return lrn(x, layer.lrn_size, layer.alpha, layer.beta, layer.k, layer.lrn_groups);
      case Kind::max_pool:
        std::tie(y, code) =
            max_pool(x, layer.pool_kernel, layer.pool_stride, layer.pool_padding, layer.ceil_mode, training);
        return y;
    }
    STD_TORCH_CHECK(false, "run: unknown layer");
  }

  // The epilogue's, of images of one pixel.
  static std::tuple<Tensor, Tensor> relu_backward(const Tensor& dy, const Tensor& y, bool want_bias) {
    static const Ints none{0, 0}, one{1, 1};
    const std::array<int64_t, 4> shape{dy.size(0), dy.size(1), 1, 1};
    const Tensor dy4 = torch::stable::reshape(dy, {shape.data(), 4}), y4 = torch::stable::reshape(y, {shape.data(), 4});
    auto [dz, db] = epilogue_backward(dy4, dy4, y4, 1, 1, want_bias, 0, 0, 0, 0, 1, none, one, none);
    return {torch::stable::reshape(dz, {shape.data(), 2}), db};
  }

  static Tensor sum_of_rows(const Tensor& x) {
    const int64_t rows = 0;
    return torch::stable::sum(x, torch::headeronly::IntHeaderOnlyArrayRef(&rows, 1));
  }

  static Tensor transposed(const Tensor& x) {
    const int64_t size[] = {x.size(1), x.size(0)}, strides[] = {x.stride(1), x.stride(0)};
    AtenTensorHandle view = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), 2, size, strides, x.storage_offset(), &view));
    return Tensor(view);
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

// Runs by number: a graph may outlive the module that made it, and an operator may be called with any number.
class Registry {
 public:
  int64_t add(std::shared_ptr<const Run> run) {
    const std::unique_lock lock(mutex_);
    runs_.emplace(++newest_, std::move(run));
    return newest_;
  }
  void remove(int64_t number) {
    const std::unique_lock lock(mutex_);
    runs_.erase(number);
  }
  std::shared_ptr<const Run> operator[](int64_t number) {
    const std::shared_lock lock(mutex_);
    const auto found = runs_.find(number);
    STD_TORCH_CHECK(found != runs_.end(), "run: there is no run ", number);
    return found->second;
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const Run>> runs_;
  int64_t newest_ = 0;
};

Registry& registry() {
  static auto* const runs = new Registry;  // never destroyed: Python may drop runs after static objects have gone
  return *runs;
}

struct Registered {
  int64_t number;
  Registered(const std::vector<py::object>& layers, std::vector<Ints> shapes)
      : number(registry().add(std::make_shared<Run>(layers, std::move(shapes)))) {}
  Registered(const Registered&) = delete;
  ~Registered() { registry().remove(number); }
};

// The result, then what backward needs; nothing at all for tensors that the run was not planned for.
std::vector<Tensor> run(const Tensor& x, const std::vector<Tensor>& parameters, int64_t number, int64_t wanted) {
  const auto planned = registry()[number];
  if (!planned->takes(x, parameters)) {
    return {};
  }
  return planned->forward(x, parameters, {static_cast<uint64_t>(wanted)});
}

std::vector<Tensor> run_backward(const Tensor& dy, const Tensor& x, const std::vector<Tensor>& weights,
                                 const std::vector<Tensor>& kept, int64_t number, int64_t wanted) {
  return registry()[number]->backward(dy, x, weights, kept, {static_cast<uint64_t>(wanted)});
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("run", TORCH_BOX(&run));
  m.impl("run_backward", TORCH_BOX(&run_backward));
}

}  // namespace

ALEXNET_FAST_REGISTER(register_all)
STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, MkldnnCPU, m) { m.impl("run", TORCH_BOX(&run)); }

void define_runs(py::module_& m) {
  py::class_<Registered>(m, "Run",
                         "A succession of layers that alexnet_fast::run carries out; see alexnet_fast.nn.runs.")
      .def(py::init<const std::vector<py::object>&, std::vector<Ints>>(), py::arg("layers"), py::arg("shapes"))
      .def_readonly("number", &Registered::number);
}

}  // namespace alexnet_fast
