// One attention call through the C API with its own inputs, and its distance from the oracle.
#pragma once

#include <string>
#include <vector>

#include "adaattn/adaattn.h"
#include "shapes.h"

namespace adaattn::bench {

// Throws with the library's text.
void check(adaattn_status_t status);

class AttentionCall {
 public:
  AttentionCall(adaattn_context_t* context, const Shape& shape, adaattn_dtype_t dtype);
  ~AttentionCall();
  AttentionCall(const AttentionCall&) = delete;
  AttentionCall& operator=(const AttentionCall&) = delete;
  void run() { check(adaattn_plan_execute(plan_, &io_, workspace_.data(), workspace_.size(), nullptr)); }
  double flops() const;          // of the scores a dense kernel owes
  double kv_bytes() const;       // K and V together
  double sampled_error() const;  // ||o - oracle|| / ||oracle|| over some rows of some heads
  std::string kernel() const;

 private:
  Shape shape_;
  adaattn_dtype_t dtype_;
  adaattn_plan_t* plan_ = nullptr;
  adaattn_io_t io_;
  std::vector<char> q_, k_, v_, o_, workspace_;
};

}  // namespace adaattn::bench
