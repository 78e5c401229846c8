// Registry rows of the Hopper forward kernels: how each instance is built. NOTES.md has the measurements behind it.
#pragma once

#include "attend/sm90/forward_kernel.cuh"
#include "attend/sm90/forward_row.cuh"
#include "attend/tall_features.h"

namespace adaattn::cuda::sm90 {

template <int kDqk, int kDv, uint32_t kFeatures>
constexpr ForwardConfig forward_config() {
  ForwardConfig c{.d_qk = kDqk, .d_v = kDv};
  c.masked = kFeatures != kPlain;
  c.softcap = (kFeatures & kSoftcap) != 0;
  c.dynamic = c.masked;
  c.split = kFeatures == kSplit;
  if (kFeatures == kTall) {
    // Three chains of small blocks hide each other, which gains more than narrow products lose.
    static_assert(kFeatures != kTall || (kDqk == 128 && kDv == 128));
    c.tile_n = 64;
    c.groups = 3;
    c.ordered = false;
    c.quick = c.load_ahead = c.pass_unseen = c.from_end = true;
    c.k_stages = c.v_stages = 4;
  } else if (kDqk <= 64) {
    c.groups = c.split ? 2 : 3;
    c.ordered = !c.masked;
    c.quick = !c.softcap;
    c.k_stages = 3;
    c.pass_unseen = c.from_end = c.masked && !c.split;
  } else if (kDqk <= 96) {
    c.ordered = false;
    c.quick = !c.softcap;
    c.k_stages = 3;
    c.load_ahead = c.quick && c.masked;
    c.q_in_registers = c.quick;
  } else if (kDqk <= 128 && kDv <= 64) {
    // Short products: a third warpgroup keeps the tensor cores busy during the exponentials of two.
    c.groups = 3;
    c.ordered = false;
    c.pass_unseen = c.masked && !c.split;
  } else if (kDqk <= 128) {
    c.ordered = c.softcap;
    c.early_columns = c.softcap ? 6 : 0;
    c.quick = !c.softcap;
    c.k_stages = c.quick ? 3 : 2;
    c.load_ahead = c.quick && !c.split;
    c.q_in_registers = c.load_ahead;
  } else if (kDqk <= 192) {
    c.tile_n = kDv <= 128 ? 128 : 112;
    c.early_columns = kDv <= 128 ? 8 : 3;
  } else {
    c.tile_n = 80;
    c.ordered = false;
    c.early_columns = 5;
    c.rescale_early = true;
  }
  return c;
}

template <typename T, int kDqk, int kDv, uint32_t kFeatures>
struct Forward {
  static constexpr ForwardConfig kConfig = forward_config<kDqk, kDv, kFeatures>();

  static AttendKernel row(const char* name) {
    return forward_row<T, Forward, &forward_kernel<T, Forward>>(
        name, kVarlen | kSink | kRagged | (kConfig.masked ? kMasked : 0) | (kConfig.softcap ? kSoftcap : 0) |
                  (kConfig.split ? kSplit | kPacked : 0) | (kFeatures & kTall) | (kConfig.from_end ? kFromEnd : 0));
  }
};

}  // namespace adaattn::cuda::sm90
