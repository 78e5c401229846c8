// Rows of kernels/instances.def, each forced and seen to have run, against the oracle.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "attend/plan.h"
#include "attention/fixture.h"
#include "gpu/device.h"

namespace adaattn::test {

class EveryKernel : public testing::TestWithParam<const cuda::AttendKernel*> {
 protected:
  void SetUp() override {
    if (const std::string reason = missing(kCuda); !reason.empty()) GTEST_SKIP() << reason;
  }
};

// Those of some phases, short of Hopper kernels with products in E4M3: these are run by E4m3.*, with the error that 8
// bits allow.
std::vector<const cuda::AttendKernel*> rows(std::initializer_list<cuda::Phase> phases);

// The types of q, k, v and o that a kernel takes.
std::vector<Dtypes> dtypes_of(const cuda::AttendKernel& kernel);

// On a device like this one on which the kernel is the first choice; multiprocessors 0: as many as this one has.
// Without dtypes: one call for each that the kernel takes.
void run_row(const cuda::AttendKernel& kernel, const AttentionCase& c, const Dtypes& dtypes, int multiprocessors = 0);
void run_row(const cuda::AttendKernel& kernel, const AttentionCase& c, int multiprocessors = 0);

// Launched by itself, whatever the selector would say of the call: no split keys, heads apart. section: as
// AttendArgs::section. again: so many more launches, in other sections, must give the same bits.
void run_alone(const cuda::AttendKernel& kernel, const AttentionCase& c, int multiprocessors, int section,
               int again = 0);

// A device like this one, of so many multiprocessors; 0: as many as it has.
cuda::DeviceTraits device_traits(int multiprocessors = 0);

inline std::string kernel_name(const testing::TestParamInfo<const cuda::AttendKernel*>& info) {
  return info.param->name;
}

}  // namespace adaattn::test
