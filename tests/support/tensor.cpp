#include "support/tensor.h"

#include <cstring>

#include "reference/number.h"

namespace adaattn::test {

using reference::load;
using reference::size_of;
using reference::store;

// 0xff bytes are NaN in every floating format, and -1 as an index: what a test forgets to fill shows up.
Buffer::Buffer(size_t bytes) : owned_(bytes + 64, std::byte{0xff}), bytes_(bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(owned_.data());
  data_ = owned_.data() + (64 - address % 64) % 64;
}

DeviceBuffer& Buffer::on(adaattn_device_t device, int32_t device_id) {
  std::unique_ptr<DeviceBuffer>& buffer = device == ADAATTN_DEVICE_CPU ? host_ : mirror_;
  if (buffer == nullptr) buffer = make_device_buffer(device, device_id, data_, bytes_);
  return *buffer;
}

Tensor::Tensor(std::shared_ptr<Buffer> buffer, adaattn_dtype_t dtype, std::vector<int64_t> shape,
               std::vector<int64_t> stride, int64_t offset)
    : buffer_(std::move(buffer)), shape_(std::move(shape)) {
  view_.data = buffer_->data() + offset * size_of(dtype);
  view_.ndim = static_cast<int32_t>(shape_.size());
  view_.dtype = dtype;
  view_.device = ADAATTN_DEVICE_CPU;
  for (size_t i = 0; i < shape_.size(); ++i) {
    view_.shape[i] = shape_[i];
    view_.stride[i] = stride[i];
  }
}

namespace {

std::vector<int64_t> contiguous(const std::vector<int64_t>& shape) {
  std::vector<int64_t> stride(shape.size(), 1);
  for (size_t i = shape.size() - 1; i-- > 0;) stride[i] = stride[i + 1] * shape[i + 1];
  return stride;
}

size_t bytes_of(adaattn_dtype_t dtype, const std::vector<int64_t>& shape) {
  size_t bytes = static_cast<size_t>(size_of(dtype));
  for (int64_t n : shape) bytes *= static_cast<size_t>(n);
  return bytes;
}

}  // namespace

Tensor::Tensor(adaattn_dtype_t dtype, std::vector<int64_t> shape)
    : Tensor(std::make_shared<Buffer>(bytes_of(dtype, shape)), dtype, shape, contiguous(shape)) {}

Tensor::Tensor(const std::vector<int32_t>& values) : Tensor(ADAATTN_DTYPE_I32, {static_cast<int64_t>(values.size())}) {
  std::memcpy(view_.data, values.data(), values.size() * sizeof(int32_t));
}

int64_t Tensor::elements() const {
  int64_t n = 1;
  for (int64_t extent : shape_) n *= extent;
  return n;
}

int64_t Tensor::offset_of(const std::vector<int64_t>& index) const {
  int64_t offset = 0;
  for (size_t i = 0; i < index.size(); ++i) offset += index[i] * view_.stride[i];
  return offset;
}

double Tensor::get(const std::vector<int64_t>& index) const { return load(view_.data, view_.dtype, offset_of(index)); }

void Tensor::set(const std::vector<int64_t>& index, double value) {
  store(view_.data, view_.dtype, offset_of(index), value);
}

void Tensor::for_each(const std::function<void(const std::vector<int64_t>&, int64_t)>& visit) const {
  std::vector<int64_t> index(shape_.size(), 0);
  const int64_t count = elements();
  for (int64_t flat = 0; flat < count; ++flat) {
    visit(index, flat);
    for (size_t i = shape_.size(); i-- > 0;) {
      if (++index[i] < shape_[i]) break;
      index[i] = 0;
    }
  }
}

void Tensor::fill(const std::function<double()>& next) {
  for_each([&](const auto& index, int64_t) { set(index, next()); });
}

void Tensor::fill(double value) {
  fill([value] { return value; });
}

std::vector<double> Tensor::values() const {
  std::vector<double> list(static_cast<size_t>(elements()));
  for_each([&](const auto& index, int64_t flat) { list[flat] = get(index); });
  return list;
}

std::vector<std::byte> Tensor::bytes() const {
  const int64_t size = size_of(view_.dtype);
  std::vector<std::byte> list(static_cast<size_t>(elements() * size));
  for_each([&](const auto& index, int64_t flat) {
    std::memcpy(list.data() + flat * size, static_cast<const std::byte*>(view_.data) + offset_of(index) * size, size);
  });
  return list;
}

adaattn_tensor_t Tensor::on(adaattn_device_t device, int32_t device_id) const {
  if (!present()) return {};
  adaattn_tensor_t view = view_;
  const auto offset = static_cast<std::byte*>(view_.data) - buffer_->data();
  view.data = static_cast<std::byte*>(buffer_->on(device, device_id).data()) + offset;
  view.device = device;
  view.device_id = device_id;
  return view;
}

void Tensor::upload(adaattn_device_t device, int32_t device_id) const {
  if (present()) buffer_->on(device, device_id).upload();
}

void Tensor::download(adaattn_device_t device, int32_t device_id) const {
  if (present()) buffer_->on(device, device_id).download();
}

std::vector<std::byte> bytes_outside(const Tensor& tensor) {
  std::vector<bool> inside(tensor.buffer()->bytes(), false);
  const int64_t size = size_of(tensor.dtype());
  const std::byte* base = tensor.buffer()->data();
  tensor.for_each([&](const auto& index, int64_t) {
    int64_t offset = 0;
    for (size_t i = 0; i < index.size(); ++i) offset += index[i] * tensor.host().stride[i];
    const int64_t first = static_cast<const std::byte*>(tensor.host().data) - base + offset * size;
    for (int64_t i = 0; i < size; ++i) inside[first + i] = true;
  });
  std::vector<std::byte> list;
  for (size_t i = 0; i < inside.size(); ++i)
    if (!inside[i]) list.push_back(base[i]);
  return list;
}

}  // namespace adaattn::test
