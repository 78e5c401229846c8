// Exact attention on the CPU: the selector, and the plan that deals a call's work out to the pool.
#pragma once

#include <memory>

#include "backend.h"
#include "cpu_fallback/attend/kernels.h"
#include "cpu_fallback/thread_pool.h"

namespace adaattn::cpu {

// What a plan for `problem` would run with this instruction set and number of threads.
PlanInfo select_attention(const Problem& problem, adaattn_isa_t isa, int32_t num_threads);

// The pool must outlive the plan.
std::unique_ptr<AttentionPlan> make_attention_plan(const Problem& problem, adaattn_isa_t isa, ThreadPool& pool);

}  // namespace adaattn::cpu
