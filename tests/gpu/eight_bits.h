// The adaptive descriptor that asks for every tile in 8 bits.
#pragma once

#include "adaattn/adaattn.h"

namespace adaattn::test {

inline adaattn_adaptive_desc_t eight_bits() {
  adaattn_adaptive_desc_t desc;
  adaattn_adaptive_desc_init(&desc, sizeof desc);
  desc.policy = ADAATTN_POLICY_CUSTOM;
  desc.tile_mass = 1;
  desc.probe = ADAATTN_PROBE_OFF;
  desc.far_field = ADAATTN_SWITCH_OFF;
  desc.rank_mode = ADAATTN_RANK_OFF;
  desc.min_precision = desc.max_precision = ADAATTN_PRECISION_I8;
  desc.verify_rows = -1;
  return desc;
}

}  // namespace adaattn::test
