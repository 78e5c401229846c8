#include "engine/blas.h"

#include <cblas.h>
#include <dlfcn.h>

#include <cstdlib>

#include "engine/error.h"

namespace generate {
namespace {

// OpenBLAS reads OPENBLAS_CORETYPE in its constructor, and the versions that distributions package take SSE3 kernels
// on processors younger than they are. So the kernel set is chosen here, from what CPUID offers, before the library
// is opened; a setting of the user's own wins.
void choose_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const char* kernels = nullptr;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    kernels = "SkylakeX";
  else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    kernels = "Haswell";
  if (kernels != nullptr) setenv("OPENBLAS_CORETYPE", kernels, 0);
#endif
}

struct Blas {
  decltype(&cblas_sgemm) sgemm;
  decltype(&cblas_sgemv) sgemv;
  // OpenBLAS's own functions are not in every cblas.h.
  char* (*get_config)();
  char* (*get_corename)();

  Blas() {
    choose_kernels();
    setenv("OPENBLAS_NUM_THREADS", "1", 1);
    void* library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) fail("OpenBLAS is needed for the weights' matrix products: %s", dlerror());
    const auto resolve = [library](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr) fail("OpenBLAS lacks a function: %s", dlerror());
    };
    resolve(sgemm, "cblas_sgemm");
    resolve(sgemv, "cblas_sgemv");
    resolve(get_config, "openblas_get_config");
    resolve(get_corename, "openblas_get_corename");
    void (*set_num_threads)(int) = nullptr;
    resolve(set_num_threads, "openblas_set_num_threads");
    set_num_threads(1);
  }
};

const Blas& blas() {
  static const Blas instance;
  return instance;
}

}  // namespace

void open_blas() { blas(); }

std::string blas_description() {
  const std::string config = blas().get_config();
  // The text starts with name and version: "OpenBLAS 0.3.21 DYNAMIC_ARCH ...".
  const size_t name_end = config.find(' ');
  const size_t version_end = name_end == std::string::npos ? name_end : config.find(' ', name_end + 1);
  return config.substr(0, version_end) + " " + blas().get_corename();
}

void matmul_transposed(int64_t rows, int64_t out, int64_t in, const float* x, const float* weight, float beta, float* y,
                       int64_t ldy) {
  const auto m = static_cast<int>(rows), n = static_cast<int>(out), k = static_cast<int>(in);
  if (rows == 1)
    blas().sgemv(CblasRowMajor, CblasNoTrans, n, k, 1.0f, weight, k, x, 1, beta, y, 1);
  else
    blas().sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1.0f, x, k, weight, k, beta, y,
                 static_cast<int>(ldy));
}

}  // namespace generate
