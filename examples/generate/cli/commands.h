// The program's subcommands. Each throws generate::Error with a sentence for the user.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "engine/model.h"
#include "engine/run.h"

namespace generate {

struct CommonOptions {
  std::string model;
  ModelOptions engine;
  std::string report;  // file for the figures as JSON; empty: none
};

struct LossOptions {
  std::string text;
  std::string ids;
  int64_t context = 1024;
  int64_t windows = 0;
};

struct WriteOptions {
  std::string prompt;
  std::string prompt_file;
  std::string prompt_ids;
  int64_t max_tokens = 256;
  SamplingOptions sampling;
};

void run_loss(const CommonOptions& common, const LossOptions& options);
void run_write(const CommonOptions& common, const WriteOptions& options);

// The losses of the model folder's manual.txt at two contexts, held against the folder's manual_reference.json, and
// a continuation. False if a loss is off by more than its type allows.
bool run_demo(const CommonOptions& common);

// What every report says about the machine and the library.
nlohmann::ordered_json describe_run(Model& model, const CommonOptions& common, const Step& step, int64_t capacity);

// For a line of text: the GPU of a run that describe_run() described, or how many threads of the CPU it had.
std::string describe_device(const Model& model, const nlohmann::ordered_json& run);

// What adaptive attention decided and measured, summed; with_heads: and each head of the newest step.
nlohmann::ordered_json describe_attention(const AttentionReport& report, bool with_heads);

std::string read_text(const std::string& path);
// Before a long run, not behind it.
void expect_writable(const std::string& path);
void write_json(const std::string& path, const nlohmann::ordered_json& report);

}  // namespace generate
