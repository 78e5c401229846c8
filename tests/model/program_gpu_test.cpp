// The generate program on a GPU.

#include <gtest/gtest.h>

#include <string>

#include "model/gpu.h"
#include "model/program.h"

namespace {

using model_test::expect_failure;
using model_test::kModel;
using model_test::Outcome;
using model_test::report_of;
using model_test::run;

class GenerateProgramOnTheGpu : public model_test::OnTheGpu {};

TEST_F(GenerateProgramOnTheGpu, LossReportHasTheFigures) {
  const auto report = report_of(std::string("loss ") + kModel +
                                "--text " MODEL_FOLDER "/manual.txt --context 1024 --windows 4 --device cuda");
  EXPECT_EQ(report.at("tokens"), 4096);
  EXPECT_EQ(report.at("dtype"), "bf16");
  adaattn_device_info_t device = adaattn::device_info({ADAATTN_DEVICE_CUDA, 0}).value();
  EXPECT_EQ(report.at("device"), device.name);
  EXPECT_EQ(report.at("isa").get<std::string>().substr(0, 3), "sm_");
  EXPECT_EQ(report.at("blas").get<std::string>().substr(0, 6), "cuBLAS");
  EXPECT_GT(report.at("tokens_per_second").get<double>(), 0);
  EXPECT_GT(report.at("attention_seconds").get<double>(), 0);
  EXPECT_GT(report.at("bits_per_byte").get<double>(), 1.0);
}

TEST_F(GenerateProgramOnTheGpu, WritesTheSameForASeed) {
  const std::string arguments =
      std::string("write ") + kModel + "--prompt 'The ' --max-tokens 40 --device cuda --top-k 40 --seed ";
  const Outcome first = run(arguments + "3", "/dev/null");
  EXPECT_EQ(first.status, 0);
  EXPECT_EQ(first.output.size(), 41u);
  EXPECT_EQ(run(arguments + "3", "/dev/null").output, first.output);
  EXPECT_NE(run(arguments + "4", "/dev/null").output, first.output);
}

// Whatever the library says of a policy, its user gets to read.
TEST_F(GenerateProgramOnTheGpu, PoliciesRunOrAreRefusedInTheWordsOfTheLibrary) {
  adaattn::Config config;
  config.device = ADAATTN_DEVICE_CUDA;
  const adaattn::Context context = adaattn::Context::create(config).value();
  adaattn::AttnDesc desc;
  desc.max_batch = 1;
  desc.max_seqlen_q = desc.max_seqlen_k = 1024;
  desc.heads_q = 6;
  desc.heads_kv = 2;
  desc.head_dim_qk = 128;
  desc.dtype_q = ADAATTN_DTYPE_BF16;
  desc.mask = ADAATTN_MASK_CAUSAL;
  adaattn::AdaptiveDesc allowed;
  allowed.policy = ADAATTN_POLICY_BALANCED;
  char reason[256] = {};
  const adaattn_status_t status = adaattn_check_support(context.get(), &desc, &allowed, reason, sizeof reason);
  const std::string arguments = std::string("loss ") + kModel +
                                "--text " MODEL_FOLDER
                                "/manual.txt --context 1024 --windows 1 --device cuda --policy balanced";
  if (status == ADAATTN_SUCCESS)
    EXPECT_EQ(report_of(arguments).at("policy"), "balanced");
  else
    expect_failure(arguments, 1, reason);
}

// All whole windows of the text at the model's longest context, where a policy's loss is what it promises.
TEST_F(GenerateProgramOnTheGpu, PoliciesAtTheLongestContextKeepTheirLoss) {
  const std::string arguments =
      std::string("loss ") + kModel + "--text " MODEL_FOLDER "/manual.txt --context 16384 --windows 4 --device cuda";
  const double exact = report_of(arguments).at("bits_per_byte").get<double>();
  const struct {
    const char* policy;
    double loss_percent, kept_tiles;  // at most
  } rows[] = {{"quality", 0.1, 0.4}, {"balanced", 0.4, 0.25}, {"speed", 1.0, 0.2}};
  for (const auto& row : rows) {
    SCOPED_TRACE(row.policy);
    const auto report = report_of(arguments + " --policy " + row.policy);
    EXPECT_EQ(report.at("policy"), row.policy);
    EXPECT_LE(100 * (report.at("bits_per_byte").get<double>() / exact - 1), row.loss_percent);
    EXPECT_LE(report.at("kept_tiles").get<double>(), row.kept_tiles);
    EXPECT_GT(report.at("measured_error").get<double>(), 0);
    for (const char* stage : {"analyze", "decide", "attend", "verify"})
      EXPECT_GT(report.at("stage_seconds").at(stage).get<double>(), 0) << stage;
    EXPECT_EQ(report.at("heads").size(), 6u * 6);  // layers, heads, of the newest window
  }
}

TEST_F(GenerateProgramOnTheGpu, DemoComparesThePolicies) {
  const auto report = report_of(std::string("demo ") + kModel + "--device cuda");
  EXPECT_NEAR(report.at("bpb_exact_ctx4096").get<double>(), report.at("reference_bpb_ctx4096").get<double>(), 5e-3);
  for (const char* policy : {"quality", "balanced", "speed"}) {
    SCOPED_TRACE(policy);
    const auto& row = report.at("policies").at(policy);
    EXPECT_LT(row.at("loss_change_percent").get<double>(), 1.5);
    EXPECT_LT(row.at("kept_tiles").get<double>(), 0.6);
    EXPECT_GT(row.at("speed_up").get<double>(), 0);
  }
  EXPECT_EQ(report.at("continuation").get<std::string>().size(), 320u);
}

}  // namespace
