#include "acceptance/tools.h"

namespace adaattn::test {

Tensor to_tensor(const std::vector<Matrix>& matrices) {
  Tensor t(ADAATTN_DTYPE_F32, {static_cast<int64_t>(matrices.size()), matrices[0].rows, matrices[0].cols});
  t.for_each([&](const auto& i, int64_t) { t.set(i, matrices[i[0]](i[1], i[2])); });
  return t;
}

Matrix to_matrix(const Tensor& tensor, int64_t index) {
  Matrix m(tensor.shape()[1], tensor.shape()[2]);
  for (int64_t i = 0; i < m.rows; ++i)
    for (int64_t j = 0; j < m.cols; ++j) m(i, j) = tensor.get({index, i, j});
  return m;
}

std::vector<double> to_vector(const Tensor& tensor, int64_t index) {
  std::vector<double> list;
  for (int64_t i = 0; i < tensor.shape()[1]; ++i) list.push_back(tensor.get({index, i}));
  return list;
}

LowRank low_rank(const Context& context, const Tensor& a, int64_t rank, uint64_t seed) {
  const int64_t batch = a.shape()[0], m = a.shape()[1], n = a.shape()[2];
  LowRank result{Tensor(ADAATTN_DTYPE_F32, {batch, m, rank}), Tensor(ADAATTN_DTYPE_F32, {batch, rank}),
                 Tensor(ADAATTN_DTYPE_F32, {batch, n, rank})};
  adaattn_low_rank_desc_t desc;
  EXPECT_TRUE(succeeded(adaattn_low_rank_desc_init(&desc, sizeof desc)));
  desc.batch = batch;
  desc.rows = m;
  desc.cols = n;
  desc.rank = rank;
  desc.seed = seed;
  const auto device = context.device();
  for (const Tensor* t : std::initializer_list<const Tensor*>{&a, &result.u, &result.s, &result.v})
    t->upload(device, 0);
  const adaattn_tensor_t view[] = {a.on(device, 0), result.u.on(device, 0), result.s.on(device, 0),
                                   result.v.on(device, 0)};
  EXPECT_TRUE(
      succeeded(adaattn_low_rank(context.get(), &desc, &view[0], &view[1], &view[2], &view[3], nullptr, 0, nullptr)));
  for (const Tensor* t : {&result.u, &result.s, &result.v}) t->download(device, 0);
  return result;
}

std::vector<int32_t> effective_rank(const Context& context, const Tensor& a, double threshold) {
  const auto device = context.device();
  Tensor ranks(std::vector<int32_t>(static_cast<size_t>(a.shape()[0]), -1));
  a.upload(device, 0);
  const adaattn_tensor_t view = a.on(device, 0), out = ranks.on(device, 0);
  EXPECT_TRUE(succeeded(adaattn_effective_rank(context.get(), &view, threshold, &out, nullptr, nullptr, 0, nullptr)));
  ranks.download(device, 0);
  std::vector<int32_t> list;
  for (double r : ranks.values()) list.push_back(static_cast<int32_t>(r));
  return list;
}

std::vector<double> spectral_norm(const Context& context, const Tensor& a, double tolerance) {
  const auto device = context.device();
  const Tensor norms(ADAATTN_DTYPE_F32, {a.shape()[0]});
  a.upload(device, 0);
  const adaattn_tensor_t view = a.on(device, 0), out = norms.on(device, 0);
  EXPECT_TRUE(succeeded(adaattn_spectral_norm(context.get(), &view, tolerance, 0, 1, &out, nullptr, 0, nullptr)));
  norms.download(device, 0);
  return norms.values();
}

adaattn_entropy_desc_t entropy_desc(bool normalized) {
  adaattn_entropy_desc_t desc;
  EXPECT_TRUE(succeeded(adaattn_entropy_desc_init(&desc, sizeof desc)));
  desc.normalized = normalized;
  return desc;
}

Entropies entropy(const Context& context, const AttentionData& data, const adaattn_entropy_desc_t& desc) {
  const auto device = context.device();
  Entropies result;
  result.heads = Tensor(ADAATTN_DTYPE_F32, {data.batch(), data.desc.heads_q});
  if (desc.mode == ADAATTN_ENTROPY_EXACT) result.rows = Tensor(ADAATTN_DTYPE_F32, data.lse.shape());
  AttentionData inputs = data;
  inputs.v = inputs.o = inputs.lse = Tensor();
  inputs.entropy = result.rows;
  inputs.desc.outputs = result.rows.present() ? ADAATTN_OUTPUT_ENTROPY : 0;
  inputs.upload(device);
  result.heads.upload(device, 0);
  const adaattn_io_t io = inputs.io(device);
  const adaattn_tensor_t heads = result.heads.on(device, 0);
  EXPECT_TRUE(succeeded(adaattn_entropy(context.get(), &inputs.desc, &desc, &io, &heads, nullptr, 0, nullptr)));
  result.rows.download(device, 0);
  result.heads.download(device, 0);
  return result;
}

}  // namespace adaattn::test
