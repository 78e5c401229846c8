/* Prints size and offsets of every public struct; compared with layout.txt. */
#include <stdio.h>

#include "adaattn/adaattn.h"

static size_t end; /* of the fields printed so far */

static void print_struct(const char* name, size_t size) {
  printf("%s %zu\n", name, size);
  end = 0;
}

/* No public struct has padding, so a gap is a field that this list lacks. */
static void print_field(const char* name, size_t offset, size_t size) {
  if (offset != end) printf("  (unlisted) %zu %zu\n", end, offset - end);
  printf("  %s %zu %zu\n", name, offset, size);
  end = offset + size;
}

static void print_end(size_t size) {
  if (size != end) printf("  (unlisted) %zu %zu\n", end, size - end);
}

#define STRUCT(type) print_struct(#type, sizeof(type))
#define FIELD(type, field) print_field(#field, offsetof(type, field), sizeof(((type*)0)->field))
#define END(type) print_end(sizeof(type))

int main(void) {
  STRUCT(adaattn_tensor_t);
  FIELD(adaattn_tensor_t, data);
  FIELD(adaattn_tensor_t, shape);
  FIELD(adaattn_tensor_t, stride);
  FIELD(adaattn_tensor_t, ndim);
  FIELD(adaattn_tensor_t, dtype);
  FIELD(adaattn_tensor_t, device);
  FIELD(adaattn_tensor_t, device_id);
  FIELD(adaattn_tensor_t, reserved);
  END(adaattn_tensor_t);
  STRUCT(adaattn_device_info_t);
  FIELD(adaattn_device_info_t, struct_size);
  FIELD(adaattn_device_info_t, device);
  FIELD(adaattn_device_info_t, device_id);
  FIELD(adaattn_device_info_t, compute_units);
  FIELD(adaattn_device_info_t, compute_capability);
  FIELD(adaattn_device_info_t, memory_bytes);
  FIELD(adaattn_device_info_t, name);
  FIELD(adaattn_device_info_t, isa);
  END(adaattn_device_info_t);
  STRUCT(adaattn_config_t);
  FIELD(adaattn_config_t, struct_size);
  FIELD(adaattn_config_t, device);
  FIELD(adaattn_config_t, device_id);
  FIELD(adaattn_config_t, num_threads);
  FIELD(adaattn_config_t, isa);
  FIELD(adaattn_config_t, parallel_for);
  FIELD(adaattn_config_t, parallel_for_user);
  FIELD(adaattn_config_t, alloc);
  FIELD(adaattn_config_t, free);
  FIELD(adaattn_config_t, alloc_user);
  END(adaattn_config_t);
  STRUCT(adaattn_attn_desc_t);
  FIELD(adaattn_attn_desc_t, struct_size);
  FIELD(adaattn_attn_desc_t, max_batch);
  FIELD(adaattn_attn_desc_t, max_seqlen_q);
  FIELD(adaattn_attn_desc_t, max_seqlen_k);
  FIELD(adaattn_attn_desc_t, max_total_q);
  FIELD(adaattn_attn_desc_t, heads_q);
  FIELD(adaattn_attn_desc_t, heads_kv);
  FIELD(adaattn_attn_desc_t, head_dim_qk);
  FIELD(adaattn_attn_desc_t, head_dim_v);
  FIELD(adaattn_attn_desc_t, dtype_q);
  FIELD(adaattn_attn_desc_t, dtype_kv);
  FIELD(adaattn_attn_desc_t, dtype_o);
  FIELD(adaattn_attn_desc_t, math);
  FIELD(adaattn_attn_desc_t, layout_q);
  FIELD(adaattn_attn_desc_t, layout_kv);
  FIELD(adaattn_attn_desc_t, page_size);
  FIELD(adaattn_attn_desc_t, mask);
  FIELD(adaattn_attn_desc_t, deterministic);
  FIELD(adaattn_attn_desc_t, window_left);
  FIELD(adaattn_attn_desc_t, window_right);
  FIELD(adaattn_attn_desc_t, scale);
  FIELD(adaattn_attn_desc_t, softcap);
  FIELD(adaattn_attn_desc_t, flags);
  FIELD(adaattn_attn_desc_t, outputs);
  FIELD(adaattn_attn_desc_t, descale_block);
  END(adaattn_attn_desc_t);
  STRUCT(adaattn_adaptive_desc_t);
  FIELD(adaattn_adaptive_desc_t, struct_size);
  FIELD(adaattn_adaptive_desc_t, policy);
  FIELD(adaattn_adaptive_desc_t, probe);
  FIELD(adaattn_adaptive_desc_t, tolerance);
  FIELD(adaattn_adaptive_desc_t, tile_mass);
  FIELD(adaattn_adaptive_desc_t, probe_rank);
  FIELD(adaattn_adaptive_desc_t, needle_share);
  FIELD(adaattn_adaptive_desc_t, far_field);
  FIELD(adaattn_adaptive_desc_t, rank_mode);
  FIELD(adaattn_adaptive_desc_t, rank_ratio);
  FIELD(adaattn_adaptive_desc_t, rank_threshold);
  FIELD(adaattn_adaptive_desc_t, min_rank);
  FIELD(adaattn_adaptive_desc_t, min_precision);
  FIELD(adaattn_adaptive_desc_t, max_precision);
  FIELD(adaattn_adaptive_desc_t, verify_rows);
  FIELD(adaattn_adaptive_desc_t, feedback);
  FIELD(adaattn_adaptive_desc_t, on_exceed);
  FIELD(adaattn_adaptive_desc_t, freeze);
  FIELD(adaattn_adaptive_desc_t, reserved0);
  FIELD(adaattn_adaptive_desc_t, seed);
  FIELD(adaattn_adaptive_desc_t, max_workspace_bytes);
  END(adaattn_adaptive_desc_t);
  STRUCT(adaattn_io_t);
  FIELD(adaattn_io_t, struct_size);
  FIELD(adaattn_io_t, q);
  FIELD(adaattn_io_t, k);
  FIELD(adaattn_io_t, v);
  FIELD(adaattn_io_t, o);
  FIELD(adaattn_io_t, lse);
  FIELD(adaattn_io_t, entropy);
  FIELD(adaattn_io_t, bias);
  FIELD(adaattn_io_t, alibi_slopes);
  FIELD(adaattn_io_t, sinks);
  FIELD(adaattn_io_t, cu_seqlens_q);
  FIELD(adaattn_io_t, cu_seqlens_k);
  FIELD(adaattn_io_t, seqused_k);
  FIELD(adaattn_io_t, block_table);
  FIELD(adaattn_io_t, q_descale);
  FIELD(adaattn_io_t, k_descale);
  FIELD(adaattn_io_t, v_descale);
  END(adaattn_io_t);
  STRUCT(adaattn_plan_info_t);
  FIELD(adaattn_plan_info_t, struct_size);
  FIELD(adaattn_plan_info_t, kernel);
  FIELD(adaattn_plan_info_t, isa);
  FIELD(adaattn_plan_info_t, tile_q);
  FIELD(adaattn_plan_info_t, tile_k);
  FIELD(adaattn_plan_info_t, splits);
  FIELD(adaattn_plan_info_t, capture_safe);
  FIELD(adaattn_plan_info_t, deterministic);
  FIELD(adaattn_plan_info_t, exact);
  FIELD(adaattn_plan_info_t, workspace_bytes);
  END(adaattn_plan_info_t);
  STRUCT(adaattn_plan_stats_t);
  FIELD(adaattn_plan_stats_t, struct_size);
  FIELD(adaattn_plan_stats_t, calls);
  FIELD(adaattn_plan_stats_t, query_rows);
  FIELD(adaattn_plan_stats_t, score_pairs);
  FIELD(adaattn_plan_stats_t, flops);
  FIELD(adaattn_plan_stats_t, violation_field);
  FIELD(adaattn_plan_stats_t, reserved0);
  FIELD(adaattn_plan_stats_t, violation_index);
  FIELD(adaattn_plan_stats_t, violation_value);
  FIELD(adaattn_plan_stats_t, heads);
  FIELD(adaattn_plan_stats_t, heads_dense);
  FIELD(adaattn_plan_stats_t, heads_low_rank);
  FIELD(adaattn_plan_stats_t, heads_f32);
  FIELD(adaattn_plan_stats_t, heads_f16);
  FIELD(adaattn_plan_stats_t, heads_bf16);
  FIELD(adaattn_plan_stats_t, heads_i8);
  FIELD(adaattn_plan_stats_t, tiles);
  FIELD(adaattn_plan_stats_t, tiles_kept);
  FIELD(adaattn_plan_stats_t, tiles_probed_in);
  FIELD(adaattn_plan_stats_t, flops_done);
  FIELD(adaattn_plan_stats_t, rank_v_sum);
  FIELD(adaattn_plan_stats_t, entropy_sum);
  FIELD(adaattn_plan_stats_t, entropy_min);
  FIELD(adaattn_plan_stats_t, entropy_max);
  FIELD(adaattn_plan_stats_t, predicted_error_sum);
  FIELD(adaattn_plan_stats_t, dropped_mass_sum);
  FIELD(adaattn_plan_stats_t, verified_heads);
  FIELD(adaattn_plan_stats_t, verified_rows);
  FIELD(adaattn_plan_stats_t, measured_error_sum);
  FIELD(adaattn_plan_stats_t, measured_error_max);
  FIELD(adaattn_plan_stats_t, measured_row_error_max);
  FIELD(adaattn_plan_stats_t, heads_over_tolerance);
  FIELD(adaattn_plan_stats_t, heads_recomputed);
  FIELD(adaattn_plan_stats_t, seconds_analyze);
  FIELD(adaattn_plan_stats_t, seconds_decide);
  FIELD(adaattn_plan_stats_t, seconds_attend);
  FIELD(adaattn_plan_stats_t, seconds_verify);
  END(adaattn_plan_stats_t);
  STRUCT(adaattn_head_stats_t);
  FIELD(adaattn_head_stats_t, batch);
  FIELD(adaattn_head_stats_t, head);
  FIELD(adaattn_head_stats_t, entropy);
  FIELD(adaattn_head_stats_t, kept_tiles);
  FIELD(adaattn_head_stats_t, dropped_mass);
  FIELD(adaattn_head_stats_t, predicted_error);
  FIELD(adaattn_head_stats_t, measured_error);
  FIELD(adaattn_head_stats_t, feedback);
  FIELD(adaattn_head_stats_t, rank_v);
  FIELD(adaattn_head_stats_t, rank_energy);
  FIELD(adaattn_head_stats_t, precision);
  FIELD(adaattn_head_stats_t, dense);
  END(adaattn_head_stats_t);
  STRUCT(adaattn_entropy_desc_t);
  FIELD(adaattn_entropy_desc_t, struct_size);
  FIELD(adaattn_entropy_desc_t, mode);
  FIELD(adaattn_entropy_desc_t, normalized);
  FIELD(adaattn_entropy_desc_t, sample_rows);
  FIELD(adaattn_entropy_desc_t, seed);
  END(adaattn_entropy_desc_t);
  STRUCT(adaattn_low_rank_desc_t);
  FIELD(adaattn_low_rank_desc_t, struct_size);
  FIELD(adaattn_low_rank_desc_t, batch);
  FIELD(adaattn_low_rank_desc_t, rows);
  FIELD(adaattn_low_rank_desc_t, cols);
  FIELD(adaattn_low_rank_desc_t, rank);
  FIELD(adaattn_low_rank_desc_t, oversampling);
  FIELD(adaattn_low_rank_desc_t, power_iterations);
  FIELD(adaattn_low_rank_desc_t, seed);
  END(adaattn_low_rank_desc_t);
  return 0;
}
