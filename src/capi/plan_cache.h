// Plans that adaattn_attention() keeps between calls.
#pragma once

#include <cstddef>
#include <list>
#include <memory>
#include <mutex>

#include "backend.h"
#include "core/problem.h"

namespace adaattn::capi {

// A plan serves one call at a time, so a call takes its plan out and puts it back when done; the cache holds the idle
// ones, most recently used first, and forgets the last ones over its limit.
class PlanCache {
 public:
  struct Entry {
    Problem problem;
    std::unique_ptr<AttentionPlan> plan;
  };
  using Node = std::list<Entry>;  // of one entry: moves in and out without allocating

  static constexpr size_t kDefaultLimit = 64;

  // Empty when no idle plan fits.
  Node take(const Problem& problem);
  void put(Node node);

  size_t limit() const;
  void set_limit(size_t limit);
  void clear();
  size_t size() const;

 private:
  void trim(Node& dropped);

  mutable std::mutex mutex_;
  std::list<Entry> idle_;
  size_t limit_ = kDefaultLimit;
};

}  // namespace adaattn::capi
