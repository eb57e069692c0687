"""The same layers in other hands: PyTorch eager and compiled, ONNX Runtime, OpenVINO, each as its users would run it.

A peer is made from an ``nn.Sequential`` of torch's own modules and an example of its input. It returns a function that
computes the layers on that example, or a string that says why it is left out.
"""

from __future__ import annotations

import ctypes
import importlib.util
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

from alexnet_fast.models.alexnet import AlexNet
from tests.ops.samples import Sample, torch_lrn

Peer = Callable[[], object] | str


class TorchLRN(nn.Module):
    """LRN in groups by torch's functions; 16-bit data through float32 on CPUs, where torch has no other."""

    def __init__(self, size: int, alpha: float, beta: float, k: float, groups: int = 1) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k, self.groups = size, alpha, beta, k, groups

    def forward(self, x: Tensor) -> Tensor:
        return torch_lrn(x, self.size, self.alpha, self.beta, self.k, self.groups)


class Bias(nn.Module):
    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]


def plain(net: AlexNet) -> nn.Sequential:
    """The net in torch's modules alone, sharing ``net``'s parameters; the pooling that changes nothing is left out."""
    layers = []
    for module in (*net.features, nn.Flatten(), *net.classifier):
        if isinstance(module, nn.LocalResponseNorm):
            module = TorchLRN(module.size, module.alpha, module.beta, module.k, getattr(module, "groups", 1))
        layers.append(module)
    return nn.Sequential(*layers)


def modules_of(sample: Sample, data: dict[str, Tensor]) -> nn.Sequential:
    """``sample`` in torch's modules, with the weights of ``data``."""
    arguments, layers = dict(sample.arguments), []
    norm, pool = arguments.pop("lrn", None), arguments.pop("pool", None)
    if sample.stem == "lrn":
        layers.append(TorchLRN(**{"alpha": 1e-4, "beta": 0.75, "k": 1.0, **arguments}))
    elif sample.stem == "max_pool":
        layers.append(nn.MaxPool2d(**arguments))
    else:
        if sample.weight is None:
            layers.append(Bias(data["bias"]))
        else:
            out, into, height, width = sample.weight
            groups = arguments.get("groups", 1)
            layers.append(nn.Conv2d(into * groups, out, (height, width), **arguments))
            layers[0].weight.data, layers[0].bias.data = data["weight"], data["bias"]
        layers.append(nn.ReLU())
        if norm:
            layers.append(TorchLRN(*norm))
        if pool:
            layers.append(nn.MaxPool2d(*pool[:3], ceil_mode=pool.ceil_mode))
    return nn.Sequential(*layers).eval().requires_grad_(False)


def eager(net: nn.Module, x: Tensor) -> Peer:
    return lambda: net(x)


def compiled(net: nn.Module, x: Tensor) -> Peer:
    """torch.compile as documented for inference: weights frozen on CPUs, max-autotune with CUDA graphs on GPUs."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    gpu = x.device.type == "cuda"
    call = torch.compile(net, mode="max-autotune" if gpu else None)
    try:
        with inductor.patch(freezing=not gpu), torch.inference_mode():
            call(x)
    except Exception as error:  # a missing compiler, or a graph that Inductor does not take
        return f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return lambda: call(x)


def onnx_model(net: nn.Sequential, x: Tensor) -> bytes:
    """``net`` in ONNX's own operators, LRN among them: exporters take torch's LRN apart into a dozen."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants, current = [], [], "x"

    def constant(name: str, tensor: Tensor) -> str:
        constants.append(numpy_helper.from_array(tensor.detach().float().contiguous().numpy(), name))
        return name

    def node(kind: str, inputs: list[str], outputs: list[str], **attributes) -> None:
        nodes.append(helper.make_node(kind, inputs, outputs, **attributes))

    def twice(value) -> list[int]:
        return list(value) if isinstance(value, tuple) else [value, value]

    for number, module in enumerate(net):
        before, current = current, f"y{number}"
        match module:
            case nn.Conv2d() | nn.Linear():
                weights = [constant(f"w{number}", module.weight)]
                weights += [] if module.bias is None else [constant(f"b{number}", module.bias)]
                if isinstance(module, nn.Linear):
                    node("Gemm", [before, *weights], [current], transB=1)
                else:
                    geometry = {"strides": list(module.stride), "pads": [*module.padding, *module.padding]}
                    node("Conv", [before, *weights], [current], **geometry, group=module.groups)
            case Bias():
                node("Add", [before, constant(f"b{number}", module.bias[:, None, None])], [current])
            case nn.ReLU():
                node("Relu", [before], [current])
            case nn.MaxPool2d():
                geometry = {"kernel_shape": twice(module.kernel_size), "strides": twice(module.stride)}
                geometry |= {"pads": 2 * twice(module.padding), "ceil_mode": module.ceil_mode}
                node("MaxPool", [before], [current], **geometry)
            case TorchLRN():
                options = {"size": module.size, "alpha": module.alpha, "beta": module.beta, "bias": module.k}
                if module.groups == 1:
                    node("LRN", [before], [current], **options)
                else:
                    parts = [f"{current}_{part}" for part in range(module.groups)]
                    node("Split", [before], parts, axis=1, num_outputs=module.groups)
                    for part in parts:
                        node("LRN", [part], [f"{part}n"], **options)
                    node("Concat", [f"{part}n" for part in parts], [current], axis=1)
            case nn.Flatten():
                node("Flatten", [before], [current])
            case nn.Dropout():  # nothing, in inference
                current = before
            case _:
                raise TypeError(f"net: no ONNX operator is given for {type(module).__name__}")
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
        for name, shape in (("x", x.shape), (current, None))
    )
    graph = helper.make_graph(nodes, "net", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


def _missing(*packages: str) -> str:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (pip install {' '.join(absent)})" if absent else ""


def onnxruntime(net: nn.Sequential, x: Tensor) -> Peer:
    if reason := _missing("onnx", "onnxruntime"):
        return reason
    if x.dtype != torch.float32:
        return "ONNX Runtime's CPU provider has no bfloat16 convolution"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads spin within a run, as by default; those that went on after it would slow down the next side.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(onnx_model(net, x), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(net: nn.Sequential, x: Tensor) -> Peer:
    """Takes float32 images in either precision, as its converted models do."""
    if reason := _missing("onnx", "openvino"):
        return reason
    import openvino

    core = openvino.Core()
    short = "f32" if x.dtype == torch.float32 else "bf16"
    if short == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "OpenVINO has no bfloat16 on this processor"
    hints = {"INFERENCE_PRECISION_HINT": short, "PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    model = core.compile_model(core.read_model(io.BytesIO(onnx_model(net, x))), "CPU", hints)
    request = model.create_infer_request()
    feed = [openvino.Tensor(x.float().contiguous().numpy())]

    def call() -> Tensor:
        request.infer(feed, share_inputs=True, share_outputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call


def conv_relu_cudnn(net: nn.Sequential, x: Tensor) -> Peer:
    """cuDNN's convolution with bias and ReLU in one call, then the other modules."""
    if x.device.type != "cuda":
        return "cuDNN needs a GPU"
    first, relu, *rest = net
    if not (isinstance(first, nn.Conv2d) and isinstance(relu, nn.ReLU)):
        return "no convolution"

    def call() -> Tensor:
        y = torch.cudnn_convolution_relu(
            x, first.weight, first.bias, first.stride, first.padding, first.dilation, first.groups
        )
        for module in rest:
            y = module(y)
        return y

    return call


def lrn_cudnn(net: nn.Sequential, x: Tensor) -> Peer:
    """cuDNN's own normalization, which torch does not offer, through the C library that torch has loaded."""
    (norm,) = net
    if x.device.type != "cuda":
        return "cuDNN needs a GPU"
    if norm.groups != 1:
        return "cuDNN's LRN has no groups"

    def do(name: str, *arguments) -> None:
        if status := getattr(cudnn, f"cudnn{name}")(*arguments):
            raise OSError(f"cudnn{name} answers {status}")

    handle, window, tensor = (ctypes.c_void_p() for _ in range(3))
    kind = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 9}[x.dtype]  # cudnnDataType_t
    y, one, zero = torch.empty_like(x), ctypes.c_float(1), ctypes.c_float(0)

    def call() -> Tensor:
        across, data, out = 0, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())
        scales = ctypes.byref(one), ctypes.byref(zero)
        do("SetStream", handle, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        do("LRNCrossChannelForward", handle, window, across, scales[0], tensor, data, scales[1], tensor, out)
        return y

    try:
        cudnn = ctypes.CDLL(f"libcudnn.so.{torch.backends.cudnn.version() // 10000}")
        do("Create", ctypes.byref(handle))
        do("CreateLRNDescriptor", ctypes.byref(window))
        do("SetLRNDescriptor", window, norm.size, *map(ctypes.c_double, (norm.alpha, norm.beta, norm.k)))
        do("CreateTensorDescriptor", ctypes.byref(tensor))
        do("SetTensor4dDescriptorEx", tensor, kind, *x.shape, *x.stride())
        call()
    except OSError as error:
        return f"cuDNN cannot be called: {error}"
    return call


def jax_compiled(net: nn.Sequential, x: Tensor) -> Peer:
    """The net jitted by XLA, channels last, which is JAX's own layout."""
    if reason := _missing("jax"):
        return reason
    import jax
    from jax import lax
    from jax import numpy as jnp

    if jax.default_backend() != "gpu":
        return "this JAX sees no GPU"

    dtype = str(x.dtype).removeprefix("torch.")

    def array(tensor: Tensor) -> jax.Array:
        return jax.device_put(jnp.asarray(tensor.detach().float().cpu().numpy(), dtype=dtype))

    def window(module: nn.MaxPool2d) -> tuple:
        sides = [value if isinstance(value, int) else value[0] for value in (module.kernel_size, module.stride)]
        pads = [(0, 0), (module.padding,) * 2, (module.padding,) * 2, (0, 0)]
        return (1, sides[0], sides[0], 1), (1, sides[1], sides[1], 1), pads

    weights = {}
    for number, module in enumerate(net):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            order = (2, 3, 1, 0) if isinstance(module, nn.Conv2d) else (1, 0)
            weights[number] = array(module.weight.permute(order)), array(module.bias)
        elif isinstance(module, Bias):
            weights[number] = (array(module.bias),)

    @jax.jit
    def forward(weights, y):
        for number, module in enumerate(net):
            match module:
                case nn.Conv2d():
                    pads = [(p, p) for p in module.padding]
                    axes, groups = ("NHWC", "HWIO", "NHWC"), module.groups
                    w, b = weights[number]
                    y = lax.conv_general_dilated(
                        y, w, module.stride, pads, dimension_numbers=axes, feature_group_count=groups
                    )
                    y = y + b
                case nn.Linear():
                    y = y @ weights[number][0] + weights[number][1]
                case Bias():
                    y = y + weights[number][0]
                case nn.ReLU():
                    y = jax.nn.relu(y)
                case nn.MaxPool2d():
                    y = lax.reduce_window(y, -jnp.inf, lax.max, *window(module))
                case TorchLRN():
                    groups = y.reshape(*y.shape[:-1], module.groups, -1)
                    reach = [(0, 0)] * 4 + [(module.size // 2, (module.size - 1) // 2)]
                    sizes = (1, 1, 1, 1, module.size)
                    total = lax.reduce_window(jnp.square(groups), 0.0, lax.add, sizes, (1,) * 5, reach)
                    scale = (module.k + module.alpha / module.size * total) ** -module.beta
                    y = (groups * scale).reshape(y.shape).astype(y.dtype)
                case nn.Flatten():
                    y = y.transpose(0, 3, 1, 2).reshape(y.shape[0], -1)
        return y

    images = array(x.permute(0, 2, 3, 1)) if x.dim() == 4 else array(x)
    return lambda: forward(weights, images).block_until_ready()


def agrees(result: object, truth: Tensor, tolerance: float) -> bool:
    if not isinstance(result, Tensor):  # JAX's arrays: images channels last
        import numpy

        result = torch.from_numpy(numpy.array(result, dtype="float32"))
        result = result.permute(0, 3, 1, 2) if truth.dim() == 4 else result
    difference = (result.to(truth.device).float() - truth.float()).abs().max()
    return result.shape == truth.shape and difference.item() <= tolerance * truth.float().abs().max().item()
