// The versioned structs of the C ABI, read and written here and nowhere else. A caller's struct may be older (shorter)
// or newer (longer) than this library's.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "adaattn/adaattn.h"
#include "capi/guard.h"

namespace adaattn::capi {

// Per struct: its name; kSmallest, the end of the last field that has no default, or of an output's strings; kUnit, the
// size by which the struct grew through its versions, so that no field is cut in two; and the defaults.
template <typename T>
struct StructTraits;

template <>
struct StructTraits<adaattn_config_t> {
  static constexpr const char* kName = "config";
  static constexpr size_t kSmallest = sizeof(size_t), kUnit = 8;
  static adaattn_config_t defaults();
};

template <>
struct StructTraits<adaattn_attn_desc_t> {
  static constexpr const char* kName = "desc";
  static constexpr size_t kSmallest = offsetof(adaattn_attn_desc_t, dtype_kv) + sizeof(adaattn_dtype_t), kUnit = 8;
  static adaattn_attn_desc_t defaults();
};

template <>
struct StructTraits<adaattn_adaptive_desc_t> {
  static constexpr const char* kName = "adaptive";
  static constexpr size_t kSmallest = offsetof(adaattn_adaptive_desc_t, tolerance), kUnit = 8;
  static adaattn_adaptive_desc_t defaults();
};

template <>
struct StructTraits<adaattn_io_t> {
  static constexpr const char* kName = "io";
  static constexpr size_t kSmallest = offsetof(adaattn_io_t, lse), kUnit = sizeof(adaattn_tensor_t);
  static adaattn_io_t defaults();
};

template <>
struct StructTraits<adaattn_entropy_desc_t> {
  static constexpr const char* kName = "desc";
  static constexpr size_t kSmallest = sizeof(size_t), kUnit = 8;
  static adaattn_entropy_desc_t defaults();
};

template <>
struct StructTraits<adaattn_low_rank_desc_t> {
  static constexpr const char* kName = "desc";
  static constexpr size_t kSmallest = offsetof(adaattn_low_rank_desc_t, oversampling), kUnit = 8;
  static adaattn_low_rank_desc_t defaults();
};

template <>
struct StructTraits<adaattn_device_info_t> {
  static constexpr const char* kName = "info";
  static constexpr size_t kSmallest = sizeof(adaattn_device_info_t), kUnit = 8;
};

template <>
struct StructTraits<adaattn_plan_info_t> {
  static constexpr const char* kName = "info";
  static constexpr size_t kSmallest = offsetof(adaattn_plan_info_t, tile_q), kUnit = 8;
};

template <>
struct StructTraits<adaattn_plan_stats_t> {
  static constexpr const char* kName = "stats";
  static constexpr size_t kSmallest = offsetof(adaattn_plan_stats_t, query_rows), kUnit = 8;
};

// Above this a struct_size is an uninitialised number, not a later version.
inline constexpr size_t kLargestStruct = 4096;

// The message names the struct's own field, or with name NULL the size argument of an _init function.
template <typename T>
void check_struct_size(size_t size, const char* name) {
  using Traits = StructTraits<T>;
  const bool whole = size >= sizeof(T) || (size - sizeof(size_t)) % Traits::kUnit == 0;
  if (size < Traits::kSmallest || size > kLargestStruct || !whole)
    fail(ADAATTN_ERROR_STRUCT_SIZE,
         "%s%s is %zu; accepted: %zu (this version's) or that of another version, %zu to %zu",
         name != nullptr ? name : "", name != nullptr ? ".struct_size" : "size", size, sizeof(T), Traits::kSmallest,
         kLargestStruct);
}

template <typename T>
size_t struct_size_of(const T* given, const char* name) {
  require(given, name);
  size_t size;
  std::memcpy(&size, given, sizeof size);
  check_struct_size<T>(size, name);
  return size;
}

// The caller's struct as one of this version: missing fields get their defaults, an unknown tail must be zero.
template <typename T>
T read_struct(const T* given, const char* name = StructTraits<T>::kName) {
  const size_t size = struct_size_of(given, name);
  T value = StructTraits<T>::defaults();
  std::memcpy(static_cast<void*>(&value), given, std::min(size, sizeof(T)));
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (size_t i = sizeof(T); i < size; ++i)
    if (bytes[i] != 0)
      fail(ADAATTN_ERROR_STRUCT_SIZE,
           "%s has a field at byte %zu that this version does not know; accepted: zero there", name, i);
  value.struct_size = sizeof(T);
  return value;
}

// Writes `value`, cut or zero-extended to the caller's size, which stays in place.
template <typename T>
void write_bytes(T* out, size_t size, T value) {
  value.struct_size = size;
  auto* bytes = reinterpret_cast<unsigned char*>(out);
  std::memcpy(bytes, &value, std::min(size, sizeof(T)));
  if (size > sizeof(T)) std::memset(bytes + sizeof(T), 0, size - sizeof(T));
}

template <typename T>
void init_struct(T* out, size_t size) {
  require(out, StructTraits<T>::kName);
  check_struct_size<T>(size, nullptr);
  write_bytes(out, size, StructTraits<T>::defaults());
}

}  // namespace adaattn::capi
