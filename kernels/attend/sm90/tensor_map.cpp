#include "attend/sm90/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "core/error.h"

namespace adaattn::cuda::sm90 {
namespace {

constexpr int64_t kElement = 2;  // bytes

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
      fail(ADAATTN_ERROR_DRIVER_TOO_OLD, "the driver has no cuTensorMapEncodeTiled: %s", cudaGetErrorString(error));
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  }();
  return encoder;
}

}  // namespace

CUtensorMap make_map(const Operand& operand, Extents extents, int width, int box_rows, const char* name) {
  const auto bytes = [&](int64_t stride, int64_t extent) {
    // The stride of a dimension of extent 1 is free, but TMA wants a multiple of 16 bytes all the same.
    return static_cast<cuuint64_t>(extent > 1 ? stride * kElement : (extents.dim * kElement + 15) / 16 * 16);
  };
  if (operand.stride_h == 0) extents.heads = 1;
  if (operand.stride_b == 0) extents.batch = 1;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(extents.dim), static_cast<cuuint64_t>(extents.tokens),
                               static_cast<cuuint64_t>(extents.heads), static_cast<cuuint64_t>(extents.batch)};
  const cuuint64_t strides[3] = {bytes(operand.stride_s, extents.tokens), bytes(operand.stride_h, extents.heads),
                                 bytes(operand.stride_b, extents.batch)};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(width / kElement), static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, operand.dtype == Dtype::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      operand.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      width == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fail(ADAATTN_ERROR_DEVICE, "cuTensorMapEncodeTiled refused %s (CUresult %d)", name, static_cast<int>(result));
  }
  return map;
}

}  // namespace adaattn::cuda::sm90
