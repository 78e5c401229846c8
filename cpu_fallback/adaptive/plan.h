// Adaptive attention on the CPU: the plan that walks analyze, decide, attend and verify.
#pragma once

#include <memory>

#include "backend.h"
#include "cpu_fallback/thread_pool.h"

namespace adaattn::cpu {

PlanInfo select_adaptive(const Problem& problem, adaattn_isa_t isa, int32_t num_threads);

// The pool must outlive the plan.
std::unique_ptr<AttentionPlan> make_adaptive_plan(const Problem& problem, adaattn_isa_t isa, ThreadPool& pool);

}  // namespace adaattn::cpu
