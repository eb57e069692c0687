// Answers that depend on the form of a call alone, its shapes, dtypes, devices and options, found by it. To find one
// from Python would take longer than to dispatch an operator.
#include <pybind11/stl.h>

#include "run.h"

namespace py = pybind11;

namespace alexnet_fast {
namespace {

constexpr Py_ssize_t TENSORS = 3;
using Flag = std::tuple<py::dict, py::object, py::object>;

// What the functions `asked` say; of each of the first `tensors` arguments, of which later ones may be None, shape,
// dtype and device; and the rest. The types of the rest are part of it: 1, 1.0 and True are equal. Null with Python's
// error set.
py::object form_of(const std::vector<py::object>& asked, PyObject* const* arguments, Py_ssize_t tensors,
                   Py_ssize_t count) {
  static PyObject* const names[] = {PyUnicode_InternFromString("shape"), PyUnicode_InternFromString("dtype"),
                                    PyUnicode_InternFromString("device")};
  const Py_ssize_t size = asked.size() + std::size(names) * tensors + 2 * (count - tensors);
  auto form = py::reinterpret_steal<py::object>(PyTuple_New(size));
  if (!form) return form;
  Py_ssize_t at = 0;
  const auto add = [&](PyObject* part) {  // takes the reference
    if (part) PyTuple_SET_ITEM(form.ptr(), at++, part);
    return part != nullptr;
  };
  for (const py::object& ask : asked) {
    if (!add(PyObject_CallNoArgs(ask.ptr()))) return {};
  }
  for (Py_ssize_t i = 0; i < tensors; ++i) {
    for (PyObject* const name : names) {
      const bool is_none = i > 0 && arguments[i] == Py_None;
      if (!add(is_none ? Py_NewRef(Py_None) : PyObject_GetAttr(arguments[i], name))) return {};
    }
  }
  for (Py_ssize_t i = tensors; i < count; ++i) {
    add(Py_NewRef(arguments[i]));
    add(Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(arguments[i]))));
  }
  return form;
}

// Of a call with the arguments (input, weight, bias, *rest), the last two tensors perhaps None.
class Forms {
 public:
  // known: from forms to (an answer, an answer for where nobody looks); anew(*arguments): the answer of no form;
  // keep(form, *arguments): the answer of a form that is not known; backend(): its name is part of the form;
  // changes, looks: functions without arguments, which say whether an answer is made anew in each call, and whether
  // somebody looks; flags: dictionaries, keys and usual values, where others have answers made anew as well; plain: the
  // types of tensors as which nobody looks.
  Forms(py::dict known, py::object anew, py::object keep, py::object backend, std::vector<py::object> changes,
        std::vector<py::object> looks, std::vector<Flag> flags, std::vector<py::object> plain)
      : known_(std::move(known)),
        anew_(std::move(anew)),
        keep_(std::move(keep)),
        flags_(std::move(flags)),
        asked_{std::move(backend)},
        changes_(std::move(changes)),
        looks_(std::move(looks)),
        plain_(std::move(plain)) {}

  PyObject* find(PyObject* const* arguments, Py_ssize_t count) const {
    if (count < TENSORS || any_says(changes_) || are_unusual()) {
      return PyObject_Vectorcall(anew_.ptr(), arguments, count, nullptr);
    }
    const py::object form = form_of(asked_, arguments, TENSORS, count);
    PyObject* const found = form ? PyDict_GetItemWithError(known_.ptr(), form.ptr()) : nullptr;
    if (found == nullptr && PyErr_Occurred()) {  // an argument is no tensor, or cannot be looked up
      if (!PyErr_ExceptionMatches(PyExc_AttributeError) && !PyErr_ExceptionMatches(PyExc_TypeError)) return nullptr;
      PyErr_Clear();
      return PyObject_Vectorcall(anew_.ptr(), arguments, count, nullptr);
    }
    if (found == nullptr) {
      std::vector<PyObject*> all{form.ptr()};
      all.insert(all.end(), arguments, arguments + count);
      return PyObject_Vectorcall(keep_.ptr(), all.data(), all.size(), nullptr);
    }
    const bool unseen =
        PyTuple_GET_ITEM(found, 0) != PyTuple_GET_ITEM(found, 1) && are_plain(arguments) && !any_says(looks_);
    return Py_NewRef(PyTuple_GET_ITEM(found, unseen));
  }

 private:
  bool are_unusual() const {
    for (const auto& [owner, name, usual] : flags_) {
      PyObject* const value = PyDict_GetItemWithError(owner.ptr(), name.ptr());
      const int is_usual = value ? PyObject_RichCompareBool(value, usual.ptr(), Py_EQ) : -1;
      if (is_usual < 0 && PyErr_Occurred()) throw py::error_already_set();
      if (is_usual != 1) return true;
    }
    return false;
  }

  bool are_plain(PyObject* const* arguments) const {
    const auto is_plain = [&](PyObject* x) {
      const auto is = [&](const py::object& type) { return type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(x)); };
      return x == Py_None || std::any_of(plain_.begin(), plain_.end(), is);
    };
    return std::all_of(arguments, arguments + TENSORS, is_plain);
  }

  py::dict known_;
  py::object anew_, keep_;
  std::vector<Flag> flags_;
  std::vector<py::object> asked_, changes_, looks_, plain_;
};

PyObject* find(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  try {
    return static_cast<const Forms*>(PyCapsule_GetPointer(self, nullptr))->find(arguments, count);
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

PyMethodDef FIND{"find", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&find)), METH_FASTCALL,
                 "The answer for a call with these arguments: input, weight or None, bias or None, and the rest."};

// What is kept in a dictionary for the form of one tensor.
struct Finder {
  std::vector<py::object> asked;  // functions, whose answers are part of the form
  py::object kind;

  PyObject* find(PyObject* known, PyObject* x) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(x)) != kind.ptr()) return Py_NewRef(Py_None);
    py::object form = form_of(asked, &x, 1, 1);
    PyObject* const found = form ? PyDict_GetItemWithError(known, form.ptr()) : nullptr;
    if (found == nullptr && PyErr_Occurred()) return nullptr;
    return found ? Py_NewRef(found) : form.release().ptr();
  }
};

PyObject* find_kept(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyDict_Check(arguments[0])) {
    PyErr_SetString(PyExc_TypeError, "find: expected a dict and a tensor");
    return nullptr;
  }
  return static_cast<const Finder*>(PyCapsule_GetPointer(self, nullptr))->find(arguments[0], arguments[1]);
}

PyMethodDef FIND_KEPT{"find", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&find_kept)), METH_FASTCALL,
                      "What a dictionary has for the form of a tensor, or the form; None for another object."};

}  // namespace

void define_forms(py::module_& m) {
  m.def(
      "forms",
      [](py::dict known, py::object anew, py::object keep, py::object backend, std::vector<py::object> changes,
         std::vector<py::object> looks, std::vector<Flag> flags, std::vector<py::object> plain) {
        return function_of(FIND, new Forms(std::move(known), std::move(anew), std::move(keep), std::move(backend),
                                           std::move(changes), std::move(looks), std::move(flags), std::move(plain)));
      },
      "A function that finds an answer by the form of its arguments; see alexnet_fast.ops.arguments.once_per_form.",
      py::arg("known"), py::arg("anew"), py::arg("keep"), py::arg("backend"), py::arg("changes"), py::arg("looks"),
      py::arg("flags"), py::arg("plain"));
  m.def(
      "finder",
      [](std::vector<py::object> asked, py::object kind) {
        return function_of(FIND_KEPT, new Finder{std::move(asked), std::move(kind)});
      },
      "A function of a dictionary and a tensor of type `kind`: what is kept there for its form; see\n"
      "alexnet_fast.nn.runs.",
      py::arg("asked"), py::arg("kind"));
}

}  // namespace alexnet_fast
