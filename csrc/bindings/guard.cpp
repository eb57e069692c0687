// What a plan was made from, and whether it is still so. A plan that alexnet_fast.nn.runs keeps holds while a hundred
// entries of modules' and classes' dictionaries are what they were; to look them up from Python would take longer than
// the layers.
#include <pybind11/stl.h>

#include "run.h"

namespace py = pybind11;

namespace alexnet_fast {
namespace {

enum class Is { object, absent, empty, filled, type, attribute, values };

// object      owner[key] is `expected`
// absent      owner, a dict, has no such key
// empty       owner[key] is a dict without entries
// filled      owner[key] is a dict with entries
// type        type(owner) is `expected`
// attribute   getattr(owner, key) is `expected`
// values      the values of owner, a dict, are the elements of `expected`, a tuple
class Entry {
 public:
  Entry(Is is, py::object owner, py::object key, py::object expected)
      : is(is), owner(std::move(owner)), key(std::move(key)), expected(std::move(expected)) {}

  const Is is;
  const py::object owner, key, expected;

  // While owner, a dict, is unchanged since an entry held, its values are the same objects: only the size of one may
  // have changed. A lookup takes ten times as long, and there are hundreds.
  bool holds() {
    const uint64_t now = version();
    if (now != 0 && now == version_) {
      return found_ == nullptr || (PyDict_GET_SIZE(found_) == 0) == (is == Is::empty);
    }
    const bool held = looks_the_same();
    version_ = held ? now : 0;
    return held;
  }

 private:
  // Of owner, if it is a dict; another one after each change. 0 where Python keeps none.
  uint64_t version() const {
#if PY_VERSION_HEX < 0x030C0000
    if (is != Is::type && is != Is::attribute) {
      return reinterpret_cast<PyDictObject*>(owner.ptr())->ma_version_tag;
    }
#endif
    return 0;
  }

  bool looks_the_same() {
    switch (is) {
      case Is::type:
        return reinterpret_cast<PyObject*>(Py_TYPE(owner.ptr())) == expected.ptr();
      case Is::attribute: {
        PyObject* const found = PyObject_GetAttr(owner.ptr(), key.ptr());
        PyErr_Clear();
        Py_XDECREF(found);
        return found == expected.ptr();
      }
      case Is::values: {
        Py_ssize_t position = 0, i = 0;
        PyObject* value = nullptr;
        const Py_ssize_t size = PyTuple_GET_SIZE(expected.ptr());
        while (PyDict_Next(owner.ptr(), &position, nullptr, &value)) {
          if (i == size || value != PyTuple_GET_ITEM(expected.ptr(), i++)) return false;
        }
        return i == size;
      }
      default: {
        PyObject* const found = PyDict_GetItemWithError(owner.ptr(), key.ptr());
        PyErr_Clear();
        if (is == Is::object) return found == expected.ptr();
        if (is == Is::absent) return found == nullptr;
        if (found == nullptr || !PyDict_Check(found)) return false;
        found_ = found;
        return (PyDict_GET_SIZE(found) == 0) == (is == Is::empty);
      }
    }
  }

  uint64_t version_ = 0;
  PyObject* found_ = nullptr;  // of empty and filled: owner[key], which lives while owner is unchanged
};

class Guard {
 public:
  void add(Is is, py::object owner, py::object key, py::object expected) {
    const bool is_dict = is != Is::type && is != Is::attribute;
    if ((is_dict && !py::isinstance<py::dict>(owner)) || (is == Is::values && !py::isinstance<py::tuple>(expected))) {
      throw py::type_error("guard: expected a dict, and a tuple of its values");
    }
    entries_.emplace_back(is, std::move(owner), std::move(key), std::move(expected));
  }

  bool holds() {
    for (Entry& entry : entries_) {
      if (!entry.holds()) return false;
    }
    return true;
  }

  // For Python's collector: a module may hold, by whatever ways, what watches it.
  int traverse(visitproc visit, void* arg) const {
    for (const Entry& entry : entries_) {
      Py_VISIT(entry.owner.ptr());
      Py_VISIT(entry.key.ptr());
      Py_VISIT(entry.expected.ptr());
    }
    return 0;
  }
  void clear() { entries_.clear(); }

 private:
  std::vector<Entry> entries_;
};

void collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const auto instance = reinterpret_cast<py::detail::instance*>(self);
    return instance->get_value_and_holder().holder_constructed()
               ? py::cast<Guard&>(py::handle(self)).traverse(visit, arg)
               : 0;
  };
  type->tp_clear = [](PyObject* self) {
    py::cast<Guard&>(py::handle(self)).clear();
    return 0;
  };
}

}  // namespace

void define_guard(py::module_& m) {
  py::enum_<Is>(m, "Is", "What a guard looks at.")
      .value("object", Is::object)
      .value("absent", Is::absent)
      .value("empty", Is::empty)
      .value("filled", Is::filled)
      .value("type", Is::type)
      .value("attribute", Is::attribute)
      .value("values", Is::values);
  py::class_<Guard>(m, "Guard", py::custom_type_setup(collectable),
                    "Holds while all that was added to it is as it was then.")
      .def(py::init<>())
      .def("add", &Guard::add, py::arg("what"), py::arg("owner"), py::arg("key") = py::none(),
           py::arg("expected") = py::none())
      .def("holds", &Guard::holds);
}

}  // namespace alexnet_fast
