// Runs a libFuzzer target without libFuzzer: on the files named, or with --random on inputs from a seed.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  if (argc == 4 && std::string(argv[1]) == "--random") {
    const unsigned long runs = std::strtoul(argv[2], nullptr, 10), seed = std::strtoul(argv[3], nullptr, 10);
    std::printf("%lu inputs from seed %lu\n", runs, seed);
    std::mt19937_64 rng(seed);
    std::vector<uint8_t> input;
    for (unsigned long run = 0; run < runs; ++run) {
      // Short inputs: few patches leave more of a valid call standing.
      input.resize(rng() % (run % 4 == 0 ? 200 : 24));
      for (uint8_t& byte : input) byte = static_cast<uint8_t>(rng());
      LLVMFuzzerTestOneInput(input.data(), input.size());
    }
    return 0;
  }
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s FILE... | --random RUNS SEED\n", argv[0]);
    return 2;
  }
  for (int i = 1; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    if (!file) {
      std::fprintf(stderr, "cannot read %s\n", argv[i]);
      return 2;
    }
    const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  }
  return 0;
}
