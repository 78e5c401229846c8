#include "engine/safetensors.h"

#include <gtest/gtest.h>

#include <string>

#include "model/checkpoint_writer.h"
#include "model/expect_error.h"

namespace {

using generate::Checkpoint;
using generate::SafetensorsFile;
using model_test::expect_error;
using model_test::raw_safetensors;
using model_test::safetensors;
using model_test::TemporaryFolder;

const std::string kEightBytes(8, '\0');

// One tensor 'a' of two F32 with other text in place of its header entry.
std::string with_entry(const std::string& entry) { return raw_safetensors("{\"a\":" + entry + "}", kEightBytes); }

struct Malformed {
  const char* name;
  std::string file;
  const char* says;
};

void PrintTo(const Malformed& malformed, std::ostream* out) { *out << malformed.name; }

class MalformedFile : public testing::TestWithParam<Malformed> {};

TEST_P(MalformedFile, IsRefusedWithTheReason) {
  const TemporaryFolder folder;
  const auto path = folder.write("model.safetensors", GetParam().file);
  expect_error([&] { SafetensorsFile file(path); }, GetParam().says);
  expect_error([&] { SafetensorsFile file(path); }, path.string());
}

std::string length_field(uint64_t value) {
  std::string field;
  for (int i = 0; i < 8; ++i) field += static_cast<char>(value >> 8 * i & 0xff);
  return field;
}

INSTANTIATE_TEST_SUITE_P(
    Safetensors, MalformedFile,
    testing::Values(
        Malformed{"Empty", "", "too few"}, Malformed{"ShorterThanTheLengthField", "1234567", "too few"},
        Malformed{"HeaderLongerThanTheFile", length_field(100) + "{}", "does not fit"},
        Malformed{"HeaderLengthOfAllOnes", length_field(~uint64_t{0}) + "{}", "does not fit"},
        Malformed{"HeaderNotJson", raw_safetensors("{\"a\":", ""), "not valid JSON"},
        Malformed{"HeaderWithoutBytes", raw_safetensors("", ""), "not valid JSON"},
        Malformed{"HeaderAnArray", raw_safetensors("[]", ""), "not a JSON object"},
        Malformed{"EntryANumber", with_entry("5"), "not an object"},
        Malformed{"NoDtype", with_entry(R"({"shape":[2],"data_offsets":[0,8]})"), "no dtype"},
        Malformed{"DtypeANumber", with_entry(R"({"dtype":4,"shape":[2],"data_offsets":[0,8]})"), "no dtype"},
        Malformed{"UnknownDtype", with_entry(R"({"dtype":"F31","shape":[2],"data_offsets":[0,8]})"), "F31"},
        Malformed{"NoShape", with_entry(R"({"dtype":"F32","data_offsets":[0,8]})"), "no shape"},
        Malformed{"NegativeExtent", with_entry(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), "shape"},
        Malformed{"FractionalExtent", with_entry(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"), "shape"},
        Malformed{"ExtentAboveInt64",
                  with_entry(R"({"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8]})"), "shape"},
        Malformed{"ShapeProductOverflows",
                  with_entry(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]})"), "overflows"},
        Malformed{"ShapeLargerThanTheData", with_entry(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"),
                  "needs 12"},
        Malformed{"NoOffsets", with_entry(R"({"dtype":"F32","shape":[2]})"), "data_offsets"},
        Malformed{"OneOffset", with_entry(R"({"dtype":"F32","shape":[2],"data_offsets":[8]})"), "data_offsets"},
        Malformed{"NegativeOffset", with_entry(R"({"dtype":"F32","shape":[2],"data_offsets":[-8,0]})"), "data_offsets"},
        Malformed{"OffsetsReversed", with_entry(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), "8 to 0"},
        Malformed{"OffsetsBeyondTheData", with_entry(R"({"dtype":"F32","shape":[2],"data_offsets":[4,12]})"),
                  "4 to 12"},
        Malformed{"HoleBeforeTheTensor", with_entry(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"),
                  "a hole at byte 0"},
        Malformed{"BytesAfterTheTensor", with_entry(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})"),
                  "4 of 8 bytes"},
        Malformed{"OverlappingTensors",
                  raw_safetensors(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                                  R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                                  kEightBytes),
                  "an overlap at byte 8"},
        Malformed{"TensorListedTwice",
                  raw_safetensors(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                                  R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
                                  kEightBytes),
                  "'a' is listed twice"}),
    [](const testing::TestParamInfo<Malformed>& info) { return info.param.name; });

TEST(Safetensors, EveryTruncationOfAFileIsRefused) {
  const TemporaryFolder folder;
  const std::string whole = safetensors({{"a", {2, 3}, {1, 2, 3, 4, 5, 6}}, {"b", {1}, {7}}}, "F16");
  for (size_t size = 0; size < whole.size(); ++size) {
    const auto path = folder.write("model.safetensors", std::string_view(whole).substr(0, size));
    EXPECT_THROW(SafetensorsFile file(path), generate::Error) << size << " of " << whole.size() << " bytes";
  }
  EXPECT_NO_THROW(SafetensorsFile file(folder.write("model.safetensors", whole)));
}

TEST(Safetensors, MissingFilesAndFoldersAreNamed) {
  const TemporaryFolder folder;
  expect_error([&] { SafetensorsFile file(folder.path() / "none.safetensors"); }, "none.safetensors: No such file");
  expect_error([&] { SafetensorsFile file(folder.path()); }, "not a regular file");
  expect_error([&] { Checkpoint checkpoint(folder.path() / "none"); }, "not a folder");
  expect_error([&] { Checkpoint checkpoint(folder.path()); }, "no *.safetensors.index.json");
}

TEST(Safetensors, ReadsScalarsEmptyTensorsAndUnalignedData) {
  const TemporaryFolder folder;
  folder.write("model.safetensors", raw_safetensors(R"({"byte":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                                    R"("none":{"dtype":"F32","shape":[0,4],"data_offsets":[1,1]},)"
                                                    R"("scalar":{"dtype":"F32","shape":[],"data_offsets":[1,5]}})",
                                                    std::string("\x01\x00\x00\x80\x3f", 5)));
  const Checkpoint checkpoint(folder.path());
  std::vector<float> values;
  checkpoint.append_f32("none", std::vector<int64_t>{0, 4}, values);
  EXPECT_TRUE(values.empty());
  checkpoint.append_f32("scalar", {}, values);
  EXPECT_EQ(values, std::vector<float>{1.0f});
}

TEST(Safetensors, WidensEachWeightType) {
  const std::vector<float> values = {0.0f, -1.5f, 0x1p-14f, 3.0f};  // exact in every type
  for (const char* dtype : {"F32", "F16", "BF16"}) {
    const TemporaryFolder folder;
    folder.write("model.safetensors", safetensors({{"a", {2, 2}, values}}, dtype));
    std::vector<float> read;
    Checkpoint(folder.path()).append_f32("a", std::vector<int64_t>{2, 2}, read);
    EXPECT_EQ(read, values) << dtype;
  }
}

TEST(Safetensors, WrongNameShapeOrTypeOfATensorIsNamed) {
  const TemporaryFolder folder;
  folder.write("model.safetensors", with_entry(R"({"dtype":"I64","shape":[1],"data_offsets":[0,8]})"));
  const Checkpoint checkpoint(folder.path());
  std::vector<float> values;
  expect_error([&] { checkpoint.append_f32("b", std::vector<int64_t>{1}, values); }, "'b' is missing");
  expect_error(
      [&] {
        checkpoint.append_f32("a", std::vector<int64_t>{2, 1}, values);
      },
      "[1], and config.json asks for [2, 1]");
  expect_error([&] { checkpoint.append_f32("a", std::vector<int64_t>{1}, values); }, "I64");
}

TEST(Safetensors, ShardsAreJoinedAndAMissingOneIsNoticed) {
  const TemporaryFolder folder;
  const std::string first = safetensors({{"a", {1}, {1}}}, "F32"), second = safetensors({{"b", {1}, {2}}}, "F32");
  folder.write("model-00001-of-00002.safetensors", first);
  expect_error([&] { Checkpoint checkpoint(folder.path()); }, "says 2 shards, and 1 are here");
  folder.write("model-00002-of-00002.safetensors", second);
  EXPECT_EQ(Checkpoint(folder.path()).names(), (std::vector<std::string>{"a", "b"}));
  folder.write("model-00002-of-00002.safetensors", first);
  expect_error([&] { Checkpoint checkpoint(folder.path()); }, "'a' is in two files");
}

TEST(Safetensors, AnIndexNamesTheFiles) {
  const TemporaryFolder folder;
  folder.write("first.safetensors", safetensors({{"a", {1}, {1}}}, "F32"));
  folder.write("second.safetensors", safetensors({{"b", {1}, {2}}}, "F32"));
  const auto index = [&](const std::string& text) { folder.write("model.safetensors.index.json", text); };
  const auto open = [&] { Checkpoint checkpoint(folder.path()); };
  index(R"({"weight_map":{"a":"first.safetensors","b":"second.safetensors"}})");
  EXPECT_EQ(Checkpoint(folder.path()).names(), (std::vector<std::string>{"a", "b"}));
  index(R"({"weight_map":{"a":"first.safetensors","c":"second.safetensors"}})");
  expect_error(open, "'c' is in none");
  index(R"({"weight_map":{"a":"third.safetensors"}})");
  expect_error(open, "third.safetensors");
  index(R"({"weight_map":{"a":"../first.safetensors"}})");
  expect_error(open, "'a' is not mapped to the name of a file in this folder");
  index(R"({"weight_map":[]})");
  expect_error(open, "no weight_map");
  index("");
  expect_error(open, "not valid JSON");
}

}  // namespace
