#include "capi/plan_cache.h"

namespace adaattn::capi {

// Dropped plans are destroyed after the lock is released: a back-end may take its time over it.

PlanCache::Node PlanCache::take(const Problem& problem) {
  Node node;
  const std::lock_guard lock(mutex_);
  for (auto it = idle_.begin(); it != idle_.end(); ++it) {
    if (!(it->problem == problem)) continue;
    node.splice(node.begin(), idle_, it);
    break;
  }
  return node;
}

void PlanCache::put(Node node) {
  Node dropped;
  const std::lock_guard lock(mutex_);
  idle_.splice(idle_.begin(), node);
  trim(dropped);
}

size_t PlanCache::limit() const {
  const std::lock_guard lock(mutex_);
  return limit_;
}

void PlanCache::set_limit(size_t limit) {
  Node dropped;
  const std::lock_guard lock(mutex_);
  limit_ = limit;
  trim(dropped);
}

void PlanCache::clear() {
  Node dropped;
  const std::lock_guard lock(mutex_);
  dropped.splice(dropped.begin(), idle_);
}

size_t PlanCache::size() const {
  const std::lock_guard lock(mutex_);
  return idle_.size();
}

void PlanCache::trim(Node& dropped) {
  while (idle_.size() > limit_) dropped.splice(dropped.begin(), idle_, std::prev(idle_.end()));
}

}  // namespace adaattn::capi
