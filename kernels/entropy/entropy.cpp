#include "entropy/entropy.h"

#include "attend/plan.h"
#include "core/error.h"
#include "core/sampling.h"
#include "runtime.h"

namespace adaattn::cuda {
namespace {

int64_t row_capacity(const EntropyParams& params, int64_t seqlen_q) {
  return params.sampled ? number_of_strata(params.sample_rows, seqlen_q) : seqlen_q;
}

const AttendKernel* kernel_for(Dtype dtype, int64_t d_qk, const DeviceTraits& device) {
  const AttendKernel* found = nullptr;
  for (const AttendKernel* kernel : attend_kernels())
    if (kernel->phase == Phase::kEntropy && kernel->dtype == dtype && kernel->d_qk >= d_qk &&
        device.compute_capability >= kernel->arch &&
        static_cast<int64_t>(kernel->shared_bytes) <= device.shared_bytes &&
        (found == nullptr || kernel->d_qk < found->d_qk))
      found = kernel;
  return found;
}

}  // namespace

size_t entropy_workspace(const Problem& problem, const EntropyParams& params, const DeviceTraits& device) {
  if (problem.dtype_q != problem.dtype_kv)
    fail(ADAATTN_ERROR_NOT_SUPPORTED, "attn.dtype_kv is %d with attn.dtype_q %d; accepted on CUDA: the same",
         static_cast<int>(problem.dtype_kv), static_cast<int>(problem.dtype_q));
  if (kernel_for(problem.dtype_q, problem.d_qk, device) == nullptr)
    fail(ADAATTN_ERROR_NOT_SUPPORTED, "attn.head_dim_qk is %lld; accepted on CUDA: 1 to 256",
         static_cast<long long>(problem.d_qk));
  constexpr int64_t kLimit = int64_t{1} << 30;
  if (problem.max_seqlen_q >= kLimit || problem.max_seqlen_k >= kLimit)
    fail(ADAATTN_ERROR_NOT_SUPPORTED,
         "attn.max_seqlen_q is %lld and attn.max_seqlen_k %lld; accepted on CUDA: less than 2^30",
         static_cast<long long>(problem.max_seqlen_q), static_cast<long long>(problem.max_seqlen_k));
  return static_cast<size_t>(problem.max_batch * problem.heads_q * row_capacity(params, problem.max_seqlen_q)) *
         sizeof(float);
}

void entropy(const EntropyParams& params, void* workspace, const DeviceTraits& device, cudaStream_t stream) {
  const AttnParams& attn = params.attn;
  const int64_t rows = row_capacity(params, attn.seqlen_q);
  if (attn.batch == 0) return;
  if (rows > 0) {
    const AttendKernel* kernel = kernel_for(attn.q.dtype, attn.d_qk, device);
    prepare_kernel(*kernel);
    Launch launch;
    launch.kernel = kernel;
    launch.m_tiles = static_cast<int32_t>((rows + kernel->tile_q - 1) / kernel->tile_q);
    launch.section =
        section_of(device, attn.batch * attn.heads_q, attn.seqlen_k * attn.d_qk * dtype_size(attn.q.dtype), 1);
    AttendArgs args = make_args(attn, Problem{}, launch, nullptr);
    args.p.sinks = nullptr;  // the distribution over real keys
    args.partial_entropy = static_cast<float*>(workspace);
    args.partial_rows = rows;
    args.normalized = params.normalized;
    if (params.sampled) args.sample = {params.sample_rows, params.seed};
    check(kernel->launch(args, stream), kernel->name);
  }
  if (params.head_entropy != nullptr)
    check(launch_head_means(params, static_cast<const float*>(workspace), rows, stream), "head_means");
}

}  // namespace adaattn::cuda
