// What CUDA's words mean in the host build, and small pieces of csrc/cuda/common that no operator test isolates:  model
// NAME
#include <cstdio>
#include <cstring>
#include <set>
#include <vector>

#include "cuda/common/async_copy.cuh"
#include "cuda/common/divider.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/vector.cuh"

using namespace alexnet_fast::cuda;

namespace {

template <class T>
T* tensor(size_t count, host_simt::Content content = host_simt::Content::undefined) {
  return static_cast<T*>(host_simt::allocate("tensor", count * sizeof(T), 0, content));
}

// ---------------------------------------------------------------- warps

__global__ void shuffle_kernel(int* out) {  // out[5][64]
  const int i = threadIdx.x;
  out[i] = __shfl_sync(0xffffffff, i, 3, 8);
  out[64 + i] = __shfl_up_sync(0xffffffff, i, 2, 8);
  out[128 + i] = __shfl_down_sync(0xffffffff, i, 5);
  out[192 + i] = __shfl_xor_sync(0xffffffff, i, 16);
  // Two halves of a warp, each under its own mask, at the same line.
  const uint32_t half = i % 32 < 16 ? 0xffff : 0xffff0000;
  out[256 + i] = __shfl_sync(half, i, i % 32 < 16 ? 15 : 16);
}

bool shuffles() {
  int* out = tensor<int>(320);
  launch<shuffle_kernel>(1, 64, 0, nullptr, out);
  bool right = true;
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32, base = i - lane;
    right = right && out[i] == base + lane / 8 * 8 + 3;
    right = right && out[64 + i] == (lane % 8 < 2 ? i : i - 2);
    right = right && out[128 + i] == (lane + 5 < 32 ? i + 5 : i);
    right = right && out[192 + i] == (i ^ 16);
    right = right && out[256 + i] == base + (lane < 16 ? 15 : 16);
  }
  return right;
}

__global__ void vote_kernel(int* out) {  // blocks of 40 threads: the second warp has 8 lanes
  const int i = threadIdx.x;
  const uint32_t odd = __ballot_sync(0xffffffff, i % 2);
  const int any = __any_sync(0xffffffff, i == 5);
  const int all = __all_sync(0xffffffff, i < 32);
  const int count = __syncthreads_count(i % 3 == 0);
  const int barrier_any = __syncthreads_or(i == 39);
  const int barrier_all = __syncthreads_and(i < 39);
  out[i] = (odd == (i < 32 ? 0xaaaaaaaau : 0xaau)) + 2 * any + 4 * all + 8 * (count == 14) + 16 * barrier_any +
           32 * barrier_all;
}

bool votes() {
  int* out = tensor<int>(40);
  launch<vote_kernel>(1, 40, 0, nullptr, out);
  bool right = true;
  for (int i = 0; i < 40; ++i) {
    right = right && out[i] == (i < 32 ? 1 + 2 + 4 + 8 + 16 : 1 + 8 + 16);
  }
  return right;
}

// ---------------------------------------------------------------- order

__global__ void ticket_kernel(int* counter, int* threads) {
  const int ticket = atomicAdd(counter, 1);
  threads[ticket] = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x * blockDim.x * blockDim.y * blockDim.z +
                    blockIdx.x * blockDim.x * blockDim.y * blockDim.z +
                    (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
}

std::vector<int> tickets(uint64_t seed) {
  host_simt::set_seed(seed);
  constexpr int kTotal = 2 * 3 * 2 * 5 * 2 * 3;
  int* counter = tensor<int>(1, host_simt::Content::defined);
  int* threads = tensor<int>(kTotal);
  *counter = 0;
  launch<ticket_kernel>(dim3(2, 3, 2), dim3(5, 2, 3), 0, nullptr, counter, threads);
  std::vector<int> order(threads, threads + kTotal);
  host_simt::free_all();
  return order;
}

// Every thread of every block runs once; the order is the seed's.
bool schedules() {
  std::set<std::vector<int>> orders;
  bool right = true;
  for (int seed = 0; seed < 20; ++seed) {
    const std::vector<int> order = tickets(seed);
    right = right && order == tickets(seed);
    orders.insert(order);
    const std::set<int> all(order.begin(), order.end());
    right =
        right && all.size() == order.size() && *all.begin() == 0 && *all.rbegin() == static_cast<int>(all.size()) - 1;
  }
  return right && orders.size() == 20;
}

// ---------------------------------------------------------------- copies

__global__ void copy_kernel(const uint32_t* x, uint32_t* y) {
  ALEXNET_FAST_SHARED(uint32_t[32][4], tile);
  const int i = threadIdx.x;
  async_copy<16>(tile[i], i % 2 == 0 ? x + 4 * i : nullptr, i % 2 == 0 ? 4 * (i % 5) : 0);
  async_commit();
  async_wait<0>();
  for (int j = 0; j < 4; ++j) {
    y[4 * i + j] = tile[i][j];
  }
}

bool copies() {
  uint32_t* x = tensor<uint32_t>(128, host_simt::Content::defined);
  uint32_t* y = tensor<uint32_t>(128);
  for (int i = 0; i < 128; ++i) {
    x[i] = 1000 + i;
  }
  launch<copy_kernel>(1, 32, 0, nullptr, x, y);
  bool right = true;
  for (int i = 0; i < 32; ++i) {
    for (int j = 0; j < 4; ++j) {
      const bool copied = i % 2 == 0 && j < i % 5;
      right = right && y[4 * i + j] == (copied ? x[4 * i + j] : 0);
    }
  }
  return right;
}

// ---------------------------------------------------------------- matrices

template <bool kTransposed>
__global__ void load_kernel(uint32_t* out) {  // 8 x 32 elements: four matrices side by side
  ALEXNET_FAST_SHARED(uint16_t[8 * 32], tile);
  for (int i = threadIdx.x; i < 8 * 32; i += 32) {
    tile[i] = i;
  }
  __syncwarp();
  uint32_t four[4], two[2], one[1];
  const int lane = threadIdx.x;
  load_matrix<kTransposed>(four, &tile[lane % 8 * 32 + lane / 8 * 8]);
  load_matrix<kTransposed>(two, &tile[lane % 8 * 32 + lane / 8 % 2 * 8]);
  load_matrix<kTransposed>(one, &tile[lane % 8 * 32]);
  for (int m = 0; m < 4; ++m) {
    out[lane * 4 + m] = four[m];
  }
  out[128 + lane] = two[0] == four[0] && two[1] == four[1] && one[0] == four[0];
}

__global__ void store_kernel(uint16_t* out) {  // 8 x 32 elements: four matrices side by side
  ALEXNET_FAST_SHARED(uint16_t[8 * 32], tile);
  const uint32_t lane = threadIdx.x;
  uint32_t four[4];
  for (int m = 0; m < 4; ++m) {
    const uint32_t first = lane / 4 * 32 + m * 8 + lane % 4 * 2;
    four[m] = first | (first + 1) << 16;
  }
  store_matrix(four, &tile[lane % 8 * 32 + lane / 8 * 8]);
  __syncwarp();
  for (int i = lane; i < 8 * 32; i += 32) {
    out[i] = tile[i];
  }
}

bool stores() {
  uint16_t* out = tensor<uint16_t>(8 * 32);
  launch<store_kernel>(1, 32, 0, nullptr, out);
  bool right = true;
  for (int i = 0; i < 8 * 32; ++i) {
    right = right && out[i] == i;
  }
  return right;
}

template <bool kTransposed>
bool loads() {
  uint32_t* out = tensor<uint32_t>(160);
  launch<load_kernel<kTransposed>>(1, 32, 0, nullptr, out);
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      for (int i = 0; i < 2; ++i) {
        const int major = lane / 4, minor = lane % 4 * 2 + i;
        const int row = kTransposed ? minor : major, column = kTransposed ? major : minor;
        right = right && (out[lane * 4 + m] >> 16 * i & 0xffff) == static_cast<uint32_t>(row * 32 + m * 8 + column);
      }
    }
    right = right && out[128 + lane] == 1;
  }
  return right;
}

// D = A B + D through the fragments that mma.cuh's head describes. a: 16 x depth, b: depth x 8, d: 16 x 8, all by rows.
template <class T>
__global__ void mma_kernel(const float* a, const float* b, float* d) {
  constexpr int kDepth = kMmaDepth<T>, kPer = kDepth / 8;  // elements in a register
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  float fd[4];
  for (int r = 0; r < 4; ++r) {
    fd[r] = d[(g + r / 2 * 8) * 8 + 2 * t + r % 2];
    const int row = g + r % 2 * 8, k = (r / 2 * 4 + t) * kPer;
    if constexpr (kPer == 1) {
      fa[r] = tf32(a[row * kDepth + k]);
    } else {
      fa[r] = pack_pair<T>(a[row * kDepth + k], a[row * kDepth + k + 1]);
    }
  }
  for (int r = 0; r < 2; ++r) {
    const int k = (r * 4 + t) * kPer;
    if constexpr (kPer == 1) {
      fb[r] = tf32(b[k * 8 + g]);
    } else {
      fb[r] = pack_pair<T>(b[k * 8 + g], b[(k + 1) * 8 + g]);
    }
  }
  mma<T>(fd, fa, fb);
  for (int r = 0; r < 4; ++r) {
    d[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = fd[r];
  }
}

template <class T>
bool product() {
  constexpr int kDepth = kMmaDepth<T>;
  float* a = tensor<float>(16 * kDepth, host_simt::Content::defined);
  float* b = tensor<float>(kDepth * 8, host_simt::Content::defined);
  float* d = tensor<float>(128, host_simt::Content::defined);
  float expected[128];
  for (int i = 0; i < 16 * kDepth; ++i) {
    a[i] = static_cast<float>(i * 7 % 23 - 11);
  }
  for (int i = 0; i < kDepth * 8; ++i) {
    b[i] = static_cast<float>(i * 5 % 19 - 9);
  }
  for (int i = 0; i < 128; ++i) {
    expected[i] = d[i] = static_cast<float>(i);
    for (int k = 0; k < kDepth; ++k) {
      expected[i] += a[i / 8 * kDepth + k] * b[k * 8 + i % 8];
    }
  }
  launch<mma_kernel<T>>(1, 32, 0, nullptr, a, b, d);
  return std::memcmp(d, expected, sizeof expected) == 0;
}

// TF32 keeps 10 bits of mantissa; ties go away from zero.
bool tf32_rounding() {
  return tf32(1.0f + 0x1p-11f) == __float_as_uint(1.0f + 0x1p-10f) &&
         tf32(-1.0f - 0x1p-11f) == __float_as_uint(-1.0f - 0x1p-10f) &&
         tf32(1.0f + 0x1.8p-12f) == __float_as_uint(1.0f) && tf32(INFINITY) == __float_as_uint(INFINITY);
}

// ---------------------------------------------------------------- 16-bit numbers

// Between two neighbours every float32 goes to the nearer one, and the middle to the one with an even last bit.
template <class T>
bool rounding(int infinity) {
  bool right = true;
  for (int i = 0; i < infinity; ++i) {
    // The largest number is as far from the power of two that infinity stands for as from the number below.
    const int high = i + 1 == infinity ? i : i + 1;
    const float step = to_float(T{static_cast<uint16_t>(high)}) - to_float(T{static_cast<uint16_t>(high - 1)});
    const float a = to_float(T{static_cast<uint16_t>(i)});
    const float middle = a + step / 2;
    const float values[] = {a, std::nextafterf(middle, 0), middle, std::nextafterf(middle, INFINITY)};
    const int expected[] = {i, i, i + i % 2, i + 1};
    for (int j = 0; j < 4; ++j) {
      T kept;
      from_float(values[j], kept);
      right = right && kept.bits == expected[j];
      from_float(-values[j], kept);
      right = right && kept.bits == (expected[j] | 0x8000);
    }
  }
  T nan;
  from_float(NAN, nan);
  return right && std::isnan(to_float(nan)) && std::isinf(to_float(T{static_cast<uint16_t>(infinity)}));
}

// The middle of two subnormal bfloat16 is a float32, so `rounding` needs no more than float32 for either type.
bool halves() { return rounding<f16>(0x7c00); }
bool bfloats() { return rounding<bf16>(0x7f80); }

// ---------------------------------------------------------------- division

bool division() {
  const int64_t interesting[] = {1,         2,         3,          5,         7,           8,         13,
                                 27,        55,        169,        3025,      65535,       65536,     1000003,
                                 INT32_MAX, 1LL << 31, UINT32_MAX, 1LL << 32, 12345678901, 1LL << 40, INT64_MAX / 3};
  bool right = true;
  for (const int64_t divisor : interesting) {
    const Divider divider(divisor);
    for (const int64_t near : interesting) {
      for (int64_t n = std::max<int64_t>(near - 3, 0); n < near + 3; ++n) {
        for (const int64_t dividend : {n, n < INT32_MAX / 4 && divisor < INT32_MAX ? n * divisor : n}) {
          int64_t rest;
          right = right && divider.divide(dividend, rest) == dividend / divisor && rest == dividend % divisor;
          if (std::max(dividend, divisor) <= INT32_MAX) {
            uint32_t small;
            right = right && divider.divide_small(static_cast<uint32_t>(dividend), small) == dividend / divisor;
            right = right && small == dividend % divisor;
          }
        }
      }
    }
  }
  return right;
}

// ---------------------------------------------------------------- approximate instructions

template <class Exact>
bool near(float (*function)(float), Exact exact, double relative, double absolute) {
  bool right = true;
  double least = 0, most = 0;
  for (int seed = 0; seed < 8; ++seed) {
    host_simt::set_approximation(seed);
    for (float x = 0x1p-120f; x < 0x1p120f; x *= 1.37f) {
      const double wanted = exact(static_cast<double>(x)), allowed = relative * std::fabs(wanted) + absolute;
      const double error = (function(x) - wanted) / allowed;
      right = right && std::fabs(error) <= 1 && function(x) == function(x);
      least = std::min(least, error);
      most = std::max(most, error);
    }
  }
  return right && least < -0.6 && most > 0.6;  // all that is allowed does happen
}

bool is(float value, uint32_t bits) { return __float_as_uint(value) == bits; }

bool approximate() {
  constexpr uint32_t kNaN = 0x7fffffff, kInfinity = 0x7f800000;
  const auto root = [](double x) { return std::sqrt(x); };
  const auto reciprocal = [](double x) { return 1 / std::sqrt(x); };
  const auto logarithm = [](double x) { return std::log2(x); };
  const float tiny = 0x1p-130f;
  return near(host_simt::sqrt_approx_ftz, root, 0x1p-23, 0) &&
         near(host_simt::rsqrt_approx_ftz, reciprocal, std::exp2(-22.9), 0) &&
         near(host_simt::lg2_approx, logarithm, 0x1p-22, 0x1p-22) && is(host_simt::sqrt_approx_ftz(-1), kNaN) &&
         is(host_simt::rsqrt_approx_ftz(-1), kNaN) && is(host_simt::lg2_approx(-1), kNaN) &&
         is(host_simt::sqrt_approx_ftz(-0.0f), 0x80000000) &&
         is(host_simt::rsqrt_approx_ftz(-0.0f), kInfinity | 0x80000000) &&
         is(host_simt::rsqrt_approx_ftz(tiny), kInfinity) && is(host_simt::sqrt_approx_ftz(tiny), 0) &&
         is(host_simt::rsqrt_approx_ftz(INFINITY), 0) && is(host_simt::lg2_approx(0), kInfinity | 0x80000000) &&
         std::fabs(host_simt::lg2_approx(tiny) + 130) < 1e-3 && host_simt::rsqrtf(tiny) > 0x1p64f &&
         is(host_simt::exp2f(-INFINITY), 0) && host_simt::exp2f(-0.0f) == 1 && is(host_simt::exp2f(NAN), kNaN);
}

struct Check {
  const char* name;
  bool (*run)();
};

const Check checks[] = {
    {"shuffles", shuffles},
    {"votes", votes},
    {"schedules", schedules},
    {"copies", copies},
    {"stores", stores},
    {"loads", loads<false>},
    {"transposed_loads", loads<true>},
    {"product_f16", product<f16>},
    {"product_bf16", product<bf16>},
    {"product_tf32", product<float>},
    {"tf32_rounding", tf32_rounding},
    {"halves", halves},
    {"bfloats", bfloats},
    {"division", division},
    {"approximate", approximate},
};

}  // namespace

int main(int count, char** arguments) {
  for (const Check& check : checks) {
    if (count == 2 && std::strcmp(check.name, arguments[1]) == 0) {
      const bool right = check.run();
      std::fprintf(stderr, "%s: %s\n", check.name, right ? "as CUDA has it" : "wrong");
      return right ? 0 : 1;
    }
  }
  std::fprintf(stderr, "usage: model NAME\n");
  return 2;
}
