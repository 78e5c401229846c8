#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "capi/call.h"

// As DLPack's header has it (https://dmlc.github.io/dlpack/latest/c_api.html): a struct without a tag, which a
// declaration of struct DLTensor in adaattn.h would contradict.
typedef struct {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} DLTensor;
static_assert(sizeof(DLTensor) == 48);

namespace adaattn::test {
namespace {

class TensorInit : public testing::Test {
 protected:
  TensorInit() { std::memset(&tensor_, 0xee, sizeof tensor_), before_ = tensor_; }

  adaattn_status_t init(adaattn_dtype_t dtype, std::vector<int64_t> shape, const int64_t* stride = nullptr,
                        adaattn_device_t device = ADAATTN_DEVICE_CPU, int32_t id = 0) {
    return adaattn_tensor_init(&tensor_, data_, dtype, device, id, static_cast<int32_t>(shape.size()), shape.data(),
                               stride);
  }
  void expect_refused(adaattn_status_t got, adaattn_status_t expected, const char* text) {
    EXPECT_EQ(got, expected);
    EXPECT_EQ(last_error().rfind(text, 0), 0u) << last_error();
    EXPECT_NE(last_error().find("; accepted"), std::string::npos) << last_error();
    EXPECT_EQ(std::memcmp(&tensor_, &before_, sizeof tensor_), 0);
  }

  float data_[64] = {};
  adaattn_tensor_t tensor_, before_;
};

TEST_F(TensorInit, ContiguousStridesByDefault) {
  ASSERT_EQ(init(ADAATTN_DTYPE_F32, {2, 3, 4}), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(tensor_.ndim, 3);
  EXPECT_EQ(tensor_.stride[0], 12);
  EXPECT_EQ(tensor_.stride[1], 4);
  EXPECT_EQ(tensor_.stride[2], 1);
  EXPECT_EQ(tensor_.shape[3], 0);
  EXPECT_EQ(tensor_.reserved, 0);
  EXPECT_EQ(tensor_.data, data_);
}

TEST_F(TensorInit, AnyStridesAsGiven) {
  const int64_t stride[] = {-5, 0};
  ASSERT_EQ(init(ADAATTN_DTYPE_BF16, {2, 3}, stride), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(tensor_.stride[0], -5);
  EXPECT_EQ(tensor_.stride[1], 0);
}

TEST_F(TensorInit, EmptyExtentsKeepTheStridesPositive) {
  ASSERT_EQ(init(ADAATTN_DTYPE_F32, {2, 0, 4}), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(tensor_.stride[0], 4);
}

TEST_F(TensorInit, RefusesWhatCannotBe) {
  expect_refused(init(ADAATTN_DTYPE_NONE, {1}), ADAATTN_ERROR_INVALID_DTYPE, "dtype is 0");
  expect_refused(init(7, {1}), ADAATTN_ERROR_INVALID_DTYPE, "dtype is 7");
  expect_refused(init(ADAATTN_DTYPE_F32, {}), ADAATTN_ERROR_INVALID_SHAPE, "ndim is 0");
  expect_refused(init(ADAATTN_DTYPE_F32, {1, 1, 1, 1, 1}), ADAATTN_ERROR_INVALID_SHAPE, "ndim is 5");
  expect_refused(init(ADAATTN_DTYPE_F32, {2, -1}), ADAATTN_ERROR_INVALID_SHAPE, "shape[1] is -1");
  expect_refused(init(ADAATTN_DTYPE_F32, {1 << 20, INT64_MAX, 2}), ADAATTN_ERROR_SIZE_OVERFLOW, "shape[1] is 92233");
  expect_refused(init(ADAATTN_DTYPE_F32, {1}, nullptr, 0), ADAATTN_ERROR_INVALID_ARGUMENT, "device is 0");
  expect_refused(init(ADAATTN_DTYPE_F32, {1}, nullptr, ADAATTN_DEVICE_CUDA, -1), ADAATTN_ERROR_INVALID_ARGUMENT,
                 "device_id is -1");
  const int64_t shape[] = {1};
  expect_refused(adaattn_tensor_init(&tensor_, data_, ADAATTN_DTYPE_F32, ADAATTN_DEVICE_CPU, 0, 1, nullptr, nullptr),
                 ADAATTN_ERROR_NULL_POINTER, "shape is NULL");
  expect_refused(adaattn_tensor_init(nullptr, data_, ADAATTN_DTYPE_F32, ADAATTN_DEVICE_CPU, 0, 1, shape, nullptr),
                 ADAATTN_ERROR_NULL_POINTER, "tensor is NULL");
}

class Dlpack : public TensorInit {
 protected:
  int64_t shape_[4] = {2, 3, 4, 1}, strides_[4] = {12, 4, 1, 1};
  DLTensor dl_ = {data_, 1, 0, 3, 2, 32, 1, shape_, nullptr, 0};
  adaattn_status_t convert() { return adaattn_tensor_from_dlpack(&tensor_, &dl_); }
};

TEST_F(Dlpack, ConvertsWithoutACopy) {
  ASSERT_EQ(convert(), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(tensor_.data, data_);
  EXPECT_EQ(tensor_.dtype, ADAATTN_DTYPE_F32);
  EXPECT_EQ(tensor_.stride[0], 12);
  dl_.strides = strides_;
  strides_[0] = 100;
  dl_.byte_offset = 8;
  ASSERT_EQ(convert(), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(tensor_.data, data_ + 2);
  EXPECT_EQ(tensor_.stride[0], 100);
}

TEST_F(Dlpack, KnowsTheDtypes) {
  const struct {
    uint8_t code, bits;
    adaattn_dtype_t dtype;
  } rows[] = {{2, 32, ADAATTN_DTYPE_F32}, {2, 16, ADAATTN_DTYPE_F16}, {4, 16, ADAATTN_DTYPE_BF16},
              {0, 32, ADAATTN_DTYPE_I32}, {0, 64, ADAATTN_DTYPE_I64}, {10, 8, ADAATTN_DTYPE_E4M3}};
  for (const auto& row : rows) {
    dl_.code = row.code;
    dl_.bits = row.bits;
    ASSERT_EQ(convert(), ADAATTN_SUCCESS) << last_error();
    EXPECT_EQ(tensor_.dtype, row.dtype);
  }
}

TEST_F(Dlpack, KnowsTheDevices) {
  const struct {
    int32_t type;
    adaattn_device_t device;
    int32_t id;
  } rows[] = {{1, ADAATTN_DEVICE_CPU, 0},
              {2, ADAATTN_DEVICE_CUDA, 3},
              {3, ADAATTN_DEVICE_CPU, 0},
              {13, ADAATTN_DEVICE_CUDA, 3}};
  for (const auto& row : rows) {
    dl_.device_type = row.type;
    dl_.device_id = 3;
    ASSERT_EQ(convert(), ADAATTN_SUCCESS) << last_error();
    EXPECT_EQ(tensor_.device, row.device);
    EXPECT_EQ(tensor_.device_id, row.id);
  }
}

TEST_F(Dlpack, RefusesWhatItCannotView) {
  const DLTensor good = dl_;
  const auto refused = [&](auto change, adaattn_status_t status, const char* text) {
    dl_ = good;
    change();
    expect_refused(convert(), status, text);
  };
  refused([&] { dl_.lanes = 4; }, ADAATTN_ERROR_INVALID_DTYPE, "dl_tensor.dtype has code 2, 32 bits, 4 lanes");
  refused([&] { dl_.bits = 64; }, ADAATTN_ERROR_INVALID_DTYPE, "dl_tensor.dtype");
  refused([&] { dl_.code = 1; }, ADAATTN_ERROR_INVALID_DTYPE, "dl_tensor.dtype");
  refused([&] { dl_.device_type = 10; }, ADAATTN_ERROR_WRONG_DEVICE, "dl_tensor.device.device_type is 10");
  refused([&] { dl_.ndim = 5; }, ADAATTN_ERROR_INVALID_SHAPE, "dl_tensor.ndim is 5");
  refused([&] { dl_.ndim = 0; }, ADAATTN_ERROR_INVALID_SHAPE, "dl_tensor.ndim is 0");
  refused([&] { dl_.shape = nullptr; }, ADAATTN_ERROR_NULL_POINTER, "dl_tensor.shape is NULL");
  refused([&] { dl_.byte_offset = UINT64_MAX; }, ADAATTN_ERROR_SIZE_OVERFLOW, "dl_tensor.byte_offset");
  refused([&] { shape_[0] = -2; }, ADAATTN_ERROR_INVALID_SHAPE, "shape[0] is -2");
  expect_refused(adaattn_tensor_from_dlpack(&tensor_, nullptr), ADAATTN_ERROR_NULL_POINTER, "dl_tensor is NULL");
  expect_refused(adaattn_tensor_from_dlpack(nullptr, &dl_), ADAATTN_ERROR_NULL_POINTER, "tensor is NULL");
}

}  // namespace
}  // namespace adaattn::test
