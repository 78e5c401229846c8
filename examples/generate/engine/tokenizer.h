// Byte tokens, the tokenizer of models with a vocabulary of 256. Other vocabularies take and print token ids.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/config.h"

namespace generate {

constexpr int64_t kByteVocabulary = 256;

inline bool has_byte_tokens(const ModelConfig& config) { return config.vocab_size == kByteVocabulary; }

// Throws unless the model has byte tokens.
std::vector<int32_t> tokenize(const ModelConfig& config, std::string_view text);

// Token ids separated by commas or white space, each checked against the vocabulary.
std::vector<int32_t> parse_token_ids(const ModelConfig& config, std::string_view text);

// What a token adds to the output: its byte, or its id and a space.
std::string detokenize(const ModelConfig& config, int32_t token);

}  // namespace generate
