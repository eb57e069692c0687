// What module.cpp makes known to Python beside facts about the build.
#pragma once

#include <pybind11/pybind11.h>

namespace alexnet_fast {

void define_runs(pybind11::module_& m);
void define_guard(pybind11::module_& m);
void define_forms(pybind11::module_& m);

}  // namespace alexnet_fast
