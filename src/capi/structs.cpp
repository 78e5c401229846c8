#include "capi/structs.h"

namespace adaattn::capi {

adaattn_config_t StructTraits<adaattn_config_t>::defaults() {
  adaattn_config_t config = {};
  config.struct_size = sizeof config;
  config.device = ADAATTN_DEVICE_CPU;
  return config;
}

adaattn_attn_desc_t StructTraits<adaattn_attn_desc_t>::defaults() {
  adaattn_attn_desc_t desc = {};
  desc.struct_size = sizeof desc;
  desc.layout_q = desc.layout_kv = ADAATTN_LAYOUT_BSHD;
  desc.window_left = desc.window_right = -1;
  return desc;
}

adaattn_adaptive_desc_t StructTraits<adaattn_adaptive_desc_t>::defaults() {
  adaattn_adaptive_desc_t desc = {};
  desc.struct_size = sizeof desc;
  return desc;
}

adaattn_io_t StructTraits<adaattn_io_t>::defaults() {
  adaattn_io_t io = {};
  io.struct_size = sizeof io;
  return io;
}

adaattn_entropy_desc_t StructTraits<adaattn_entropy_desc_t>::defaults() {
  adaattn_entropy_desc_t desc = {};
  desc.struct_size = sizeof desc;
  desc.sample_rows = 256;
  return desc;
}

adaattn_low_rank_desc_t StructTraits<adaattn_low_rank_desc_t>::defaults() {
  adaattn_low_rank_desc_t desc = {};
  desc.struct_size = sizeof desc;
  desc.batch = 1;
  desc.oversampling = 8;
  desc.power_iterations = 2;
  return desc;
}

}  // namespace adaattn::capi

using adaattn::capi::guarded;
using adaattn::capi::init_struct;

extern "C" {

adaattn_status_t adaattn_config_init(adaattn_config_t* config, size_t size) {
  return guarded([&] { init_struct(config, size); });
}

adaattn_status_t adaattn_attn_desc_init(adaattn_attn_desc_t* desc, size_t size) {
  return guarded([&] { init_struct(desc, size); });
}

adaattn_status_t adaattn_adaptive_desc_init(adaattn_adaptive_desc_t* desc, size_t size) {
  return guarded([&] { init_struct(desc, size); });
}

adaattn_status_t adaattn_io_init(adaattn_io_t* io, size_t size) {
  return guarded([&] { init_struct(io, size); });
}

adaattn_status_t adaattn_entropy_desc_init(adaattn_entropy_desc_t* desc, size_t size) {
  return guarded([&] { init_struct(desc, size); });
}

adaattn_status_t adaattn_low_rank_desc_init(adaattn_low_rank_desc_t* desc, size_t size) {
  return guarded([&] { init_struct(desc, size); });
}

}  // extern "C"
