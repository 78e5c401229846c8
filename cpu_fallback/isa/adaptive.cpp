// Compiled once per instruction set; ADAATTN_UNIT_* and the flags say which.
#include "cpu_fallback/isa/adaptive-inl.h"
#if defined(ADAATTN_UNIT_AMX)
#include "cpu_fallback/isa/needles_amx-inl.h"
#elif !defined(ADAATTN_UNIT_BF16)
#include "cpu_fallback/isa/cells-inl.h"
#include "cpu_fallback/isa/needles-inl.h"
#endif

namespace adaattn::cpu {

#if defined(ADAATTN_UNIT_BF16)
#if defined(ADAATTN_UNIT_AMX)
#define ADAATTN_TILES kAmxTiles
#else
#define ADAATTN_TILES kAvx512Bf16Tiles
#endif

const Bf16Tiles ADAATTN_TILES = {
    .tile_scratch = tile_scratch,
    .tiles = adaptive_tiles,
    .heads_together = kHeadsTogether,
#if defined(ADAATTN_UNIT_AMX)
    .byte_cost = 0.66f,  // half the products, but each vector of their sums has to be converted
    .bf16_cost = 0.25f,
#else
    .byte_cost = 0.56f,
    .bf16_cost = 0.6f,
#endif
    .pack_keys = pack_keys,
    .pack_values = pack_values,
    .pack_tile = pack_tile,
    .pack_groups = pack_groups,
    .probe_tile_bytes = probe_tile_bytes,
    .pack_probe = pack_probe,
    .gram_scratch = gram_tiles_scratch,
    .gram = gram_tiles,
    .project_scratch = project_scratch,
    .project_tile = project_tile,
#if defined(ADAATTN_UNIT_AMX)
    .find_needles = find_needles,
#else
    .find_needles = nullptr,
#endif
};

#else
#if defined(ADAATTN_UNIT_BASELINE)
#define ADAATTN_ADAPTIVE_TABLE kBaselineAdaptive
#elif defined(ADAATTN_UNIT_AVX2)
#define ADAATTN_ADAPTIVE_TABLE kAvx2Adaptive
#elif defined(ADAATTN_UNIT_AVX512VNNI)
#define ADAATTN_ADAPTIVE_TABLE kAvx512VnniAdaptive
#elif defined(ADAATTN_UNIT_AVX512)
#define ADAATTN_ADAPTIVE_TABLE kAvx512Adaptive
#else
#define ADAATTN_ADAPTIVE_TABLE kNeonAdaptive
#endif

const AdaptiveKernels ADAATTN_ADAPTIVE_TABLE = {
    .load_keys = load_keys,
    .load_rows = load_rows,
    .row_means = row_means,
    .group_stats = group_stats,
    .gram_scratch = gram_scratch,
    .gram = gram,
    .project = project,
    .quantize_cells = quantize_cells,
    .weigh_cells = weigh_cells,
    .needle_block_bytes = needle_block_bytes,
    .needle_row_bytes = needle_row_bytes,
    .quantize_needles = quantize_needles,
    .quantize_needle_rows = quantize_needle_rows,
    .find_needles = find_needles,
    .weigh_dropped = weigh_dropped,
    .probe_tile_bytes = probe_tile_bytes,
    .pack_probe = pack_probe,
    .tile_scratch = tile_scratch,
    .tiles = adaptive_tiles,
#if defined(ADAATTN_BYTE_SCORES)
    .pack_bytes = pack_bytes,
    .byte_cost = 0.28f,
#endif
};
#endif

}  // namespace adaattn::cpu
