// The generate program run through the shell.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

namespace model_test {

struct Outcome {
  int status = -1;
  std::string output;
};

// stderr joins stdout unless it is sent elsewhere.
inline Outcome run(const std::string& arguments, const std::string& errors = "&1") {
  Outcome outcome;
  FILE* pipe = popen((GENERATE_PROGRAM " " + arguments + " 2>" + errors).c_str(), "r");
  if (pipe == nullptr) return outcome;
  char chunk[4096];
  for (size_t size; (size = fread(chunk, 1, sizeof chunk, pipe)) > 0;) outcome.output.append(chunk, size);
  const int status = pclose(pipe);
  outcome.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return outcome;
}

inline void expect_failure(const std::string& arguments, int status, const std::string& says) {
  const Outcome outcome = run(arguments);
  EXPECT_EQ(outcome.status, status) << arguments;
  EXPECT_NE(outcome.output.find(says), std::string::npos) << arguments << "\nprinted: " << outcome.output;
}

inline constexpr char kModel[] = "--model " MODEL_FOLDER " ";

// The report of a run that must succeed; `arguments` lack the file's name.
inline nlohmann::json report_of(const std::string& arguments) {
  const std::filesystem::path path =
      std::filesystem::temp_directory_path() / ("adaattn-report-" + std::to_string(getpid()));
  const Outcome outcome = run(arguments + " --report " + path.string());
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  std::ifstream stream(path);
  const auto report = nlohmann::json::parse(stream, nullptr, false);
  std::filesystem::remove(path);
  return report;
}

}  // namespace model_test
