#include "backend.h"

#include <cuda_runtime_api.h>

#include <cstdio>

#include "adaptive/plan.h"
#include "attend/plan.h"
#include "core/error.h"
#include "entropy/entropy.h"
#include "lowrank/libraries.h"
#include "lowrank/lowrank.h"
#include "runtime.h"
#include "tools.h"

namespace adaattn {
namespace {

using cuda::check;
using cuda::DeviceScope;

// Kept by the pool between calls; more goes back to the driver at the next synchronisation.
constexpr uint64_t kPoolKeepsBytes = uint64_t{256} << 20;

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

cuda::DeviceTraits traits_of(int device) {
  cuda::DeviceTraits t;
  t.compute_capability =
      attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 + attribute(cudaDevAttrComputeCapabilityMinor, device);
  t.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  t.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  t.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return t;
}

void check_device_id(int32_t device_id) {
  std::string reason;
  adaattn_status_t why = ADAATTN_ERROR_NO_DEVICE;
  const int32_t count = cuda::usable_devices(&reason, &why);
  if (count == 0) fail(why, "device is 2 (CUDA): %s", reason.c_str());
  if (device_id < 0 || device_id >= count)
    fail(ADAATTN_ERROR_NO_DEVICE, "device_id is %d; accepted: 0 to %d, the CUDA devices that this process sees",
         device_id, count - 1);
}

// Stream-ordered memory from a pool of the back-end's own, so that the caller's default pool keeps its settings.
class PoolAllocator {
 public:
  explicit PoolAllocator(int device) : device_(device) {
    cudaMemPoolProps props{};
    props.allocType = cudaMemAllocationTypePinned;
    props.location.type = cudaMemLocationTypeDevice;
    props.location.id = device;
    check(cudaMemPoolCreate(&pool_, &props), "making the memory pool");
    uint64_t keeps = kPoolKeepsBytes;
    cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keeps);
  }
  ~PoolAllocator() { cudaMemPoolDestroy(pool_); }
  PoolAllocator(const PoolAllocator&) = delete;
  PoolAllocator& operator=(const PoolAllocator&) = delete;
  Allocator face() { return {&PoolAllocator::alloc, &PoolAllocator::free, this}; }

 private:
  static void* alloc(void* self, size_t bytes, size_t, adaattn_stream_t stream) {
    auto* pool = static_cast<PoolAllocator*>(self);
    try {
      const DeviceScope scope(pool->device_);
      void* memory = nullptr;  // aligned to 256 bytes and more
      return cudaMallocFromPoolAsync(&memory, bytes, pool->pool_, stream) == cudaSuccess ? memory : nullptr;
    } catch (const Error&) {
      return nullptr;
    }
  }
  static void free(void* self, void* memory, size_t, adaattn_stream_t stream) {
    try {
      const DeviceScope scope(static_cast<PoolAllocator*>(self)->device_);
      cudaFreeAsync(memory, stream);
    } catch (const Error&) {  // the device is gone; so is its memory
    }
  }
  int device_;
  cudaMemPool_t pool_ = nullptr;
};

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const BackendConfig& config)
      : device_id_(config.device_id), traits_(traits_of(config.device_id)), allocator_(config.allocator) {
    if (traits_.compute_capability < 80)
      fail(ADAATTN_ERROR_NOT_SUPPORTED,
           "config.device_id is %d, of compute capability %d.%d; accepted: a device of 8.0 or newer", device_id_,
           traits_.compute_capability / 10, traits_.compute_capability % 10);
    if (allocator_.alloc == nullptr) {
      if (attribute(cudaDevAttrMemoryPoolsSupported, device_id_) == 0)
        fail(ADAATTN_ERROR_NOT_SUPPORTED,
             "config.alloc is NULL; accepted on device %d, which has no stream-ordered memory pools: hooks of the "
             "caller's",
             device_id_);
      const DeviceScope scope(device_id_);
      pool_ = std::make_unique<PoolAllocator>(device_id_);
      allocator_ = pool_->face();
    }
    records_ = std::make_shared<cuda::RecordPool>();
  }
  ~CudaBackend() override {
    try {
      const DeviceScope scope(device_id_);
      libraries_.reset();
      records_.reset();
      pool_.reset();
    } catch (const Error&) {  // the device is gone; so is its memory
    }
  }

  adaattn_device_t device() const override { return ADAATTN_DEVICE_CUDA; }
  int32_t device_id() const override { return device_id_; }
  const Allocator& allocator() const override { return allocator_; }

  void check_stream(adaattn_stream_t stream, bool will_allocate) const override {
    const DeviceScope scope(device_id_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status), "stream");
    if (status == cudaStreamCaptureStatusInvalidated)
      fail(ADAATTN_ERROR_CAPTURE,
           "stream has an invalidated capture; accepted: a stream outside a capture or in a valid one");
    if (status == cudaStreamCaptureStatusActive) {
      if (will_allocate)
        fail(ADAATTN_ERROR_CAPTURE,
             "stream is being captured and the call would allocate; accepted: a workspace, and a plan made before");
      return;
    }
    int stream_device = device_id_;
    if (stream != nullptr && cudaStreamGetDevice(stream, &stream_device) == cudaSuccess && stream_device != device_id_)
      fail(ADAATTN_ERROR_WRONG_DEVICE, "stream belongs to CUDA device %d; accepted: one of device %d, the context's",
           stream_device, device_id_);
  }

  void check_pointer(const void* pointer, const char* field) const override {
    if (pointer == nullptr) return;
    cudaPointerAttributes attributes{};
    const DeviceScope scope(device_id_);
    check(cudaPointerGetAttributes(&attributes, pointer), field);
    switch (attributes.type) {
      case cudaMemoryTypeManaged:
        return;
      case cudaMemoryTypeDevice:
        if (attributes.device == device_id_) return;
        fail(ADAATTN_ERROR_WRONG_DEVICE,
             "%s is %p, memory of CUDA device %d; accepted: memory of device %d, the context's", field, pointer,
             attributes.device, device_id_);
      case cudaMemoryTypeHost:
        if (attributes.devicePointer == pointer) return;
        [[fallthrough]];
      default:
        fail(ADAATTN_ERROR_WRONG_DEVICE, "%s is %p, host memory; accepted: memory of CUDA device %d", field, pointer,
             device_id_);
    }
  }

  void set_option(adaattn_option_t, int64_t) override {
    fail(ADAATTN_ERROR_NOT_SUPPORTED,
         "option is one of CPU contexts; accepted on CUDA: 1 (CHECK_POINTERS), 4 (PLAN_CACHE_SIZE)");
  }
  int64_t get_option(adaattn_option_t) const override {
    fail(ADAATTN_ERROR_NOT_SUPPORTED,
         "option is one of CPU contexts; accepted on CUDA: 1 (CHECK_POINTERS), 4 (PLAN_CACHE_SIZE)");
  }

  PlanInfo select(const Problem& problem) const override {
    return is_adaptive(problem) ? cuda::adaptive_plan_info(problem, traits_) : cuda::plan_info(problem, traits_);
  }
  std::unique_ptr<AttentionPlan> make_plan(const Problem& problem) override {
    return is_adaptive(problem) ? cuda::make_adaptive_plan(problem, traits_, device_id_, records_)
                                : cuda::make_plan(problem, traits_, device_id_, records_);
  }

  void merge(const MergeParams& params, adaattn_stream_t stream) override {
    const DeviceScope scope(device_id_);
    cuda::merge(params, stream);
  }
  size_t entropy_workspace(const Problem& problem, const EntropyParams& params) const override {
    return cuda::entropy_workspace(problem, params, traits_);
  }
  void entropy(const EntropyParams& params, void* workspace, size_t, adaattn_stream_t stream) override {
    const DeviceScope scope(device_id_);
    cuda::entropy(params, workspace, traits_, stream);
  }
  size_t low_rank_workspace(const LowRankParams& params) const override {
    const DeviceScope scope(device_id_);
    return cuda::low_rank_workspace(params, libraries_.get());
  }
  void low_rank(const LowRankParams& params, void* workspace, size_t, adaattn_stream_t stream) override {
    const DeviceScope scope(device_id_);
    cuda::low_rank(params, workspace, libraries_.get(), stream);
  }
  void low_rank_project(const ProjectParams& params, adaattn_stream_t stream) override {
    if (params.residual.data != nullptr) check_stream(stream, true);
    const DeviceScope scope(device_id_);
    cuda::low_rank_project(params, allocator_, stream);
  }
  size_t effective_rank_workspace(const EffectiveRankParams& params) const override {
    const DeviceScope scope(device_id_);
    return cuda::effective_rank_workspace(params, libraries_.get());
  }
  void effective_rank(const EffectiveRankParams& params, void* workspace, size_t, adaattn_stream_t stream) override {
    const DeviceScope scope(device_id_);
    cuda::effective_rank(params, workspace, libraries_.get(), stream);
  }
  size_t spectral_norm_workspace(const SpectralNormParams& params) const override {
    return cuda::spectral_norm_workspace(params);
  }
  void spectral_norm(const SpectralNormParams& params, void* workspace, size_t, adaattn_stream_t stream) override {
    const DeviceScope scope(device_id_);
    cuda::spectral_norm(params, workspace, stream);
  }

 private:
  static bool is_adaptive(const Problem& problem) { return problem.adaptive.policy != decide::Policy::kExact; }

  int32_t device_id_;
  cuda::DeviceTraits traits_;
  Allocator allocator_;
  std::unique_ptr<PoolAllocator> pool_;
  std::shared_ptr<cuda::RecordPool> records_;
  std::unique_ptr<cuda::MathLibraries> libraries_ = std::make_unique<cuda::MathLibraries>();
};

}  // namespace

std::unique_ptr<Backend> make_cuda_backend(const BackendConfig& config) {
  check_device_id(config.device_id);
  return std::make_unique<CudaBackend>(config);
}

int32_t cuda_device_count(std::string* reason, adaattn_status_t* why) { return cuda::usable_devices(reason, why); }

void cuda_device_info(int32_t device_id, adaattn_device_info_t* info) {
  check_device_id(device_id);
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device_id), "cudaGetDeviceProperties");
  info->device = ADAATTN_DEVICE_CUDA;
  info->device_id = device_id;
  info->compute_units = properties.multiProcessorCount;
  info->compute_capability = properties.major * 10 + properties.minor;
  info->memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  std::snprintf(info->name, sizeof(info->name), "%.*s", static_cast<int>(sizeof(info->name) - 1), properties.name);
  info->isa[0] = 0;
}

std::string cuda_build_info() {
  return "CUDA " + std::to_string(CUDART_VERSION / 1000) + '.' + std::to_string(CUDART_VERSION % 1000 / 10) + " for " +
         ADAATTN_CUDA_ARCHITECTURES + ", " + std::to_string(cuda::attend_kernels().size()) + " attention kernels";
}

}  // namespace adaattn
