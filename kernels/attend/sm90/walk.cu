#include <algorithm>

#include "attend/sm90/forward_launch.h"
#include "attend/sm90/tensor_map.h"
#include "attend/sm90/walk.h"
#include "attend/sm90/walk_kernel.cuh"
#include "runtime.h"

namespace adaattn::cuda::sm90 {
namespace {

template <int kRank, LeftOut kLeftOut, int kProbeColumns = 0>
constexpr WalkInstance instance() {
  using Policy = WalkPolicy<kRank, kLeftOut, kProbeColumns>;
  using Traits = WalkTraits<__nv_bfloat16, Policy>;
  return {Traits::kC, static_cast<int>(sizeof(typename Traits::Shared)),
          reinterpret_cast<const void*>(&walk_kernel<__nv_bfloat16, Policy>)};
}

// By rank class; decide::rank_of_class.
const WalkInstance kInstances[decide::kRankClasses] = {
    instance<kWalkDim, LeftOut::kCentroids>(), instance<96, LeftOut::kCentroids>(), instance<64, LeftOut::kCentroids>(),
    instance<32, LeftOut::kCentroids>()};
template <int kColumns>
const WalkInstance kProbing[decide::kRankClasses] = {
    instance<kWalkDim, LeftOut::kCentroids, kColumns>(), instance<96, LeftOut::kCentroids, kColumns>(),
    instance<64, LeftOut::kCentroids, kColumns>(), instance<32, LeftOut::kCentroids, kColumns>()};
const WalkInstance kPlain = instance<kWalkDim, LeftOut::kNothing>();
const WalkInstance kWithRemainder = instance<kWalkDim, LeftOut::kRemainder>();

const WalkInstance& instance_of(const WalkCall& call) {
  if (call.bytes.k != nullptr) return int8_walk();
  if (call.found != nullptr) {
    switch (call.tables.shape.probe_columns) {
      case 32:
        return kProbing<32>[call.rank_class];
      case 64:
        return kProbing<64>[call.rank_class];
      default:
        return kProbing<kWalkDim>[call.rank_class];
    }
  }
  if (call.rank_class != 0 || call.far_field) return kInstances[call.rank_class];
  return call.tables.remainder != nullptr ? kWithRemainder : kPlain;
}

// [batch, heads, rows, columns] without gaps.
Operand dense(const __nv_bfloat16* data, int64_t heads, int64_t rows, int64_t columns) {
  return {const_cast<__nv_bfloat16*>(data), heads * rows * columns, columns, rows * columns, Dtype::kBF16};
}

}  // namespace

void prepare_walk() {
  const auto prepare = [](const WalkInstance& x) {
    check(cudaFuncSetAttribute(x.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, x.shared_bytes), "walk");
  };
  for (const WalkInstance& x : kInstances) prepare(x);
  for (const WalkInstance& x : kProbing<32>) prepare(x);
  for (const WalkInstance& x : kProbing<64>) prepare(x);
  for (const WalkInstance& x : kProbing<kWalkDim>) prepare(x);
  prepare(kPlain);
  prepare(kWithRemainder);
  prepare(int8_walk());
}

cudaError_t launch_walk(const WalkCall& call, cudaStream_t stream) {
  const WalkInstance& instance = instance_of(call);
  const TableShape& shape = call.tables.shape;
  const int rank = instance.config.d_v;
  const bool low_rank = call.rank_class != 0;
  ForwardConfig exact = instance.config;
  exact.d_v = kWalkDim;
  Int8WalkArgs with_bytes{};
  WalkArgs& args = with_bytes.walk;
  args.forward = common_args(exact, call.p);
  args.tables = call.tables;
  const int64_t items = int64_t{shape.batch} * shape.heads_q * shape.wave_tiles;
  const int list = call.bytes.k != nullptr ? kByteList : call.rank_class;
  args.work = call.tables.work + list * items;
  args.work_count = call.tables.work_count + list;
  args.far_field = call.far_field;
  args.far_share = call.far_share;
  args.log2_needle = call.log2_needle;
  args.mask = call.mask;
  args.found = call.found;
  args.forward.counters = call.counters;

  // Columns beyond the class's rank are there, and never loaded: a box ends before them.
  const int width = rank % 64 == 0 ? 128 : 64;
  const auto map = [&](const __nv_bfloat16* data, int64_t rows, int64_t stride, int64_t columns, int box_width,
                       const char* name) {
    return make_map(dense(data, shape.heads_kv, rows, stride), {columns, rows, shape.heads_kv, shape.batch}, box_width,
                    128, name);
  };
  if (low_rank) {
    args.forward.v_map = map(call.tables.v_low, shape.key_rows(), shape.max_rank, rank, width, "v_low");
    args.forward.v_head_step = args.forward.v_batch_step = 1;
    args.forward.zero_v_tail = false;  // zeros already
    args.basis_map = map(call.tables.basis, kWalkDim, shape.max_rank, rank, width, "basis");
  }
  if (call.far_field) {
    args.group_k_map = map(call.tables.group_k, shape.key_groups(), 2 * kWalkDim, 2 * kWalkDim, 128, "group_k");
    args.group_v_map =
        low_rank ? map(call.tables.group_v_low, shape.key_groups(), shape.max_rank, rank, width, "group_v_low")
                 : map(call.tables.group_v, shape.key_groups(), kWalkDim, kWalkDim, width, "group_v");
  }
  if (const int columns = shape.probe_columns; call.found != nullptr && columns > 0) {
    args.probe_k_map = map(call.tables.probe_k, shape.key_rows(), columns, columns, 2 * columns, "probe_k");
    args.probe_q_map = make_map(dense(call.tables.probe_q, shape.heads_q, shape.query_rows(), columns),
                                {columns, shape.query_rows(), shape.heads_q, shape.batch}, 2 * columns, 64, "probe_q");
  }
  with_bytes.tables = call.bytes;
  with_bytes.with_shift = call.p.lse.data != nullptr || call.p.sinks != nullptr;
  const int grid = static_cast<int>(std::min<int64_t>(call.multiprocessors, items));
  static_assert(offsetof(Int8WalkArgs, walk) == 0);
  void* arguments[] = {&with_bytes};
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(128 * (instance.config.groups + 1)));
  config.dynamicSmemBytes = static_cast<size_t>(instance.shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelExC(&config, instance.kernel, arguments);
}

}  // namespace adaattn::cuda::sm90
