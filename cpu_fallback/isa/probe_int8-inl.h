// The rank probe in 8 bits, four products per lane and instruction: keys signed with one scale per tile, queries
// unsigned (shifted by 128) with one scale each. Included by analyze-inl.h or tiles_bf16-inl.h inside their namespace.

struct Int8Tile {
  float scale;
  int32_t offset[kTileKeys];  // -128 times the sum of a key's elements: what the queries' shift adds, taken back
};

HWY_INLINE int64_t quads_of(int64_t rank) { return (rank + 3) / 4; }

[[maybe_unused]] size_t probe_tile_bytes(int64_t rank) {
  return static_cast<size_t>(round_up(static_cast<int64_t>(sizeof(Int8Tile)), 64) + kTileKeys * quads_of(rank) * 4);
}

HWY_INLINE int8_t* int8_rows(char* tile) { return reinterpret_cast<int8_t*>(tile + round_up(sizeof(Int8Tile), 64)); }

// The padding of y is 0, and so are the bytes that it becomes.
[[maybe_unused]] void pack_probe(const float* y, int64_t y_stride, int64_t n, int64_t rank, char* tile) {
  Int8Tile& head = *reinterpret_cast<Int8Tile*>(tile);
  int8_t* rows = int8_rows(tile);
  const int64_t width = quads_of(rank) * 4;
  memset(rows, 0, static_cast<size_t>(kTileKeys * width));
  F32 most = hn::Zero(kF32);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t c = 0; c < rank; c += kLanes) most = hn::Max(most, hn::Abs(hn::LoadU(kF32, y + j * y_stride + c)));
  }
  const float largest = hn::GetLane(hn::MaxOfLanes(kF32, most));
  head.scale = largest / 127;
  const F32 inverse = hn::Set(kF32, largest > 0 ? 127 / largest : 0);
  for (int64_t j = 0; j < kTileKeys; ++j) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t c = 0; c < rank && j < n; c += kLanes) {
      const __m512i q = _mm512_cvtps_epi32(hn::Mul(hn::LoadU(kF32, y + j * y_stride + c), inverse).raw);
      sum = _mm512_add_epi32(sum, q);
      const int64_t bytes = width - c < kLanes ? width - c : kLanes;
      _mm_mask_storeu_epi8(rows + j * width + c, static_cast<__mmask16>((1u << bytes) - 1), _mm512_cvtepi32_epi8(q));
    }
    head.offset[j] = -128 * _mm512_reduce_add_epi32(sum);
  }
}

// Of one panel.
struct Int8Queries {
  uint8_t* q;    // [quads][kPanel][4]
  float* scale;  // [kPanel]
  float* base;   // [kPanel]: the query's product with the mean of K
};

HWY_INLINE void lay_out(Arena& arena, Int8Queries& x, int64_t rank) {
  x.q = arena.take<uint8_t>(quads_of(rank) * 4 * kPanel);
  x.scale = arena.take<float>(kPanel);
  x.base = arena.take<float>(kPanel);
}

// From projected queries [rank + 1][kPanel], the last row being the base.
HWY_INLINE void quantize_queries(const float* projected, int64_t rank, const Int8Queries& x) {
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    F32 largest = hn::Zero(kF32);
    for (int64_t c = 0; c < rank; ++c)
      largest = hn::Max(largest, hn::Abs(hn::Load(kF32, projected + c * kPanel + lane)));
    hn::Store(hn::Mul(largest, hn::Set(kF32, 1.0f / 127)), kF32, x.scale + lane);
    hn::Store(hn::Load(kF32, projected + rank * kPanel + lane), kF32, x.base + lane);
  }
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    const F32 scale = hn::Load(kF32, x.scale + lane);
    const F32 inverse = hn::IfThenElseZero(hn::Gt(scale, hn::Zero(kF32)), hn::Div(hn::Set(kF32, 1.0f), scale));
    for (int64_t quad = 0; quad < quads_of(rank); ++quad) {
      __m512i four = _mm512_set1_epi8(static_cast<char>(128));
      for (int64_t i = 0; i < 4 && quad * 4 + i < rank; ++i) {
        const F32 scaled = hn::Mul(hn::Load(kF32, projected + (quad * 4 + i) * kPanel + lane), inverse);
        const __m512i q = _mm512_and_si512(_mm512_cvtps_epi32(scaled.raw), _mm512_set1_epi32(255));
        // Flipping the top bit of a signed byte adds 128 to it.
        four = _mm512_xor_si512(four, _mm512_sll_epi32(q, _mm_cvtsi64_si128(8 * i)));
      }
      _mm512_store_si512(x.q + (quad * kPanel + lane) * 4, four);
    }
  }
}

// acc += q . k, four products a lane. In assembly because GCC 12 copies the sums of the intrinsic and spills them all.
HWY_INLINE void add_products(__m512i& acc, __m512i q, __m512i k) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(q), "v"(k));
}

// Not inlined, and the maxima stay in memory until the end: 24 sums, 4 queries and a key leave no register for them.
template <int kRows>
HWY_NOINLINE void int8_rows_maximum(const int8_t* HWY_RESTRICT rows, const int32_t* HWY_RESTRICT offset, int64_t quads,
                                    const uint8_t* HWY_RESTRICT q, int32_t* HWY_RESTRICT max) {
  __m512i acc[kRows][kPanelVectors];
  ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = _mm512_set1_epi32(offset[r]);
  }
  for (int64_t t = 0; t < quads; ++t) {
    __m512i row[kPanelVectors];
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) row[v] =
        _mm512_load_si512(q + (t * kPanel + v * kLanes) * 4);
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) {
      int32_t four;
      memcpy(&four, rows + (r * quads + t) * 4, sizeof four);
      const __m512i k = _mm512_set1_epi32(four);
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) add_products(acc[r][v], row[v], k);
    }
  }
  ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
    __m512i m = _mm512_load_si512(max + v * kLanes);
    ADAATTN_UNROLL for (int r = 0; r < kRows; ++r) m = _mm512_max_epi32(m, acc[r][v]);
    _mm512_store_si512(max + v * kLanes, m);
  }
}

// The largest score of each query of the panel over the tile's 128 keys.
HWY_INLINE void int8_maximum(const char* tile, int64_t rank, const Int8Queries& x, float* block_max) {
  const Int8Tile& head = *reinterpret_cast<const Int8Tile*>(tile);
  const int8_t* rows = int8_rows(const_cast<char*>(tile));
  const int64_t quads = quads_of(rank);
  HWY_ALIGN int32_t max[kPanel];
  for (int64_t lane = 0; lane < kPanel; ++lane) max[lane] = INT32_MIN;
  int64_t j = 0;
  for (; j + kMicroRows <= kTileKeys; j += kMicroRows)
    int8_rows_maximum<kMicroRows>(rows + j * quads * 4, head.offset + j, quads, x.q, max);
  constexpr int kRest = kTileKeys % kMicroRows;
  if constexpr (kRest > 0) int8_rows_maximum<kRest>(rows + j * quads * 4, head.offset + j, quads, x.q, max);
  const F32 key_scale = hn::Set(kF32, head.scale);
  for (int v = 0; v < kPanelVectors; ++v) {
    const F32 integer = F32{_mm512_cvtepi32_ps(_mm512_load_si512(max + v * kLanes))};
    const F32 scale = hn::Mul(key_scale, hn::Load(kF32, x.scale + v * kLanes));
    hn::Store(hn::MulAdd(integer, scale, hn::Load(kF32, x.base + v * kLanes)), kF32, block_max + v * kLanes);
  }
}
