// Model tests on a CUDA device.
#pragma once

#include <gtest/gtest.h>

#include "adaattn/adaattn.hpp"
#include "engine/model.h"

namespace model_test {

// Skips where there is no device, saying why.
class OnTheGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (adaattn::device_count(ADAATTN_DEVICE_CUDA).value() == 0) GTEST_SKIP() << adaattn::last_error();
  }
};

inline generate::ModelOptions on_cuda(generate::DType dtype) {
  generate::ModelOptions options;
  options.device = ADAATTN_DEVICE_CUDA;
  options.dtype = dtype;
  return options;
}

}  // namespace model_test
