#include "engine/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "engine/error.h"
#include "engine/float_types.h"

namespace generate {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

// The format's own limit on the header.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;

size_t element_size(const std::string& dtype) {
  static const std::map<std::string, size_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U16", 2}, {"I16", 2}, {"F16", 2},
      {"BF16", 2}, {"U32", 4}, {"I32", 4}, {"F32", 4},     {"U64", 8},     {"I64", 8}, {"F64", 8}};
  const auto found = sizes.find(dtype);
  return found == sizes.end() ? 0 : found->second;
}

// Refuses names that occur twice, of which a JSON object would silently keep the last.
Json parse_header(const char* file, const char* begin, const char* end) {
  std::set<std::string> seen;
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth == 1 && event == Json::parse_event_t::key && !seen.insert(parsed.get<std::string>()).second)
      fail("%s: tensor '%s' is listed twice", file, parsed.get_ref<const std::string&>().c_str());
    return true;
  };
  try {
    return Json::parse(begin, end, check);
  } catch (const Json::exception& e) {
    fail("%s: the header is not valid JSON (%s)", file, e.what());
  }
}

StoredTensor read_entry(const char* file, const std::string& name, const Json& entry, std::span<const std::byte> data) {
  const char* tensor = name.c_str();
  if (!entry.is_object()) fail("%s: the entry of tensor '%s' is not an object", file, tensor);
  const auto dtype = entry.find("dtype"), shape = entry.find("shape"), offsets = entry.find("data_offsets");
  if (dtype == entry.end() || !dtype->is_string()) fail("%s: tensor '%s' has no dtype", file, tensor);
  if (shape == entry.end() || !shape->is_array()) fail("%s: tensor '%s' has no shape", file, tensor);
  if (offsets == entry.end() || !offsets->is_array() || offsets->size() != 2 || !(*offsets)[0].is_number_unsigned() ||
      !(*offsets)[1].is_number_unsigned())
    fail("%s: data_offsets of tensor '%s' must be two unsigned integers", file, tensor);

  StoredTensor result;
  result.dtype = dtype->get<std::string>();
  const size_t size = element_size(result.dtype);
  if (size == 0) fail("%s: tensor '%s' has the unknown dtype '%s'", file, tensor, result.dtype.c_str());

  int64_t bytes = static_cast<int64_t>(size);
  for (const Json& extent : *shape) {
    if (!extent.is_number_unsigned() || extent.get<uint64_t>() > INT64_MAX)
      fail("%s: the shape of tensor '%s' has an extent that is not an unsigned integer", file, tensor);
    result.shape.push_back(extent.get<int64_t>());
    if (__builtin_mul_overflow(bytes, result.shape.back(), &bytes))
      fail("%s: the shape of tensor '%s' overflows", file, tensor);
  }
  const uint64_t begin = (*offsets)[0].get<uint64_t>(), end = (*offsets)[1].get<uint64_t>();
  if (begin > end || end > data.size())
    fail("%s: tensor '%s' lies at bytes %llu to %llu of %zu bytes of data", file, tensor,
         static_cast<unsigned long long>(begin), static_cast<unsigned long long>(end), data.size());
  if (end - begin != static_cast<uint64_t>(bytes))
    fail("%s: tensor '%s' has %llu bytes of data and a shape that needs %lld", file, tensor,
         static_cast<unsigned long long>(end - begin), static_cast<long long>(bytes));
  result.data = data.subspan(begin, end - begin);
  return result;
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (const int64_t extent : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  return text + "]";
}

// The shard count in a name like model-00001-of-00002.safetensors, 0 where there is none.
size_t shard_count(const std::string& stem) {
  const size_t of = stem.rfind("-of-");
  if (of == std::string::npos) return 0;
  const std::string digits = stem.substr(of + 4);
  if (digits.empty() || digits.size() > 6 || digits.find_first_not_of("0123456789") != std::string::npos) return 0;
  return std::stoul(digits);
}

std::vector<fs::path> shards_by_name(const fs::path& folder) {
  if (fs::exists(folder / "model.safetensors")) return {folder / "model.safetensors"};
  std::vector<fs::path> shards;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder)) {
    const fs::path& path = entry.path();
    if (path.extension() == ".safetensors" && path.filename().string().starts_with("model-")) shards.push_back(path);
  }
  std::sort(shards.begin(), shards.end());
  if (shards.empty())
    fail("%s: no *.safetensors.index.json, model.safetensors or model-*.safetensors here", folder.c_str());
  for (const fs::path& shard : shards) {
    const size_t count = shard_count(shard.stem().string());
    if (count != 0 && count != shards.size())
      fail("%s: the name says %zu shards, and %zu are here", shard.c_str(), count, shards.size());
  }
  return shards;
}

}  // namespace

MappedFile::MappedFile(const fs::path& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail("%s: %s", path.c_str(), std::strerror(errno));
  struct stat status = {};
  const bool regular = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  const size_t size = regular ? static_cast<size_t>(status.st_size) : 0;
  void* address = size > 0 ? mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0) : nullptr;
  const int map_error = errno;
  close(fd);
  if (!regular) fail("%s: not a regular file", path.c_str());
  if (address == MAP_FAILED) fail("%s: cannot be mapped: %s", path.c_str(), std::strerror(map_error));
  bytes_ = {static_cast<const std::byte*>(address), size};
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

MappedFile::MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

SafetensorsFile::SafetensorsFile(const fs::path& path) : file_(path) {
  const std::string name = path.string();
  const char* file = name.c_str();
  const std::span<const std::byte> bytes = file_.bytes();
  if (bytes.size() < 8) fail("%s: %zu bytes are too few for a safetensors file", file, bytes.size());
  uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | static_cast<uint8_t>(bytes[i]);
  if (header_bytes > kMaxHeaderBytes || header_bytes > bytes.size() - 8)
    fail("%s: a header of %llu bytes does not fit in a file of %zu", file,
         static_cast<unsigned long long>(header_bytes), bytes.size());

  const char* begin = reinterpret_cast<const char*>(bytes.data()) + 8;
  const Json header = parse_header(file, begin, begin + header_bytes);
  if (!header.is_object()) fail("%s: the header is not a JSON object", file);
  const std::span<const std::byte> data = bytes.subspan(8 + header_bytes);
  for (const auto& [key, entry] : header.items())
    if (key != "__metadata__") tensors_.emplace(key, read_entry(file, key, entry, data));

  // The format wants the data covered without holes or overlaps; a cut file fails here or above.
  std::vector<std::pair<size_t, size_t>> ranges;
  for (const auto& [key, tensor] : tensors_) ranges.emplace_back(tensor.data.data() - data.data(), tensor.data.size());
  std::sort(ranges.begin(), ranges.end());
  size_t covered = 0;
  for (const auto& [offset, size] : ranges) {
    if (offset != covered)
      fail("%s: tensor data has %s at byte %zu", file, offset < covered ? "an overlap" : "a hole", covered);
    covered += size;
  }
  if (covered != data.size()) fail("%s: the tensors cover %zu of %zu bytes of data", file, covered, data.size());
}

Checkpoint::Checkpoint(const fs::path& folder) : folder_(folder) {
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) fail("%s: not a folder", folder.c_str());
  std::vector<fs::path> indexes;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder))
    if (entry.path().filename().string().ends_with(".safetensors.index.json")) indexes.push_back(entry.path());
  if (indexes.size() > 1) fail("%s: more than one *.safetensors.index.json", folder.c_str());

  if (indexes.empty()) {
    add_files(shards_by_name(folder));
  } else {
    const char* file = indexes[0].c_str();
    const MappedFile text(indexes[0]);
    const char* begin = reinterpret_cast<const char*>(text.bytes().data());
    const Json index = parse_header(file, begin, begin + text.bytes().size());
    if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object())
      fail("%s: no weight_map", file);
    std::set<fs::path> shards;
    for (const auto& [tensor, shard] : index["weight_map"].items()) {
      if (!shard.is_string() || shard.get<std::string>().find('/') != std::string::npos)
        fail("%s: tensor '%s' is not mapped to the name of a file in this folder", file, tensor.c_str());
      shards.insert(folder / shard.get<std::string>());
    }
    add_files({shards.begin(), shards.end()});
    for (const auto& [tensor, shard] : index["weight_map"].items())
      if (!has(tensor)) fail("%s: tensor '%s' is in none of the files", file, tensor.c_str());
  }
}

void Checkpoint::add_files(const std::vector<fs::path>& paths) {
  for (const fs::path& path : paths) files_.emplace_back(path);
  for (const SafetensorsFile& file : files_)
    for (const auto& [name, tensor] : file.tensors())
      if (!tensors_.emplace(name, &tensor).second)
        fail("%s: tensor '%s' is in two files", folder_.c_str(), name.c_str());
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : tensors_) names.push_back(name);
  return names;
}

void Checkpoint::append_f32(const std::string& name, std::span<const int64_t> shape, std::vector<float>& out) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) fail("%s: tensor '%s' is missing", folder_.c_str(), name.c_str());
  const StoredTensor& tensor = *found->second;
  if (!std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end()))
    fail("%s: tensor '%s' has shape %s, and config.json asks for %s", folder_.c_str(), name.c_str(),
         shape_text(tensor.shape).c_str(), shape_text(shape).c_str());
  const std::byte* data = tensor.data.data();
  const size_t size = element_size(tensor.dtype), count = tensor.data.size() / size, first = out.size();
  out.resize(first + count);
  float* to = out.data() + first;
  if (tensor.dtype == "F32") {
    if (count > 0) std::memcpy(to, data, count * sizeof(float));
  } else if (tensor.dtype == "F16" || tensor.dtype == "BF16") {
    const bool half = tensor.dtype == "F16";
    for (size_t i = 0; i < count; ++i) {
      uint16_t bits;
      std::memcpy(&bits, data + 2 * i, sizeof bits);
      to[i] = half ? f16_to_f32(bits) : bf16_to_f32(bits);
    }
  } else {
    fail("%s: tensor '%s' is %s; F32, F16 and BF16 are served", folder_.c_str(), name.c_str(), tensor.dtype.c_str());
  }
}

}  // namespace generate
