#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <regex>
#include <string>
#include <thread>
#include <vector>

#include "capi/call.h"

namespace adaattn::test {
namespace {

TEST(Library, VersionIsTheHeaders) {
  EXPECT_EQ(adaattn_version(), static_cast<uint32_t>(ADAATTN_VERSION));
  EXPECT_EQ(std::string(adaattn_build_info()).rfind("libadaattn 0.1.0; cpu", 0), 0u) << adaattn_build_info();
}

TEST(Library, EveryStatusOfTheHeaderHasANameAndASentence) {
  std::ifstream file(ADAATTN_HEADER);
  const std::string header(std::istreambuf_iterator<char>(file), {});
  const std::regex define("#define (ADAATTN_SUCCESS|ADAATTN_ERROR_\\w+) (\\d+)");
  int count = 0;
  for (std::sregex_iterator it(header.begin(), header.end(), define), end; it != end; ++it, ++count) {
    const int status = std::stoi((*it)[2]);
    EXPECT_EQ(adaattn_status_name(status), (*it)[1].str());
    EXPECT_GT(std::strlen(adaattn_status_string(status)), 10u) << status;
  }
  EXPECT_EQ(count, 21);
  EXPECT_STREQ(adaattn_status_name(-1), "ADAATTN_ERROR_UNKNOWN");
  EXPECT_STREQ(adaattn_status_name(1999), "ADAATTN_ERROR_UNKNOWN");
}

TEST(Library, ErrorTextIsCutToTheBufferAndItsFullLengthReturned) {
  ASSERT_EQ(adaattn_config_init(nullptr, 0), ADAATTN_ERROR_NULL_POINTER);
  const std::string full = last_error();
  ASSERT_GT(full.size(), 8u);
  char buffer[8];
  std::memset(buffer, 'x', sizeof buffer);
  EXPECT_EQ(adaattn_last_error(buffer, 6), full.size());
  EXPECT_EQ(std::string(buffer), full.substr(0, 5));
  EXPECT_EQ(buffer[6], 'x');
  EXPECT_EQ(adaattn_last_error(buffer, 1), full.size());
  EXPECT_EQ(buffer[0], '\0');
  EXPECT_EQ(adaattn_last_error(nullptr, 0), full.size());
  EXPECT_EQ(adaattn_last_error(nullptr, 100), full.size());
}

TEST(Library, ErrorTextSurvivesSuccessfulCallsAndBelongsToItsThread) {
  ASSERT_EQ(adaattn_config_init(nullptr, 0), ADAATTN_ERROR_NULL_POINTER);
  const std::string mine = last_error();
  adaattn_config_t config;
  ASSERT_EQ(adaattn_config_init(&config, sizeof config), ADAATTN_SUCCESS);
  EXPECT_EQ(last_error(), mine);
  std::string at_start = "unset", other;
  std::thread([&] {
    at_start = last_error();
    adaattn_set_option(nullptr, 1, 1);
    other = last_error();
  }).join();
  EXPECT_EQ(at_start, "");
  EXPECT_EQ(other, "context is NULL; accepted: a valid pointer");
  EXPECT_EQ(last_error(), mine);
}

TEST(Library, CountsDevices) {
  int32_t count = -1;
  ASSERT_EQ(adaattn_device_count(ADAATTN_DEVICE_CPU, &count), ADAATTN_SUCCESS);
  EXPECT_EQ(count, 1);
  ASSERT_EQ(adaattn_device_count(ADAATTN_DEVICE_CUDA, &count), ADAATTN_SUCCESS);
  EXPECT_GE(count, 0);
  EXPECT_TRUE(count > 0 || !last_error().empty());
  count = -7;
  EXPECT_EQ(adaattn_device_count(3, &count), ADAATTN_ERROR_INVALID_ARGUMENT);
  EXPECT_EQ(count, -7);
  EXPECT_EQ(adaattn_device_count(ADAATTN_DEVICE_CPU, nullptr), ADAATTN_ERROR_NULL_POINTER);
}

TEST(Library, DescribesTheProcessor) {
  adaattn_device_info_t info = {};
  info.struct_size = sizeof info;
  ASSERT_EQ(adaattn_device_info(ADAATTN_DEVICE_CPU, 0, &info), ADAATTN_SUCCESS) << last_error();
  EXPECT_EQ(info.device, ADAATTN_DEVICE_CPU);
  EXPECT_GE(info.compute_units, 1);
  EXPECT_GT(info.memory_bytes, 1 << 20);
  EXPECT_NE(std::string(info.isa), "");
  EXPECT_EQ(adaattn_device_info(ADAATTN_DEVICE_CPU, 1, &info), ADAATTN_ERROR_NO_DEVICE);
  EXPECT_EQ(adaattn_device_info(ADAATTN_DEVICE_CPU, 0, nullptr), ADAATTN_ERROR_NULL_POINTER);
  EXPECT_EQ(adaattn_device_info(0, 0, &info), ADAATTN_ERROR_INVALID_ARGUMENT);
  const adaattn_status_t cuda = adaattn_device_info(ADAATTN_DEVICE_CUDA, 1000, &info);
  EXPECT_TRUE(cuda == ADAATTN_ERROR_NOT_BUILT || (cuda >= 4000 && cuda < 5000)) << cuda;
}

struct Journal {
  std::vector<std::string> lines;
  std::atomic<int> inside{0};
  bool overlapped = false;
  adaattn_status_t nested = ADAATTN_SUCCESS;

  static void record(void* user, adaattn_log_level_t level, const char* message) {
    auto& journal = *static_cast<Journal*>(user);
    journal.overlapped |= journal.inside.fetch_add(1) != 0;
    journal.lines.push_back(std::to_string(level) + " " + message);
    // A callback may call the library; what that would log is dropped, and its failure must not replace the text.
    journal.nested = adaattn_set_log_callback(nullptr, nullptr, ADAATTN_LOG_OFF);
    journal.inside.fetch_sub(1);
  }
};

class Log : public testing::Test {
 protected:
  void TearDown() override { adaattn_set_log_callback(nullptr, nullptr, ADAATTN_LOG_OFF); }
  Journal journal;
};

TEST_F(Log, DeliversMessagesUpToTheLevel) {
  ASSERT_EQ(adaattn_set_log_callback(Journal::record, &journal, ADAATTN_LOG_ERROR), ADAATTN_SUCCESS);
  adaattn_context_t* context = nullptr;
  ASSERT_EQ(adaattn_create(nullptr, &context), ADAATTN_SUCCESS);
  EXPECT_TRUE(journal.lines.empty()) << journal.lines[0];
  EXPECT_EQ(adaattn_set_option(context, 77, 0), ADAATTN_ERROR_INVALID_ARGUMENT);
  ASSERT_EQ(journal.lines.size(), 1u);
  EXPECT_EQ(journal.lines[0].rfind("1 ADAATTN_ERROR_INVALID_ARGUMENT: option is 77", 0), 0u) << journal.lines[0];
  EXPECT_EQ(journal.nested, ADAATTN_ERROR_IN_USE);
  EXPECT_EQ(last_error().rfind("option is 77", 0), 0u) << last_error();
  ASSERT_EQ(adaattn_set_log_callback(Journal::record, &journal, ADAATTN_LOG_DEBUG), ADAATTN_SUCCESS);
  adaattn_destroy(context);
  ASSERT_EQ(adaattn_create(nullptr, &context), ADAATTN_SUCCESS);
  EXPECT_GE(journal.lines.size(), 2u);
  EXPECT_EQ(journal.lines[1][0], '3') << journal.lines[1];
  ASSERT_EQ(adaattn_set_log_callback(nullptr, nullptr, ADAATTN_LOG_DEBUG), ADAATTN_SUCCESS);
  const size_t lines = journal.lines.size();
  adaattn_set_option(context, 77, 0);
  EXPECT_EQ(journal.lines.size(), lines);
  adaattn_destroy(context);
}

TEST_F(Log, LevelIsChecked) {
  for (int level : {-1, 5}) {
    EXPECT_EQ(adaattn_set_log_callback(Journal::record, &journal, level), ADAATTN_ERROR_INVALID_ARGUMENT);
    EXPECT_EQ(last_error().rfind("level is " + std::to_string(level), 0), 0u) << last_error();
  }
}

TEST_F(Log, ConcurrentMessagesComeOneAtATime) {
  ASSERT_EQ(adaattn_set_log_callback(Journal::record, &journal, ADAATTN_LOG_ERROR), ADAATTN_SUCCESS);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([] {
      for (int i = 0; i < 50; ++i) adaattn_set_option(nullptr, 1, 1);
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(journal.overlapped);
  EXPECT_EQ(journal.lines.size(), 200u);
}

}  // namespace
}  // namespace adaattn::test
