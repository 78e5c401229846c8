// The adaptive descriptor, validated and with every default of its policy filled in.
#pragma once

#include "adaattn/adaattn.h"
#include "core/problem.h"
#include "decide/policy.h"

namespace adaattn {

// Throws naming the field ("adaptive.tolerance"). An EXACT policy gives Options whose policy is kExact.
decide::Options resolve_options(const adaattn_adaptive_desc_t& desc, const Problem& problem);

}  // namespace adaattn
