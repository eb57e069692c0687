// 16-bit floats, and the matrix instructions of a warp with their layouts of fragments over lanes (PTX ISA, "Matrix
// Fragments for mma.m16n8k16 / .m16n8k8", "ldmatrix" and "stmatrix").
#include <cstring>
#include <vector>

#include "host_simt/state.h"

namespace host_simt {
namespace {

float decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  const float magnitude = exponent == 31  ? (mantissa != 0 ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                          : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return std::copysign(magnitude, (bits & 0x8000) != 0 ? -1.0f : 1.0f);
}

float decode(Element element, uint32_t reg, int half) {
  const uint16_t bits = static_cast<uint16_t>(reg >> (16 * half));
  return element == Element::f16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

}  // namespace

float half_to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (int i = 0; i < 65536; ++i) {
      values[i] = decode_half(i);
    }
    return values;
  }();
  return table[bits];
}

uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) {
    return 0x7fff;  // the card's NaN
  }
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) {  // halfway between the largest half and the next power of two
    return sign | 0x7c00;
  }
  if (magnitude == 0) {
    return sign;
  }
  int exponent;
  std::frexp(magnitude, &exponent);
  // Below 2^-14 the spacing stays that of subnormals, 2^-24. nearbyint rounds ties to even; a carry moves the exponent
  // on.
  const int spacing = std::max(exponent - 11, -24);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -spacing)));
  return sign | static_cast<uint16_t>(spacing == -24 ? steps : ((spacing + 24) << 10) + steps);
}

void multiply_16x8(Element element, const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4], Site site) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  const Shown* shown = meet(Meeting::matrix_multiply, 0xffffffff, &mine, sizeof mine, site);
  // Lane 4 g + t holds rows g and g + 8 of A and D, column g of B, and columns 2 t, 2 t + 1 of D.
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row_half = i / 2, column = 2 * t + i % 2;
    float sum = d[i];
    for (int s = 0; s < 4; ++s) {  // lanes that share a row of A, or a column of B
      Fragments row, col;
      std::memcpy(&row, shown[4 * g + s], sizeof row);
      std::memcpy(&col, shown[4 * column + s], sizeof col);
      for (int k = 0; k < 2; ++k) {  // the halves of the depth
        if (element == Element::tf32) {
          // The multiplier takes the upper 19 bits.
          sum += __uint_as_float(row.a[row_half + 2 * k] & 0xffffe000) * __uint_as_float(col.b[k] & 0xffffe000);
        } else {
          sum += decode(element, row.a[row_half + 2 * k], 0) * decode(element, col.b[k], 0);
          sum += decode(element, row.a[row_half + 2 * k], 1) * decode(element, col.b[k], 1);
        }
      }
    }
    d[i] = sum;
  }
}

namespace {

// Of the lanes whose rows are used.
void expect_aligned(const char* instruction, int matrices, const void* row, Site site) {
  if (lane() < 8 * matrices && reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fail("misaligned", "%s of the row at %p in %s:%d", instruction, row, site.file, site.line);
  }
}

}  // namespace

void load_matrices(uint32_t* registers, int matrices, const void* row, bool transposed, Site site) {
  expect_aligned("ldmatrix", matrices, row, site);
  const Shown* shown = meet(Meeting::matrix_load, 0xffffffff, &row, sizeof row, site);
  const int g = lane() / 4, t = lane() % 4;
  for (int matrix = 0; matrix < matrices; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int from_row = transposed ? 2 * t + i : g;
      const int from_column = transposed ? g : 2 * t + i;
      const uint16_t* elements;
      std::memcpy(&elements, shown[8 * matrix + from_row], sizeof elements);
      touch(elements + from_column, 2, Access::read, __builtin_return_address(0));
      pair[i] = elements[from_column];
    }
    registers[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

void store_matrices(const uint32_t* registers, int matrices, void* row, Site site) {
  expect_aligned("stmatrix", matrices, row, site);
  const Shown* shown = meet(Meeting::matrix_store, 0xffffffff, &row, sizeof row, site);
  const int g = lane() / 4, t = lane() % 4;
  for (int matrix = 0; matrix < matrices; ++matrix) {
    uint16_t* elements;
    std::memcpy(&elements, shown[8 * matrix + g], sizeof elements);
    touch(elements + 2 * t, 4, Access::write, __builtin_return_address(0));
    std::memcpy(elements + 2 * t, registers + matrix, 4);
  }
}

}  // namespace host_simt
