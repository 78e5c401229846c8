// generate: the loss of a text, or its continuation, by a Llama-architecture checkpoint.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <map>
#include <string>
#include <utility>

#include "cli/commands.h"

namespace {

// Exit statuses; 0 is success.
constexpr int kFailed = 1;
constexpr int kUsage = 2;

// By CLI11's own check a wrong name is answered with the numbers behind the names.
template <typename T>
CLI::Validator one_of(std::map<std::string, T> names) {
  const auto take = [names = std::move(names)](std::string& text) -> std::string {
    if (const auto found = names.find(text); found != names.end()) {
      text = std::to_string(static_cast<int>(found->second));
      return "";
    }
    std::string accepted;
    for (const auto& [name, value] : names) accepted += (accepted.empty() ? "" : ", ") + name;
    return "is '" + text + "'; accepted: " + accepted;
  };
  return CLI::Validator(take, "NAME");
}

void add_common(CLI::App& command, generate::CommonOptions& common, const char* report_name) {
  using generate::DType;
  static const std::map<std::string, DType> dtypes = {
      {"f32", DType::kF32}, {"f16", DType::kF16}, {"bf16", DType::kBf16}};
  command.add_option("--model", common.model, "Folder with config.json and *.safetensors")->required();
  static const std::map<std::string, adaattn_device_t> devices = {{"cpu", ADAATTN_DEVICE_CPU},
                                                                  {"cuda", ADAATTN_DEVICE_CUDA}};
  command.add_option("--device", common.engine.device, "Where the model runs: cpu (default), cuda")
      ->transform(one_of(devices));
  command.add_option("--threads", common.engine.threads, "CPU threads; 0: all that this process may use")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
  command
      .add_option("--isa", common.engine.isa, "Instruction set of attention: auto, baseline, avx2, avx512, amx, neon")
      ->transform(one_of(generate::isa_names()));
  command
      .add_option(
          "--dtype", common.engine.dtype,
          "Type of q, k, v and o, on cuda of the weights too: f32 (default on cpu), f16, bf16 (default on cuda)")
      ->transform(one_of(dtypes));
  command.add_option(report_name, common.report, "File for the figures as JSON");
}

// What the demo chooses by itself.
void add_attention(CLI::App& command, generate::CommonOptions& common) {
  static const std::map<std::string, generate::CacheFormat> formats = {{"same", generate::CacheFormat::kAsAttention},
                                                                       {"e4m3", generate::CacheFormat::kE4m3}};
  command
      .add_option("--kv-dtype", common.engine.cache,
                  "Type of the keys and values kept: same (default, as --dtype), e4m3 (8 bits, a factor for each 64 "
                  "tokens of a head)")
      ->transform(one_of(formats));
  auto* policy = command
                     .add_option("--policy", common.engine.attention.policy,
                                 "Error allowed: exact (default), quality, balanced, speed")
                     ->transform(one_of(generate::policy_names()));
  command
      .add_option("--tolerance", common.engine.attention.tolerance,
                  "Error allowed per head, relative to the spread of V; 0: the policy's own")
      ->check(CLI::NonNegativeNumber)
      ->needs(policy);
}

int run(int argc, char** argv) {
  CLI::App app("Runs Llama-architecture checkpoints, with attention by libadaattn.");
  app.require_subcommand(1);
  generate::CommonOptions common;

  generate::LossOptions loss;
  CLI::App* loss_command = app.add_subcommand("loss", "Mean loss of a text over consecutive windows");
  add_common(*loss_command, common, "--report,--json");
  add_attention(*loss_command, common);
  auto* loss_source = loss_command->add_option_group("source")->require_option(1);
  loss_source->add_option("--text", loss.text, "Text file (models with 256 byte tokens)");
  loss_source->add_option("--ids", loss.ids, "File of token ids, separated by commas or white space");
  loss_command->add_option("--context", loss.context, "Tokens in a window")->capture_default_str();
  loss_command->add_option("--windows", loss.windows, "Windows to evaluate; 0: all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();

  generate::WriteOptions write;
  CLI::App* write_command = app.add_subcommand("write", "Continues a prompt; the text goes to stdout");
  add_common(*write_command, common, "--report,--json");
  add_attention(*write_command, common);
  auto* prompt = write_command->add_option_group("prompt")->require_option(1);
  prompt->add_option("--prompt", write.prompt, "Text to continue (models with 256 byte tokens)");
  prompt->add_option("--prompt-file", write.prompt_file, "File with the text to continue");
  prompt->add_option("--prompt-ids", write.prompt_ids, "Token ids to continue, separated by commas");
  write_command->add_option("--max-tokens", write.max_tokens, "Tokens to write at most")->capture_default_str();
  write_command->add_flag("--greedy", write.sampling.greedy, "Always take the likeliest token");
  write_command->add_option("--temperature", write.sampling.temperature, "Divides the logits")->capture_default_str();
  write_command->add_option("--top-k", write.sampling.top_k, "Keep the k likeliest tokens; 0: all")
      ->capture_default_str();
  write_command->add_option("--top-p", write.sampling.top_p, "Keep the likeliest tokens of this joint probability")
      ->capture_default_str();
  write_command->add_option("--seed", write.sampling.seed, "Seed of the random choice")->capture_default_str();

  CLI::App* demo_command = app.add_subcommand("demo", "Losses of the model's manual.txt and a continuation");
  add_common(*demo_command, common, "--out,--report,--json");

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : kUsage;
  }
  if (!common.report.empty()) generate::expect_writable(common.report);
  if (*loss_command) generate::run_loss(common, loss);
  if (*write_command) generate::run_write(common, write);
  if (*demo_command && !generate::run_demo(common)) return kFailed;
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "generate: %s\n", e.what());
    return kFailed;
  }
}
