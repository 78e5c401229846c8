// In place of compute.cpp where no CUDA toolkit was found.
#include "engine/cuda/compute.h"
#include "engine/error.h"

namespace generate {

std::unique_ptr<Compute> make_cuda_compute(const ModelConfig&, const Weights&, DType) {
  fail("this program was built without CUDA: no CUDA toolkit with cuBLAS was found, or ADAATTN_CUDA was OFF");
}

}  // namespace generate
