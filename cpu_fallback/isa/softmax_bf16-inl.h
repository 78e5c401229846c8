// The online softmax of prefill with bf16 products: scores of a few keys to pairs of weights.
#pragma once

#include "cpu_fallback/isa/products-inl.h"

namespace adaattn::cpu {
namespace {

// A row's reference moves when a score exceeds it by more than so many powers of two: weights stay far from overflow,
// and rounding does not depend on the reference.
constexpr float kSlack = 8;
// Where scores outlive their weights, maxima are looked at only where these keys' weights add up to more than this:
// then one of them has left the slack, and until then weights stay below it.
constexpr float kMostWeight = kScoreKeys * 256;

// 2^x with a relative error below 9e-5, a twentieth of what rounding to bf16 adds; 2^0 is 1, 2^-inf 0, NaN stays. The
// polynomial is for the fraction in [0, 1].
HWY_INLINE __m512 exp2_weight(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.0770672f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.22764482f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69511682f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

// Two rows of weights as one row of words, the first in the low halves: rounded to nearest by adding half a unit to
// what is cut off. Cheaper than the conversion instruction, whose result would still have to be interleaved. The
// weights are no NaN that the carry could turn into a number, unless the row's sum holds it too.
HWY_INLINE __m512i pair_weights(__m512 low, __m512 high) {
  const __m512i half = _mm512_set1_epi32(0x8000), high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i l = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(low), half), 16);
  const __m512i h = _mm512_add_epi32(_mm512_castps_si512(high), half);
  return _mm512_ternarylogic_epi32(high_half, h, l, 0xca);  // high_half ? h : l
}

HWY_NOINLINE void scale_scores(float* s, int64_t keys, float factor) {
  const F32 f = hn::Set(kF32, factor);
  for (int64_t i = 0; i < keys * kPanel; i += kLanes) hn::Store(hn::Mul(hn::Load(kF32, s + i), f), kF32, s + i);
}

#if defined(ADAATTN_UNIT_AMX)
// Sums of products of bytes to scores, in place.
[[maybe_unused]] HWY_NOINLINE void scale_bytes(float* s, int64_t keys, const float* key_factors,
                                               const float* row_factors) {
  for (int64_t j = 0; j < keys; ++j) {
    const __m512 of_key = _mm512_set1_ps(key_factors[j / kStepKeys]);
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
      float* at = s + j * kPanel + v * kLanes;
      const __m512 factor = _mm512_mul_ps(of_key, _mm512_load_ps(row_factors + v * kLanes));
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(at)), factor));
    }
  }
}
#endif

HWY_NOINLINE void block_maximum(const float* s, int64_t keys, float* block_max) {
  F32 max[2][kPanelVectors];
  ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) max[0][v] = max[1][v] = hn::Set(kF32, -infinity());
  for (int64_t j = 0; j < keys; j += 2) {
    ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
      const float* at = s + j * kPanel + v * kLanes;
      max[0][v] = hn::Max(hn::Load(kF32, at), max[0][v]);
      max[1][v] = hn::Max(hn::Load(kF32, at + kPanel), max[1][v]);
    }
  }
  ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
    hn::Store(hn::Max(max[0][v], max[1][v]), kF32, block_max + v * kLanes);
  }
}

// Whether a maximum, times `factor`, has left the slack of its row's reference.
HWY_INLINE bool reference_moves(const Panel& p, const float* block_max, float factor) {
  const F32 f = hn::Set(kF32, factor), slack = hn::Set(kF32, kSlack);
  bool moves = false;
  for (int64_t at = 0; at < kPanel; at += kLanes) {
    const F32 max = hn::Mul(hn::Load(kF32, block_max + at), f);
    moves = moves || !hn::AllFalse(kF32, hn::Gt(max, hn::Add(hn::Load(kF32, p.max + at), slack)));
  }
  return moves;
}

// Whether some row has not seen a key yet.
HWY_INLINE bool is_fresh(const Panel& p) {
  bool fresh = false;
  for (int64_t at = 0; at < kPanel; at += kLanes)
    fresh = fresh || !hn::AllFalse(kF32, hn::Eq(hn::Load(kF32, p.max + at), hn::Set(kF32, -infinity())));
  return fresh;
}

// Moves the references that have to, and what was summed up to now along with them.
HWY_NOINLINE void move_reference(Panel& p, const float* block_max, float factor, int64_t d_v) {
  for (int64_t at = 0; at < kPanel; at += kLanes) {
    const F32 none = hn::Set(kF32, -infinity()), zero = hn::Zero(kF32);
    const F32 old = hn::Load(kF32, p.max + at);
    const F32 max = hn::Mul(hn::Load(kF32, block_max + at), hn::Set(kF32, factor));
    const auto moves = hn::Gt(max, hn::Add(old, hn::Set(kF32, kSlack)));
    if (hn::AllFalse(kF32, moves)) continue;
    const F32 reference = hn::IfThenElse(moves, max, old);
    const auto fresh = hn::Eq(old, none);
    const F32 shift = hn::IfThenElse(fresh, zero, hn::Sub(old, reference));
    const F32 alpha = exp2(shift);
    const F32 sum = hn::Load(kF32, p.sum + at);
    hn::Store(reference, kF32, p.max + at);
    hn::Store(hn::Mul(sum, alpha), kF32, p.sum + at);
    hn::Store(hn::Mul(hn::MulAdd(shift, sum, hn::Load(kF32, p.entropy_sum + at)), alpha), kF32, p.entropy_sum + at);
    if (hn::AllTrue(kF32, fresh)) continue;  // O^T is 0
    for (int64_t i = 0; i < d_v; ++i) {
      float* o = p.ot + i * kPanel + at;
      hn::Store(hn::Mul(hn::Load(kF32, o), alpha), kF32, o);
    }
  }
}

// Scores, to be multiplied by `factor`, to weights in words [keys / 2][kPanel]; keys is even. The words may lie where
// the scores do: word row t is written when score rows 2t and 2t + 1 have been read. Returns false, and leaves the
// row's sums as they are, if the weights of these keys add up to more than `limit` in some row, or to NaN.
// kBytes: the scores are sums of products of bytes, and their factor is that of each 32 keys and of each row.
template <bool kEntropy, bool kBytes = false>
HWY_NOINLINE bool weigh_pairs(Panel& p, const float* s, int64_t keys, float factor, float limit, uint32_t* words,
                              const float* key_factors = nullptr, const float* row_factors = nullptr) {
  const __m512 none = _mm512_set1_ps(-infinity());
  __m512 reference[kPanelVectors], sum[kPanelVectors], entropy[kPanelVectors], f[kBytes ? kPanelVectors : 1];
  f[0] = _mm512_set1_ps(factor);
  ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
    const __m512 max = _mm512_load_ps(p.max + v * kLanes);
    // A lane that has seen nothing yet: any finite reference gives weights 2^-inf = 0.
    reference[v] = _mm512_mask_mov_ps(max, _mm512_cmp_ps_mask(max, none, _CMP_EQ_OQ), _mm512_setzero_ps());
    sum[v] = entropy[v] = _mm512_setzero_ps();
  }
  const auto score = [&](const float* at, int v) {
    const __m512 x = kBytes ? _mm512_cvtepi32_ps(_mm512_load_si512(at)) : _mm512_load_ps(at);
    return _mm512_fmsub_ps(x, f[kBytes ? v : 0], reference[v]);
  };
  for (int64_t j = 0; j < keys;) {
    if (kBytes) {
      const __m512 of_keys = _mm512_set1_ps(key_factors[j / kStepKeys]);
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
        f[kBytes ? v : 0] = _mm512_mul_ps(of_keys, _mm512_load_ps(row_factors + v * kLanes));
      }
    }
    for (const int64_t end = kBytes ? j + kStepKeys : keys; j < end; j += 2) {
      ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
        const float* at = s + j * kPanel + v * kLanes;
        const __m512 x0 = score(at, v), x1 = score(at + kPanel, v);
        const __m512 w0 = exp2_weight(x0), w1 = exp2_weight(x1);
        sum[v] = _mm512_add_ps(sum[v], _mm512_add_ps(w0, w1));
        if (kEntropy) {
          // 0 * -inf counts as 0.
          const __mmask16 some0 = _mm512_cmp_ps_mask(w0, _mm512_setzero_ps(), _CMP_NEQ_UQ);
          const __mmask16 some1 = _mm512_cmp_ps_mask(w1, _mm512_setzero_ps(), _CMP_NEQ_UQ);
          entropy[v] = _mm512_mask3_fmadd_ps(w0, x0, entropy[v], some0);
          entropy[v] = _mm512_mask3_fmadd_ps(w1, x1, entropy[v], some1);
        }
        _mm512_store_si512(words + j / 2 * kPanel + v * kLanes, pair_weights(w0, w1));
      }
    }
  }
  __mmask16 over = 0;
  ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
    over |= _mm512_cmp_ps_mask(sum[v], _mm512_set1_ps(limit), _CMP_NLE_UQ);
  }
  if (over != 0 && limit < infinity()) return false;
  ADAATTN_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
    _mm512_store_ps(p.sum + v * kLanes, _mm512_add_ps(_mm512_load_ps(p.sum + v * kLanes), sum[v]));
    if (kEntropy)
      _mm512_store_ps(p.entropy_sum + v * kLanes,
                      _mm512_add_ps(_mm512_load_ps(p.entropy_sum + v * kLanes), entropy[v]));
  }
  return true;
}

}  // namespace
}  // namespace adaattn::cpu
