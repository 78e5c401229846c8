#include "engine/cuda/blas.h"

#include <dlfcn.h>

#include <type_traits>

#include "engine/error.h"

namespace generate::cuda {
namespace {

// cublasGemmEx as the library has it; in C++ its header adds an overload of the name.
using GemmEx = cublasStatus_t (*)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void*,
                                  const void*, cudaDataType, int, const void*, cudaDataType, int, const void*, void*,
                                  cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t);

// Opened rather than linked: loading it takes a sixth of a second and 200 MB, and a run on the CPU needs none of it.
struct Library {
  decltype(&cublasCreate) create;
  decltype(&cublasDestroy) destroy;
  decltype(&cublasSetStream) set_stream;
  decltype(&cublasGetVersion) get_version;
  decltype(&cublasGetStatusString) get_status_string;
  GemmEx gemm_ex;

  Library() {
    const std::string soname = "libcublas.so." + std::to_string(CUBLAS_VER_MAJOR);
    void* library = dlopen(soname.c_str(), RTLD_NOW | RTLD_LOCAL);
    // Where the program was built; the loader need not know that folder.
    if (library == nullptr) library = dlopen((CUDA_LIBRARY_FOLDER "/" + soname).c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) fail("cuBLAS is needed for the weights' matrix products: %s", dlerror());
    const auto resolve = [library](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr) fail("cuBLAS lacks a function: %s", dlerror());
    };
    resolve(create, "cublasCreate_v2");
    resolve(destroy, "cublasDestroy_v2");
    resolve(set_stream, "cublasSetStream_v2");
    resolve(get_version, "cublasGetVersion_v2");
    resolve(get_status_string, "cublasGetStatusString");
    resolve(gemm_ex, "cublasGemmEx");
  }
};

const Library& library() {
  static const Library instance;
  return instance;
}

void check(cublasStatus_t status, const char* what) {
  if (status != CUBLAS_STATUS_SUCCESS) fail("cuBLAS: %s: %s", what, library().get_status_string(status));
}

cudaDataType_t type_of(DType dtype) {
  return dtype == DType::kF32 ? CUDA_R_32F : dtype == DType::kF16 ? CUDA_R_16F : CUDA_R_16BF;
}

}  // namespace

Blas::Blas(cudaStream_t stream) {
  check(library().create(&handle_), "starting");
  library().set_stream(handle_, stream);
}

Blas::~Blas() { library().destroy(handle_); }

// cuBLAS counts by columns: what it is asked for is y^T = weight x^T.
void Blas::multiply_transposed(int64_t rows, int64_t out, int64_t in, DType dtype, const void* x, const void* weight,
                               float beta, float* y) const {
  const float one = 1;
  const auto m = static_cast<int>(out), n = static_cast<int>(rows), k = static_cast<int>(in);
  check(library().gemm_ex(handle_, CUBLAS_OP_T, CUBLAS_OP_N, m, n, k, &one, weight, type_of(dtype), k, x,
                          type_of(dtype), k, &beta, y, CUDA_R_32F, m, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
        "a matrix product");
}

std::string Blas::description() const {
  int version = 0;  // 10000 major + 100 minor + patch
  check(library().get_version(handle_, &version), "asking for the version");
  return "cuBLAS " + std::to_string(version / 10000) + '.' + std::to_string(version / 100 % 100) + '.' +
         std::to_string(version % 100);
}

}  // namespace generate::cuda
