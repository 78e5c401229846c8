#include "model/checkpoint_writer.h"

#include <stdlib.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "engine/float_types.h"

namespace model_test {
namespace fs = std::filesystem;

TemporaryFolder::TemporaryFolder() {
  std::string name = (fs::temp_directory_path() / "adaattn-model-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp: " + name);
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

fs::path TemporaryFolder::write(const std::string& name, std::string_view bytes) const {
  std::ofstream stream(path_ / name, std::ios::binary);
  stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  stream.close();
  if (!stream) throw std::runtime_error("cannot write " + name);
  return path_ / name;
}

std::string raw_safetensors(std::string_view header, std::string_view data) {
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(static_cast<uint64_t>(header.size()) >> 8 * i & 0xff);
  file += header;
  file += data;
  return file;
}

float stored_value(float value, const std::string& dtype) {
  if (dtype == "F16") return generate::f16_to_f32(generate::f32_to_f16(value));
  if (dtype == "BF16") return generate::bf16_to_f32(generate::f32_to_bf16(value));
  return value;
}

std::string safetensors(const std::vector<Tensor>& tensors, const std::string& dtype) {
  nlohmann::ordered_json header = {{"__metadata__", {{"format", "pt"}}}};
  std::string data;
  for (const Tensor& tensor : tensors) {
    const size_t begin = data.size();
    for (const float value : tensor.values) {
      char bytes[4];
      if (dtype == "F32") {
        std::memcpy(bytes, &value, 4);
        data.append(bytes, 4);
      } else {
        const uint16_t bits = dtype == "F16" ? generate::f32_to_f16(value) : generate::f32_to_bf16(value);
        std::memcpy(bytes, &bits, 2);
        data.append(bytes, 2);
      }
    }
    header[tensor.name] = {{"dtype", dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  return raw_safetensors(header.dump(), data);
}

}  // namespace model_test
