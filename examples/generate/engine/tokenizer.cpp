#include "engine/tokenizer.h"

#include <charconv>

#include "engine/error.h"

namespace generate {

std::vector<int32_t> tokenize(const ModelConfig& config, std::string_view text) {
  if (!has_byte_tokens(config))
    fail("this model has %lld tokens, and text is understood as bytes for models with %lld only; give token ids",
         static_cast<long long>(config.vocab_size), static_cast<long long>(kByteVocabulary));
  std::vector<int32_t> tokens;
  tokens.reserve(text.size());
  for (const char byte : text) tokens.push_back(static_cast<unsigned char>(byte));
  return tokens;
}

std::vector<int32_t> parse_token_ids(const ModelConfig& config, std::string_view text) {
  constexpr std::string_view kSeparators = ", \t\r\n";
  std::vector<int32_t> tokens;
  for (size_t begin = text.find_first_not_of(kSeparators); begin != std::string_view::npos;) {
    const std::string_view word = text.substr(begin, text.find_first_of(kSeparators, begin) - begin);
    int32_t token = -1;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), token);
    if (error != std::errc() || end != word.data() + word.size() || token < 0 || token >= config.vocab_size)
      fail("'%.*s' is not a token id; whole numbers from 0 to %lld are", static_cast<int>(word.size()), word.data(),
           static_cast<long long>(config.vocab_size - 1));
    tokens.push_back(token);
    begin = text.find_first_not_of(kSeparators, begin + word.size());
  }
  return tokens;
}

std::string detokenize(const ModelConfig& config, int32_t token) {
  if (has_byte_tokens(config)) return std::string(1, static_cast<char>(token));
  return std::to_string(token) + " ";
}

}  // namespace generate
