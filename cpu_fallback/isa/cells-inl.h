// Cells of 32 queries x 32 keys (decide/cells.h): block means in 8 bits, and the masses of key tiles from their
// products. The bytes are kept as floats, whose products and sums are exact integers; so the masses are those of the
// shared code, bit for bit.
#pragma once

#include <float.h>

#include "cpu_fallback/adaptive/kernels.h"
#include "cpu_fallback/isa/simd-inl.h"
#include "decide/cells.h"

namespace adaattn::cpu {
namespace {

static_assert(kCellBlock % kLanes == 0);

// Of n rows less `shift` (null: 0): their bytes, element c of row j at cells[(j / block * d + c) * block + j % block],
// and what they are to be multiplied with; NaN where a row is not finite.
void quantize_cells(const float* rows, int64_t n, int64_t d, int64_t stride, const float* shift, float factor,
                    int64_t block, float* cells, float* scales) {
  for (int64_t j = 0; j < n; ++j, rows += stride) {
    float* to = cells + j / block * d * block + j % block;
    F32 most = hn::Zero(kF32), wrong = hn::Zero(kF32);
    HWY_ALIGN float x[512 + kLanes];
    memset(x + d / kLanes * kLanes, 0, kLanes * sizeof(float));
    for (int64_t c = 0; c < d; ++c) x[c] = shift == nullptr ? rows[c] : rows[c] - shift[c];
    for (int64_t c = 0; c < d; c += kLanes) {
      const F32 v = hn::Load(kF32, x + c);
      most = hn::Max(most, hn::Abs(v));
      wrong = hn::Add(wrong, hn::Sub(v, v));
    }
    const float top = hn::GetLane(hn::MaxOfLanes(kF32, most));
    const bool finite = hn::AllTrue(kF32, hn::Eq(wrong, hn::Zero(kF32)));
    const float inverse = finite && top > 0 ? 127.0f / top : 0.0f;
    for (int64_t c = 0; c < d; c += kLanes)
      hn::Store(inverse > 0 ? hn::Round(hn::Mul(hn::Load(kF32, x + c), hn::Set(kF32, inverse))) : hn::Zero(kF32), kF32,
                x + c);
    for (int64_t c = 0; c < d; ++c) to[c * block] = x[c];
    scales[j] = finite ? factor * top * (1.0f / 127.0f) : NAN;
  }
}

// As decide::integer_mass(), element by element.
__attribute__((flatten)) HWY_INLINE void integer_masses(const float* scores, int64_t n, float top, uint32_t* masses) {
#if HWY_TARGET == HWY_SSE4 || HWY_TARGET == HWY_SSSE3 || HWY_TARGET == HWY_SSE2 || HWY_TARGET == HWY_EMU128 || \
    HWY_TARGET == HWY_SCALAR
  // No fused multiply-add.
  for (int64_t i = 0; i < n; ++i) masses[i] = decide::integer_mass(scores[i], top);
#else
  const auto set = [](float x) { return hn::Set(kF32, x); };
  const F32 magic = set(12582912.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32 x = hn::Add(hn::Sub(hn::LoadU(kF32, scores + i), set(top)), set(22.0f));
    const F32 whole = hn::Sub(hn::Add(x, magic), magic), f = hn::Sub(x, whole);
    F32 p = set(1.5403530e-4f);
    p = hn::MulAdd(p, f, set(1.3333558e-3f));
    p = hn::MulAdd(p, f, set(9.6181291e-3f));
    p = hn::MulAdd(p, f, set(5.5504109e-2f));
    p = hn::MulAdd(p, f, set(2.4022651e-1f));
    p = hn::MulAdd(p, f, set(6.9314718e-1f));
    p = hn::MulAdd(p, f, set(1.0f));
    const auto bits = hn::Add(hn::BitCast(kI32, p), hn::ShiftLeft<23>(hn::ConvertTo(kI32, whole)));
    const F32 mass = hn::IfThenElseZero(hn::Ge(x, set(-126.0f)), hn::BitCast(kF32, bits));
    hn::StoreU(hn::ConvertTo(kI32, hn::Add(mass, set(0.5f))), kI32, reinterpret_cast<int32_t*>(masses + i));
  }
#endif
}

// Scores of a block of cells with all blocks of queries, one row of `pitch` scores each. Not inlined: a score is
// rounded when it is stored, before anything is added to it.
template <int kBlocks>
HWY_NOINLINE void score_cells(const CellArgs& args, int64_t first, float* scores, int64_t pitch) {
  constexpr int kVectors = static_cast<int>(kCellBlock / kLanes);
  const float* keys = args.key_cells + first * args.d;
  F32 acc[kBlocks][kVectors];
  for (int b = 0; b < kBlocks; ++b) {
    for (int v = 0; v < kVectors; ++v) acc[b][v] = hn::Zero(kF32);
  }
  for (int64_t c = 0; c < args.d; ++c) {
    F32 row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = hn::LoadU(kF32, keys + c * kCellBlock + v * kLanes);
    for (int b = 0; b < kBlocks; ++b) {
      const F32 q = hn::Set(kF32, args.query_cells[b * args.d + c]);
      for (int v = 0; v < kVectors; ++v) acc[b][v] = hn::MulAdd(q, row[v], acc[b][v]);
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    const F32 scale = hn::Set(kF32, args.query_scales[b]);
    for (int v = 0; v < kVectors; ++v) {
      const F32 both = hn::Mul(scale, hn::LoadU(kF32, args.key_scales + first + v * kLanes));
      hn::StoreU(hn::Mul(acc[b][v], both), kF32, scores + b * pitch + v * kLanes);
    }
  }
}

// Functions of src/decide must be inlined: those of this unit may not run elsewhere.
__attribute__((flatten)) bool weigh_cells(const CellArgs& args) {
  constexpr int64_t kCells = decide::kCellsOfTile;
  const int64_t tiles = args.tile_end - args.tile_begin, begin = args.tile_begin * kCells, end = args.tile_end * kCells;
  const int64_t base = begin / kCellBlock * kCellBlock, pitch = cell_pitch(tiles);
  for (int64_t first = base; first < end; first += kCellBlock) {
    float* scores = args.scores + first - base;
    switch (args.blocks) {
      case 1:
        score_cells<1>(args, first, scores, pitch);
        break;
      case 2:
        score_cells<2>(args, first, scores, pitch);
        break;
      case 3:
        score_cells<3>(args, first, scores, pitch);
        break;
      default:
        score_cells<4>(args, first, scores, pitch);
        break;
    }
  }
  const int64_t whole = args.len / decide::kCell;  // cells with all their keys
  memset(args.mass, 0, static_cast<size_t>(tiles) * sizeof(uint32_t));
  memset(args.peak, 0, static_cast<size_t>(tiles) * sizeof(uint32_t));
  for (int64_t b = 0; b < args.blocks; ++b) {
    float* scores = args.scores + b * pitch + begin - base;
    const int64_t n = end - begin;
    if (whole < end && whole >= begin && args.len % decide::kCell != 0) scores[whole - begin] += args.last_log2;
    // Cells without keys, and those behind the last tile.
    const int64_t used = (args.len + decide::kCell - 1) / decide::kCell - begin;
    for (int64_t i = used < n ? used : n; i < (n + kLanes - 1) / kLanes * kLanes; ++i) scores[i] = -infinity();
    F32 most = hn::Set(kF32, -infinity()), wrong = hn::Zero(kF32);
    for (int64_t i = 0; i < n; i += kLanes) {
      const F32 x = hn::LoadU(kF32, scores + i);
      most = hn::Max(most, x);
      // Not for -infinity, which only cells without keys have unless a product has overflown.
      wrong = hn::Or(wrong, hn::IfThenElseZero(hn::IsNaN(x), hn::Set(kF32, 1.0f)));
    }
    const float top = hn::GetLane(hn::MaxOfLanes(kF32, most));
    if (!(top <= FLT_MAX && top >= -FLT_MAX) || !hn::AllTrue(kF32, hn::Eq(wrong, hn::Zero(kF32)))) return false;
    args.scores[(b + 1) * pitch - 1] = top;
    // In place: a mass is written when its score has been read.
    uint32_t* masses = reinterpret_cast<uint32_t*>(scores);
    integer_masses(scores, n, top, masses);
    uint64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += masses[i];
    const float inverse = 1.0f / static_cast<float>(sum);
    if (args.rows != nullptr) args.rows[b] = {top, inverse};
    for (int64_t t = 0; t < tiles; ++t, masses += kCells) {
      uint32_t of_tile = 0, largest = 0;
      for (int64_t i = 0; i < kCells; ++i) {
        of_tile += masses[i];
        largest = masses[i] > largest ? masses[i] : largest;
      }
      args.mass[t] += decide::tile_share(of_tile, inverse);
      const uint32_t share = decide::cell_share(largest, inverse);
      args.peak[t] = share > args.peak[t] ? share : args.peak[t];
    }
  }
  return true;
}

// Sums over the dropped cells of mass times V, some vectors of columns from `c` on.
template <int kVectors>
HWY_NOINLINE void add_dropped(const DroppedArgs& args, int64_t c, float* out, int64_t stride) {
  constexpr int64_t kBlocks = decide::kCellsOfTile;
  const CellArgs& cells = args.cells;
  const int64_t pitch = cell_pitch(cells.tile_end - cells.tile_begin);
  const int64_t base = cells.tile_begin * kBlocks / kCellBlock * kCellBlock;
  F32 acc[kBlocks][kVectors];
  for (int64_t b = 0; b < kBlocks; ++b) {
    for (int v = 0; v < kVectors; ++v) acc[b][v] = hn::Zero(kF32);
  }
  for (int64_t t = cells.tile_begin; t < cells.tile_end; ++t) {
    if (tile_bit(args.mask, t)) continue;
    for (int64_t cell = t * kBlocks; cell < (t + 1) * kBlocks; ++cell) {
      F32 row[kVectors];
      for (int v = 0; v < kVectors; ++v) row[v] = hn::LoadU(kF32, args.group_v + cell * args.v_stride + c + v * kLanes);
      for (int64_t b = 0; b < kBlocks; ++b) {
        const uint32_t* masses = reinterpret_cast<const uint32_t*>(cells.scores + b * pitch);
        const F32 weight = hn::Set(kF32, b < cells.blocks ? static_cast<float>(masses[cell - base]) : 0.0f);
        for (int v = 0; v < kVectors; ++v) acc[b][v] = hn::MulAdd(weight, row[v], acc[b][v]);
      }
    }
  }
  for (int64_t b = 0; b < cells.blocks; ++b) {
    for (int v = 0; v < kVectors; ++v) hn::StoreU(acc[b][v], kF32, out + b * stride + c + v * kLanes);
  }
}

void weigh_dropped(const DroppedArgs& args) {
  constexpr int64_t kCells = decide::kCellsOfTile;
  const CellArgs& cells = args.cells;
  const int64_t stride = dropped_stride(args.d_v), pitch = cell_pitch(cells.tile_end - cells.tile_begin);
  const int64_t base = cells.tile_begin * kCells / kCellBlock * kCellBlock;
  float* const means = args.dropped + kDroppedHead;
  int64_t c = 0;
  for (; c + 4 * kLanes <= args.d_v; c += 4 * kLanes) add_dropped<4>(args, c, means, stride);
  for (; c < args.d_v; c += kLanes) add_dropped<1>(args, c, means, stride);
  for (int64_t b = 0; b < cells.blocks; ++b) {
    const uint32_t* masses = reinterpret_cast<const uint32_t*>(cells.scores + b * pitch);
    uint64_t of_dropped = 0, all = 0;
    for (int64_t t = cells.tile_begin; t < cells.tile_end; ++t) {
      uint64_t sum = 0;
      for (int64_t cell = t * kCells; cell < (t + 1) * kCells; ++cell) sum += masses[cell - base];
      all += sum;
      of_dropped += tile_bit(args.mask, t) ? 0 : sum;
    }
    float* const block = args.dropped + b * stride;
    float of_mean = 0;
    for (int64_t i = 0; i < cells.d; ++i) of_mean += cells.query_cells[b * cells.d + i] * args.k_mean[i];
    const float weight = static_cast<float>(of_dropped);
    block[0] = weight / static_cast<float>(all);
    // A mass of 2^22 is that of 32 keys at the top.
    block[1] = of_mean * cells.query_scales[b] + cells.scores[(b + 1) * pitch - 1] + (5.0f - 22.0f) + ::log2f(weight);
    const float inverse = of_dropped > 0 ? 1.0f / weight : 0.0f;
    for (int64_t i = 0; i < args.d_v; ++i) block[kDroppedHead + i] *= inverse;
  }
}

}  // namespace
}  // namespace adaattn::cpu
