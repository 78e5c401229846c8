// What valid descriptors and tensors become; what is refused is tested through the C API (tests/capi).
#include "core/validate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "capi/call.h"

namespace adaattn {
namespace {

using test::Call;
using test::Form;

TEST(ProblemFrom, FillsInTheDefaults) {
  Call call;
  call.desc.head_dim_v = 0;
  const Problem p = problem_from(call.desc, Use::kAttention);
  EXPECT_EQ(p.d_v, Call::kDimQk);
  EXPECT_EQ(p.dtype_kv, Dtype::kF32);
  EXPECT_EQ(p.dtype_o, Dtype::kF32);
  EXPECT_EQ(p.scale, static_cast<float>(1 / std::sqrt(8.0)));
  EXPECT_EQ(p.softcap, 0);
  EXPECT_EQ(p.max_total_q, Call::kBatch * Call::kSeqlenQ);
  EXPECT_EQ(p.window_left, -1);
  EXPECT_EQ(p.window_right, 0);  // causal
  EXPECT_FALSE(p.off_top_left);
  EXPECT_TRUE(p.alibi && p.sink && p.bias && p.want_lse && p.want_entropy);
}

TEST(ProblemFrom, WindowsThatHideNothingBecomeOpen) {
  Call call;
  call.desc.mask = ADAATTN_MASK_NONE;
  call.desc.window_left = Call::kSeqlenK;
  call.desc.window_right = INT64_MAX;
  Problem p = problem_from(call.desc, Use::kAttention);
  EXPECT_EQ(p.window_left, -1);
  EXPECT_EQ(p.window_right, -1);
  call.desc.window_left = Call::kSeqlenK - 1;
  call.desc.window_right = 2;
  p = problem_from(call.desc, Use::kAttention);
  EXPECT_EQ(p.window_left, Call::kSeqlenK - 1);
  EXPECT_EQ(p.window_right, 2);
  call.desc.mask = ADAATTN_MASK_CAUSAL_TOP_LEFT;
  p = problem_from(call.desc, Use::kAttention);
  EXPECT_EQ(p.window_right, 0);
  EXPECT_TRUE(p.off_top_left);
}

TEST(ProblemFrom, PackedTokensDefaultToTheProductWithinInt32) {
  Call call(Form::kPacked);
  EXPECT_EQ(problem_from(call.desc, Use::kAttention).max_total_q, 6);
  call.desc.max_batch = call.desc.max_seqlen_q = 1 << 20;
  EXPECT_EQ(problem_from(call.desc, Use::kAttention).max_total_q, INT32_MAX);
  call.desc.max_total_q = 100;
  EXPECT_EQ(problem_from(call.desc, Use::kAttention).max_total_q, 100);
}

TEST(ProblemFrom, FastMathMeansNothingForNarrowInputs) {
  Call call;
  call.desc.math = ADAATTN_MATH_FAST_F32;
  EXPECT_TRUE(problem_from(call.desc, Use::kAttention).fast_f32);
  call.desc.dtype_q = ADAATTN_DTYPE_BF16;
  EXPECT_FALSE(problem_from(call.desc, Use::kAttention).fast_f32);
}

AttnParams params_of(const Call& call) {
  return attention_from(problem_from(call.desc, Use::kAttention), call.io, {}, {});
}

TEST(AttentionFrom, FindsTheDimensionsOfEveryLayout) {
  {
    Call call(Form::kBSHD);
    const AttnParams p = params_of(call);
    EXPECT_EQ(p.batch, 2);
    EXPECT_EQ(p.seqlen_q, 3);
    EXPECT_EQ(p.seqlen_k, 8);
    EXPECT_EQ(p.total_q, 6);
    EXPECT_EQ(p.total_k, 16);
    EXPECT_EQ(p.q.stride_b, 3 * 4 * 8);
    EXPECT_EQ(p.q.stride_s, 4 * 8);
    EXPECT_EQ(p.q.stride_h, 8);
    EXPECT_EQ(p.lse.stride_b, 12);
    EXPECT_EQ(p.lse.stride_h, 3);
    EXPECT_EQ(p.lse.stride_s, 1);
    EXPECT_EQ(p.bias.stride_q, 8);
    EXPECT_EQ(p.alibi_stride_b, 0);
    EXPECT_EQ(p.alibi_stride_h, 1);
    EXPECT_EQ(p.cu_seqlens_q, nullptr);
    EXPECT_EQ(p.seqused_k, call.used_k.data());
  }
  {
    Call call(Form::kBHSD);
    const AttnParams p = params_of(call);
    EXPECT_EQ(p.k.stride_b, 2 * 8 * 8);
    EXPECT_EQ(p.k.stride_h, 8 * 8);
    EXPECT_EQ(p.k.stride_s, 8);
    EXPECT_EQ(p.v.stride_h, 8 * 6);
  }
  {
    Call call(Form::kPacked);
    const AttnParams p = params_of(call);
    EXPECT_EQ(p.batch, 2);
    EXPECT_EQ(p.total_q, 6);
    EXPECT_EQ(p.total_k, 16);
    EXPECT_EQ(p.seqlen_q, 3);
    EXPECT_EQ(p.seqlen_k, 8);
    EXPECT_EQ(p.q.stride_b, 0);
    EXPECT_EQ(p.q.stride_s, 32);
    EXPECT_EQ(p.lse.stride_h, 6);
    EXPECT_EQ(p.cu_seqlens_k, call.cu_k.data());
  }
  {
    Call call(Form::kPackedPaged);
    const AttnParams p = params_of(call);
    EXPECT_EQ(p.num_pages, 5);
    EXPECT_EQ(p.pages_per_seq, 2);
    EXPECT_EQ(p.page_size, 4);
    EXPECT_EQ(p.seqlen_k, 8);
    EXPECT_EQ(p.block_table_stride, 2);
    EXPECT_EQ(p.k.stride_b, 4 * 2 * 8);
    EXPECT_EQ(p.cu_seqlens_k, nullptr);
  }
}

TEST(AttentionFrom, KeysOfPagesEndAtTheMaximumOfTheDescriptor) {
  Call call(Form::kPaged);
  call.desc.flags &= ~ADAATTN_FLAG_BIAS;
  call.io.bias = {};
  call.desc.max_seqlen_k = 7;
  EXPECT_EQ(params_of(call).seqlen_k, 7);
  call.desc.max_seqlen_k = 100;
  EXPECT_EQ(params_of(call).seqlen_k, 8);
}

TEST(AttentionFrom, BiasBoundsTheLengthsThatLieInDeviceMemory) {
  Call call(Form::kPacked);
  call.io.bias = test::tensor(call.bias.data(), ADAATTN_DTYPE_F32, {2, 1, 2, 5});
  const AttnParams p = params_of(call);
  EXPECT_EQ(p.seqlen_q, 2);
  EXPECT_EQ(p.seqlen_k, 5);
  EXPECT_EQ(p.bias.stride_h, 0);
  call.io.bias = test::tensor(call.bias.data(), ADAATTN_DTYPE_F32, {1, 1, 1, 1});
  EXPECT_EQ(params_of(call).seqlen_q, 3);
  EXPECT_EQ(params_of(call).seqlen_k, 8);
}

TEST(AttentionFrom, StridesOfSingleElementsBecomeZero) {
  Call call;
  call.io.q.shape[0] = call.io.o.shape[0] = call.io.k.shape[0] = call.io.v.shape[0] = 1;
  call.io.lse.shape[0] = call.io.entropy.shape[0] = call.io.bias.shape[0] = call.io.seqused_k.shape[0] = 1;
  call.io.q.stride[0] = INT64_MIN;
  call.io.bias.stride[0] = INT64_MAX;
  const AttnParams p = params_of(call);
  EXPECT_EQ(p.q.stride_b, 0);
  EXPECT_EQ(p.bias.stride_b, 0);
}

TEST(AttentionFrom, SlopesPerSequence) {
  Call call;
  call.slopes.resize(8, 0.5f);
  call.io.alibi_slopes = test::tensor(call.slopes.data(), ADAATTN_DTYPE_F32, {2, 4});
  const AttnParams p = params_of(call);
  EXPECT_EQ(p.alibi_stride_b, 4);
  EXPECT_EQ(p.alibi_stride_h, 1);
}

TEST(ToolsFrom, LeadingDimensionsAreTheBatch) {
  std::vector<float> a(2 * 3 * 4 * 5), y(2 * 3 * 4 * 2), basis(2 * 3 * 5 * 2), residual(6);
  using test::tensor;
  constexpr auto kF32 = ADAATTN_DTYPE_F32;
  adaattn_tensor_t ta = tensor(a.data(), kF32, {2, 3, 4, 5}), tb = tensor(basis.data(), kF32, {2, 3, 5, 2}),
                   ty = tensor(y.data(), kF32, {2, 3, 4, 2}), tr = tensor(residual.data(), kF32, {2, 3});
  ProjectParams p = project_from(ta, tb, nullptr, &ty, nullptr, &tr, {});
  EXPECT_EQ(p.a.batch(), 6);
  EXPECT_EQ(p.a.rows, 4);
  EXPECT_EQ(p.a.cols, 5);
  EXPECT_EQ(p.a.offset(4), 4 * 20);
  EXPECT_EQ(p.basis.offset(5), 5 * 10);
  EXPECT_EQ(p.residual.offset(5), 5);
  EXPECT_EQ(p.mean.data, nullptr);
  EXPECT_EQ(p.row_residual.data, nullptr);
  tr = tensor(residual.data(), kF32, {2, 3, 1});
  EXPECT_EQ(project_from(ta, tb, nullptr, nullptr, nullptr, &tr, {}).residual.offset(5), 5);
  ta = tensor(a.data(), kF32, {5, 4}, {1, 5});
  tb = tensor(basis.data(), kF32, {4, 2});
  tr = tensor(residual.data(), kF32, {1});
  p = project_from(ta, tb, nullptr, nullptr, nullptr, &tr, {});
  EXPECT_EQ(p.a.batch(), 1);
  EXPECT_EQ(p.a.stride_row, 1);
  EXPECT_EQ(p.a.stride_col, 5);
}

TEST(ToolsFrom, MergeOfPackedTokensHasOneBatch) {
  std::vector<float> o(3 * 7 * 2 * 4), lse(3 * 7 * 2);
  using test::tensor;
  constexpr auto kF32 = ADAATTN_DTYPE_F32;
  const auto part = [&](int i) { return tensor(o.data() + i * 56, kF32, {7, 2, 4}); };
  const auto rows = [&](int i) { return tensor(lse.data() + i * 14, kF32, {2, 7}); };
  const adaattn_tensor_t lse_out = rows(2);
  const MergeParams p = merge_from(part(0), rows(0), part(1), rows(1), part(2), &lse_out, {});
  EXPECT_EQ(p.batch, 1);
  EXPECT_EQ(p.tokens, 7);
  EXPECT_EQ(p.heads, 2);
  EXPECT_EQ(p.d_v, 4);
  EXPECT_EQ(p.o.stride_b, 0);
  EXPECT_EQ(p.o.stride_s, 8);
  EXPECT_EQ(p.o.stride_h, 4);
  EXPECT_EQ(p.lse_a.stride_h, 7);
  EXPECT_EQ(p.lse_a.stride_s, 1);
}

}  // namespace
}  // namespace adaattn
