// Every kind of wrong argument of merge and the tools: the status, the text naming the field, outputs untouched, and a
// context that works afterwards.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "capi/call.h"

namespace adaattn::test {
namespace {

constexpr adaattn_status_t kArgument = ADAATTN_ERROR_INVALID_ARGUMENT, kNull = ADAATTN_ERROR_NULL_POINTER,
                           kShape = ADAATTN_ERROR_INVALID_SHAPE, kDtype = ADAATTN_ERROR_INVALID_DTYPE,
                           kStride = ADAATTN_ERROR_INVALID_STRIDE, kOverlap = ADAATTN_ERROR_OVERLAP,
                           kStructSize = ADAATTN_ERROR_STRUCT_SIZE, kDevice = ADAATTN_ERROR_WRONG_DEVICE,
                           kOverflow = ADAATTN_ERROR_SIZE_OVERFLOW;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr auto kF32 = ADAATTN_DTYPE_F32;

// Memory that a test may poison and look at: inputs hold small numbers, outputs a pattern.
struct Buffer {
  explicit Buffer(size_t count) : values(count) {
    for (size_t i = 0; i < count; ++i) values[i] = 0.1f * static_cast<float>((i * 7) % 11) - 0.3f;
  }
  float* data() { return values.data(); }
  void poison() { std::memset(values.data(), 0xfb, values.size() * sizeof(float)); }
  bool untouched() const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    return std::all_of(bytes, bytes + values.size() * sizeof(float), [](unsigned char b) { return b == 0xfb; });
  }
  std::vector<float> values;
};

// What the tests need of each tool: a valid call, outputs, and a way to make it.
struct MergeCall {
  Buffer oa{2 * 3 * 4 * 8}, ob{oa.values.size()}, la{2 * 4 * 3}, lb{la.values.size()}, out{oa.values.size()},
      lse_out{la.values.size()};
  adaattn_tensor_t o_a = tensor(oa.data(), kF32, {2, 3, 4, 8}), o_b = tensor(ob.data(), kF32, {2, 3, 4, 8}),
                   o = tensor(out.data(), kF32, {2, 3, 4, 8}), lse_a = tensor(la.data(), kF32, {2, 4, 3}),
                   lse_b = tensor(lb.data(), kF32, {2, 4, 3}), lse = tensor(lse_out.data(), kF32, {2, 4, 3});
  const adaattn_tensor_t* arguments[6] = {&o_a, &lse_a, &o_b, &lse_b, &o, &lse};
  adaattn_stream_t stream = nullptr;
  std::vector<Buffer*> outputs = {&out, &lse_out};
  adaattn_status_t run(adaattn_context_t* context) {
    return adaattn_merge(context, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5],
                         stream);
  }
};

struct EntropyCall {
  Call call;
  Buffer rows{2 * 4 * 3}, heads{2 * 4};
  adaattn_tensor_t head_entropy = tensor(heads.data(), kF32, {2, 4});
  const adaattn_tensor_t* head_argument = &head_entropy;
  adaattn_entropy_desc_t desc;
  const adaattn_entropy_desc_t* desc_pointer = &desc;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  std::vector<Buffer*> outputs = {&rows, &heads};
  EntropyCall() {
    adaattn_entropy_desc_init(&desc, sizeof desc);
    call.desc.outputs = 0;
    call.io.v = call.io.o = call.io.lse = {};
    call.io.entropy = tensor(rows.data(), kF32, {2, 4, 3});
  }
  void sample() {
    desc.mode = ADAATTN_ENTROPY_SAMPLED;
    call.io.entropy = {};
  }
  adaattn_status_t run(adaattn_context_t* context) {
    return adaattn_entropy(context, call.desc_pointer, desc_pointer, call.io_pointer, head_argument, workspace,
                           workspace_bytes, call.stream);
  }
};

struct LowRankCall {
  Buffer in{2 * 6 * 5}, u_out{2 * 6 * 3}, s_out{2 * 3}, v_out{2 * 5 * 3};
  adaattn_tensor_t a = tensor(in.data(), kF32, {2, 6, 5}), u = tensor(u_out.data(), kF32, {2, 6, 3}),
                   s = tensor(s_out.data(), kF32, {2, 3}), v = tensor(v_out.data(), kF32, {2, 5, 3});
  const adaattn_tensor_t* arguments[4] = {&a, &u, &s, &v};
  adaattn_low_rank_desc_t desc;
  const adaattn_low_rank_desc_t* desc_pointer = &desc;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  std::vector<Buffer*> outputs = {&u_out, &s_out, &v_out};
  LowRankCall() {
    adaattn_low_rank_desc_init(&desc, sizeof desc);
    desc.batch = 2;
    desc.rows = 6;
    desc.cols = 5;
    desc.rank = 3;
  }
  adaattn_status_t run(adaattn_context_t* context) {
    return adaattn_low_rank(context, desc_pointer, arguments[0], arguments[1], arguments[2], arguments[3], workspace,
                            workspace_bytes, nullptr);
  }
};

struct ProjectCall {
  Buffer in{2 * 6 * 5}, axes{2 * 5 * 3}, center{2 * 5}, y_out{2 * 6 * 3}, rows_out{2 * 6}, all_out{2};
  adaattn_tensor_t a = tensor(in.data(), kF32, {2, 6, 5}), basis = tensor(axes.data(), kF32, {2, 5, 3}),
                   mean = tensor(center.data(), kF32, {2, 5}), y = tensor(y_out.data(), kF32, {2, 6, 3}),
                   row_residual = tensor(rows_out.data(), kF32, {2, 6}), residual = tensor(all_out.data(), kF32, {2});
  const adaattn_tensor_t* arguments[6] = {&a, &basis, &mean, &y, &row_residual, &residual};
  std::vector<Buffer*> outputs = {&y_out, &rows_out, &all_out};
  adaattn_status_t run(adaattn_context_t* context) {
    return adaattn_low_rank_project(context, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4],
                                    arguments[5], nullptr);
  }
};

struct EffectiveRankCall {
  Buffer in{2 * 6 * 5}, ranks_out{2}, values_out{2 * 5};
  adaattn_tensor_t a = tensor(in.data(), kF32, {2, 6, 5}), ranks = tensor(ranks_out.data(), ADAATTN_DTYPE_I32, {2}),
                   values = tensor(values_out.data(), kF32, {2, 5});
  const adaattn_tensor_t* arguments[3] = {&a, &ranks, &values};
  double threshold = 0.9;
  std::vector<Buffer*> outputs = {&ranks_out, &values_out};
  adaattn_status_t run(adaattn_context_t* context) {
    return adaattn_effective_rank(context, arguments[0], threshold, arguments[1], arguments[2], nullptr, 0, nullptr);
  }
};

struct SpectralNormCall {
  Buffer in{2 * 6 * 5}, norms_out{2};
  adaattn_tensor_t a = tensor(in.data(), kF32, {2, 6, 5}), norms = tensor(norms_out.data(), kF32, {2});
  const adaattn_tensor_t* arguments[2] = {&a, &norms};
  double tolerance = 0;
  int64_t iterations = 0;
  std::vector<Buffer*> outputs = {&norms_out};
  adaattn_status_t run(adaattn_context_t* context) {
    return adaattn_spectral_norm(context, arguments[0], tolerance, iterations, 1, arguments[1], nullptr, 0, nullptr);
  }
};

template <typename ToolCall>
struct Bad {
  const char* name;
  void (*spoil)(ToolCall&);
  adaattn_status_t status;
  const char* text;
};

template <typename ToolCall, size_t N>
void expect_refusals(const Bad<ToolCall> (&rows)[N]) {
  const std::unique_ptr<adaattn_context_t, decltype(&adaattn_destroy)> context(make_context(), adaattn_destroy);
  for (const Bad<ToolCall>& bad : rows) {
    SCOPED_TRACE(bad.name);
    ToolCall call;
    for (Buffer* output : call.outputs) output->poison();
    bad.spoil(call);
    EXPECT_EQ(call.run(context.get()), bad.status) << last_error();
    EXPECT_NE(last_error().find(bad.text), std::string::npos) << last_error();
    EXPECT_NE(last_error().find("; accepted"), std::string::npos) << last_error();
    for (const Buffer* output : call.outputs) EXPECT_TRUE(output->untouched());
    ToolCall good;
    ASSERT_EQ(good.run(context.get()), ADAATTN_SUCCESS) << last_error();
  }
  ToolCall call;
  EXPECT_EQ(call.run(nullptr), kNull);
  EXPECT_EQ(last_error(), "context is NULL; accepted: a valid pointer");
}

TEST(BadTools, Merge) {
  expect_refusals<MergeCall>({
      {"null o_a", [](auto& c) { c.arguments[0] = nullptr; }, kNull, "o_a is NULL"},
      {"null lse_a", [](auto& c) { c.arguments[1] = nullptr; }, kNull, "lse_a is NULL"},
      {"null o_b", [](auto& c) { c.arguments[2] = nullptr; }, kNull, "o_b is NULL"},
      {"null lse_b", [](auto& c) { c.arguments[3] = nullptr; }, kNull, "lse_b is NULL"},
      {"null o", [](auto& c) { c.arguments[4] = nullptr; }, kNull, "o is NULL"},
      {"absent o_a", [](auto& c) { c.o_a = {}; }, kNull, "o_a is absent"},
      {"absent o", [](auto& c) { c.o = {}; }, kNull, "o is absent"},
      {"dims", [](auto& c) { c.o_a.ndim = 2; }, kShape, "o_a.ndim is 2; accepted: 3 to 4"},
      {"dims of o_b", [](auto& c) { c.o_b.ndim = 3; }, kShape, "o_b.ndim is 3; accepted: 4"},
      {"dtype", [](auto& c) { c.o_a.dtype = ADAATTN_DTYPE_I32; }, kDtype, "o_a.dtype is 4"},
      {"dtype of o_b", [](auto& c) { c.o_b.dtype = ADAATTN_DTYPE_F16; }, kDtype, "o_b.dtype is 2 (F16); accepted: F32"},
      {"dtype of lse", [](auto& c) { c.lse_b.dtype = ADAATTN_DTYPE_F16; }, kDtype, "lse_b.dtype is 2"},
      {"wider o", [](auto& c) { c.o_a.dtype = c.o_b.dtype = ADAATTN_DTYPE_BF16; }, kDtype, "o.dtype is 1 (F32)"},
      {"shape of o_b", [](auto& c) { c.o_b.shape[1] = 2; }, kShape, "o_b.shape[1] is 2; accepted: 3"},
      {"shape of o", [](auto& c) { c.o.shape[3] = 7; }, kShape, "o.shape[3] is 7; accepted: 8"},
      {"heads of lse_a", [](auto& c) { c.lse_a.shape[1] = 3; }, kShape, "lse_a.shape[1] is 3; accepted: 4"},
      {"tokens of lse", [](auto& c) { c.lse.shape[2] = 4; }, kShape, "lse.shape[2] is 4; accepted: 3"},
      {"stride of o", [](auto& c) { c.o.stride[3] = 2; }, kStride, "o.stride[3] is 2"},
      {"negative stride", [](auto& c) { c.lse_a.stride[0] = -12; }, kStride, "lse_a.stride[0] is -12"},
      {"device", [](auto& c) { c.o_b.device = ADAATTN_DEVICE_CUDA; }, kDevice, "o_b.device is 2"},
      {"o over o_b", [](auto& c) { c.o.data = c.o_b.data; }, kOverlap, "o overlaps o_b"},
      {"shifted o over o_a", [](auto& c) { c.o.data = c.oa.data() + 8; }, kOverlap, "o overlaps o_a"},
      {"permuted o over o_a", [](auto& c) { c.o.data = c.o_a.data, c.o.stride[0] = 32, c.o.stride[1] = 64; }, kOverlap,
       "o overlaps o_a"},
      {"lse over lse_b", [](auto& c) { c.lse.data = c.lse_b.data; }, kOverlap, "lse overlaps lse_b"},
      {"lse over o", [](auto& c) { c.lse.data = c.o.data; }, kOverlap, "lse overlaps o"},
      {"stream", [](auto& c) { c.stream = reinterpret_cast<adaattn_stream_t>(&c); }, kArgument, "stream"},
  });
}

TEST(GoodTools, MergeInPlaceAndWithoutLse) {
  const std::unique_ptr<adaattn_context_t, decltype(&adaattn_destroy)> context(make_context(), adaattn_destroy);
  MergeCall call;
  call.o = call.o_a;
  call.lse = call.lse_a;
  EXPECT_EQ(call.run(context.get()), ADAATTN_SUCCESS) << last_error();
  call.arguments[5] = nullptr;
  EXPECT_EQ(call.run(context.get()), ADAATTN_SUCCESS) << last_error();
  call.lse = {};
  call.arguments[5] = &call.lse;
  EXPECT_EQ(call.run(context.get()), ADAATTN_SUCCESS) << last_error();
}

TEST(BadTools, Entropy) {
  expect_refusals<EntropyCall>({
      {"null attn", [](auto& c) { c.call.desc_pointer = nullptr; }, kNull, "attn is NULL"},
      {"null desc", [](auto& c) { c.desc_pointer = nullptr; }, kNull, "desc is NULL"},
      {"null io", [](auto& c) { c.call.io_pointer = nullptr; }, kNull, "io is NULL"},
      {"attn size", [](auto& c) { c.call.desc.struct_size = 1; }, kStructSize, "attn.struct_size is 1"},
      {"desc size", [](auto& c) { c.desc.struct_size = 1; }, kStructSize, "desc.struct_size is 1"},
      {"attn field", [](auto& c) { c.call.desc.heads_kv = 3; }, kArgument, "attn.heads_q is 4"},
      {"lse asked for", [](auto& c) { c.call.desc.outputs = ADAATTN_OUTPUT_LSE; }, kArgument, "attn.outputs is 0x1"},
      {"mode", [](auto& c) { c.desc.mode = 2; }, kArgument, "desc.mode is 2"},
      {"normalized", [](auto& c) { c.desc.normalized = 2; }, kArgument, "desc.normalized is 2"},
      {"rows", [](auto& c) { c.sample(), c.desc.sample_rows = 0; }, kArgument, "desc.sample_rows is 0"},
      {"sampled rows wanted", [](auto& c) { c.desc.mode = ADAATTN_ENTROPY_SAMPLED; }, kArgument,
       "io.entropy is present"},
      {"no output", [](auto& c) { c.call.io.entropy = {}, c.head_argument = nullptr; }, kNull,
       "io.entropy and head_entropy are both absent"},
      {"v", [](auto& c) { c.call.io.v = c.call.io.k; }, kArgument, "io.v is present"},
      {"o", [](auto& c) { c.call.io.o = c.call.io.q; }, kArgument, "io.o is present"},
      {"k", [](auto& c) { c.call.io.k.shape[3] = 7; }, kShape, "io.k.shape[3] is 7"},
      {"rows' shape", [](auto& c) { c.call.io.entropy.shape[1] = 3; }, kShape, "io.entropy.shape[1] is 3"},
      {"heads' dims", [](auto& c) { c.head_entropy.ndim = 1; }, kShape, "head_entropy.ndim is 1"},
      {"heads' shape", [](auto& c) { c.head_entropy.shape[1] = 2; }, kShape, "head_entropy.shape[1] is 2; accepted: 4"},
      {"heads' dtype", [](auto& c) { c.head_entropy.dtype = ADAATTN_DTYPE_F16; }, kDtype, "head_entropy.dtype is 2"},
      {"overlap", [](auto& c) { c.head_entropy.data = c.rows.data(); }, kOverlap, "head_entropy overlaps io.entropy"},
      {"workspace over k", [](auto& c) { c.workspace = c.call.k.data(), c.workspace_bytes = 64; }, kOverlap,
       "workspace overlaps io.k"},
      {"bytes without workspace", [](auto& c) { c.workspace_bytes = 64; }, kNull, "workspace is NULL"},
  });
}

TEST(BadTools, LowRank) {
  expect_refusals<LowRankCall>({
      {"null desc", [](auto& c) { c.desc_pointer = nullptr; }, kNull, "desc is NULL"},
      {"null a", [](auto& c) { c.arguments[0] = nullptr; }, kNull, "a is NULL"},
      {"null s", [](auto& c) { c.arguments[2] = nullptr; }, kNull, "s is NULL"},
      {"absent a", [](auto& c) { c.a = {}; }, kNull, "a is absent"},
      {"absent s", [](auto& c) { c.s = {}; }, kNull, "s is absent"},
      {"size", [](auto& c) { c.desc.struct_size = 16; }, kStructSize, "desc.struct_size is 16"},
      {"batch", [](auto& c) { c.desc.batch = 0; }, kArgument, "desc.batch is 0"},
      {"rows", [](auto& c) { c.desc.rows = 0; }, kArgument, "desc.rows is 0"},
      {"cols", [](auto& c) { c.desc.cols = -5; }, kArgument, "desc.cols is -5"},
      {"rank 0", [](auto& c) { c.desc.rank = 0; }, kArgument, "desc.rank is 0; accepted: 1 to 5"},
      {"rank 6", [](auto& c) { c.desc.rank = 6; }, kArgument, "desc.rank is 6; accepted: 1 to 5"},
      {"oversampling", [](auto& c) { c.desc.oversampling = -1; }, kArgument, "desc.oversampling is -1"},
      {"power", [](auto& c) { c.desc.power_iterations = 1001; }, kArgument, "desc.power_iterations is 1001"},
      {"overflow", [](auto& c) { c.desc.batch = c.desc.rows = c.desc.cols = INT32_MAX; }, kOverflow, "desc.batch is"},
      {"a's batch", [](auto& c) { c.a.shape[0] = 1; }, kShape, "a holds 1 matrices; accepted: 2"},
      {"a's rows", [](auto& c) { c.a.shape[1] = 5; }, kShape, "a.shape[1] is 5; accepted: 6"},
      {"a's cols", [](auto& c) { c.a.shape[2] = 4; }, kShape, "a.shape[2] is 4; accepted: 5"},
      {"a's dims", [](auto& c) { c.a.ndim = 1; }, kShape, "a.ndim is 1; accepted: 2 to 4"},
      {"a's dtype", [](auto& c) { c.a.dtype = ADAATTN_DTYPE_BF16; }, kDtype, "a.dtype is 3"},
      {"a's stride", [](auto& c) { c.a.stride[1] = -5; }, kStride, "a.stride[1] is -5"},
      {"u's cols", [](auto& c) { c.u.shape[2] = 4; }, kShape, "u.shape[2] is 4; accepted: 3 (desc.rank)"},
      {"u's dims", [](auto& c) { c.u.ndim = 2; }, kShape, "u.ndim is 2; accepted: 3"},
      {"s's extent", [](auto& c) { c.s.shape[1] = 2; }, kShape, "s.shape[1] is 2; accepted: 3"},
      {"v's rows", [](auto& c) { c.v.shape[1] = 6; }, kShape, "v.shape[1] is 6; accepted: 5"},
      {"v's batch", [](auto& c) { c.v.shape[0] = 1; }, kShape, "v.shape[0] is 1; accepted: 2 (that of a)"},
      {"u over a", [](auto& c) { c.u.data = c.a.data; }, kOverlap, "u overlaps a"},
      {"s over v", [](auto& c) { c.s.data = c.v.data; }, kOverlap, "v overlaps s"},
      {"u over itself", [](auto& c) { c.u.stride[1] = 2; }, kOverlap, "u.stride"},
      {"workspace over u", [](auto& c) { c.workspace = c.u_out.data(), c.workspace_bytes = 16; }, kOverlap,
       "workspace overlaps u"},
  });
}

TEST(GoodTools, LowRankWithoutVectors) {
  const std::unique_ptr<adaattn_context_t, decltype(&adaattn_destroy)> context(make_context(), adaattn_destroy);
  LowRankCall call;
  call.arguments[1] = nullptr;
  call.v = {};
  EXPECT_EQ(call.run(context.get()), ADAATTN_SUCCESS) << last_error();
}

TEST(BadTools, Project) {
  expect_refusals<ProjectCall>({
      {"null a", [](auto& c) { c.arguments[0] = nullptr; }, kNull, "a is NULL"},
      {"null basis", [](auto& c) { c.arguments[1] = nullptr; }, kNull, "basis is NULL"},
      {"absent basis", [](auto& c) { c.basis = {}; }, kNull, "basis is absent"},
      {"no output", [](auto& c) { c.arguments[3] = c.arguments[4] = c.arguments[5] = nullptr; }, kNull,
       "y, row_residual and residual are all absent"},
      {"basis rows", [](auto& c) { c.basis.shape[1] = 4; }, kShape, "basis.shape[1] is 4; accepted: 5"},
      {"basis cols", [](auto& c) { c.basis.shape[2] = 6, c.basis.stride[1] = 0; }, kShape, "basis.shape[2] is 6"},
      {"mean", [](auto& c) { c.mean.shape[1] = 6; }, kShape, "mean.shape[1] is 6; accepted: 5"},
      {"y", [](auto& c) { c.y.shape[2] = 2; }, kShape, "y.shape[2] is 2; accepted: 3 (the columns of basis)"},
      {"row_residual", [](auto& c) { c.row_residual.shape[1] = 5; }, kShape, "row_residual.shape[1] is 5"},
      {"residual", [](auto& c) { c.residual.shape[0] = 1; }, kShape, "residual.shape[0] is 1; accepted: 2"},
      {"residual dtype", [](auto& c) { c.residual.dtype = ADAATTN_DTYPE_I32; }, kDtype, "residual.dtype is 4"},
      {"empty", [](auto& c) { c.a.shape[1] = 0; }, kShape, "a.shape[1] is 0; accepted: 1 or more"},
      {"y over a", [](auto& c) { c.y.data = c.a.data; }, kOverlap, "y overlaps a"},
  });
}

TEST(BadTools, EffectiveRank) {
  expect_refusals<EffectiveRankCall>({
      {"null a", [](auto& c) { c.arguments[0] = nullptr; }, kNull, "a is NULL"},
      {"null ranks", [](auto& c) { c.arguments[1] = nullptr; }, kNull, "ranks is NULL"},
      {"threshold 0", [](auto& c) { c.threshold = 0; }, kArgument, "threshold is 0"},
      {"threshold 2", [](auto& c) { c.threshold = 2; }, kArgument, "threshold is 2"},
      {"threshold nan", [](auto& c) { c.threshold = kNan; }, kArgument, "threshold is nan"},
      {"too large",
       [](auto& c) {
         c.a = tensor(c.in.data(), kF32, {2, 1025, 1025}, {0, 0, 0});
       },
       kShape, "a is 1025 x 1025"},
      {"ranks dtype", [](auto& c) { c.ranks.dtype = kF32; }, kDtype, "ranks.dtype is 1 (F32); accepted: I32"},
      {"ranks shape", [](auto& c) { c.ranks.shape[0] = 1; }, kShape, "ranks.shape[0] is 1; accepted: 2"},
      {"values", [](auto& c) { c.values.shape[1] = 6; }, kShape, "singular_values.shape[1] is 6; accepted: 5"},
      {"ranks over a", [](auto& c) { c.ranks.data = c.a.data; }, kOverlap, "ranks overlaps a"},
  });
}

TEST(BadTools, SpectralNorm) {
  expect_refusals<SpectralNormCall>({
      {"null a", [](auto& c) { c.arguments[0] = nullptr; }, kNull, "a is NULL"},
      {"null norms", [](auto& c) { c.arguments[1] = nullptr; }, kNull, "norms is NULL"},
      {"tolerance", [](auto& c) { c.tolerance = -1; }, kArgument, "tolerance is -1"},
      {"tolerance nan", [](auto& c) { c.tolerance = kNan; }, kArgument, "tolerance is nan"},
      {"iterations", [](auto& c) { c.iterations = -1; }, kArgument, "max_iterations is -1"},
      {"norms", [](auto& c) { c.norms.shape[0] = 3; }, kShape, "norms.shape[0] is 3; accepted: 2"},
      {"norms over a", [](auto& c) { c.norms.data = c.a.data; }, kOverlap, "norms overlaps a"},
      {"null data", [](auto& c) { c.a.data = nullptr; }, kNull, "a.data is NULL"},
  });
}

TEST(BadTools, WorkspaceQueriesReadShapesOnlyAndCheckThem) {
  const std::unique_ptr<adaattn_context_t, decltype(&adaattn_destroy)> owner(make_context(), adaattn_destroy);
  adaattn_context_t* context = owner.get();
  LowRankCall low_rank;
  EntropyCall entropy;
  EffectiveRankCall rank;
  rank.a.data = nullptr;
  size_t bytes = 1;
  EXPECT_EQ(adaattn_low_rank_workspace_size(context, &low_rank.desc, &bytes), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(adaattn_entropy_workspace_size(context, &entropy.call.desc, &entropy.desc, &bytes), ADAATTN_SUCCESS)
      << last_error();
  EXPECT_EQ(adaattn_effective_rank_workspace_size(context, &rank.a, &bytes), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(adaattn_spectral_norm_workspace_size(context, &rank.a, &bytes), ADAATTN_SUCCESS) << last_error();

  bytes = 77;
  rank.a.ndim = 1;
  low_rank.desc.rank = 9;
  entropy.desc.mode = 9;
  EXPECT_EQ(adaattn_low_rank_workspace_size(context, &low_rank.desc, &bytes), kArgument);
  EXPECT_EQ(adaattn_entropy_workspace_size(context, &entropy.call.desc, &entropy.desc, &bytes), kArgument);
  EXPECT_EQ(adaattn_effective_rank_workspace_size(context, &rank.a, &bytes), kShape);
  EXPECT_EQ(adaattn_spectral_norm_workspace_size(context, &rank.a, &bytes), kShape);
  EXPECT_EQ(adaattn_low_rank_workspace_size(context, &low_rank.desc, nullptr), kNull);
  EXPECT_EQ(adaattn_entropy_workspace_size(context, &entropy.call.desc, &entropy.desc, nullptr), kNull);
  EXPECT_EQ(adaattn_effective_rank_workspace_size(context, nullptr, &bytes), kNull);
  EXPECT_EQ(adaattn_spectral_norm_workspace_size(nullptr, &rank.a, &bytes), kNull);
  EXPECT_EQ(bytes, 77u);
}

}  // namespace
}  // namespace adaattn::test
