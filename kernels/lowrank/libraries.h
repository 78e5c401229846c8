// cuBLAS and cuSOLVER for large matrices, opened when one first needs them. The library does not link them: they weigh
// 700 MB, and where they are absent our own kernels do the same work.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

namespace adaattn::cuda {

// c = a b, or c = a^T b, for `batch` column-major matrices: c is m x n, b is k x n.
template <typename Element>
struct ColumnProduct {
  bool transpose_a;
  int64_t m, n, k;
  const Element* a;
  int64_t lda, stride_a;
  const Element* b;
  int64_t ldb, stride_b;
  Element* c;
  int64_t ldc, stride_c;
  int64_t batch;
};

// Handles of one device. They are made and used with it current; calls may come from several threads.
class MathLibraries {
 public:
  // What cuBLAS wants on compute capability 9.0; it allocates nothing itself then.
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;

  // ADAATTN_CUDA_LIBRARIES=off in the environment keeps both closed.
  MathLibraries();
  ~MathLibraries();
  MathLibraries(const MathLibraries&) = delete;
  MathLibraries& operator=(const MathLibraries&) = delete;

  // These open the library, and say in the log which was found or what was tried.
  bool has_blas();
  bool has_solver();

  // Enqueued; workspace: kWorkspaceBytes.
  void multiply(const ColumnProduct<float>& product, void* workspace, cudaStream_t stream);
  void multiply(const ColumnProduct<double>& product, void* workspace, cudaStream_t stream);

  // Eigenvectors of a symmetric matrix replace it, a column each, in ascending order of values; info[0] != 0: it has
  // none. May wait for the stream, which must not be captured. n below 2^15.
  size_t eigen_bytes(int64_t n, int64_t ld);
  void eigen(int64_t n, int64_t ld, double* matrix, double* values, void* workspace, size_t bytes, int* info,
             cudaStream_t stream);

 private:
  struct Handles;
  std::mutex mutex_;
  std::unique_ptr<Handles> handles_;
};

}  // namespace adaattn::cuda
