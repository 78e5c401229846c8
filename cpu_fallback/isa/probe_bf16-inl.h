// Products of a tile's queries with rows of bf16: projections of the queries, and the largest scores that the probes
// compare with their thresholds. Included by tiles_bf16-inl.h inside its namespace.

// The largest product of each query with 128 rows of bf16. `buffer` holds two steps of products: those of one step are
// under way while the maxima of the step before are taken.
struct RowMaximum {
  const uint16_t* rows;
  int64_t d;               // a multiple of 32, of the rows and the queries
  uint32_t* const* words;  // per panel, as fill_query_words() leaves them
  float* buffer;

  static constexpr int64_t kSteps = kTileKeys / kStepKeys;  // of a panel

  HWY_INLINE const float* start(int64_t step) {
    float* to = buffer + step % 2 * kStepKeys * kPanel;
    multiply_scores(rows + step % kSteps * kStepKeys * d, d, kStepKeys, words[step / kSteps], d, to);
    return to;
  }

  // True as soon as `hit`, called with a panel's index and maxima, returns true.
  template <class Hit>
  HWY_INLINE bool any(int64_t panels, Hit&& hit) {
    const float* next = start(0);
    for (int64_t step = 0, panel = 0; panel < panels; ++panel) {
      F32 max[2][kPanelVectors];
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) max[0][v] = max[1][v] = hn::Set(kF32, -infinity());
      for (const int64_t end = step + kSteps; step < end; ++step) {
        const float* s = next;
        if (step + 1 < panels * kSteps) {
          next = start(step + 1);
        }
        for (int64_t j = 0; j < kStepKeys; j += 2) {
          ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
            const float* at = s + j * kPanel + v * kLanes;
            max[0][v] = hn::Max(hn::Load(kF32, at), max[0][v]);
            max[1][v] = hn::Max(hn::Load(kF32, at + kPanel), max[1][v]);
          }
        }
      }
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) max[0][v] = hn::Max(max[0][v], max[1][v]);
      if (hit(panel, max[0])) return true;
    }
    return false;
  }
};

#if defined(ADAATTN_UNIT_AMX)
// The rank probe: rows of bf16, whose products cost the tiles no more than those of bytes.
[[maybe_unused]] size_t probe_tile_bytes(int64_t rank) {
  return static_cast<size_t>(packed_elements(rank)) * sizeof(uint16_t);
}

[[maybe_unused]] void pack_probe(const float* y, int64_t y_stride, int64_t n, int64_t rank, char* tile) {
  pack_keys(y, n, rank, y_stride, reinterpret_cast<uint16_t*>(tile));
}
#endif
