// Operators of this library as functions of Python's, past torch's dispatcher: that takes three microseconds of a call
// to make its own of the arguments, above all of lists. Where somebody may notice, the operator itself is called.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "run.h"
#include "torch_compat.h"

// Of torch >= 2.14; weak, so that the library loads where they are absent.
extern "C" AOTITorchError torch_tensor_from_pyobject(void* object, AtenTensorHandle* tensor) __attribute__((weak));
extern "C" AOTITorchError torch_tensor_to_pyobject(AtenTensorHandle tensor, void* type, void** object)
    __attribute__((weak));

namespace alexnet_fast {

struct Direct {
  pybind11::object op;                                      // the operator
  std::vector<pybind11::object> looks;                      // functions, which say whether somebody looks at operators
  std::vector<pybind11::object> plain;                      // the types of tensors as which nobody looks
  pybind11::object capsule_of_tensor, tensors_of_capsules;  // what torch < 2.14 has in place of the functions above

  struct Unusual {};  // thrown for a tensor that the dispatcher would make another of first

  template <auto function>
  PyObject* call(PyObject* const* arguments, Py_ssize_t count) const {
    constexpr auto all = places(function);
    if (count == static_cast<Py_ssize_t>(all.size()) && !any_says(looks)) {
      try {
        return objects(with(function, arguments, all)).release().ptr();
      } catch (const Unusual&) {
      }
    }
    return PyObject_Vectorcall(op.ptr(), arguments, count, nullptr);
  }

 private:
  template <class... T>
  static constexpr auto places(std::vector<Tensor> (*)(T...)) {
    return std::index_sequence_for<T...>();
  }

  template <class... T, size_t... i>
  std::vector<Tensor> with(std::vector<Tensor> (*function)(T...), PyObject* const* arguments,
                           std::index_sequence<i...>) const {
    const std::tuple<std::decay_t<T>...> values{read<std::decay_t<T>>(arguments[i])...};
    const pybind11::gil_scoped_release others_may_run;
    return std::apply(function, values);
  }

  template <class T>
  T read(PyObject* from) const {
    if constexpr (std::is_same_v<T, Tensor>) {
      return tensor(from);
    } else if constexpr (std::is_same_v<T, std::vector<Tensor>>) {  // a tuple or a list
      if (!PyTuple_Check(from) && !PyList_Check(from)) throw Unusual();
      T tensors;
      tensors.reserve(PySequence_Fast_GET_SIZE(from));
      for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(from); ++i) {
        tensors.push_back(tensor(PySequence_Fast_GET_ITEM(from, i)));
      }
      return tensors;
    } else {
      const auto value = PyLong_AsLongLong(from);
      if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
      return static_cast<T>(value);
    }
  }

  Tensor tensor(PyObject* from) const {
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    const auto is = [&](const auto& type) { return type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(from)); };
    if (std::none_of(plain.begin(), plain.end(), is)) throw Unusual();
    const auto negative = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(from, is_neg));
    if (!negative) throw pybind11::error_already_set();
    if (negative.ptr() != Py_False) throw Unusual();
    AtenTensorHandle handle = nullptr;
    if (torch_tensor_from_pyobject) {
      STABLE_TORCH_ERROR_CODE_CHECK(torch_tensor_from_pyobject(from, &handle));
    } else {
      handle = pybind11::capsule(capsule_of_tensor(pybind11::handle(from))).get_pointer<AtenTensorOpaque>();
    }
    const Tensor made(handle);
    int32_t layout = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
    const bool is_strided = layout == aoti_torch_layout_strided();
    // Without memory: a zero of autograd's, or a tensor that is functionalized.
    if (is_strided ? made.numel() > 0 && !made.const_data_ptr() : layout != aoti_torch_layout__mkldnn())
      throw Unusual();
    return made;
  }

  pybind11::object objects(const std::vector<Tensor>& from) const {
    pybind11::list made(from.size());
    for (size_t i = 0; i < from.size(); ++i) {
      void* object = nullptr;
      if (torch_tensor_to_pyobject) {
        STABLE_TORCH_ERROR_CODE_CHECK(torch_tensor_to_pyobject(from[i].get(), nullptr, &object));
        made[i] = pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(object));
      } else {
        AtenTensorHandle handle = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(from[i].get(), &handle));
        made[i] = pybind11::capsule(handle);
      }
    }
    return torch_tensor_to_pyobject ? pybind11::object(std::move(made)) : tensors_of_capsules(made);
  }
};

template <auto function>
PyMethodDef direct_method(const char* name) {
  PyObject* (*const called)(PyObject*, PyObject* const*, Py_ssize_t) = [](PyObject* self, PyObject* const* arguments,
                                                                          Py_ssize_t count) {
    const auto direct = static_cast<const Direct*>(PyCapsule_GetPointer(self, nullptr));
    try {
      return direct->call<function>(arguments, count);
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return static_cast<PyObject*>(nullptr);
  };
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(called)), METH_FASTCALL,
          "The operator of this name, past the dispatcher where nobody looks."};
}

}  // namespace alexnet_fast
