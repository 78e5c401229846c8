// Reading safetensors checkpoints: a JSON header with the name, type, shape and byte range of each tensor, then the
// raw data. Files are mapped, never copied, and nothing in a header is believed before it is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace generate {

// A read-only mapping of a whole file.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

// A tensor inside a mapped file; data has the alignment of the file, which may be none.
struct StoredTensor {
  std::string dtype;  // as the file spells it: "F32", "F16", "BF16", ...
  std::vector<int64_t> shape;
  std::span<const std::byte> data;
};

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }

 private:
  MappedFile file_;
  std::map<std::string, StoredTensor> tensors_;
};

// All tensors of a checkpoint folder: the files an index names, or model.safetensors, or model-*.safetensors.
class Checkpoint {
 public:
  explicit Checkpoint(const std::filesystem::path& folder);

  bool has(const std::string& name) const { return tensors_.contains(name); }

  // Appends the tensor's values, widened to f32, to `out`. The tensor must exist with exactly this shape and one of
  // the types F32, F16 and BF16.
  void append_f32(const std::string& name, std::span<const int64_t> shape, std::vector<float>& out) const;

  std::vector<std::string> names() const;

 private:
  void add_files(const std::vector<std::filesystem::path>& paths);

  std::filesystem::path folder_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, const StoredTensor*> tensors_;
};

}  // namespace generate
