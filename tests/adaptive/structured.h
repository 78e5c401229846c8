// Inputs with the structure that adaptive attention lives on: keys come in topics, queries look for one of them, values
// follow a few directions.
#pragma once

#include <cstdint>
#include <vector>

#include "support/attention_data.h"
#include "support/context.h"

namespace adaattn::test {

struct Structure {
  double topic = 2.0;  // strength of a topic in q and k; 0: random normal input
  int topics = 8;
  int64_t run = 128;          // keys in a row that share a topic
  double value_noise = 0.05;  // of the directions of V beyond the first quarter
  double value_mean = 0;      // added to every element of V
};

// Overwrites q, k and v.
void make_structured(AttentionData& data, const Structure& structure, uint64_t seed);

adaattn_adaptive_desc_t adaptive_desc(adaattn_policy_t policy);

class AdaptivePlan {
 public:
  AdaptivePlan(const Context& context, const adaattn_attn_desc_t& desc, const adaattn_adaptive_desc_t& adaptive);
  ~AdaptivePlan();
  AdaptivePlan(const AdaptivePlan&) = delete;
  AdaptivePlan& operator=(const AdaptivePlan&) = delete;
  adaattn_plan_t* get() const { return plan_; }
  adaattn_status_t execute(const AttentionData& data) const;
  adaattn_plan_stats_t stats(uint32_t flags = ADAATTN_STATS_WAIT) const;
  std::vector<adaattn_head_stats_t> heads() const;
  adaattn_plan_info_t info() const;
  struct TileMap {
    int64_t query_tiles = -1, key_tiles = -1;
    std::vector<uint8_t> tiles;
    uint8_t at(int64_t q, int64_t k) const { return tiles[static_cast<size_t>(q * key_tiles + k)]; }
    const uint8_t* row(int64_t q) const { return tiles.data() + q * key_tiles; }
  };
  TileMap tile_map(int64_t batch, int64_t head) const;

 private:
  adaattn_plan_t* plan_ = nullptr;
};

// The output of the exact plan, and the error of data.o against it for one (sequence, head), as adaattn.h defines it.
Tensor exact_output(const Context& context, const AttentionData& data);
double head_error(const AttentionData& data, const Tensor& exact, int64_t b, int64_t h);

// Expects of the maps of the newest call what the mask and the statistics of each head say. Returns the number of
// skipped tiles.
int64_t check_maps(const AdaptivePlan& plan, const AttentionData& data);

}  // namespace adaattn::test
