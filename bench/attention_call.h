// One attention call through the C API with its own inputs, and its distance from the oracle.
#pragma once

#include <string>
#include <vector>

#include "adaattn/adaattn.h"
#include "shapes.h"

namespace adaattn::bench {

// Throws with the library's text.
void check(adaattn_status_t status);

// Of a contiguous call without features beyond its mask.
adaattn_attn_desc_t desc_of(const Shape& shape, adaattn_dtype_t dtype);

// Plan and operands of a call, wherever they lie. q, k, v and o are contiguous [batch, seqlen, heads, head_dim].
class AttentionCall {
 public:
  virtual ~AttentionCall() { adaattn_plan_destroy(plan_); }
  AttentionCall(const AttentionCall&) = delete;
  AttentionCall& operator=(const AttentionCall&) = delete;
  double flops() const;          // of the scores a dense kernel owes
  double kv_bytes() const;       // of the keys and values that are seen
  double sampled_error() const;  // RMS over some rows of some heads of ||o - oracle|| / ||oracle||
  std::string kernel() const;

 protected:
  AttentionCall(adaattn_context_t* context, const Shape& shape, const NamedDtype& dtype, adaattn_math_t math,
                const adaattn_adaptive_desc_t* adaptive);
  size_t query_bytes() const;  // of q
  size_t key_bytes() const;    // of k, and of v
  size_t output_bytes() const;
  size_t workspace_bytes() const;
  size_t factors() const;  // of k, and of v, where they are E4M3
  // ones: as many floats 1, the descale factors of E4M3 tensors; may be null for other dtypes.
  // tables: a copy of page_tables(), null where k and v are contiguous.
  void place(void* q, void* k, void* v, void* o, void* ones, void* tables, adaattn_device_t device);
  // The sequences' lengths, then the pages of each, which are not in order; empty where k and v are contiguous.
  std::vector<int32_t> page_tables() const;
  void execute(void* workspace, size_t bytes, adaattn_stream_t stream) {
    check(adaattn_plan_execute(plan_, &io_, workspace, bytes, stream));
  }
  // Copies rows that are `pitch` bytes apart to host memory without gaps.
  virtual void fetch(char* to, const char* from, size_t row_bytes, size_t pitch, size_t rows) const = 0;

 private:
  int64_t pages() const { return (shape_.seqlen_k - 1) / shape_.page_size + 1; }  // of a sequence
  int64_t page(int64_t batch, int64_t index) const;

  Shape shape_;
  adaattn_dtype_t dtype_, dtype_kv_, dtype_o_;
  int64_t descale_block_;
  adaattn_plan_t* plan_ = nullptr;
  adaattn_io_t io_;
};

class CpuCall final : public AttentionCall {
 public:
  CpuCall(adaattn_context_t* context, const Shape& shape, adaattn_dtype_t dtype);
  void run() { execute(workspace_.data(), workspace_.size(), nullptr); }

 private:
  void fetch(char* to, const char* from, size_t row_bytes, size_t pitch, size_t rows) const override;

  std::vector<char> q_, k_, v_, o_, workspace_;
};

}  // namespace adaattn::bench
