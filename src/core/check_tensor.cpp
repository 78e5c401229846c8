#include "core/check_tensor.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <string>

#include "backend.h"
#include "core/error.h"

namespace adaattn {
namespace {

std::string join(std::initializer_list<Dtype> dtypes) {
  std::string names;
  for (Dtype dtype : dtypes) names += (names.empty() ? "" : ", ") + std::string(dtype_name(dtype));
  return names;
}

bool is_empty(const adaattn_tensor_t& t) {
  for (int i = 0; i < t.ndim; ++i)
    if (t.shape[i] == 0) return true;
  return false;
}

bool needs_unit_stride(Access access) {
  return access == Access::kUnitInput || access == Access::kDistinctInput || access == Access::kContiguousInput ||
         access == Access::kUnitOutput;
}

bool allows_broadcast(Access access) { return access == Access::kInput || access == Access::kUnitInput; }

// Far above any memory, and low enough that sums and differences of a few spans stay within 64 bits.
constexpr int64_t kMaxSpan = int64_t{1} << 60;

// Bytes from the first to the end of the last element must exist as an int64 and as an address range.
void check_range(const adaattn_tensor_t& t, const char* name) {
  const int64_t size = dtype_size(static_cast<Dtype>(t.dtype));
  int64_t count = size, last = 0;
  if (is_empty(t)) return;
  for (int i = 0; i < t.ndim; ++i) {
    if (__builtin_mul_overflow(count, t.shape[i], &count) || count > kMaxSpan)
      fail(ADAATTN_ERROR_SIZE_OVERFLOW, "%s.shape[%d] is %" PRId64 "; accepted: tensors of at most 2^60 bytes", name, i,
           t.shape[i]);
    if (t.shape[i] == 1) continue;
    int64_t step;
    if (__builtin_mul_overflow(t.stride[i], size, &step) || __builtin_mul_overflow(step, t.shape[i] - 1, &step) ||
        __builtin_add_overflow(last, step, &last) || last > kMaxSpan - size)
      fail(ADAATTN_ERROR_SIZE_OVERFLOW,
           "%s.stride[%d] is %" PRId64 "; accepted with shape[%d] %" PRId64 ": a last element within 2^60 bytes", name,
           i, t.stride[i], i, t.shape[i]);
  }
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.data);
  if (begin > UINTPTR_MAX - static_cast<uintptr_t>(last + size))
    fail(ADAATTN_ERROR_SIZE_OVERFLOW,
         "%s.data is %p; accepted: an address from which %" PRId64 " bytes stay in the address space", name, t.data,
         last + size);
}

// Producers disagree about the strides of tensors without elements, and nothing follows them.
void check_strides(const adaattn_tensor_t& t, const char* name, Access access) {
  if (is_empty(t)) return;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] <= 1) continue;
    if (t.stride[i] < 0)
      fail(ADAATTN_ERROR_INVALID_STRIDE, "%s.stride[%d] is %" PRId64 "; accepted: 0 or more elements", name, i,
           t.stride[i]);
    if (i == t.ndim - 1 && needs_unit_stride(access) && t.stride[i] != 1)
      fail(ADAATTN_ERROR_INVALID_STRIDE, "%s.stride[%d] is %" PRId64 "; accepted: 1 for the last dimension", name, i,
           t.stride[i]);
    if (t.stride[i] == 0 && !allows_broadcast(access))
      fail(ADAATTN_ERROR_INVALID_STRIDE,
           "%s.stride[%d] is 0 with shape[%d] %" PRId64
           "; accepted: 1 or more here, 0 for k, v, bias and other inputs that may be broadcast",
           name, i, i, t.shape[i]);
  }
}

void check_memory(const adaattn_tensor_t& t, const char* name, const DeviceScope& scope) {
  if (t.device != scope.device || t.device_id != scope.device_id) {
    if (t.device != scope.device)
      fail(ADAATTN_ERROR_WRONG_DEVICE, "%s.device is %" PRId32 " (%s); accepted: %" PRId32 " (%s), the context's", name,
           t.device, device_name(t.device), scope.device, device_name(scope.device));
    fail(ADAATTN_ERROR_WRONG_DEVICE, "%s.device_id is %" PRId32 "; accepted: %" PRId32 ", the context's", name,
         t.device_id, scope.device_id);
  }
  if (is_empty(t)) return;
  if (t.data == nullptr)
    fail(ADAATTN_ERROR_NULL_POINTER, "%s.data is NULL; accepted: the address of the first element", name);
  const int64_t size = dtype_size(static_cast<Dtype>(t.dtype));
  // NOLINTNEXTLINE(clang-analyzer-core.DivideZero): the dtype is one of the accepted ones by now.
  if (reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(size) != 0)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.data is %p; accepted: a multiple of the element size, %" PRId64 " bytes",
         name, t.data, size);
  if (scope.pointer_check != nullptr) {
    char field[64];
    std::snprintf(field, sizeof field, "%s.data", name);
    scope.pointer_check->check_pointer(t.data, field);
  }
}

}  // namespace

bool is_output(Access access) { return access == Access::kOutput || access == Access::kUnitOutput; }

const char* device_name(adaattn_device_t device) {
  return device == ADAATTN_DEVICE_CPU ? "CPU" : device == ADAATTN_DEVICE_CUDA ? "CUDA" : "unknown";
}

void check_device(adaattn_device_t device, const char* field) {
  if (device != ADAATTN_DEVICE_CPU && device != ADAATTN_DEVICE_CUDA)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s is %" PRId32 "; accepted: 1 (CPU), 2 (CUDA)", field, device);
}

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case ADAATTN_DTYPE_NONE:
      return "NONE";
    case ADAATTN_DTYPE_F32:
      return "F32";
    case ADAATTN_DTYPE_F16:
      return "F16";
    case ADAATTN_DTYPE_BF16:
      return "BF16";
    case ADAATTN_DTYPE_I32:
      return "I32";
    case ADAATTN_DTYPE_I64:
      return "I64";
    case ADAATTN_DTYPE_E4M3:
      return "E4M3";
    default:
      return "unknown";
  }
}

const char* dtype_name(Dtype dtype) { return dtype_name(static_cast<int32_t>(dtype)); }

bool is_absent(const adaattn_tensor_t* tensor, const char* name) {
  if (tensor == nullptr) return true;
  if (tensor->ndim != 0) return false;
  static const adaattn_tensor_t kAbsent = {};
  if (std::memcmp(tensor, &kAbsent, sizeof kAbsent) != 0)
    fail(ADAATTN_ERROR_INVALID_SHAPE,
         "%s.ndim is 0 while other fields are set; accepted: 1 to 4, or a tensor of "
         "zeros for an absent one",
         name);
  return true;
}

void check_tensor_shape(const adaattn_tensor_t& t, const char* name, Access access, int min_ndim, int max_ndim,
                        std::initializer_list<Dtype> dtypes) {
  if (t.ndim < min_ndim || t.ndim > max_ndim) {
    if (min_ndim == max_ndim)
      fail(ADAATTN_ERROR_INVALID_SHAPE, "%s.ndim is %" PRId32 "; accepted: %d", name, t.ndim, min_ndim);
    fail(ADAATTN_ERROR_INVALID_SHAPE, "%s.ndim is %" PRId32 "; accepted: %d to %d", name, t.ndim, min_ndim, max_ndim);
  }
  if (std::find(dtypes.begin(), dtypes.end(), static_cast<Dtype>(t.dtype)) == dtypes.end())
    fail(ADAATTN_ERROR_INVALID_DTYPE, "%s.dtype is %" PRId32 " (%s); accepted: %s", name, t.dtype, dtype_name(t.dtype),
         join(dtypes).c_str());
  if (t.reserved != 0)
    fail(ADAATTN_ERROR_INVALID_ARGUMENT, "%s.reserved is %" PRId64 "; accepted: 0", name, t.reserved);
  for (int i = 0; i < t.ndim; ++i)
    if (t.shape[i] < 0)
      fail(ADAATTN_ERROR_INVALID_SHAPE, "%s.shape[%d] is %" PRId64 "; accepted: 0 or more", name, i, t.shape[i]);
  check_strides(t, name, access);
  check_range(t, name);
}

void check_tensor(const adaattn_tensor_t& t, const char* name, Access access, int min_ndim, int max_ndim,
                  std::initializer_list<Dtype> dtypes, const DeviceScope& scope) {
  check_tensor_shape(t, name, access, min_ndim, max_ndim, dtypes);
  check_memory(t, name, scope);
}

void expect_extent(const adaattn_tensor_t& tensor, const char* name, int dim, int64_t expected, const char* why) {
  if (tensor.shape[dim] != expected)
    fail(ADAATTN_ERROR_INVALID_SHAPE, "%s.shape[%d] is %" PRId64 "; accepted: %" PRId64 " (%s)", name, dim,
         tensor.shape[dim], expected, why);
}

void expect_at_most(const adaattn_tensor_t& tensor, const char* name, int dim, int64_t limit, const char* why) {
  if (tensor.shape[dim] > limit)
    fail(ADAATTN_ERROR_INVALID_SHAPE, "%s.shape[%d] is %" PRId64 "; accepted: 0 to %" PRId64 " (%s)", name, dim,
         tensor.shape[dim], limit, why);
}

int CallMemory::add(const adaattn_tensor_t& tensor, const char* name, bool output, int may_equal) {
  entries_[count_] = {name, &tensor, memory_view(tensor, dtype_size(static_cast<Dtype>(tensor.dtype))), output,
                      may_equal};
  return count_++;
}

void CallMemory::add(const Workspace& workspace) {
  if (workspace.data == nullptr || workspace.bytes == 0) return;
  if (workspace.bytes > static_cast<size_t>(kMaxSpan) ||
      reinterpret_cast<uintptr_t>(workspace.data) > UINTPTR_MAX - workspace.bytes)
    fail(ADAATTN_ERROR_SIZE_OVERFLOW, "workspace_bytes is %zu; accepted: what stays in the address space from %p on",
         workspace.bytes, workspace.data);
  entries_[count_++] = {"workspace", nullptr, memory_view(workspace.data, static_cast<int64_t>(workspace.bytes)), true,
                        -1};
}

bool CallMemory::same_view(const Entry& a, const Entry& b) const {
  if (a.tensor == nullptr || b.tensor == nullptr || a.tensor->data != b.tensor->data ||
      a.tensor->dtype != b.tensor->dtype || a.tensor->ndim != b.tensor->ndim)
    return false;
  for (int i = 0; i < a.tensor->ndim; ++i)
    if (a.tensor->shape[i] != b.tensor->shape[i] || effective_stride(*a.tensor, i) != effective_stride(*b.tensor, i))
      return false;
  return true;
}

void CallMemory::check() const {
  for (int i = 0; i < count_; ++i) {
    if (!entries_[i].output) continue;
    if (overlaps_itself(entries_[i].view))
      fail(ADAATTN_ERROR_OVERLAP,
           "%s.stride lets elements of an output share memory; accepted: each stride at least the span of the "
           "dimensions inside it",
           entries_[i].name);
    for (int j = 0; j < count_; ++j) {
      const Entry &out = entries_[i], &other = entries_[j];
      if (i == j || (other.output && j > i) || !overlap(out.view, other.view)) continue;
      if ((out.may_equal == j || other.may_equal == i) && same_view(out, other)) continue;
      fail(ADAATTN_ERROR_OVERLAP, "%s overlaps %s; accepted: an output that shares no memory with another tensor",
           out.name, other.name);
    }
  }
}

}  // namespace adaattn
