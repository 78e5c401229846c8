// A call's tensors as the kernels of one sequence and KV head read them.
#pragma once

#include "core/attn_params.h"
#include "cpu_fallback/attend/kernels.h"

namespace adaattn::cpu {

// K or V of sequence b and KV head `head`.
KeyOperand key_operand(const AttnParams& p, const Operand& x, int64_t b, const Sequence& s, int64_t head);

// Queries of sequence b and query heads [head, head + group).
RowOperands row_operands(const AttnParams& p, int64_t b, const Sequence& s, int64_t head, int64_t group);

// Rows [row, row + count) of a sequence: what each of them sees.
void fill_ranges(const AttnParams& p, const Sequence& s, int64_t group, int64_t row, int64_t count, int32_t* begin,
                 int32_t* end);

// (query, visible key) pairs of one sequence and head.
int64_t visible_pairs(const AttnParams& p, const Sequence& s);

}  // namespace adaattn::cpu
