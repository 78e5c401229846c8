#include "adaptive/structured.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "support/random.h"

namespace adaattn::test {
namespace {

constexpr int64_t kTile = 128;

// By the definition of the mask, over all pairs of the tile.
bool any_visible(const AttentionData& data, int64_t b, int64_t q, int64_t k) {
  const adaattn_attn_desc_t& d = data.desc;
  const int64_t offset = d.mask == ADAATTN_MASK_CAUSAL ? data.len_k(b) - data.len_q(b) : 0;
  for (int64_t i = q * kTile; i < std::min((q + 1) * kTile, data.len_q(b)); ++i) {
    for (int64_t j = k * kTile; j < std::min((k + 1) * kTile, data.len_k(b)); ++j) {
      const bool future = d.mask == ADAATTN_MASK_CAUSAL && j > i + offset;
      const bool outside = d.window_left >= 0 && j < i + offset - d.window_left;
      if (!future && !outside) return true;
    }
  }
  return false;
}

}  // namespace

void make_structured(AttentionData& data, const Structure& s, uint64_t seed) {
  Random random(seed);
  const adaattn_attn_desc_t& d = data.desc;
  const auto directions = [&](int64_t width) {
    std::vector<std::vector<double>> list(static_cast<size_t>(s.topics),
                                          std::vector<double>(static_cast<size_t>(width)));
    for (auto& direction : list)
      for (double& x : direction) x = random.normal();
    return list;
  };
  const auto topics = directions(d.head_dim_qk), contents = directions(data.d_v());
  for (int64_t b = 0; b < data.batch(); ++b) {
    for (int64_t j = 0; j < data.len_k(b); ++j) {
      const auto topic = static_cast<size_t>(j / s.run * 5 % s.topics);
      for (int64_t h = 0; h < d.heads_kv; ++h) {
        for (int64_t c = 0; c < d.head_dim_qk; ++c)
          data.k.set(data.key_index(b, j, h, c),
                     s.topic * topics[topic][static_cast<size_t>(c)] * 0.25 + random.normal());
        for (int64_t c = 0; c < data.d_v(); ++c) {
          const double noise = c < data.d_v() / 4 ? 0.5 : s.value_noise;
          data.v.set(data.key_index(b, j, h, c), s.value_mean +
                                                     (s.topic > 0 ? contents[topic][static_cast<size_t>(c)] : 0) +
                                                     (s.topic > 0 ? noise : 1.0) * random.normal());
        }
      }
    }
    for (int64_t i = 0; i < data.len_q(b); ++i) {
      for (int64_t h = 0; h < d.heads_q; ++h) {
        const auto topic = static_cast<size_t>((i / 64 * 3 + h) % s.topics);
        for (int64_t c = 0; c < d.head_dim_qk; ++c)
          data.q.set(data.query_index(b, i, h, c), s.topic * topics[topic][static_cast<size_t>(c)] + random.normal());
      }
    }
  }
}

adaattn_adaptive_desc_t adaptive_desc(adaattn_policy_t policy) {
  adaattn_adaptive_desc_t desc;
  adaattn_adaptive_desc_init(&desc, sizeof desc);
  desc.policy = policy;
  return desc;
}

AdaptivePlan::AdaptivePlan(const Context& context, const adaattn_attn_desc_t& desc,
                           const adaattn_adaptive_desc_t& adaptive) {
  if (adaattn_plan_create(context.get(), &desc, &adaptive, &plan_) != ADAATTN_SUCCESS)
    throw std::runtime_error(last_error());
}

AdaptivePlan::~AdaptivePlan() { adaattn_plan_destroy(plan_); }

adaattn_status_t AdaptivePlan::execute(const AttentionData& data) const {
  const adaattn_io_t io = data.io();
  return adaattn_plan_execute(plan_, &io, nullptr, 0, nullptr);
}

adaattn_plan_stats_t AdaptivePlan::stats(uint32_t flags) const {
  adaattn_plan_stats_t stats;
  stats.struct_size = sizeof stats;
  if (adaattn_plan_get_stats(plan_, flags, &stats) != ADAATTN_SUCCESS) throw std::runtime_error(last_error());
  return stats;
}

std::vector<adaattn_head_stats_t> AdaptivePlan::heads() const {
  size_t count = 0;
  if (adaattn_plan_get_head_stats(plan_, nullptr, sizeof(adaattn_head_stats_t), 0, &count) != ADAATTN_SUCCESS)
    throw std::runtime_error(last_error());
  std::vector<adaattn_head_stats_t> heads(count);
  if (adaattn_plan_get_head_stats(plan_, heads.data(), sizeof heads[0], count, &count) != ADAATTN_SUCCESS)
    throw std::runtime_error(last_error());
  return heads;
}

adaattn_plan_info_t AdaptivePlan::info() const {
  adaattn_plan_info_t info;
  info.struct_size = sizeof info;
  if (adaattn_plan_get_info(plan_, &info) != ADAATTN_SUCCESS) throw std::runtime_error(last_error());
  return info;
}

AdaptivePlan::TileMap AdaptivePlan::tile_map(int64_t batch, int64_t head) const {
  TileMap map;
  if (adaattn_plan_get_tile_map(plan_, batch, head, nullptr, 0, &map.query_tiles, &map.key_tiles) != ADAATTN_SUCCESS)
    throw std::runtime_error(last_error());
  map.tiles.assign(static_cast<size_t>(map.query_tiles * map.key_tiles), uint8_t{0x5a});
  if (adaattn_plan_get_tile_map(plan_, batch, head, map.tiles.data(), map.tiles.size(), &map.query_tiles,
                                &map.key_tiles) != ADAATTN_SUCCESS)
    throw std::runtime_error(last_error());
  return map;
}

Tensor exact_output(const Context& context, const AttentionData& data) {
  Tensor o(data.desc.dtype_q, data.o.shape());
  adaattn_io_t io = data.io();
  io.o = o.host();
  if (adaattn_attention(context.get(), &data.desc, nullptr, &io, nullptr) != ADAATTN_SUCCESS)
    throw std::runtime_error(last_error());
  return o;
}

double head_error(const AttentionData& data, const Tensor& exact, int64_t b, int64_t h) {
  const int64_t kv = h / (data.desc.heads_q / data.desc.heads_kv);
  double error = 0, spread = 0;
  for (int64_t c = 0; c < data.d_v(); ++c) {
    double mean = 0, square = 0;
    for (int64_t j = 0; j < data.len_k(b); ++j) mean += data.v.get(data.key_index(b, j, kv, c));
    mean /= static_cast<double>(data.len_k(b));
    for (int64_t j = 0; j < data.len_k(b); ++j) {
      const double x = data.v.get(data.key_index(b, j, kv, c)) - mean;
      square += x * x;
    }
    spread += square / static_cast<double>(data.len_k(b));
    for (int64_t i = 0; i < data.len_q(b); ++i) {
      const auto at = data.query_index(b, i, h, c);
      const double x = data.o.get(at) - exact.get(at);
      error += x * x;
    }
  }
  return std::sqrt(error / static_cast<double>(data.len_q(b)) / spread);
}

int64_t check_maps(const AdaptivePlan& plan, const AttentionData& data) {
  int64_t all_skipped = 0;
  const auto heads = plan.heads();
  EXPECT_EQ(heads.size(), static_cast<size_t>(data.batch() * data.desc.heads_q));
  for (const adaattn_head_stats_t& head : heads) {
    SCOPED_TRACE("sequence " + std::to_string(head.batch) + ", head " + std::to_string(head.head));
    const AdaptivePlan::TileMap map = plan.tile_map(head.batch, head.head);
    EXPECT_EQ(map.query_tiles, (data.len_q(head.batch) + kTile - 1) / kTile);
    EXPECT_EQ(map.key_tiles, (data.len_k(head.batch) + kTile - 1) / kTile);
    int64_t visible = 0, kept = 0, wrong = 0;
    for (int64_t q = 0; q < map.query_tiles; ++q) {
      for (int64_t k = 0; k < map.key_tiles; ++k) {
        const uint8_t state = map.at(q, k);
        wrong += state > 2 || (state != 0) != any_visible(data, head.batch, q, k);
        visible += state != 0;
        kept += state == 2;
      }
    }
    EXPECT_EQ(wrong, 0);
    EXPECT_DOUBLE_EQ(head.kept_tiles, static_cast<double>(kept) / static_cast<double>(visible));
    if (head.dense) {
      EXPECT_EQ(kept, visible);
    }
    all_skipped += visible - kept;
  }
  return all_skipped;
}

}  // namespace adaattn::test
