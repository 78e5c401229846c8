#include "lowrank/libraries.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "core/error.h"
#include "core/log.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

// Their headers come in packages of their own, so what is called of the two is declared here; a soname stands for it.
using Handle = void*;
constexpr int kNoTranspose = 0, kTranspose = 1;  // cublasOperation_t
constexpr int kVectors = 1;                      // CUSOLVER_EIG_MODE_VECTOR
constexpr int kLower = 0;                        // CUBLAS_FILL_MODE_LOWER

template <typename Element>
using Gemm = int (*)(Handle, int, int, int64_t, int64_t, int64_t, const Element*, const Element*, int64_t, long long,
                     const Element*, int64_t, long long, const Element*, Element*, int64_t, long long, int64_t);

// A shared library: as already loaded, as the loader finds it, in the folder that ADAATTN_CUDA_LIB_DIR names. It stays
// open: other users may share it.
class SharedLibrary {
 public:
  explicit SharedLibrary(const std::string& soname) {
    library_ = dlopen(soname.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (library_ == nullptr) library_ = dlopen(soname.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) why_ = dlerror();
    const char* folder = std::getenv("ADAATTN_CUDA_LIB_DIR");
    if (library_ == nullptr && folder != nullptr) {
      library_ = dlopen((std::string(folder) + '/' + soname).c_str(), RTLD_NOW | RTLD_LOCAL);
      if (library_ == nullptr) why_ += std::string("; ") + dlerror();
    } else if (library_ == nullptr) {
      why_ += "; ADAATTN_CUDA_LIB_DIR is not set";
    }
  }
  template <typename Function>
  void find(Function& function, const char* name) {
    if (library_ == nullptr) return;
    function = reinterpret_cast<Function>(dlsym(library_, name));
    if (function != nullptr) return;
    why_ = std::string(name) + " is missing";
    library_ = nullptr;
  }
  bool complete() const { return library_ != nullptr; }
  const std::string& why() const { return why_; }

 private:
  void* library_ = nullptr;
  std::string why_;
};

struct Blas {
  SharedLibrary library{"libcublas.so." + std::to_string(CUDART_VERSION / 1000)};
  int (*create)(Handle*) = nullptr;
  int (*destroy)(Handle) = nullptr;
  int (*set_stream)(Handle, cudaStream_t) = nullptr;
  int (*set_workspace)(Handle, void*, size_t) = nullptr;
  int (*get_version)(Handle, int*) = nullptr;
  Gemm<float> gemm_f32 = nullptr;
  Gemm<double> gemm_f64 = nullptr;
  Blas() {
    library.find(create, "cublasCreate_v2");
    library.find(destroy, "cublasDestroy_v2");
    library.find(set_stream, "cublasSetStream_v2");
    library.find(set_workspace, "cublasSetWorkspace_v2");
    library.find(get_version, "cublasGetVersion_v2");
    library.find(gemm_f32, "cublasSgemmStridedBatched_64");
    library.find(gemm_f64, "cublasDgemmStridedBatched_64");
  }
};

struct Solver {
  SharedLibrary library{"libcusolver.so." + std::to_string(CUDART_VERSION / 1000 - 1)};  // its majors are one behind
  int (*create)(Handle*) = nullptr;
  int (*destroy)(Handle) = nullptr;
  int (*set_stream)(Handle, cudaStream_t) = nullptr;
  int (*get_version)(int*) = nullptr;
  int (*eigen_size)(Handle, int, int, int, const double*, int, const double*, int*) = nullptr;
  int (*eigen)(Handle, int, int, int, double*, int, double*, double*, int, int*) = nullptr;
  Solver() {
    library.find(create, "cusolverDnCreate");
    library.find(destroy, "cusolverDnDestroy");
    library.find(set_stream, "cusolverDnSetStream");
    library.find(get_version, "cusolverGetVersion");
    library.find(eigen_size, "cusolverDnDsyevd_bufferSize");
    library.find(eigen, "cusolverDnDsyevd");
  }
};

Blas& blas() {
  static Blas instance;
  return instance;
}

Solver& solver() {
  static Solver instance;
  return instance;
}

void check_status(int status, const char* what) {
  if (status != 0) fail(ADAATTN_ERROR_DEVICE, "low rank: %s returned status %d", what, status);
}

// Handles allocate, which a thread whose stream is being captured must announce as no concern of the capture.
class OutsideCapture {
 public:
  OutsideCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode"); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A handle of `library`, made at the first call; null where there is none, which the log says once.
template <typename Library>
Handle open(Library& library, const char* name) {
  if (!library.library.complete()) {
    log_message(ADAATTN_LOG_INFO, "low rank: without %s, by our own kernels: %s", name, library.library.why().c_str());
    return nullptr;
  }
  const OutsideCapture outside;
  Handle handle = nullptr;
  if (const int status = library.create(&handle); status != 0) {
    log_message(ADAATTN_LOG_WARNING, "low rank: without %s, by our own kernels: its handle: status %d", name, status);
    return nullptr;
  }
  return handle;
}

}  // namespace

struct MathLibraries::Handles {
  bool wanted = true, blas_tried = false, solver_tried = false;
  Handle blas_handle = nullptr, solver_handle = nullptr;

  template <typename Element>
  void multiply(Gemm<Element> gemm, const ColumnProduct<Element>& p, void* workspace, cudaStream_t stream) const {
    const OutsideCapture outside;  // kernels may be loaded
    check_status(blas().set_stream(blas_handle, stream), "cublasSetStream");
    // A new stream takes the workspace away.
    check_status(blas().set_workspace(blas_handle, workspace, kWorkspaceBytes), "cublasSetWorkspace");
    const Element one = 1, zero = 0;
    check_status(gemm(blas_handle, p.transpose_a ? kTranspose : kNoTranspose, kNoTranspose, p.m, p.n, p.k, &one, p.a,
                      p.lda, p.stride_a, p.b, p.ldb, p.stride_b, &zero, p.c, p.ldc, p.stride_c, p.batch),
                 "a product by cuBLAS");
  }
};

MathLibraries::MathLibraries() : handles_(std::make_unique<Handles>()) {
  const char* setting = std::getenv("ADAATTN_CUDA_LIBRARIES");
  handles_->wanted = setting == nullptr || std::strcmp(setting, "off") != 0;
}

MathLibraries::~MathLibraries() {
  if (handles_->blas_handle != nullptr) blas().destroy(handles_->blas_handle);
  if (handles_->solver_handle != nullptr) solver().destroy(handles_->solver_handle);
}

bool MathLibraries::has_blas() {
  const std::lock_guard lock(mutex_);
  Handles& h = *handles_;
  if (h.wanted && !h.blas_tried) {
    h.blas_tried = true;
    h.blas_handle = open(blas(), "cuBLAS");
    int version = 0;  // 10000 major + 100 minor + patch
    if (h.blas_handle != nullptr && blas().get_version(h.blas_handle, &version) == 0)
      log_message(ADAATTN_LOG_INFO, "low rank: large products by cuBLAS %d.%d.%d", version / 10000, version / 100 % 100,
                  version % 100);
  }
  return h.blas_handle != nullptr;
}

bool MathLibraries::has_solver() {
  const std::lock_guard lock(mutex_);
  Handles& h = *handles_;
  if (h.wanted && !h.solver_tried) {
    h.solver_tried = true;
    h.solver_handle = open(solver(), "cuSOLVER");
    int version = 0;  // 1000 major + 100 minor + patch
    if (h.solver_handle != nullptr && solver().get_version(&version) == 0)
      log_message(ADAATTN_LOG_INFO, "low rank: eigenvectors of large matrices by cuSOLVER %d.%d.%d", version / 1000,
                  version / 100 % 10, version % 100);
  }
  return h.solver_handle != nullptr;
}

void MathLibraries::multiply(const ColumnProduct<float>& product, void* workspace, cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  handles_->multiply(blas().gemm_f32, product, workspace, stream);
}

void MathLibraries::multiply(const ColumnProduct<double>& product, void* workspace, cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  handles_->multiply(blas().gemm_f64, product, workspace, stream);
}

size_t MathLibraries::eigen_bytes(int64_t n, int64_t ld) {
  const std::lock_guard lock(mutex_);
  int elements = 0;
  check_status(solver().eigen_size(handles_->solver_handle, kVectors, kLower, static_cast<int>(n), nullptr,
                                   static_cast<int>(ld), nullptr, &elements),
               "cusolverDnDsyevd_bufferSize");
  return static_cast<size_t>(elements) * sizeof(double);
}

void MathLibraries::eigen(int64_t n, int64_t ld, double* matrix, double* values, void* workspace, size_t bytes,
                          int* info, cudaStream_t stream) {
  const std::lock_guard lock(mutex_);
  check_status(solver().set_stream(handles_->solver_handle, stream), "cusolverDnSetStream");
  check_status(
      solver().eigen(handles_->solver_handle, kVectors, kLower, static_cast<int>(n), matrix, static_cast<int>(ld),
                     values, static_cast<double*>(workspace), static_cast<int>(bytes / sizeof(double)), info),
      "an eigen-decomposition by cuSOLVER");
}

}  // namespace adaattn::cuda
