// Approximate instructions: any value within the error that the PTX manual and the CUDA C++ Programming Guide allow.
//
// A card always gives the same value for the same argument, but no document says which. So does this file: the value is
// drawn from the argument and a seed, at either end of what is allowed as often as in between. What holds for every
// seed holds on a card. Not everything does: LRN's general powers err by up to 4 ulp in float32, as lrn.cuh says, and
// tests that allow twice PyTorch's error pass with most seeds, not with all.
#include <cstdio>
#include <cstdlib>

#include "host_simt/host_simt.h"

namespace host_simt {
namespace {

uint64_t first_seed() {
  const char* text = std::getenv("HOST_SIMT_APPROXIMATION");
  return text == nullptr ? 1 : std::strtoull(text, nullptr, 10);
}

uint64_t seed = first_seed();

enum class Function : uint64_t { root = 1, reciprocal_root, logarithm, library_root, library_exponential, library_log };

float nan() { return __uint_as_float(0x7fffffff); }

// -1, 1, or anything between.
double draw(Function function, float argument) {
  uint64_t state = (seed << 36) + (static_cast<uint64_t>(function) << 32) + __float_as_uint(argument);
  for (int round = 0; round < 2; ++round) {
    state = (state ^ state >> 31) * 0x9e3779b97f4a7c15;
    state = (state ^ state >> 29) * 0xbf58476d1ce4e5b9;
  }
  const double between = static_cast<double>(state >> 11) * 0x1p-52 - 1;
  return (state & 3) == 0 ? -1 : (state & 3) == 1 ? 1 : between;
}

// A float32 that is at most `error` away from `exact`, or the nearest one if none is.
float within(double exact, double error, Function function, float argument) {
  const float nearest = static_cast<float>(exact);
  float result = static_cast<float>(exact + error * draw(function, argument));
  while (result != nearest && std::fabs(result - exact) > error) {
    result = std::nextafterf(result, nearest);
  }
  return result;
}

// The distance from a number of this size to the next one.
double ulp(double exact) {
  int exponent;
  std::frexp(exact, &exponent);
  return std::ldexp(1.0, std::max(exponent, -125) - 24);
}

float flushed(float value) { return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value; }

float reciprocal_root(float value, double relative, Function function) {
  if (value != value || value < 0) {
    return nan();
  }
  if (value == 0 || std::isinf(value)) {
    return 1 / std::sqrt(value);  // -infinity at -0
  }
  const double exact = 1 / std::sqrt(static_cast<double>(value));
  return within(exact, relative > 0 ? relative * exact : 2 * ulp(exact), function, value);
}

// Logarithms of what is no positive number, and infinity's.
bool special_logarithm(float value, float& result) {
  result = value != value || value < 0 ? nan() : value == 0 ? -INFINITY : value;
  return !(value > 0) || std::isinf(value);
}

}  // namespace

void set_approximation(uint64_t new_seed) { seed = new_seed; }

// "The maximum relative error is 2^-23."
float sqrt_approx_ftz(float value) {
  value = flushed(value);
  if (value != value || value < 0) {
    return nan();
  }
  const double exact = std::sqrt(static_cast<double>(value));
  return value == 0 || std::isinf(value) ? value : within(exact, 0x1p-23 * exact, Function::root, value);
}

// 2^-22.9.
float rsqrt_approx_ftz(float value) {
  return reciprocal_root(flushed(value), 0x1.125fbep-23, Function::reciprocal_root);
}

// lg2.approx: 2^-22 absolute between 1/2 and 2, relative elsewhere. It is __log2f, and flushes nothing.
float lg2_approx(float value) {
  float result;
  if (special_logarithm(value, result)) {
    return result;
  }
  const double exact = std::log2(static_cast<double>(value));
  const double scale = value > 0.5f && value < 2 ? 1 : std::fabs(exact);
  return within(exact, 0x1p-22 * scale, Function::logarithm, value);
}

// The functions of CUDA's library: 2, 2 and 1 ulp, subnormal numbers like others.
float rsqrtf(float value) { return reciprocal_root(value, 0, Function::library_root); }

float exp2f(float value) {
  if (value != value) {
    return nan();
  }
  if (flushed(value) == 0) {  // ex2.approx's table of special values: 1 exactly
    return 1;
  }
  const double exact = std::exp2(static_cast<double>(value));
  return exact == 0 || exact > 0x1.fffffep127 ? static_cast<float>(exact)
                                              : within(exact, 2 * ulp(exact), Function::library_exponential, value);
}

float log2f(float value) {
  float result;
  if (special_logarithm(value, result)) {
    return result;
  }
  const double exact = std::log2(static_cast<double>(value));
  return within(exact, ulp(exact), Function::library_log, value);
}

}  // namespace host_simt
