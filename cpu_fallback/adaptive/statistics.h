// What an adaptive plan tells about itself: sums over its calls, and one record for each head of the newest.
#pragma once

#include <cstdint>
#include <vector>

#include "backend.h"
#include "cpu_fallback/adaptive/call.h"

namespace adaattn::cpu {

adaattn_precision_t input_precision(Dtype dtype);

class Statistics {
 public:
  explicit Statistics(const Problem& problem);

  // Time of the stages is added by the plan itself.
  AdaptiveCounters& sums() { return counters_.adaptive; }
  const std::vector<HeadRecord>& records() const { return records_; }
  PlanCounters read(bool reset);

  void begin_call() { records_.clear(); }
  // A head computed exactly. feedback: the multiplier that its next prediction takes.
  void add_exact(const AttnParams& params, int64_t b, int64_t head, double entropy, float feedback);
  // A head of a unit that verify is done with, exact or not.
  void add_head(const AdaptiveCall& call, const Unit& unit, int64_t member, float feedback);
  void end_call(const AttnParams& params);

 private:
  void add(const HeadRecord& record, int64_t tiles, int64_t kept, int64_t probed_in);

  Dtype dtype_;
  PlanCounters counters_;
  std::vector<HeadRecord> records_;  // [batch][heads_q] of the newest call
};

}  // namespace adaattn::cpu
