// What the host's code decides on the statistics that the device has made.
#pragma once

#include <cstdint>
#include <vector>

#include "gpu/analysis.h"

namespace adaattn::test {

// The host's walk over the device's statistics.
struct HostDecisions {
  std::vector<decide::TileLevels> levels;
  std::vector<decide::HeadLevels> head_levels;
  std::vector<decide::HeadChoice> choice;
  std::vector<decide::HeadFeedback> feedback;  // after the call, if the analysis has multipliers
  std::vector<uint64_t> mask;                  // [heads, query_tiles, mask_words]
  uint64_t skipped = 0, needles = 0;
};

HostDecisions decide_on_host(const Analysis& a);

}  // namespace adaattn::test
