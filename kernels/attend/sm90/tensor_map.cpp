#include "attend/sm90/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "core/error.h"

namespace adaattn::cuda::sm90 {
namespace {

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

// Heads and tokens of an operand as two dimensions of a map.
struct Axis {
  int64_t extent, stride;
  int box;
};

CUtensorMap encode(const Operand& operand, int64_t dim, const Axis (&axes)[3], int width, const char* name,
                   int step = 1) {
  const int64_t element = dtype_size(operand.dtype);
  cuuint64_t sizes[4] = {static_cast<cuuint64_t>(dim)}, strides[3];
  cuuint32_t box[4] = {static_cast<cuuint32_t>(width / element)};
  for (int i = 0; i < 3; ++i) {
    const int64_t extent = axes[i].stride == 0 ? 1 : axes[i].extent;
    sizes[i + 1] = static_cast<cuuint64_t>(extent);
    // The stride of a dimension of extent 1 is free, but TMA wants a multiple of 16 bytes all the same.
    strides[i] = static_cast<cuuint64_t>(extent > 1 ? axes[i].stride * element : (dim * element + 15) / 16 * 16);
    box[i + 1] = static_cast<cuuint32_t>(axes[i].box);
  }
  const cuuint32_t steps[4] = {1, static_cast<cuuint32_t>(step), 1, 1};
  CUtensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map,
                           operand.dtype == Dtype::kE4M3   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                           : operand.dtype == Dtype::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                           4, operand.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           width == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fail(ADAATTN_ERROR_DEVICE, "cuTensorMapEncodeTiled refused %s (CUresult %d)", name, static_cast<int>(result));
  }
  return map;
}

}  // namespace

CUtensorMap make_map(const Operand& operand, Extents extents, int width, int box_rows, const char* name) {
  const Axis tokens{extents.tokens, operand.stride_s, box_rows}, heads{extents.heads, operand.stride_h, 1};
  return encode(operand, extents.dim, {tokens, heads, {extents.batch, operand.stride_b, 1}}, width, name);
}

CUtensorMap make_sampled_map(const Operand& operand, Extents extents, int width, int box_rows, int step,
                             const char* name) {
  const Axis tokens{extents.tokens, operand.stride_s, box_rows}, heads{extents.heads, operand.stride_h, 1};
  return encode(operand, extents.dim, {tokens, heads, {extents.batch, operand.stride_b, 1}}, width, name, step);
}

CUtensorMap make_rows_map(const Operand& operand, Extents extents, int width, int box_rows, int heads,
                          const char* name) {
  const Axis tokens{extents.tokens, operand.stride_s, box_rows / heads};
  const Axis in_group{extents.heads, operand.stride_h, heads};
  return encode(operand, extents.dim, {in_group, tokens, {extents.batch, operand.stride_b, 1}}, width, name);
}

}  // namespace adaattn::cuda::sm90
