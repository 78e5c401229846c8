// Every case of the table against the oracle, crossed with dtypes and targets.
#pragma once

#include <string>
#include <vector>

#include "attention/fixture.h"

namespace adaattn::test {

struct Cell {
  const AttentionCase* c;
  Dtypes dtypes;
  Target target;
};

inline void PrintTo(const Cell& cell, std::ostream* out) {
  *out << describe(*cell.c) << ", " << cell.dtypes.name << ", " << cell.target.name;
}

inline std::vector<Cell> cells(bool reduced, const std::vector<Dtypes>& dtype_list) {
  std::vector<Cell> list;
  for (const Target& target : listed_targets(kDevice))
    for (const AttentionCase& c : attention_cases())
      for (const Dtypes& dtypes : dtype_list)
        if (c.reduced == reduced) list.push_back({&c, dtypes, target});
  return list;
}

inline std::string cell_name(const testing::TestParamInfo<Cell>& info) {
  return info.param.c->name + "_" + info.param.dtypes.name + "_" + info.param.target.name;
}

class Attention : public testing::TestWithParam<Cell> {
 protected:
  void SetUp() override {
    if (const std::string reason = missing(GetParam().target); !reason.empty()) GTEST_SKIP() << reason;
  }
};

TEST_P(Attention, AgreesWithTheOracle) {
  const auto& [c, dtypes, target] = GetParam();
  const uint64_t seed = run_seed();
  SCOPED_TRACE(describe(*c));
  const Context context(target);
  AttentionData data(*c, dtypes, seed);
  const reference::AttentionResult expected = reference::attention(data.desc, data.io());

  if (const std::string reason = unsupported(context, data.desc); !reason.empty()) GTEST_SKIP() << reason;
  const Plan plan(context, data.desc);
  const auto before_o = bytes_outside(data.o), before_lse = bytes_outside(data.lse);
  ASSERT_TRUE(succeeded(plan.execute(data)));
  EXPECT_TRUE(matches(data, expected, weights_of(target)));
  EXPECT_EQ(bytes_outside(data.o), before_o) << "bytes between the rows of o were written";
  EXPECT_EQ(bytes_outside(data.lse), before_lse) << "bytes between the elements of lse were written";

  const adaattn_plan_stats_t stats = plan.stats();
  EXPECT_EQ(stats.calls, 1u);
  EXPECT_EQ(stats.query_rows, expected.query_rows);
  EXPECT_EQ(stats.score_pairs, expected.score_pairs);
  EXPECT_EQ(stats.flops, 2.0 * static_cast<double>(c->d_qk + data.d_v()) * static_cast<double>(expected.score_pairs));
  EXPECT_EQ(stats.violation_field, ADAATTN_FIELD_NONE)
      << "at index " << stats.violation_index << " the value " << stats.violation_value;

  AttentionData bare = with_own_outputs(data);
  bare.drop_optional_outputs();
  ASSERT_TRUE(succeeded(attention(context, bare)));
  EXPECT_TRUE(matches(bare, expected, weights_of(target))) << "without lse and entropy, by adaattn_attention()";
}

}  // namespace adaattn::test
