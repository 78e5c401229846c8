#include "cli/commands.h"

#include <cstdio>
#include <fstream>
#include <iterator>

#include "cli/progress.h"
#include "engine/error.h"
#include "engine/tokenizer.h"

namespace generate {
namespace {

using Json = nlohmann::ordered_json;

std::vector<int32_t> prompt_tokens(const ModelConfig& config, const WriteOptions& options) {
  if (!options.prompt_ids.empty()) return parse_token_ids(config, options.prompt_ids);
  return tokenize(config, options.prompt_file.empty() ? options.prompt : read_text(options.prompt_file));
}

// A string of '0', '1' and '2' for each query tile, as adaattn_plan_get_tile_map() means them.
std::vector<std::string> map_rows(const adaattn::TileMap& map) {
  std::vector<std::string> rows;
  for (int64_t q = 0; q < map.query_tiles; ++q) {
    std::string& row = rows.emplace_back();
    for (int64_t k = 0; k < map.key_tiles; ++k)
      row += static_cast<char>('0' + map.tiles[static_cast<size_t>(q * map.key_tiles + k)]);
  }
  return rows;
}

std::string policy_name(adaattn_policy_t policy) {
  for (const auto& [name, value] : policy_names()) {
    if (value == policy) return name;
  }
  return "unknown";
}

}  // namespace

std::string read_text(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(stream), {}};
  if (!stream) fail("%s: cannot be read", path.c_str());
  return text;
}

void expect_writable(const std::string& path) {
  if (!std::ofstream(path, std::ios::app)) fail("%s: cannot be written", path.c_str());
}

void write_json(const std::string& path, const Json& report) {
  std::ofstream stream(path);
  // Text that a model wrote need not be valid UTF-8.
  stream << report.dump(2, ' ', false, Json::error_handler_t::replace) << '\n';
  stream.close();
  if (!stream) fail("%s: cannot be written", path.c_str());
}

Json describe_run(Model& model, const CommonOptions& common, const Step& step, int64_t capacity) {
  const adaattn_plan_info_t plan = model.attention_info(step, capacity);
  adaattn_device_info_t device = {};
  device.struct_size = sizeof device;
  const bool known = adaattn_device_info(model.device(), 0, &device) == ADAATTN_SUCCESS;
  return {{"library", adaattn_build_info()},
          {"device", known ? device.name : "unknown"},
          {"isa", plan.isa},
          {"kernel", plan.kernel},
          {"blas", model.compute_description()},
          {"threads", model.threads()},
          {"dtype", dtype_name(model.dtype())},
          {"kv_dtype", cache_name(model.cache_format(), model.dtype())},
          {"model", common.model}};
}

std::string describe_device(const Model& model, const Json& run) {
  return model.device() == ADAATTN_DEVICE_CPU ? std::to_string(model.threads()) + " threads"
                                              : run.at("device").get<std::string>();
}

Json describe_attention(const AttentionReport& report, bool with_heads) {
  const adaattn_plan_stats_t& sum = report.totals;
  const auto ratio = [](double part, double whole) { return whole > 0 ? part / whole : 0; };
  const auto heads = static_cast<double>(sum.heads);
  Json json = {{"attention_seconds", report.seconds}};
  if (sum.heads == 0) return json;
  json["kept_tiles"] = ratio(static_cast<double>(sum.tiles_kept), static_cast<double>(sum.tiles));
  json["mean_rank_v"] = sum.rank_v_sum / heads;
  json["dense_heads"] = static_cast<double>(sum.heads_dense) / heads;
  json["low_rank_ratio"] = static_cast<double>(sum.heads_low_rank) / heads;
  json["precision_distribution"] = {{"f32", static_cast<double>(sum.heads_f32) / heads},
                                    {"f16", static_cast<double>(sum.heads_f16) / heads},
                                    {"bf16", static_cast<double>(sum.heads_bf16) / heads},
                                    {"i8", static_cast<double>(sum.heads_i8) / heads}};
  json["flops_ratio"] = ratio(sum.flops_done, sum.flops);
  json["predicted_error"] = sum.predicted_error_sum / heads;
  json["measured_error"] = ratio(sum.measured_error_sum, static_cast<double>(sum.verified_heads));
  json["measured_error_max"] = sum.measured_error_max;
  json["heads_over_tolerance"] = sum.heads_over_tolerance;
  json["stage_seconds"] = {{"analyze", sum.seconds_analyze},
                           {"decide", sum.seconds_decide},
                           {"attend", sum.seconds_attend},
                           {"verify", sum.seconds_verify}};
  if (!with_heads) return json;
  Json& list = json["heads"] = Json::array();
  for (const HeadReport& head : report.heads) {
    const adaattn_head_stats_t& s = head.stats;
    list.push_back({{"layer", head.layer},
                    {"batch", s.batch},
                    {"head", s.head},
                    {"entropy", s.entropy},
                    {"kept_tiles", s.kept_tiles},
                    {"dropped_mass", s.dropped_mass},
                    {"rank_v", s.rank_v},
                    {"rank_energy", s.rank_energy},
                    {"precision", s.precision},
                    {"dense", s.dense != 0},
                    {"predicted_error", s.predicted_error},
                    {"measured_error", s.dense != 0 ? Json() : Json(s.measured_error)},
                    {"feedback", s.feedback}});
    if (!head.map.tiles.empty()) list.back()["tiles"] = map_rows(head.map);
  }
  return json;
}

void run_loss(const CommonOptions& common, const LossOptions& options) {
  Model model(common.model, common.engine);
  const std::vector<int32_t> tokens = options.ids.empty() ? tokenize(model.config(), read_text(options.text))
                                                          : parse_token_ids(model.config(), read_text(options.ids));
  const LossResult result = [&] {
    Progress progress("context " + std::to_string(options.context));
    return evaluate_loss(model, tokens, options.context, options.windows, std::ref(progress));
  }();
  Json report = describe_run(model, common, {1, options.context, 0}, options.context);
  report["policy"] = policy_name(common.engine.attention.policy);
  report["tolerance"] = common.engine.attention.tolerance;
  report["text"] = options.ids.empty() ? options.text : options.ids;
  report["context"] = result.context;
  report["windows"] = result.windows;
  report["tokens"] = result.tokens;
  report[has_byte_tokens(model.config()) ? "bits_per_byte" : "bits_per_token"] = result.bits_per_token;
  report["seconds"] = result.seconds;
  report["tokens_per_second"] = result.tokens_per_second();
  report.update(describe_attention(model.attention_report(), true));
  std::printf("context %lld: %.6f bits per %s over %lld tokens in %lld windows, %.0f tokens/s (%s, %s, cache %s, %s)\n",
              static_cast<long long>(result.context), result.bits_per_token,
              has_byte_tokens(model.config()) ? "byte" : "token", static_cast<long long>(result.tokens),
              static_cast<long long>(result.windows), result.tokens_per_second(),
              report["isa"].get_ref<const std::string&>().c_str(), dtype_name(model.dtype()),
              cache_name(model.cache_format(), model.dtype()), describe_device(model, report).c_str());
  if (!common.report.empty()) write_json(common.report, report);
}

void run_write(const CommonOptions& common, const WriteOptions& options) {
  Model model(common.model, common.engine);
  const ModelConfig& config = model.config();
  const std::vector<int32_t> prompt = prompt_tokens(config, options);
  std::string text;
  const auto print = [&](int32_t token) {
    const std::string piece = detokenize(config, token);
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
    text += piece;
  };
  const WriteResult result = write_tokens(model, prompt, options.max_tokens, options.sampling, print);
  std::fputc('\n', stdout);
  std::fflush(stdout);
  std::fprintf(stderr, "prompt: %lld tokens, %.0f tokens/s; written: %zu tokens, %.0f tokens/s\n",
               static_cast<long long>(result.prompt_tokens), result.prefill_tokens_per_second(), result.tokens.size(),
               result.decode_tokens_per_second());
  if (common.report.empty()) return;
  Json report = describe_run(model, common, {1, 1, 0}, result.prompt_tokens + options.max_tokens);
  report["seed"] = options.sampling.seed;
  report["prompt_tokens"] = result.prompt_tokens;
  report["tokens"] = result.tokens;
  report["text"] = text;
  report["tokens_per_second_prefill"] = result.prefill_tokens_per_second();
  report["tokens_per_second_decode"] = result.decode_tokens_per_second();
  write_json(common.report, report);
}

}  // namespace generate
