#include <cinttypes>

#include "capi/guard.h"
#include "core/check_tensor.h"

namespace adaattn::capi {
namespace {

// DLPack's DLTensor as its header lays it out since v0.2 (C ABI, unchanged in 1.x); only what a conversion reads.
// https://dmlc.github.io/dlpack/latest/c_api.html
struct DLTensor {
  void* data;
  struct {
    int32_t device_type;
    int32_t device_id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; NULL: contiguous
  uint64_t byte_offset;
};

constexpr int32_t kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLCUDAManaged = 13;
constexpr uint8_t kDLInt = 0, kDLFloat = 2, kDLBfloat = 4, kDLFloat8E4M3fn = 10;

adaattn_tensor_t make_tensor(void* data, adaattn_dtype_t dtype, adaattn_device_t device, int32_t device_id,
                             int32_t ndim, const int64_t* shape, const int64_t* stride) {
  if (dtype < ADAATTN_DTYPE_F32 || dtype > ADAATTN_DTYPE_E4M3)
    fail(ADAATTN_ERROR_INVALID_DTYPE,
         "dtype is %" PRId32 "; accepted: 1 (F32), 2 (F16), 3 (BF16), 4 (I32), 5 (I64), 6 (E4M3)", dtype);
  check_device(device, "device");
  if (device_id < 0) fail(ADAATTN_ERROR_INVALID_ARGUMENT, "device_id is %" PRId32 "; accepted: 0 or more", device_id);
  if (ndim < 1 || ndim > 4) fail(ADAATTN_ERROR_INVALID_SHAPE, "ndim is %" PRId32 "; accepted: 1 to 4", ndim);
  require(shape, "shape");
  adaattn_tensor_t t = {};
  t.data = data;
  t.ndim = ndim;
  t.dtype = dtype;
  t.device = device;
  t.device_id = device_id;
  int64_t step = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] < 0) fail(ADAATTN_ERROR_INVALID_SHAPE, "shape[%d] is %" PRId64 "; accepted: 0 or more", i, shape[i]);
    t.shape[i] = shape[i];
    t.stride[i] = stride != nullptr ? stride[i] : step;
    if (stride == nullptr && shape[i] > 0 && __builtin_mul_overflow(step, shape[i], &step))
      fail(ADAATTN_ERROR_SIZE_OVERFLOW,
           "shape[%d] is %" PRId64 "; accepted: shapes whose number of elements fits 64 bits", i, shape[i]);
  }
  return t;
}

adaattn_dtype_t dtype_of(const DLTensor& t) {
  if (t.dtype.lanes == 1) {
    if (t.dtype.code == kDLFloat && t.dtype.bits == 32) return ADAATTN_DTYPE_F32;
    if (t.dtype.code == kDLFloat && t.dtype.bits == 16) return ADAATTN_DTYPE_F16;
    if (t.dtype.code == kDLBfloat && t.dtype.bits == 16) return ADAATTN_DTYPE_BF16;
    if (t.dtype.code == kDLFloat8E4M3fn && t.dtype.bits == 8) return ADAATTN_DTYPE_E4M3;
    if (t.dtype.code == kDLInt && t.dtype.bits == 32) return ADAATTN_DTYPE_I32;
    if (t.dtype.code == kDLInt && t.dtype.bits == 64) return ADAATTN_DTYPE_I64;
  }
  fail(ADAATTN_ERROR_INVALID_DTYPE,
       "dl_tensor.dtype has code %u, %u bits, %u lanes; accepted: one lane of float16, "
       "float32, bfloat16, float8_e4m3fn, int32 or int64",
       t.dtype.code, t.dtype.bits, t.dtype.lanes);
}

adaattn_tensor_t from_dlpack(const DLTensor& t) {
  const adaattn_dtype_t dtype = dtype_of(t);
  adaattn_device_t device;
  switch (t.device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
      device = ADAATTN_DEVICE_CPU;
      break;  // pinned memory is the host's
    case kDLCUDA:
    case kDLCUDAManaged:
      device = ADAATTN_DEVICE_CUDA;
      break;
    default:
      fail(ADAATTN_ERROR_WRONG_DEVICE,
           "dl_tensor.device.device_type is %" PRId32
           "; accepted: 1 (CPU), 2 (CUDA), "
           "3 (CUDA host), 13 (CUDA managed)",
           t.device.device_type);
  }
  if (t.ndim < 1 || t.ndim > 4)
    fail(ADAATTN_ERROR_INVALID_SHAPE, "dl_tensor.ndim is %" PRId32 "; accepted: 1 to 4", t.ndim);
  require(t.shape, "dl_tensor.shape");
  const uintptr_t address = reinterpret_cast<uintptr_t>(t.data);
  if (t.byte_offset > UINTPTR_MAX - address)
    fail(ADAATTN_ERROR_SIZE_OVERFLOW,
         "dl_tensor.byte_offset is %" PRIu64 "; accepted: one that stays in the address space from %p on",
         t.byte_offset, t.data);
  return make_tensor(reinterpret_cast<void*>(address + t.byte_offset), dtype, device,
                     device == ADAATTN_DEVICE_CPU ? 0 : t.device.device_id, t.ndim, t.shape, t.strides);
}

}  // namespace
}  // namespace adaattn::capi

namespace capi = adaattn::capi;

extern "C" {

adaattn_status_t adaattn_tensor_init(adaattn_tensor_t* tensor, void* data, adaattn_dtype_t dtype,
                                     adaattn_device_t device, int32_t device_id, int32_t ndim, const int64_t* shape,
                                     const int64_t* stride) {
  return capi::guarded([&] {
    adaattn_tensor_t& out = capi::require(tensor, "tensor");
    out = capi::make_tensor(data, dtype, device, device_id, ndim, shape, stride);
  });
}

adaattn_status_t adaattn_tensor_from_dlpack(adaattn_tensor_t* tensor, const void* dl_tensor) {
  return capi::guarded([&] {
    adaattn_tensor_t& out = capi::require(tensor, "tensor");
    out = capi::from_dlpack(capi::require(static_cast<const capi::DLTensor*>(dl_tensor), "dl_tensor"));
  });
}

}  // extern "C"
