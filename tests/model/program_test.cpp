// The generate program as its user meets it: exit status, streams and report.

#include "model/program.h"

#include <gtest/gtest.h>

#include <string>

#include "adaattn/adaattn.hpp"

namespace {

using model_test::expect_failure;
using model_test::kModel;
using model_test::Outcome;
using model_test::report_of;
using model_test::run;

TEST(GenerateProgram, UsageErrorsExitWith2AndSayWhy) {
  expect_failure("", 2, "subcommand");
  expect_failure("write --prompt x", 2, "--model is required");
  expect_failure(std::string("write ") + kModel, 2, "--prompt");
  expect_failure(std::string("write ") + kModel + "--prompt x --prompt-ids 1", 2, "--prompt");
  expect_failure(std::string("write ") + kModel + "--prompt x --isa sse9", 2, "sse9'; accepted: amx, auto, avx2");
  expect_failure(std::string("write ") + kModel + "--prompt x --dtype f8", 2, "f8");
  expect_failure(std::string("write ") + kModel + "--prompt x --kv-dtype e5m2", 2, "e5m2");
  expect_failure(std::string("write ") + kModel + "--prompt x --device tpu", 2,
                 "--device: is 'tpu'; accepted: cpu, cuda");
  expect_failure(std::string("write ") + kModel + "--prompt x --policy fast", 2, "accepted: balanced, exact");
  expect_failure(std::string("write ") + kModel + "--prompt x --tolerance 0.1", 2, "--tolerance requires --policy");
  expect_failure(std::string("demo ") + kModel + "--policy speed", 2, "--policy");  // it compares them all
  expect_failure(std::string("loss ") + kModel + "--text x --threads -1", 2, "--threads");
}

TEST(GenerateProgram, FailuresExitWith1AndSayWhy) {
  expect_failure("write --model /nonexistent --prompt x", 1, "/nonexistent/config.json: cannot be read");
  expect_failure(std::string("loss ") + kModel + "--text /nonexistent", 1, "/nonexistent: cannot be read");
  expect_failure(std::string("loss ") + kModel + "--text " MODEL_FOLDER "/config.json", 1, "too few");
  expect_failure(std::string("loss ") + kModel + "--context 0 --text " MODEL_FOLDER "/manual.txt", 1, "context is 0");
  expect_failure(std::string("write ") + kModel + "--prompt ''", 1, "prompt is empty");
  expect_failure(std::string("write ") + kModel + "--prompt x --max-tokens 16384", 1, "max_position_embeddings");
  expect_failure(std::string("write ") + kModel + "--prompt x --temperature 0", 1, "temperature is 0");
  expect_failure(std::string("write ") + kModel + "--prompt-ids 256", 1, "'256' is not a token id");
  expect_failure(std::string("write ") + kModel + "--prompt x --kv-dtype e4m3 --policy speed", 1, "E4M3");
  const Outcome unwritable =
      run(std::string("write ") + kModel + "--prompt x --max-tokens 1 --json /nonexistent/a", "&1");
  EXPECT_EQ(unwritable.status, 1);
  EXPECT_EQ(unwritable.output, "generate: /nonexistent/a: cannot be written\n") << "before it writes, not behind it";
}

TEST(GenerateProgram, AnInstructionSetOfAnotherArchitectureIsRefused) {
#if defined(__x86_64__)
  expect_failure(std::string("write ") + kModel + "--prompt x --isa neon", 1, "neon");
#else
  expect_failure(std::string("write ") + kModel + "--prompt x --isa avx2", 1, "avx2");
#endif
}

TEST(GenerateProgram, AGpuTakesNoInstructionSet) {
  expect_failure(std::string("write ") + kModel + "--prompt x --device cuda --isa baseline", 1, "isa");
}

TEST(GenerateProgram, WithoutAGpuCudaIsRefusedWithTheReason) {
  if (adaattn::device_count(ADAATTN_DEVICE_CUDA).value() > 0) GTEST_SKIP() << "there is a GPU";
  expect_failure(std::string("write ") + kModel + "--prompt x --device cuda", 1, "CUDA");
}

TEST(GenerateProgram, HelpExitsWith0) {
  const Outcome outcome = run("loss --help");
  EXPECT_EQ(outcome.status, 0);
  EXPECT_NE(outcome.output.find("--context"), std::string::npos);
}

TEST(GenerateProgram, WritesOnlyTheTextToStdoutAndTheSameForTheSameIds) {
  const Outcome text = run(std::string("write ") + kModel + "--prompt 'The ' --max-tokens 12 --greedy", "/dev/null");
  const Outcome ids =
      run(std::string("write ") + kModel + "--prompt-ids 84,104,101,32 --max-tokens 12 --greedy", "/dev/null");
  EXPECT_EQ(text.status, 0);
  EXPECT_EQ(text.output.size(), 13u);  // twelve bytes and a line end
  EXPECT_EQ(text.output, ids.output);
}

TEST(GenerateProgram, LossReportHasTheFigures) {
  const auto report = report_of(std::string("loss ") + kModel +
                                "--text " MODEL_FOLDER "/manual.txt --context 256 --windows 2 --threads 1");
  EXPECT_EQ(report.at("windows"), 2);
  EXPECT_EQ(report.at("tokens"), 512);
  EXPECT_EQ(report.at("threads"), 1);
  EXPECT_EQ(report.at("dtype"), "f32");
  EXPECT_GT(report.at("bits_per_byte").get<double>(), 1.0);
  EXPECT_LT(report.at("bits_per_byte").get<double>(), 8.0);
  EXPECT_FALSE(report.at("kernel").get<std::string>().empty());
  EXPECT_FALSE(report.at("isa").get<std::string>().empty());
}

TEST(GenerateProgram, LossReportHasTheHeadsAndTilesOfAPolicy) {
  const auto report =
      report_of(std::string("loss ") + kModel +
                "--text " MODEL_FOLDER "/manual.txt --context 1024 --windows 2 --policy speed --tolerance 0.3");
  EXPECT_EQ(report.at("policy"), "speed");
  EXPECT_EQ(report.at("tolerance"), 0.3);
  const auto& heads = report.at("heads");
  ASSERT_EQ(heads.size(), 6u * 2 * 6);  // layers, windows, heads
  for (size_t i = 0; i < heads.size(); ++i) {
    const auto& head = heads[i];
    EXPECT_EQ(head.at("layer"), i / 12);
    EXPECT_EQ(head.at("batch"), i / 6 % 2);
    EXPECT_EQ(head.at("head"), i % 6);
    ASSERT_EQ(head.contains("tiles"), i / 6 % 2 == 1) << "of the newest window only";
    if (!head.contains("tiles")) continue;
    ASSERT_EQ(head.at("tiles").size(), 8u);
    int visible = 0, kept = 0;
    for (size_t q = 0; q < 8; ++q) {
      const auto row = head.at("tiles")[q].get<std::string>();
      ASSERT_EQ(row.size(), 8u);
      EXPECT_EQ(row.find('0'), q == 7 ? std::string::npos : q + 1) << "a causal row sees its own tile and those before";
      for (const char state : row) {
        visible += state != '0';
        kept += state == '2';
      }
    }
    EXPECT_EQ(visible, 36);
    EXPECT_DOUBLE_EQ(head.at("kept_tiles").get<double>(), kept / 36.0);
  }
}

}  // namespace
