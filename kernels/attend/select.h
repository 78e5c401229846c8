// The selector: which kernel serves a problem or a call, and in how many splits. The only place that decides.
#pragma once

#include <cstdint>
#include <vector>

#include "attend/kernel.h"
#include "core/problem.h"

namespace adaattn::cuda {

struct DeviceTraits {
  int32_t compute_capability = 0;  // major * 10 + minor
  int32_t multiprocessors = 0;
  int64_t l2_bytes = 0;
  int64_t shared_bytes = 0;  // per CTA, opted in
};

// Tiles of a launch whose splits are joined by the last of their CTAs.
inline constexpr int32_t kMostJoinedTiles = 32;

// One grid and, with more than one split that is not joined, the combining one.
struct Launch {
  const AttendKernel* kernel = nullptr;
  int32_t m_tiles = 0, pack = 1, splits = 1, section = 1;
  bool joined = false;
};

// Refuses (NOT_SUPPORTED, with the reason) what no kernel of this build and device serves.
void check_problem(const Problem& problem, const DeviceTraits& device);

// Features of any call of a problem; a call adds kUnaligned where its rows are.
uint32_t features_of(const Problem& problem);

// The extents that the choice depends on.
struct Extent {
  int64_t batch = 0, seqlen_q = 0, seqlen_k = 0, total_q = 0;
};

// bytes: what the partial results of split keys may take, or -1 for unlimited.
Launch choose(const Problem& problem, const Extent& extent, uint32_t features, const DeviceTraits& device,
              int64_t partial_bytes);

// How many of `pairs` (sequence, head) pairs are walked together, their tiles from the longest to the shortest;
// kv_bytes are the keys and values of one pair, `group` of them read the same. A section takes a sixth of the L2 cache,
// for long tiles of the next ones run beside its short ones.
int32_t section_of(const DeviceTraits& device, int64_t pairs, int64_t kv_bytes, int64_t group);

// Sections of at most `most` pairs, in whole groups where they fit. A last section of few pairs would leave most
// multiprocessors idle behind its longest tiles: all get the same number of pairs if one above most / 2 divides them,
// and nearly the same otherwise.
int32_t even_section(int64_t pairs, int64_t most, int64_t group);

// Enough for the partial results of every call within the problem's maxima.
int64_t partial_capacity(const Problem& problem, const DeviceTraits& device);

// Bytes of `splits` partial results of one row.
int64_t partial_row_bytes(const Problem& problem);

// Every kernel that a call of this problem may get, for loading ahead of a capture.
std::vector<const AttendKernel*> candidates(const Problem& problem, const DeviceTraits& device);

}  // namespace adaattn::cuda
