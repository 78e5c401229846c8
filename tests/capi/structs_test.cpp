// Versions of the public structs: shorter, longer and impossible ones, going in and coming out.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "capi/call.h"

namespace adaattn::test {
namespace {

using Handle = std::unique_ptr<adaattn_context_t, decltype(&adaattn_destroy)>;
Handle context() { return {make_context(), adaattn_destroy}; }

// Memory of exactly `size` bytes, so that AddressSanitizer sees a read or write beyond it.
class Bytes {
 public:
  Bytes(size_t size, unsigned char fill) : size_(size), data_(new unsigned char[size]) {
    std::memset(data_.get(), fill, size);
  }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data_.get());
  }
  unsigned char& operator[](size_t i) { return data_[i]; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  std::unique_ptr<unsigned char[]> data_;
};

template <typename T>
void expect_init_of_every_version(adaattn_status_t (*init)(T*, size_t)) {
  T current;
  std::memset(static_cast<void*>(&current), 0xee, sizeof current);
  ASSERT_EQ(init(&current, sizeof current), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(current.struct_size, sizeof current);

  Bytes longer(sizeof(T) + 16, 0xee);
  ASSERT_EQ(init(longer.as<T>(), longer.size()), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(longer.as<T>()->struct_size, longer.size());
  EXPECT_EQ(std::memcmp(&longer[sizeof(size_t)], reinterpret_cast<unsigned char*>(&current) + sizeof(size_t),
                        sizeof(T) - sizeof(size_t)),
            0);
  for (size_t i = sizeof(T); i < longer.size(); ++i) EXPECT_EQ(longer[i], 0) << i;

  EXPECT_EQ(init(nullptr, sizeof(T)), ADAATTN_ERROR_NULL_POINTER);
  for (size_t size : {size_t{0}, size_t{4}, sizeof(T) - 1, size_t{1} << 20, SIZE_MAX}) {
    T untouched = current;
    EXPECT_EQ(init(&untouched, size), ADAATTN_ERROR_STRUCT_SIZE) << size;
    EXPECT_NE(last_error().find("size is " + std::to_string(size)), std::string::npos) << last_error();
    EXPECT_EQ(std::memcmp(&untouched, &current, sizeof current), 0);
  }
}

TEST(Structs, InitServesEveryVersionOfConfig) { expect_init_of_every_version(adaattn_config_init); }
TEST(Structs, InitServesEveryVersionOfAttnDesc) { expect_init_of_every_version(adaattn_attn_desc_init); }
TEST(Structs, InitServesEveryVersionOfAdaptiveDesc) { expect_init_of_every_version(adaattn_adaptive_desc_init); }
TEST(Structs, InitServesEveryVersionOfIo) { expect_init_of_every_version(adaattn_io_init); }
TEST(Structs, InitServesEveryVersionOfEntropyDesc) { expect_init_of_every_version(adaattn_entropy_desc_init); }
TEST(Structs, InitServesEveryVersionOfLowRankDesc) { expect_init_of_every_version(adaattn_low_rank_desc_init); }

TEST(Structs, DefaultsAreTheDocumentedOnes) {
  adaattn_attn_desc_t attn;
  adaattn_attn_desc_init(&attn, sizeof attn);
  EXPECT_EQ(attn.window_left, -1);
  EXPECT_EQ(attn.window_right, -1);
  EXPECT_EQ(attn.layout_q, ADAATTN_LAYOUT_BSHD);
  EXPECT_EQ(attn.layout_kv, ADAATTN_LAYOUT_BSHD);
  EXPECT_EQ(attn.scale, 0);
  adaattn_low_rank_desc_t low_rank;
  adaattn_low_rank_desc_init(&low_rank, sizeof low_rank);
  EXPECT_EQ(low_rank.batch, 1);
  EXPECT_EQ(low_rank.oversampling, 8);
  EXPECT_EQ(low_rank.power_iterations, 2);
  adaattn_entropy_desc_t entropy;
  adaattn_entropy_desc_init(&entropy, sizeof entropy);
  EXPECT_EQ(entropy.sample_rows, 256);
  adaattn_config_t config;
  adaattn_config_init(&config, sizeof config);
  EXPECT_EQ(config.device, ADAATTN_DEVICE_CPU);
}

TEST(Structs, ShorterDescriptorGetsTheDefaults) {
  const Handle handle = context();
  Call call;
  // Everything up to the data types: an older header's struct.
  Bytes older(offsetof(adaattn_attn_desc_t, dtype_o), 0);
  std::memcpy(older.as<void>(), &call.desc, older.size());
  older.as<adaattn_attn_desc_t>()->struct_size = older.size();
  call.desc_pointer = older.as<adaattn_attn_desc_t>();
  call.io.lse = call.io.entropy = call.io.bias = call.io.alibi_slopes = call.io.sinks = {};
  EXPECT_EQ(call.attention(handle.get()), ADAATTN_SUCCESS) << last_error();
  older.as<adaattn_attn_desc_t>()->struct_size -= 8;
  EXPECT_EQ(call.attention(handle.get()), ADAATTN_ERROR_STRUCT_SIZE);
}

TEST(Structs, ShorterIoMeansAbsentTensors) {
  const Handle handle = context();
  Call call;
  call.desc.flags = call.desc.outputs = 0;
  Bytes older(offsetof(adaattn_io_t, lse), 0);
  std::memcpy(older.as<void>(), &call.io, older.size());
  older.as<adaattn_io_t>()->struct_size = older.size();
  call.io_pointer = older.as<adaattn_io_t>();
  EXPECT_EQ(call.attention(handle.get()), ADAATTN_SUCCESS) << last_error();
  call.desc.outputs = ADAATTN_OUTPUT_LSE;
  EXPECT_EQ(call.attention(handle.get()), ADAATTN_ERROR_NULL_POINTER);
  EXPECT_NE(last_error().find("io.lse is absent"), std::string::npos) << last_error();
}

TEST(Structs, LongerDescriptorIsAcceptedWhileItsTailIsZero) {
  const Handle handle = context();
  Call call;
  Bytes newer(sizeof call.desc + 24, 0);
  std::memcpy(newer.as<void>(), &call.desc, sizeof call.desc);
  newer.as<adaattn_attn_desc_t>()->struct_size = newer.size();
  call.desc_pointer = newer.as<adaattn_attn_desc_t>();
  EXPECT_EQ(call.attention(handle.get()), ADAATTN_SUCCESS) << last_error();
  call.poison();
  newer[newer.size() - 1] = 1;
  EXPECT_EQ(call.attention(handle.get()), ADAATTN_ERROR_STRUCT_SIZE);
  EXPECT_NE(last_error().find("byte " + std::to_string(newer.size() - 1)), std::string::npos) << last_error();
  EXPECT_TRUE(call.outputs_untouched());
}

TEST(Structs, OutputsAreWrittenWithinTheCallersSize) {
  const Handle handle = context();
  Call call;
  adaattn_plan_t* plan = nullptr;
  ASSERT_EQ(adaattn_plan_create(handle.get(), &call.desc, nullptr, &plan), ADAATTN_SUCCESS) << last_error();
  ASSERT_EQ(adaattn_plan_execute(plan, &call.io, nullptr, 0, nullptr), ADAATTN_SUCCESS) << last_error();

  Bytes older(offsetof(adaattn_plan_stats_t, flops), 0xee);
  older.as<adaattn_plan_stats_t>()->struct_size = older.size();
  ASSERT_EQ(adaattn_plan_get_stats(plan, 0, older.as<adaattn_plan_stats_t>()), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(older.as<adaattn_plan_stats_t>()->calls, 1u);
  EXPECT_EQ(older.as<adaattn_plan_stats_t>()->struct_size, older.size());

  Bytes newer(sizeof(adaattn_plan_info_t) + 8, 0xee);
  newer.as<adaattn_plan_info_t>()->struct_size = newer.size();
  ASSERT_EQ(adaattn_plan_get_info(plan, newer.as<adaattn_plan_info_t>()), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(newer.as<adaattn_plan_info_t>()->struct_size, newer.size());
  for (size_t i = sizeof(adaattn_plan_info_t); i < newer.size(); ++i) EXPECT_EQ(newer[i], 0) << i;

  Bytes unset(sizeof(adaattn_plan_stats_t), 0);
  EXPECT_EQ(adaattn_plan_get_stats(plan, 0, unset.as<adaattn_plan_stats_t>()), ADAATTN_ERROR_STRUCT_SIZE);
  EXPECT_NE(last_error().find("stats.struct_size is 0"), std::string::npos) << last_error();
  for (size_t i = 0; i < unset.size(); ++i) ASSERT_EQ(unset[i], 0) << i;
  adaattn_plan_destroy(plan);
}

}  // namespace
}  // namespace adaattn::test
