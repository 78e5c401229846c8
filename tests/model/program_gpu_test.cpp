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

}  // namespace
