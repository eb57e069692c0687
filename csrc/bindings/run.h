// What module.cpp makes known to Python beside facts about the build.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace alexnet_fast {

void define_runs(pybind11::module_& m);
void define_guard(pybind11::module_& m);
void define_forms(pybind11::module_& m);

// Whether one of the functions, without arguments, says so.
inline bool any_says(const std::vector<pybind11::object>& asked) {
  for (const pybind11::object& ask : asked) {
    const auto said = pybind11::reinterpret_steal<pybind11::object>(PyObject_CallNoArgs(ask.ptr()));
    const int is_true = said ? PyObject_IsTrue(said.ptr()) : -1;
    if (is_true < 0) throw pybind11::error_already_set();
    if (is_true) return true;
  }
  return false;
}

// A function of Python's, with what `object` is for it.
template <class T>
pybind11::object function_of(PyMethodDef& definition, T* object) {
  const pybind11::capsule self(object, [](void* made) { delete static_cast<T*>(made); });
  return pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&definition, self.ptr()));
}

}  // namespace alexnet_fast
