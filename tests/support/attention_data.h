// The tensors of one attention call, made from a case and a seed.
#pragma once

#include <cstdint>
#include <vector>

#include "adaattn/adaattn.h"
#include "support/cases.h"
#include "support/tensor.h"

namespace adaattn::test {

struct AttentionData {
  adaattn_attn_desc_t desc;
  Tensor q, k, v, o, lse, entropy, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, block_table,
      q_descale, k_descale, v_descale;

  // Random inputs; outputs poisoned with NaN.
  AttentionData(const AttentionCase& c, const Dtypes& dtypes, uint64_t seed, uint32_t outputs = ADAATTN_OUTPUT_ALL);

  // What the library gets on a device. Host memory for the oracle: ADAATTN_DEVICE_CPU.
  adaattn_io_t io(adaattn_device_t device = ADAATTN_DEVICE_CPU, int32_t device_id = 0) const;
  void upload(adaattn_device_t device, int32_t device_id = 0) const;
  void download(adaattn_device_t device, int32_t device_id = 0) const;
  void poison_outputs();
  // Leaves out lse and entropy, in the descriptor and the tensors.
  void drop_optional_outputs();

  int64_t batch() const;
  int64_t len_q(int64_t b) const;
  int64_t len_k(int64_t b) const;
  int64_t d_v() const { return desc.head_dim_v != 0 ? desc.head_dim_v : desc.head_dim_qk; }
  // Indices of an element by sequence, token within it, head and column, whatever the layout.
  std::vector<int64_t> query_index(int64_t b, int64_t i, int64_t h, int64_t c) const;  // q, o
  std::vector<int64_t> key_index(int64_t b, int64_t j, int64_t h, int64_t c) const;    // k, v
  std::vector<int64_t> row_index(int64_t b, int64_t i, int64_t h) const;               // lse, entropy

 private:
  void add_descales(Random& random);
  const std::vector<const Tensor*> all() const;
};

}  // namespace adaattn::test
