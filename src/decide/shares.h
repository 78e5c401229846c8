// By which shares of a row's mass a policy keeps tiles, as the length of the context asks for. Host code: what comes of
// it is part of a plan's options.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "decide/policy.h"

namespace adaattn::decide {

struct Shares {
  double cell = 0;       // of a block of rows in a cell (cells.h), from which on its tile is kept; 0: none is
  double needle = 0;     // of a row in a needle (needles.h), likewise; 0: there are none
  double remainder = 0;  // Options::remainder
  // A share falls as there are more cells: at half the context the shares of the same loss are 2^power times as large.
  double power = 0.5;
  double most_cell = 0.05;  // however short the context
};

// What a policy goes by. Needles keep fewer tiles at the same loss, which saves time with the square of the length;
// finding them takes a part of a call's time that grows as the length falls. From cells_from to below needles_from
// keys, as a back-end has measured it, cells alone decide. In contexts that are shorter still they keep so much more
// that needles pay again.
struct ShareRule {
  Shares cells = {}, needles = {};
  int64_t cells_from = 0, needles_from = 0;
};

// For a problem of up to `keys` keys; calibrated: the context of the rule's shares. Beyond it shares follow the mean.
inline Shares shares_at(const ShareRule& rule, int64_t keys, int64_t calibrated) {
  Shares shares = keys >= rule.cells_from && keys < rule.needles_from ? rule.cells : rule.needles;
  const double length = static_cast<double>(calibrated) / static_cast<double>(std::max<int64_t>(keys, 1));
  const double scale = length < 1 ? length : std::pow(length, shares.power);
  shares.cell = std::min(shares.most_cell, shares.cell * scale);
  shares.needle = std::min(0.05, shares.needle * scale);
  return shares;
}

inline void set_shares(const Shares& shares, Options* o) {
  o->keep_peak = static_cast<uint32_t>(0x1p24 * shares.cell);
  o->needle_mass = static_cast<float>(shares.needle);
  o->remainder = static_cast<float>(shares.remainder);
}

}  // namespace adaattn::decide
