// Projections and Gram matrices of analyze as bf16 products. Included by tiles_bf16-inl.h inside its namespace.

struct ProjectScratch {
  uint16_t* rows;
  uint32_t* words;
  float* products;
};

HWY_INLINE void lay_out(Arena& arena, ProjectScratch& x, int64_t d) {
  x.rows = arena.take<uint16_t>(packed_elements(d));
  x.words = arena.take<uint32_t>(round_up(d, 32) / 2 * kPanel);
  x.products = arena.take<float>(kTileKeys * kPanel);
}

[[maybe_unused]] size_t project_scratch(int64_t d) {
  Arena arena{nullptr};
  ProjectScratch unused;
  lay_out(arena, unused, d);
  return arena.used;
}

// As project() of analyze-inl.h. The mean is projected by the basis as rounded, so that it cancels.
[[maybe_unused]] double project_tile(const float* rows, int64_t n, int64_t d, int64_t stride, const float* mean,
                                     const float* basis, int64_t r, float* y, int64_t y_stride, char* scratch) {
  [[maybe_unused]] const TileScope scope;
  Arena arena{scratch};
  ProjectScratch x;
  lay_out(arena, x, d);
  const int64_t padded = round_up(d, 32), packed_rows = round_up(n, kStepKeys);
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  pack_rows(rows, n, packed_rows, d, stride, x.rows);
  __m512 squares = _mm512_setzero_ps();
  for (int64_t first = 0; first < r; first += kPanel) {
    const int64_t columns = r - first < kPanel ? r - first : kPanel;
    __m512 offset[kPanelVectors];
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) offset[v] = _mm512_setzero_ps();
    for (int64_t t = 0; t < padded; t += 2) {
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
        const int64_t c = first + v * kLanes;
        const __m512i word = pair_weights(load_corner(basis, d, r, r, t, c), load_corner(basis, d, r, r, t + 1, c));
        _mm512_store_si512(x.words + t / 2 * kPanel + v * kLanes, word);
        const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(word, 16));
        const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(word, high_half));
        if (t < d) offset[v] = _mm512_fmadd_ps(_mm512_set1_ps(mean[t]), low, offset[v]);
        if (t + 1 < d) offset[v] = _mm512_fmadd_ps(_mm512_set1_ps(mean[t + 1]), high, offset[v]);
      }
    }
    multiply_scores(x.rows, padded, packed_rows, x.words, padded, x.products);
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        const __m512 value = _mm512_sub_ps(_mm512_load_ps(x.products + j * kPanel + c), offset[c / kLanes]);
        squares = _mm512_fmadd_ps(value, value, squares);
        _mm512_storeu_ps(y + j * y_stride + first + c, value);
      }
    }
  }
  return static_cast<double>(_mm512_reduce_add_ps(squares));
}

struct GramTiles {
  uint32_t *transposed, *words;
  float* out;
};

HWY_INLINE void lay_out(Arena& arena, GramTiles& x, int64_t n, int64_t d) {
  const int64_t rows = round_up(n, kStepKeys), columns = round_up(d, 32);
  x.transposed = arena.take<uint32_t>(rows / 2 * columns);
  x.words = arena.take<uint32_t>(rows / 2 * round_up(columns, kPanel));
  x.out = arena.take<float>(columns * kPanel);
}

[[maybe_unused]] size_t gram_tiles_scratch(int64_t n, int64_t d) {
  Arena arena{nullptr};
  GramTiles unused;
  lay_out(arena, unused, n, d);
  return arena.used;
}

// As gram() of analyze-inl.h, over rows that have lost their mean before they are rounded.
[[maybe_unused]] void gram_tiles(const float* rows, int64_t n, int64_t step, int64_t d, int64_t stride,
                                 const float* mean, float* gram, char* scratch) {
  [[maybe_unused]] const TileScope scope;
  Arena arena{scratch};
  const int64_t samples = (n + step - 1) / step, padded = round_up(samples, kStepKeys), columns = round_up(d, 32);
  GramTiles x;
  lay_out(arena, x, samples, d);
  const auto corner = [&](int64_t j, int64_t c) {
    const __m512 row = load_corner(rows, samples, d, step * stride, j, c);
    return j < samples ? _mm512_sub_ps(row, load_corner(mean, 1, d, 0, 0, c)) : row;
  };
  for (int64_t j = 0; j < padded; j += kStepKeys) {
    for (int64_t c = 0; c < round_up(columns, kPanel); c += kLanes) {
      __m512i pairs[16];
      uint32_t* words = x.words + c / kPanel * (padded / 2 * kPanel) + j / 2 * kPanel + c % kPanel;
      ADAATTN_UNROLL for (int w = 0; w < 16; ++w) {
        pairs[w] = pair_weights(corner(j + 2 * w, c), corner(j + 2 * w + 1, c));
        _mm512_store_si512(words + w * kPanel, pairs[w]);
      }
      if (c < columns) store_value_tile(pairs, value_tile(x.transposed, columns, c / kTileValues, j / kStepKeys));
    }
  }
  for (int64_t first = 0; first < d; first += kPanel) {
    const int64_t count = d - first < kPanel ? d - first : kPanel;
    memset(x.out, 0, static_cast<size_t>(columns * kPanel) * sizeof(float));
    const ValueRun all = {0, padded};
    multiply_values(x.transposed, &all, 1, columns, x.words + first / kPanel * (padded / 2 * kPanel), x.out);
    for (int64_t i = 0; i < d; ++i)
      memcpy(gram + i * d + first, x.out + i * kPanel, static_cast<size_t>(count) * sizeof(float));
  }
}
