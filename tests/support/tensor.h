// A host tensor that owns (or shares) its memory, mirrored on the device under test.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "adaattn/adaattn.h"
#include "support/device_buffer.h"

namespace adaattn::test {

// Shared by the views into one allocation.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  // Memory the caller keeps alive, e.g. between guard pages.
  Buffer(void* data, size_t bytes) : data_(static_cast<std::byte*>(data)), bytes_(bytes) {}
  std::byte* data() { return data_; }
  size_t bytes() const { return bytes_; }
  DeviceBuffer& on(adaattn_device_t device, int32_t device_id);

 private:
  std::vector<std::byte> owned_;
  std::byte* data_;
  size_t bytes_;
  std::unique_ptr<DeviceBuffer> host_, mirror_;  // what the CPU sees, and the device under test
};

class Tensor {
 public:
  Tensor() = default;  // absent
  // Contiguous.
  Tensor(adaattn_dtype_t dtype, std::vector<int64_t> shape);
  // A view into buffer; offset and strides in elements.
  Tensor(std::shared_ptr<Buffer> buffer, adaattn_dtype_t dtype, std::vector<int64_t> shape, std::vector<int64_t> stride,
         int64_t offset = 0);
  // i32 vector.
  explicit Tensor(const std::vector<int32_t>& values);

  bool present() const { return buffer_ != nullptr; }
  adaattn_dtype_t dtype() const { return view_.dtype; }
  const std::vector<int64_t>& shape() const { return shape_; }
  int64_t elements() const;
  const std::shared_ptr<Buffer>& buffer() const { return buffer_; }

  double get(const std::vector<int64_t>& index) const;
  void set(const std::vector<int64_t>& index, double value);
  // Calls visit(index, flat) over all elements in the order of the dimensions; flat counts them.
  void for_each(const std::function<void(const std::vector<int64_t>&, int64_t)>& visit) const;
  void fill(double value);
  void fill(const std::function<double()>& next);
  std::vector<double> values() const;
  // The elements' bytes, in order.
  std::vector<std::byte> bytes() const;

  // The tensor as the library sees it: host memory, or the device mirror after upload().
  const adaattn_tensor_t& host() const { return view_; }
  adaattn_tensor_t on(adaattn_device_t device, int32_t device_id) const;
  void upload(adaattn_device_t device, int32_t device_id) const;
  void download(adaattn_device_t device, int32_t device_id) const;

 private:
  int64_t offset_of(const std::vector<int64_t>& index) const;

  std::shared_ptr<Buffer> buffer_;
  std::vector<int64_t> shape_;
  adaattn_tensor_t view_{};
};

// Bytes of the buffer that belong to no element of the tensor; equal before and after a call that stays inside.
std::vector<std::byte> bytes_outside(const Tensor& tensor);

}  // namespace adaattn::test
