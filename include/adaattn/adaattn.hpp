// libadaattn for C++17: owners for the handles of adaattn.h, and nothing else. Header only.
//
// SPDX-License-Identifier: BSD-3-Clause
//
// Every call that can fail returns a Status or a Result<T>, with exceptions and without. value() and or_throw() turn a
// failure into an adaattn::Error; in code compiled with -fno-exceptions they call std::abort().
//
//   auto context = adaattn::Context::create().value();
//   adaattn::AttnDesc desc;                     // the C struct with its defaults
//   desc.max_batch = 1; ...
//   adaattn::Io io;
//   io.q = adaattn::tensor(q, {1, seqlen, heads, head_dim}); ...
//   if (adaattn::Status status = context.attention(desc, io); !status.ok()) puts(status.text().c_str());
#ifndef ADAATTN_ADAATTN_HPP_
#define ADAATTN_ADAATTN_HPP_

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "adaattn/adaattn.h"

#if defined(__cpp_exceptions)
#include <stdexcept>
#define ADAATTN_CXX_NAMESPACE cxx_throwing
#else
#define ADAATTN_CXX_NAMESPACE cxx_aborting
#endif

namespace adaattn {
// The two kinds of code may meet in one program; their inline functions differ and so must the functions' names.
inline namespace ADAATTN_CXX_NAMESPACE {

inline std::string last_error() {
  std::string text(adaattn_last_error(nullptr, 0), '\0');
  adaattn_last_error(text.data(), text.size() + 1);
  return text;
}

#if defined(__cpp_exceptions)
class Error : public std::runtime_error {
 public:
  Error(adaattn_status_t code, const std::string& text)
      : std::runtime_error(std::string(adaattn_status_name(code)) + ": " + text), code_(code) {}
  adaattn_status_t code() const noexcept { return code_; }

 private:
  adaattn_status_t code_;
};
#endif

// A status with the text that the library had for it at the time.
class [[nodiscard]] Status {
 public:
  Status() = default;
  // Implicit, so that a C call's status returns as it is; has to be taken on the thread of the call.
  Status(adaattn_status_t code) : code_(code), text_(code != ADAATTN_SUCCESS ? last_error() : std::string()) {}

  bool ok() const noexcept { return code_ == ADAATTN_SUCCESS; }
  adaattn_status_t code() const noexcept { return code_; }
  const char* name() const noexcept { return adaattn_status_name(code_); }
  const std::string& text() const noexcept { return text_; }

  void or_throw() const {
    if (ok()) return;
#if defined(__cpp_exceptions)
    throw Error(code_, text_);
#else
    std::abort();
#endif
  }

 private:
  adaattn_status_t code_ = ADAATTN_SUCCESS;
  std::string text_;
};

// A value or the status that explains its absence.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}
  Result(Status failure) : status_(std::move(failure)) {}

  bool ok() const noexcept { return value_.has_value(); }
  explicit operator bool() const noexcept { return ok(); }
  const Status& status() const noexcept { return status_; }

  T& value() & {
    status_.or_throw();
    return *value_;
  }
  const T& value() const& {
    status_.or_throw();
    return *value_;
  }
  T&& value() && {
    status_.or_throw();
    return *std::move(value_);
  }
  // Only when ok().
  T& operator*() noexcept { return *value_; }
  T* operator->() noexcept { return &*value_; }

 private:
  std::optional<T> value_;
  Status status_;
};

struct Config : adaattn_config_t {
  Config() : adaattn_config_t() { adaattn_config_init(this, sizeof(adaattn_config_t)); }
};
struct AdaptiveDesc : adaattn_adaptive_desc_t {
  AdaptiveDesc() : adaattn_adaptive_desc_t() { adaattn_adaptive_desc_init(this, sizeof(adaattn_adaptive_desc_t)); }
};
struct AttnDesc : adaattn_attn_desc_t {
  AttnDesc() : adaattn_attn_desc_t() { adaattn_attn_desc_init(this, sizeof(adaattn_attn_desc_t)); }
};
struct Io : adaattn_io_t {
  Io() : adaattn_io_t() { adaattn_io_init(this, sizeof(adaattn_io_t)); }
};
struct EntropyDesc : adaattn_entropy_desc_t {
  EntropyDesc() : adaattn_entropy_desc_t() { adaattn_entropy_desc_init(this, sizeof(adaattn_entropy_desc_t)); }
};
struct LowRankDesc : adaattn_low_rank_desc_t {
  LowRankDesc() : adaattn_low_rank_desc_t() { adaattn_low_rank_desc_init(this, sizeof(adaattn_low_rank_desc_t)); }
};

struct Device {
  adaattn_device_t kind = ADAATTN_DEVICE_CPU;
  int32_t id = 0;
};

// The dtype of an element type; specialise it for 16-bit types of your own.
template <typename T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr adaattn_dtype_t value = ADAATTN_DTYPE_F32;
};
template <>
struct DtypeOf<int32_t> {
  static constexpr adaattn_dtype_t value = ADAATTN_DTYPE_I32;
};
template <>
struct DtypeOf<int64_t> {
  static constexpr adaattn_dtype_t value = ADAATTN_DTYPE_I64;
};

// A view; strides in elements, none: contiguous. Nothing is checked here: the call that gets a view of more than four
// dimensions, or with as many strides as it has no dimensions, refuses it.
inline adaattn_tensor_t tensor(const void* data, adaattn_dtype_t dtype, std::initializer_list<int64_t> shape,
                               std::initializer_list<int64_t> stride = {}, Device device = {}) noexcept {
  adaattn_tensor_t view = {};
  view.data = const_cast<void*>(data);
  view.dtype = dtype;
  view.device = device.kind;
  view.device_id = device.id;
  const bool fits = shape.size() <= 4 && (stride.size() == 0 || stride.size() == shape.size());
  view.ndim = fits ? static_cast<int32_t>(shape.size()) : -1;
  if (!fits) return view;
  std::size_t i = 0;
  for (const int64_t extent : shape) view.shape[i++] = extent;
  i = 0;
  for (const int64_t step : stride) view.stride[i++] = step;
  if (stride.size() == 0) {
    uint64_t step = 1;  // unsigned: an absurd shape wraps around here and is refused by the call
    for (i = shape.size(); i-- > 0;) {
      view.stride[i] = static_cast<int64_t>(step);
      step *= static_cast<uint64_t>(view.shape[i]);
    }
  }
  return view;
}

template <typename T>
adaattn_tensor_t tensor(T* data, std::initializer_list<int64_t> shape, std::initializer_list<int64_t> stride = {},
                        Device device = {}) noexcept {
  return tensor(static_cast<const void*>(data), DtypeOf<std::remove_const_t<T>>::value, shape, stride, device);
}

// A view of another framework's tensor, without a copy. dl_tensor is a DLTensor*.
inline Result<adaattn_tensor_t> tensor_from_dlpack(const void* dl_tensor) {
  adaattn_tensor_t view = {};
  if (Status status = adaattn_tensor_from_dlpack(&view, dl_tensor); !status.ok()) return status;
  return view;
}

// NULL data and 0 bytes: the library allocates.
struct Workspace {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// As adaattn_plan_get_tile_map() describes it; row-major.
struct TileMap {
  std::int64_t query_tiles = 0, key_tiles = 0;
  std::vector<std::uint8_t> tiles;
};

// Keeps its context alive.
class Plan {
 public:
  Plan(Plan&&) noexcept = default;
  Plan& operator=(Plan&& other) noexcept {
    plan_ = std::move(other.plan_);  // before the context it came from
    context_ = std::move(other.context_);
    return *this;
  }

  adaattn_plan_t* get() const noexcept { return plan_.get(); }

  Result<std::size_t> workspace_size() const {
    std::size_t bytes = 0;
    if (Status status = adaattn_plan_workspace_size(get(), &bytes); !status.ok()) return status;
    return bytes;
  }
  Status execute(const adaattn_io_t& io, Workspace workspace = {}, adaattn_stream_t stream = nullptr) const {
    return adaattn_plan_execute(get(), &io, workspace.data, workspace.bytes, stream);
  }
  Result<adaattn_plan_info_t> info() const {
    adaattn_plan_info_t info = {};
    info.struct_size = sizeof info;
    if (Status status = adaattn_plan_get_info(get(), &info); !status.ok()) return status;
    return info;
  }
  Result<adaattn_plan_stats_t> stats(uint32_t flags = ADAATTN_STATS_WAIT) const {
    adaattn_plan_stats_t stats = {};
    stats.struct_size = sizeof stats;
    if (Status status = adaattn_plan_get_stats(get(), flags, &stats); !status.ok()) return status;
    return stats;
  }
  // Of the newest call, heads fastest; empty for an exact plan.
  Result<std::vector<adaattn_head_stats_t>> head_stats() const {
    std::size_t count = 0;
    if (Status status = adaattn_plan_get_head_stats(get(), nullptr, sizeof(adaattn_head_stats_t), 0, &count);
        !status.ok())
      return status;
    std::vector<adaattn_head_stats_t> heads(count);
    if (Status status =
            adaattn_plan_get_head_stats(get(), heads.data(), sizeof(adaattn_head_stats_t), heads.size(), &count);
        !status.ok())
      return status;
    return heads;
  }
  // Of the newest call and one (batch, query head); refused by exact plans.
  Result<TileMap> tile_map(std::int64_t batch, std::int64_t head) const {
    TileMap map;
    if (Status status = adaattn_plan_get_tile_map(get(), batch, head, nullptr, 0, &map.query_tiles, &map.key_tiles);
        !status.ok())
      return status;
    map.tiles.resize(static_cast<std::size_t>(map.query_tiles * map.key_tiles));
    if (Status status = adaattn_plan_get_tile_map(get(), batch, head, map.tiles.data(), map.tiles.size(),
                                                  &map.query_tiles, &map.key_tiles);
        !status.ok())
      return status;
    return map;
  }

 private:
  friend class Context;
  struct Destroy {
    void operator()(adaattn_plan_t* plan) const noexcept { adaattn_plan_destroy(plan); }
  };
  Plan(std::shared_ptr<adaattn_context_t> context, adaattn_plan_t* plan) : context_(std::move(context)), plan_(plan) {}

  std::shared_ptr<adaattn_context_t> context_;
  std::unique_ptr<adaattn_plan_t, Destroy> plan_;
};

// Optional tensors are absent when they are all zero, the default.
class Context {
 public:
  static Result<Context> create(const adaattn_config_t& config = Config()) {
    adaattn_context_t* context = nullptr;
    if (Status status = adaattn_create(&config, &context); !status.ok()) return status;
    return Context(context);
  }
  Context(Context&&) noexcept = default;
  Context& operator=(Context&&) noexcept = default;

  adaattn_context_t* get() const noexcept { return context_.get(); }

  Status set_option(adaattn_option_t option, int64_t value) const { return adaattn_set_option(get(), option, value); }
  Result<int64_t> get_option(adaattn_option_t option) const {
    int64_t value = 0;
    if (Status status = adaattn_get_option(get(), option, &value); !status.ok()) return status;
    return value;
  }

  // Here and below, adaptive NULL: exact.
  Status check_support(const adaattn_attn_desc_t& desc, const adaattn_adaptive_desc_t* adaptive = nullptr) const {
    return adaattn_check_support(get(), &desc, adaptive, nullptr, 0);
  }
  Result<Plan> make_plan(const adaattn_attn_desc_t& desc, const adaattn_adaptive_desc_t* adaptive = nullptr) const {
    adaattn_plan_t* plan = nullptr;
    if (Status status = adaattn_plan_create(get(), &desc, adaptive, &plan); !status.ok()) return status;
    return Plan(context_, plan);
  }
  Status attention(const adaattn_attn_desc_t& desc, const adaattn_io_t& io, adaattn_stream_t stream = nullptr,
                   const adaattn_adaptive_desc_t* adaptive = nullptr) const {
    return adaattn_attention(get(), &desc, adaptive, &io, stream);
  }
  Status merge(const adaattn_tensor_t& o_a, const adaattn_tensor_t& lse_a, const adaattn_tensor_t& o_b,
               const adaattn_tensor_t& lse_b, const adaattn_tensor_t& o, const adaattn_tensor_t& lse = {},
               adaattn_stream_t stream = nullptr) const {
    return adaattn_merge(get(), &o_a, &lse_a, &o_b, &lse_b, &o, &lse, stream);
  }

  Result<std::size_t> entropy_workspace_size(const adaattn_attn_desc_t& attn,
                                             const adaattn_entropy_desc_t& desc) const {
    std::size_t bytes = 0;
    if (Status status = adaattn_entropy_workspace_size(get(), &attn, &desc, &bytes); !status.ok()) return status;
    return bytes;
  }
  Status entropy(const adaattn_attn_desc_t& attn, const adaattn_entropy_desc_t& desc, const adaattn_io_t& io,
                 const adaattn_tensor_t& head_entropy = {}, Workspace workspace = {},
                 adaattn_stream_t stream = nullptr) const {
    return adaattn_entropy(get(), &attn, &desc, &io, &head_entropy, workspace.data, workspace.bytes, stream);
  }

  Result<std::size_t> low_rank_workspace_size(const adaattn_low_rank_desc_t& desc) const {
    std::size_t bytes = 0;
    if (Status status = adaattn_low_rank_workspace_size(get(), &desc, &bytes); !status.ok()) return status;
    return bytes;
  }
  Status low_rank(const adaattn_low_rank_desc_t& desc, const adaattn_tensor_t& a, const adaattn_tensor_t& u,
                  const adaattn_tensor_t& s, const adaattn_tensor_t& v, Workspace workspace = {},
                  adaattn_stream_t stream = nullptr) const {
    return adaattn_low_rank(get(), &desc, &a, &u, &s, &v, workspace.data, workspace.bytes, stream);
  }
  Status low_rank_project(const adaattn_tensor_t& a, const adaattn_tensor_t& basis, const adaattn_tensor_t& mean,
                          const adaattn_tensor_t& y, const adaattn_tensor_t& row_residual = {},
                          const adaattn_tensor_t& residual = {}, adaattn_stream_t stream = nullptr) const {
    return adaattn_low_rank_project(get(), &a, &basis, &mean, &y, &row_residual, &residual, stream);
  }

  Result<std::size_t> effective_rank_workspace_size(const adaattn_tensor_t& a) const {
    std::size_t bytes = 0;
    if (Status status = adaattn_effective_rank_workspace_size(get(), &a, &bytes); !status.ok()) return status;
    return bytes;
  }
  Status effective_rank(const adaattn_tensor_t& a, double threshold, const adaattn_tensor_t& ranks,
                        const adaattn_tensor_t& singular_values = {}, Workspace workspace = {},
                        adaattn_stream_t stream = nullptr) const {
    return adaattn_effective_rank(get(), &a, threshold, &ranks, &singular_values, workspace.data, workspace.bytes,
                                  stream);
  }

  Result<std::size_t> spectral_norm_workspace_size(const adaattn_tensor_t& a) const {
    std::size_t bytes = 0;
    if (Status status = adaattn_spectral_norm_workspace_size(get(), &a, &bytes); !status.ok()) return status;
    return bytes;
  }
  Status spectral_norm(const adaattn_tensor_t& a, const adaattn_tensor_t& norms, double tolerance = 0,
                       int64_t max_iterations = 0, uint64_t seed = 0, Workspace workspace = {},
                       adaattn_stream_t stream = nullptr) const {
    return adaattn_spectral_norm(get(), &a, tolerance, max_iterations, seed, &norms, workspace.data, workspace.bytes,
                                 stream);
  }

 private:
  explicit Context(adaattn_context_t* context)
      : context_(context, [](adaattn_context_t* owned) { adaattn_destroy(owned); }) {}

  std::shared_ptr<adaattn_context_t> context_;
};

inline Result<int32_t> device_count(adaattn_device_t kind) {
  int32_t count = 0;
  if (Status status = adaattn_device_count(kind, &count); !status.ok()) return status;
  return count;
}

inline Result<adaattn_device_info_t> device_info(Device device = {}) {
  adaattn_device_info_t info = {};
  info.struct_size = sizeof info;
  if (Status status = adaattn_device_info(device.kind, device.id, &info); !status.ok()) return status;
  return info;
}

}  // namespace ADAATTN_CXX_NAMESPACE
}  // namespace adaattn

#undef ADAATTN_CXX_NAMESPACE

#endif  // ADAATTN_ADAATTN_HPP_
