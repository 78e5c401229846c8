// Small checkpoints and deliberately broken ones, in a folder that lives as long as the test.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace model_test {

class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

  // Writes a file here and returns its path.
  std::filesystem::path write(const std::string& name, std::string_view bytes) const;

 private:
  std::filesystem::path path_;
};

struct Tensor {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> values;
};

// A safetensors file with the header text as given.
std::string raw_safetensors(std::string_view header, std::string_view data);

// A well-formed safetensors file with all tensors in one type: "F32", "F16" or "BF16".
std::string safetensors(const std::vector<Tensor>& tensors, const std::string& dtype);

// The value that comes back after storing it in that type.
float stored_value(float value, const std::string& dtype);

}  // namespace model_test
