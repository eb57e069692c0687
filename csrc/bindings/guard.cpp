// What a plan was made from, and whether it is still so. A plan that alexnet_fast.nn.runs keeps holds while a hundred
// entries of modules' and classes' dictionaries are what they were; to look them up from Python would take longer than
// the layers.
#include <pybind11/stl.h>

#include <algorithm>

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
struct Entry {
  Is is;
  py::object key, expected;
  size_t place;  // of empty and filled: among Guard's contents
};

// While a dict or a class is unchanged since its entries held, they hold: of a dict that it has only the size may be
// another. A lookup takes ten times as long, and there are hundreds.
struct Owner {
  py::object object;
  std::vector<Entry> entries;
  uint64_t version = 0;  // when its entries held

  // Another one after each change; 0 where Python keeps none.
  uint64_t version_now() const {
#if PY_VERSION_HEX < 0x030C0000
    if (PyDict_Check(object.ptr())) return reinterpret_cast<PyDictObject*>(object.ptr())->ma_version_tag;
    if (PyType_Check(object.ptr())) {
      const auto type = reinterpret_cast<PyTypeObject*>(object.ptr());
      return PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG) ? type->tp_version_tag : 0;
    }
#endif
    return 0;
  }
};

// A dict that an owner has, which lives while the owner is unchanged.
struct Content {
  PyObject* dict;
  bool is_empty;
  bool holds() const { return (PyDict_GET_SIZE(dict) == 0) == is_empty; }
};

class Guard {
 public:
  explicit Guard(std::vector<py::object> looks) : looks_(std::move(looks)) {}

  void add(Is is, py::object object, py::object key, py::object expected) {
    const bool is_dict = is != Is::type && is != Is::attribute;
    if ((is_dict && !py::isinstance<py::dict>(object)) || (is == Is::values && !py::isinstance<py::tuple>(expected))) {
      throw py::type_error("guard: expected a dict, and a tuple of its values");
    }
    if (is == Is::type) {
      types_.emplace_back(std::move(object), std::move(expected));
      return;
    }
    auto owner = std::find_if(owners_.begin(), owners_.end(), [&](const Owner& o) { return o.object.is(object); });
    if (owner == owners_.end()) owner = owners_.insert(owner, Owner{std::move(object), {}});
    owner->version = 0;
    owner->entries.push_back({is, std::move(key), std::move(expected), contents_.size()});
    if (is == Is::empty || is == Is::filled) contents_.push_back({nullptr, is == Is::empty});
  }

  bool holds() {
    for (const auto& [object, expected] : types_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != expected.ptr()) return false;
    }
    for (Owner& owner : owners_) {
      const uint64_t now = owner.version_now();
      if (now != 0 && now == owner.version) continue;
      owner.version = 0;
      for (const Entry& entry : owner.entries) {
        if (!looks_the_same(owner.object, entry)) return false;
      }
      owner.version = now;
    }
    return std::all_of(contents_.begin(), contents_.end(), [](const Content& c) { return c.holds(); }) &&
           !any_says(looks_);
  }

  // For Python's collector: a module may hold, by whatever ways, what watches it.
  int traverse(visitproc visit, void* arg) const {
    for (const auto& [object, expected] : types_) {
      Py_VISIT(object.ptr());
      Py_VISIT(expected.ptr());
    }
    for (const Owner& owner : owners_) {
      Py_VISIT(owner.object.ptr());
      for (const Entry& entry : owner.entries) {
        Py_VISIT(entry.key.ptr());
        Py_VISIT(entry.expected.ptr());
      }
    }
    for (const py::object& look : looks_) Py_VISIT(look.ptr());
    return 0;
  }
  void clear() {
    types_.clear();
    owners_.clear();
    contents_.clear();
    looks_.clear();
  }

 private:
  bool looks_the_same(const py::object& owner, const Entry& entry) {
    switch (entry.is) {
      case Is::attribute: {
        PyObject* const found = PyObject_GetAttr(owner.ptr(), entry.key.ptr());
        PyErr_Clear();
        Py_XDECREF(found);
        return found == entry.expected.ptr();
      }
      case Is::values: {
        Py_ssize_t position = 0, i = 0;
        PyObject* value = nullptr;
        const Py_ssize_t size = PyTuple_GET_SIZE(entry.expected.ptr());
        while (PyDict_Next(owner.ptr(), &position, nullptr, &value)) {
          if (i == size || value != PyTuple_GET_ITEM(entry.expected.ptr(), i++)) return false;
        }
        return i == size;
      }
      default: {
        PyObject* const found = PyDict_GetItemWithError(owner.ptr(), entry.key.ptr());
        PyErr_Clear();
        if (entry.is == Is::object) return found == entry.expected.ptr();
        if (entry.is == Is::absent) return found == nullptr;
        if (found == nullptr || !PyDict_Check(found)) return false;
        contents_[entry.place].dict = found;
        return true;
      }
    }
  }

  std::vector<std::pair<py::object, py::object>> types_;
  std::vector<Owner> owners_;
  std::vector<Content> contents_;
  std::vector<py::object> looks_;
};

Guard& guard_of(PyObject* self) {
  return *reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr<Guard>();
}

PyObject* holds(PyObject* self, PyObject*) {
  try {
    return PyBool_FromLong(guard_of(self).holds());
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

PyMethodDef HOLDS{"holds", &holds, METH_NOARGS, "Whether all is as it was, and nobody looks."};

void collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject* const type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const auto instance = reinterpret_cast<py::detail::instance*>(self);
    return instance->get_value_and_holder().holder_constructed() ? guard_of(self).traverse(visit, arg) : 0;
  };
  type->tp_clear = [](PyObject* self) {
    guard_of(self).clear();
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
  py::class_<Guard>(
      m, "Guard", py::custom_type_setup(collectable),
      "Holds while all that was added to it is as it was then, and none of the functions `looks`, without\n"
      "arguments, says that somebody looks.")
      .def(py::init<std::vector<py::object>>(), py::arg("looks") = std::vector<py::object>())
      .def("add", &Guard::add, py::arg("what"), py::arg("owner"), py::arg("key") = py::none(),
           py::arg("expected") = py::none())
      // Not by pybind11, which takes as long to find the guard as all its entries take.
      .def_property_readonly("holds", [](const py::object& self) {
        return py::reinterpret_steal<py::object>(PyCFunction_New(&HOLDS, self.ptr()));
      });
}

}  // namespace alexnet_fast
