#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>

#include "cli/commands.h"
#include "cli/progress.h"
#include "engine/error.h"
#include "engine/tokenizer.h"

namespace generate {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kContexts[] = {1024, 4096};
// Bits per byte that implementations may differ by: in f32, and where q, k and v are narrower.
constexpr double kMaxDifference = 1e-3, kMaxNarrowDifference = 5e-3;
// Where adaptive attention is compared with exact attention: whole windows from the start of the text.
constexpr int64_t kAdaptiveContext = 8192, kAdaptiveWindows = 2;
constexpr char kPrompt[] = "The function returns ";
constexpr int64_t kContinuation = 320;

Json read_reference(const std::string& path) {
  try {
    return Json::parse(read_text(path));
  } catch (const Json::exception& e) {
    fail("%s: %s", path.c_str(), e.what());
  }
}

// Loss and time of attention under each policy, in the demo's order.
Json compare_policies(const CommonOptions& common, const std::string& text) {
  std::printf("\nattention at context %lld, first %lld windows of manual.txt\n",
              static_cast<long long>(kAdaptiveContext), static_cast<long long>(kAdaptiveWindows));
  std::printf(
      "policy      bits/byte     change   attention s   speed-up   tiles kept   rank of V   error predicted / "
      "measured\n");
  Json report = {{"context", kAdaptiveContext}, {"windows", kAdaptiveWindows}};
  double exact_loss = 0, exact_seconds = 0;
  for (const char* name : {"exact", "quality", "balanced", "speed"}) {
    ModelOptions options = common.engine;
    options.attention.policy = policy_names().at(name);
    Model model(common.model, options);
    LossResult result;
    try {
      Progress progress(name);
      result =
          evaluate_loss(model, tokenize(model.config(), text), kAdaptiveContext, kAdaptiveWindows, std::ref(progress));
    } catch (const adaattn::Error& e) {
      if (e.code() != ADAATTN_ERROR_NOT_SUPPORTED) throw;
      std::printf("%-9s   %s\n", name, e.what());
      report["policies"][name] = {{"refused", e.what()}};
      continue;
    }
    Json row = {{"bpb", result.bits_per_token}};
    row.update(describe_attention(model.attention_report(), false));
    const double seconds = row["attention_seconds"].get<double>();
    row["seconds"] = seconds;
    if (options.attention.policy == ADAATTN_POLICY_EXACT) {
      exact_loss = result.bits_per_token;
      exact_seconds = seconds;
      std::printf("%-9s   %9.6f               %7.4f\n", name, result.bits_per_token, seconds);
      report["exact"] = row;
    } else {
      row["loss_change_percent"] = 100 * (result.bits_per_token / exact_loss - 1);
      row["speed_up"] = exact_seconds / seconds;
      std::printf(
          "%-9s   %9.6f   %+7.3f %%       %7.4f     %5.2f x      %5.1f %%      %6.1f            %6.4f / %6.4f\n", name,
          result.bits_per_token, row["loss_change_percent"].get<double>(), seconds, row["speed_up"].get<double>(),
          100 * row["kept_tiles"].get<double>(), row["mean_rank_v"].get<double>(), row["predicted_error"].get<double>(),
          row["measured_error"].get<double>());
      report["policies"][name] = row;
    }
    std::fflush(stdout);
  }
  return report;
}

}  // namespace

bool run_demo(const CommonOptions& common) {
  const auto start = std::chrono::steady_clock::now();
  const std::filesystem::path folder = common.model;
  const Json reference = read_reference(folder / "manual_reference.json");
  Model model(common.model, common.engine);
  const std::vector<int32_t> text = tokenize(model.config(), read_text(folder / "manual.txt"));

  Json report = describe_run(model, common, {1, kContexts[0], 0}, kContexts[0]);
  const auto text_of = [&](const char* key) { return report[key].get<std::string>(); };
  const bool on_cpu = model.device() == ADAATTN_DEVICE_CPU;
  std::printf("%s\n%s%s%s, attention %s (%s, %s), weights %s\n\n", text_of("library").c_str(),
              on_cpu ? text_of("device").c_str() : "", on_cpu ? ", " : "", describe_device(model, report).c_str(),
              text_of("kernel").c_str(), text_of("isa").c_str(), dtype_name(model.dtype()), text_of("blas").c_str());
  std::printf("loss of manual.txt   tokens   bits/byte   reference   difference   tokens/s\n");

  const double allowed = model.dtype() == DType::kF32 ? kMaxDifference : kMaxNarrowDifference;
  bool agrees = true;
  for (const int64_t context : kContexts) {
    const LossResult result = [&] {
      Progress progress("context " + std::to_string(context));
      return evaluate_loss(model, text, context, 0, std::ref(progress));
    }();
    const std::string suffix = "_ctx" + std::to_string(context);
    const double expected = reference.at("bits_per_byte").at(std::to_string(context)).get<double>();
    const double difference = result.bits_per_token - expected;
    agrees = agrees && std::abs(difference) <= allowed;
    report["bpb_exact" + suffix] = result.bits_per_token;
    report["reference_bpb" + suffix] = expected;
    report["tokens" + suffix] = result.tokens;
    report["tokens_per_second" + suffix] = result.tokens_per_second();
    std::printf("context %8lld    %8lld   %9.6f   %9.6f   %+10.6f   %8.0f\n", static_cast<long long>(context),
                static_cast<long long>(result.tokens), result.bits_per_token, expected, difference,
                result.tokens_per_second());
    std::fflush(stdout);
  }

  report.update(compare_policies(common, read_text(folder / "manual.txt")));

  std::printf("\n%s", kPrompt);
  std::string continuation;
  SamplingOptions sampling;
  sampling.temperature = 0.6;
  sampling.seed = 1;
  const WriteResult written =
      write_tokens(model, tokenize(model.config(), kPrompt), kContinuation, sampling, [&](int32_t token) {
        continuation += detokenize(model.config(), token);
        std::fputs(detokenize(model.config(), token).c_str(), stdout);
        std::fflush(stdout);
      });
  report["kernel_decode"] = model.attention_info({1, 1, 0}, written.prompt_tokens + kContinuation).kernel;
  report["tokens_per_second_decode"] = written.decode_tokens_per_second();
  report["prompt"] = kPrompt;
  report["continuation"] = continuation;
  report["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("\n\nwritten at %.0f tokens/s; %.1f s in all\n", written.decode_tokens_per_second(),
              report["seconds"].get<double>());
  if (!common.report.empty()) write_json(common.report, report);
  if (!agrees) std::fprintf(stderr, "a loss differs from the reference by more than %g bits per byte\n", allowed);
  return agrees;
}

}  // namespace generate
