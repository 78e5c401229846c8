#include "support/context.h"

#include <cstring>
#include <sstream>
#include <stdexcept>

namespace adaattn::test {
namespace {

void require(adaattn_status_t status) {
  if (status != ADAATTN_SUCCESS) throw std::runtime_error(adaattn_status_name(status) + (": " + last_error()));
}

}  // namespace

const std::vector<Target>& all_targets(adaattn_device_t device) {
  static const std::vector<Target> cpu = {
#if defined(__x86_64__)
    {"baseline", ADAATTN_DEVICE_CPU, ADAATTN_ISA_BASELINE},
    {"avx2", ADAATTN_DEVICE_CPU, ADAATTN_ISA_AVX2},
    {"avx512", ADAATTN_DEVICE_CPU, ADAATTN_ISA_AVX512},
    {"amx", ADAATTN_DEVICE_CPU, ADAATTN_ISA_AMX},
#elif defined(__aarch64__)
    {"neon", ADAATTN_DEVICE_CPU, ADAATTN_ISA_NEON},
#else
    {"baseline", ADAATTN_DEVICE_CPU, ADAATTN_ISA_BASELINE},
#endif
  };
  static const std::vector<Target> cuda = {{"cuda", ADAATTN_DEVICE_CUDA, ADAATTN_ISA_AUTO}};
  return device == ADAATTN_DEVICE_CPU ? cpu : cuda;
}

std::string missing(const Target& target) {
  int32_t count = 0;
  require(adaattn_device_count(target.device, &count));
  if (count == 0) return "no usable device: " + last_error();
  if (target.device != ADAATTN_DEVICE_CPU) return "";
  adaattn_device_info_t info{};
  info.struct_size = sizeof info;
  require(adaattn_device_info(target.device, 0, &info));
  std::istringstream words(info.isa);
  for (std::string word; words >> word;)
    if (word == target.name) return "";
  return "this processor has no " + target.name + " (it has: " + info.isa + ")";
}

std::vector<Target> available_targets(adaattn_device_t device) {
  std::vector<Target> list;
  for (const Target& target : all_targets(device))
    if (missing(target).empty()) list.push_back(target);
  return list;
}

std::vector<Target> listed_targets(adaattn_device_t device) {
  const std::vector<Target> available = available_targets(device);
  return available.empty() ? all_targets(device) : available;
}

std::string last_error() {
  std::string text(adaattn_last_error(nullptr, 0), '\0');
  adaattn_last_error(text.data(), text.size() + 1);
  return text;
}

Context::Context(const Target& target, int32_t num_threads) : device_(target.device) {
  adaattn_config_t config;
  require(adaattn_config_init(&config, sizeof config));
  config.device = target.device;
  config.isa = target.isa;
  if (target.device == ADAATTN_DEVICE_CPU) config.num_threads = num_threads;
  require(adaattn_create(&config, &context_));
}

Context::Context(const adaattn_config_t& config) : device_(config.device) {
  require(adaattn_create(&config, &context_));
}

Context::~Context() { EXPECT_EQ(adaattn_destroy(context_), ADAATTN_SUCCESS) << last_error(); }

Plan::Plan(const Context& context, const adaattn_attn_desc_t& desc) : device_(context.device()) {
  require(adaattn_plan_create(context.get(), &desc, nullptr, &plan_));
}

Plan::~Plan() { EXPECT_EQ(adaattn_plan_destroy(plan_), ADAATTN_SUCCESS) << last_error(); }

size_t Plan::workspace_size() const {
  size_t bytes = 0;
  require(adaattn_plan_workspace_size(plan_, &bytes));
  return bytes;
}

adaattn_plan_stats_t Plan::stats(uint32_t flags) const {
  adaattn_plan_stats_t stats{};
  stats.struct_size = sizeof stats;
  require(adaattn_plan_get_stats(plan_, flags, &stats));
  return stats;
}

adaattn_plan_info_t Plan::info() const {
  adaattn_plan_info_t info{};
  info.struct_size = sizeof info;
  require(adaattn_plan_get_info(plan_, &info));
  return info;
}

adaattn_status_t Plan::execute(const AttentionData& data) const {
  data.upload(device_);
  const adaattn_io_t io = data.io(device_);
  const adaattn_status_t status = adaattn_plan_execute(plan_, &io, nullptr, 0, nullptr);
  data.download(device_);
  return status;
}

adaattn_status_t attention(const Context& context, const AttentionData& data) {
  data.upload(context.device());
  const adaattn_io_t io = data.io(context.device());
  const adaattn_status_t status = adaattn_attention(context.get(), &data.desc, nullptr, &io, nullptr);
  data.download(context.device());
  return status;
}

testing::AssertionResult succeeded(adaattn_status_t status) {
  if (status == ADAATTN_SUCCESS) return testing::AssertionSuccess();
  return testing::AssertionFailure() << adaattn_status_name(status) << ": " << last_error();
}

}  // namespace adaattn::test
