// The Llama architecture in float64 and plain loops, written from its definition: what the engine is held against.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "engine/config.h"
#include "model/checkpoint_writer.h"

namespace model_test {

// Weights by their names in a checkpoint, row-major.
using TensorMap = std::map<std::string, Tensor>;

// Logits [tokens, vocab] after each token of one sequence.
std::vector<double> reference_logits(const generate::ModelConfig& config, const TensorMap& weights,
                                     const std::vector<int32_t>& tokens);

}  // namespace model_test
