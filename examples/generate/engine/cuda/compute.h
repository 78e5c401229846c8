// The GPU's share of a layer: matrix products by cuBLAS, the rest by the kernels beside this file, all on one stream.
#pragma once

#include <memory>

#include "engine/compute.h"

namespace generate {

// Uploads the weights in `dtype`. Throws with the reason where this program or this machine cannot use CUDA. config
// must outlive the result.
std::unique_ptr<Compute> make_cuda_compute(const ModelConfig& config, const Weights& weights, DType dtype);

}  // namespace generate
