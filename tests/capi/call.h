// A small valid attention call with every optional input and output, for tests that break one thing at a time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "adaattn/adaattn.h"

namespace adaattn::test {

// From context_fake.cpp or context_cpu.cpp: what the test program runs on.
adaattn_context_t* make_context();

std::string last_error();

// Contiguous unless strides are given; CPU.
adaattn_tensor_t tensor(void* data, adaattn_dtype_t dtype, std::vector<int64_t> shape,
                        std::vector<int64_t> stride = {});

enum class Form { kBSHD, kBHSD, kPacked, kPaged, kPackedPaged };

class Call {
 public:
  static constexpr int64_t kBatch = 2, kSeqlenQ = 3, kSeqlenK = 8, kHeadsQ = 4, kHeadsKv = 2, kDimQk = 8, kDimV = 6,
                           kPageSize = 4, kPages = 5;

  explicit Call(Form form = Form::kBSHD);
  // Tensors point into the object.
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  adaattn_status_t attention(adaattn_context_t* context) {
    return adaattn_attention(context, desc_pointer, adaptive, io_pointer, stream);
  }

  void poison();
  // o, lse and entropy as poison() left them.
  bool outputs_untouched() const;
  bool outputs_written() const;

  adaattn_attn_desc_t desc;
  adaattn_io_t io;
  const adaattn_attn_desc_t* desc_pointer = &desc;
  const adaattn_io_t* io_pointer = &io;
  const adaattn_adaptive_desc_t* adaptive = nullptr;
  adaattn_stream_t stream = nullptr;

  std::vector<float> q, k, v, o, lse, entropy, bias, slopes, sinks;
  std::vector<int32_t> cu_q, cu_k, used_k, table;
};

}  // namespace adaattn::test
