// What PyTorch does with the rows of a suite, measured in the same run.
#pragma once

#include <nlohmann/json.hpp>

namespace adaattn::bench {

// What the script prints for the rows: {"ceilings": {name: value}, "rows": {row: {peer: us}}}; empty without PyTorch.
nlohmann::json run_peers(const char* script, const nlohmann::json& rows);

}  // namespace adaattn::bench
