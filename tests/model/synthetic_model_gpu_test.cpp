// Small random checkpoints on a GPU, against the float64 model.

#include <gtest/gtest.h>

#include <span>

#include "model/gpu.h"
#include "model/synthetic_model.h"

namespace {

using generate::DType;
using generate::KvCache;
using generate::Model;
using model_test::expect_close;
using model_test::largest_of;
using model_test::on_cuda;
using model_test::reference_logits;
using model_test::separate_head;
using model_test::Shape;
using model_test::Synthetic;

// Those of the CPU, and a head_dim that the kernels take without padding.
std::vector<Shape> gpu_shapes() {
  std::vector<Shape> shapes = model_test::shapes();
  shapes.push_back({"HeadDim64", model_test::with(separate_head(), {{"head_dim", 64}}), "BF16", 1});
  return shapes;
}

constexpr struct {
  DType dtype;
  double tolerance;
} kTypes[] = {{DType::kF32, 2e-5}, {DType::kF16, 8e-3}, {DType::kBf16, 6e-2}};

class SyntheticModelOnTheGpu : public model_test::OnTheGpu, public testing::WithParamInterface<Shape> {};

TEST_P(SyntheticModelOnTheGpu, MatchesTheFloat64ModelInOneStepAndInMany) {
  Synthetic synthetic(GetParam().config, GetParam().dtype, GetParam().shards);
  const std::vector<int32_t> tokens = synthetic.tokens(61);
  const std::vector<double> expected = reference_logits(synthetic.config(), synthetic.weights(), tokens);
  const double largest = largest_of(expected);
  const auto vocab = static_cast<size_t>(synthetic.config().vocab_size);
  for (const auto& type : kTypes) {
    SCOPED_TRACE(dtype_name(type.dtype));
    Model model(synthetic.folder().path(), on_cuda(type.dtype));
    const auto check = [&](size_t first, size_t count) {
      for (size_t row = 0; row < count; ++row)
        expect_close(model.logits(static_cast<int64_t>(row)), expected.data() + (first + row) * vocab, largest,
                     type.tolerance, first + row);
    };
    KvCache once = model.make_cache(1, 61, KvCache::Use::kOneStep);
    model.forward(tokens, once);
    check(0, tokens.size());

    KvCache cache = model.make_cache(1, 80, KvCache::Use::kManySteps);
    size_t done = 0;
    for (const size_t step : {5, 40, 1, 1, 1, 9, 4}) {
      model.forward(std::span(tokens).subspan(done, step), cache);
      check(done, step);
      done += step;
    }
    EXPECT_EQ(done, tokens.size());
  }
}

INSTANTIATE_TEST_SUITE_P(Engine, SyntheticModelOnTheGpu, testing::ValuesIn(gpu_shapes()),
                         [](const testing::TestParamInfo<Shape>& info) { return info.param.name; });

using SyntheticBatchOnTheGpu = model_test::OnTheGpu;

TEST_F(SyntheticBatchOnTheGpu, SequencesDoNotSeeEachOther) {
  Synthetic synthetic(separate_head(), "F32", 1);
  const std::vector<int32_t> tokens = synthetic.tokens(3 * 20);
  Model model(synthetic.folder().path(), on_cuda(DType::kF32));
  KvCache cache = model.make_cache(3, 24, KvCache::Use::kOneStep);
  model.forward(tokens, cache);
  for (int64_t sequence = 0; sequence < 3; ++sequence) {
    const std::vector<int32_t> alone(tokens.begin() + sequence * 20, tokens.begin() + sequence * 20 + 20);
    const std::vector<double> expected = reference_logits(synthetic.config(), synthetic.weights(), alone);
    expect_close(model.logits(sequence * 20 + 19), expected.data() + 19 * 37, largest_of(expected), 2e-5, 19);
  }
}

}  // namespace
