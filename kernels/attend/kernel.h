// What every attention kernel of the CUDA back-end is launched with, and the registry row that describes one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "adaptive/int8_tables.h"
#include "core/attn_params.h"

namespace adaattn::cuda {

// Lives in device memory, one per plan: what kernels report when the host does not know the lengths.
struct PlanRecord {
  unsigned long long query_rows;
  unsigned long long score_pairs;
  unsigned long long tiles;      // 128 x 128 with a visible pair, times query heads
  unsigned long long violation;  // field << 32 | uint32(value); 0: none
  unsigned long long violation_index;
  // Tile counters of persistent kernels, a pair for each launch in turn: launches of one plan may overlap on different
  // streams. Zero between launches.
  unsigned int scheduler[64];
};

// Query rows that are not all of a sequence's: the entropy tool's strata.
struct RowSample {
  int64_t rows = 0;  // per head; 0: every row
  uint64_t seed = 0;
};

struct AttendArgs {
  AttnParams p;                      // windows cut to +-2^30, scale > 0 unless the kernel has kExtras
  int32_t m_tiles = 0;               // tiles of one (sequence, head): ceil(max rows / tile_q)
  int32_t heads = 0;                 // heads_q / pack
  int32_t pack = 1;                  // query heads interleaved in one tile's rows: row = q_pos * pack + head
  int32_t splits = 1;                // parts of the keys; above 1 the partial_* arrays get the results
  int32_t section = 1;               // (sequence, head) pairs walked together, tiles of most work first
  int32_t group = 1;                 // heads_q / heads_kv
  int32_t page_shift = -1;           // log2(page_size) where that is whole
  bool causal_order = false;         // tiles of most work first pays
  bool overlap_grids = false;        // the combining grid may be launched early (compute capability 9.0 and newer)
  bool aligned = true;               // rows of q, k, v, o start on 16 bytes
  float* partial_o = nullptr;        // [splits, rows, d_v], normalised per split
  float* partial_lse = nullptr;      // [splits, rows], natural
  float* partial_entropy = nullptr;  // [splits, rows], null: not wanted
  int64_t partial_rows = 0;          // total_q * heads_q, row = token * heads_q + head
  PlanRecord* record = nullptr;      // null: the host knows the lengths
  uint32_t* scheduler = nullptr;     // this launch's pair of PlanRecord::scheduler
  int32_t multiprocessors = 0;
  Int8Tables int8;   // K and V of the 8-bit kernels
  RowSample sample;  // the entropy tool's, as is normalized
  bool normalized = false;
};

enum class Phase : int32_t { kForward, kDecode, kExactF32, kTf32, kEntropy, kInt8 };

// What a call may need beyond the plain forward pass (windows, causal masks, packed sequences, grouped heads, LSE,
// sinks and split keys, which every portable kernel has).
enum Feature : uint32_t {
  kPlain = 0,
  kSoftcap = 1u << 0,
  kAlibi = 1u << 1,
  kBias = 1u << 2,
  kEntropy = 1u << 3,
  kUnaligned = 1u << 4,  // rows that do not start on 16 bytes
  kAnyScale = 1u << 5,   // scale <= 0
  kPaged = 1u << 6,
  kVarlen = 1u << 7,  // packed sequences or seqused_k
  kSplit = 1u << 8,
  kPacked = 1u << 9,       // pack > 1
  kWideOutput = 1u << 10,  // f32 output of 16-bit inputs
  kSink = 1u << 11,
  kMasked = 1u << 12,  // any window or causal mask
  kRowSample = 1u << 13,
  kRagged = 1u << 14,  // head_dim below the kernel's padded one
  kExtras = kSoftcap | kAlibi | kBias | kEntropy | kUnaligned | kAnyScale | kPaged,
  kCommon = kVarlen | kSplit | kPacked | kWideOutput | kSink | kMasked | kRagged,
};

struct AttendKernel {
  const char* name;
  int32_t arch;  // least compute capability; 90 means 9.0 alone (architecture-specific code)
  Phase phase;
  Dtype dtype;
  int32_t d_qk, d_v;  // padded head dimensions
  uint32_t features;  // Feature bits that it serves
  int32_t tile_q, tile_k;
  int32_t ctas_per_sm;
  bool reports;           // counts rows and checks lengths itself (common/problem.cuh)
  int32_t page_multiple;  // paged: page_size must be a multiple of this; 0: any
  size_t shared_bytes;
  const void* function;  // for cudaFuncSetAttribute
  // Enqueues one grid; the kernel was prepared by prepare_kernel() on the current device.
  cudaError_t (*launch)(const AttendArgs& args, cudaStream_t stream);
};

// Every compiled kernel, in the order of instances.def: for equal head dimensions the first that serves a call wins.
std::span<const AttendKernel* const> attend_kernels();

// Counts rows and checks lengths for kernels that do not.
cudaError_t launch_report(const AttendArgs& args, cudaStream_t stream);

// Combines the partial results of args.splits parts into o, lse and entropy (with the sink).
cudaError_t launch_combine(const AttendArgs& args, cudaStream_t stream);

}  // namespace adaattn::cuda
