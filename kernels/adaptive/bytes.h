// Heads in 8 bits among others: how far off they are, and K and V for them alone.
#pragma once

#include "adaptive/int8_tables.h"
#include "decide/choose.h"

namespace adaattn::cuda {

// Rounding of P and V to e4m3, 2.65e-2 each, for a row that sees one key: more keys average V's part and the
// normalisation takes P's. Rounding of Q and K (under 1e-2) is not felt beside it.
inline constexpr float kByteRoundError = 0.0375f;

// launch_quantize() of the (sequence, KV head) pairs of which some query head takes 8 bits; nothing is read or written
// of the others. choice: [batch, heads_q], written before the grids that the stream holds.
cudaError_t launch_quantize_chosen(const AttnParams& params, const Int8Tables& tables, const decide::HeadChoice* choice,
                                   cudaStream_t stream);

}  // namespace adaattn::cuda
