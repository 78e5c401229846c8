// E4M3 operands on the CPU: widened to f32 with their descale factors, then computed by the plan for f32 operands.
#pragma once

#include <functional>
#include <memory>

#include "backend.h"
#include "cpu_fallback/thread_pool.h"

namespace adaattn::cpu {

// The problem that remains when q, k and v are widened; pages and packed keys are laid out by sequence.
Problem widened(const Problem& problem);

// What a plan made by make_e4m3_plan() reports, from what `inner` says of the widened problem.
PlanInfo e4m3_info(const Problem& problem, PlanInfo inner);

// inner: a plan for widened(problem). The pool must outlive the plan.
std::unique_ptr<AttentionPlan> make_e4m3_plan(const Problem& problem, std::unique_ptr<AttentionPlan> inner,
                                              ThreadPool& pool);

}  // namespace adaattn::cpu
