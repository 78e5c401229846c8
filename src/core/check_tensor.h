// The checks that every tensor argument passes, whatever it means; shared by the validate_*.cpp files.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "core/memory_view.h"
#include "core/validate.h"

namespace adaattn {

// What a tensor's strides may be, besides not negative.
enum class Access {
  kInput,            // anything, 0 included
  kUnitInput,        // last stride 1
  kDistinctInput,    // last stride 1, no broadcast
  kContiguousInput,  // last stride 1; for index arrays
  kOutput,           // no broadcast
  kUnitOutput,       // and last stride 1
};

bool is_output(Access access);

// All zero or NULL. A tensor of 0 dimensions with anything else set is refused.
bool is_absent(const adaattn_tensor_t* tensor, const char* name);

const char* dtype_name(int32_t dtype);
const char* dtype_name(Dtype dtype);

// Number of dimensions, dtype, extents, strides, reserved field, address range, device, null pointer, alignment.
void check_tensor(const adaattn_tensor_t& tensor, const char* name, Access access, int min_ndim, int max_ndim,
                  std::initializer_list<Dtype> dtypes, const DeviceScope& scope);
// The same without what belongs to memory and device: for workspace queries.
void check_tensor_shape(const adaattn_tensor_t& tensor, const char* name, Access access, int min_ndim, int max_ndim,
                        std::initializer_list<Dtype> dtypes);

// tensor.shape[dim] against one value or 0..limit; `why` says where the bound comes from.
void expect_extent(const adaattn_tensor_t& tensor, const char* name, int dim, int64_t expected, const char* why);
void expect_at_most(const adaattn_tensor_t& tensor, const char* name, int dim, int64_t limit, const char* why);

// Stride of a dimension, 0 where the extent makes it irrelevant.
inline int64_t effective_stride(const adaattn_tensor_t& tensor, int dim) {
  return tensor.shape[dim] > 1 ? tensor.stride[dim] : 0;
}

// The memory of one call: no output may share a byte with another tensor of it or between its own elements.
class CallMemory {
 public:
  // may_equal: index of an earlier entry that this output may be the very same view of, or -1. Returns the entry's
  // index.
  int add(const adaattn_tensor_t& tensor, const char* name, bool output, int may_equal = -1);
  void add(const Workspace& workspace);
  void check() const;

 private:
  struct Entry {
    const char* name;
    const adaattn_tensor_t* tensor;  // null: the workspace
    MemoryView view;
    bool output;
    int may_equal;
  };
  bool same_view(const Entry& a, const Entry& b) const;
  Entry entries_[18];  // an io's tensors, head_entropy and the workspace
  int count_ = 0;
};

}  // namespace adaattn
