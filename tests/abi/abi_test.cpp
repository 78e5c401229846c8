// The binary interface: exported names, struct layout, what the shared library asks of the system.
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>
#include <sstream>
#include <string>

#include "adaattn/adaattn.h"

namespace {

using Names = std::set<std::string>;

std::string read_text(const std::string& path) {
  std::ifstream file(path);
  EXPECT_TRUE(file.good()) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string output_of(const std::string& command) {
  std::string text;
  FILE* pipe = popen(command.c_str(), "r");
  EXPECT_NE(pipe, nullptr) << command;
  char chunk[4096];
  while (const size_t count = std::fread(chunk, 1, sizeof chunk, pipe)) text.append(chunk, count);
  EXPECT_EQ(pclose(pipe), 0) << command;
  return text;
}

Names matches(const std::string& text, const char* pattern) {
  const std::regex regex(pattern);
  Names names;
  for (std::sregex_iterator it(text.begin(), text.end(), regex), end; it != end; ++it) names.insert((*it)[1].str());
  return names;
}

Names lines_of(const std::string& text) { return matches(text, "([^\\n]+)"); }

std::string header_without_comments() {
  return std::regex_replace(read_text(ADAATTN_HEADER), std::regex("/\\*[^]*?\\*/"), "");
}

TEST(Abi, CommittedSymbolListIsSorted) {
  const std::string text = read_text(ADAATTN_SYMBOLS);
  std::ostringstream sorted;
  for (const std::string& name : lines_of(text)) sorted << name << '\n';
  EXPECT_EQ(text, sorted.str());
}

TEST(Abi, HeaderDeclaresTheCommittedSymbols) {
  EXPECT_EQ(matches(header_without_comments(), "ADAATTN_API\\s[^;(]*?(adaattn_\\w+)\\("),
            lines_of(read_text(ADAATTN_SYMBOLS)));
}

TEST(Abi, LibraryExportsTheCommittedSymbolsAndNothingElse) {
  Names expected;
  for (const std::string& name : lines_of(read_text(ADAATTN_SYMBOLS))) expected.insert("T " + name + "@@ADAATTN_0");
  expected.insert("A ADAATTN_0");
  const std::string text =
      std::regex_replace(output_of(ADAATTN_NM " -D --defined-only --with-symbol-versions " ADAATTN_LIBRARY),
                         std::regex("ADAATTN_0@@ADAATTN_0"), "ADAATTN_0");
  EXPECT_EQ(matches(text, "[0-9a-f]+ (\\w [^\\n]+)"), expected);
}

TEST(Abi, ExportMapNamesEverySymbolWithoutWildcard) {
  std::string map = std::regex_replace(read_text(ADAATTN_MAP), std::regex("#[^\\n]*"), "");
  map.resize(map.find("local:"));
  EXPECT_EQ(map.find('*'), std::string::npos);
  EXPECT_EQ(matches(map, "(\\w+);"), lines_of(read_text(ADAATTN_SYMBOLS)));
}

TEST(Abi, StructLayoutIsTheCommittedOne) { EXPECT_EQ(output_of(ADAATTN_LAYOUT_PROGRAM), read_text(ADAATTN_LAYOUT)); }

TEST(Abi, LayoutListHasEveryPublicStructInFull) {
  const std::string layout = read_text(ADAATTN_LAYOUT);
  EXPECT_EQ(matches(layout, "(adaattn_\\w+) \\d+"), matches(header_without_comments(), "\\} (adaattn_\\w+);"));
  EXPECT_EQ(layout.find("unlisted"), std::string::npos);
}

TEST(Abi, HeaderIncludesNothingButTwoStandardHeaders) {
  EXPECT_EQ(matches(read_text(ADAATTN_HEADER), "#\\s*include ([^\\n]+)"), (Names{"<stddef.h>", "<stdint.h>"}));
}

TEST(Abi, SonameCarriesTheMajorVersion) {
  EXPECT_EQ(matches(output_of(ADAATTN_READELF " -d " ADAATTN_LIBRARY), "\\(SONAME\\)[^\\[]*\\[([^\\]]+)"),
            (Names{"libadaattn.so." + std::to_string(ADAATTN_VERSION_MAJOR)}));
}

TEST(Abi, LibraryNeedsOnlyTheCLibrary) {
  if (*ADAATTN_SANITIZER != '\0') GTEST_SKIP() << "built with -fsanitize=" ADAATTN_SANITIZER ", which adds its runtime";
  Names needed = matches(output_of(ADAATTN_READELF " -d " ADAATTN_LIBRARY), "\\(NEEDED\\)[^\\[]*\\[([^\\]]+)");
  EXPECT_EQ(needed.count("libc.so.6"), 1u);
  for (const char* allowed : {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"})
    needed.erase(allowed);
#if defined(ADAATTN_WITH_CUDA)
  for (const char* allowed : {"libdl.so.2", "libpthread.so.0", "librt.so.1"}) needed.erase(allowed);  // parts of glibc
#endif
  EXPECT_EQ(needed, Names{});
}

TEST(Abi, LibraryLoadsOnGlibc235) {
  if (*ADAATTN_SANITIZER != '\0') GTEST_SKIP() << "built with -fsanitize=" ADAATTN_SANITIZER ", which adds its runtime";
  const Names versions = matches(output_of(ADAATTN_READELF " -V " ADAATTN_LIBRARY), "GLIBC_2\\.(\\d+)");
  EXPECT_FALSE(versions.empty());
  for (const std::string& minor : versions) EXPECT_LE(std::stoi(minor), 35) << "GLIBC_2." << minor;
}

}  // namespace
