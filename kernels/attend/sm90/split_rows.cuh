// Results of the split instances: rows of a tile are the query heads of a group at consecutive positions, and with more
// than one part of the keys they go to the arrays that combine.cu joins.
#pragma once

#include "attend/sm90/consumer_core.cuh"

namespace adaattn::cuda::sm90 {

template <class Traits>
class SplitRows : public ConsumerCore<Traits> {
  using Core = ConsumerCore<Traits>;

 public:
  using Core::Core;

 protected:
  using Core::args_, Core::lane_, Core::tile_, Core::range_, Core::out_;
  using typename Core::RowScale, typename Core::T;

  __device__ __forceinline__ void store() {
    RowScale scale;
    Core::join_sums();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Place place(*this, Core::row_of(r));
      const float lse = Core::finish_row(r, place.sink, scale);
      if (place.position >= range_.len_q) continue;
      if (lane_ % 4 == 0) put_lse(place, lse);
      if (args_.splits > 1) {
        put_pairs(args_.partial_o + place.partial * args_.p.d_v, r, scale.factor[r]);
      } else {
        put_pairs(static_cast<T*>(args_.p.o.data) + place.offset(args_.p.o), r, scale.factor[r]);
      }
    }
  }

  // A part without keys: its LSE says that nothing else of it is to be read. Alone, O = 0 and LSE is the sink's.
  __device__ __forceinline__ void store_empty() {
    for (int i = 0; i < 16; ++i) {
      const Place place(*this, Core::warp_row() + i);
      if (place.position >= range_.len_q) break;
      if (lane_ == 0) put_lse(place, place.sink / kLog2e);
      if (args_.splits > 1) continue;
      T* const o = static_cast<T*>(args_.p.o.data) + place.offset(args_.p.o);
      for (int column = lane_; column < args_.p.d_v; column += 32) o[column] = T(0.f);
    }
  }

 private:
  struct Place {
    int position, head, batch;
    int64_t token, partial;
    float sink;  // in log2 units; with parts it enters when they are combined

    __device__ __forceinline__ Place(const SplitRows& c, int row) {
      const AttnParams& p = c.args_.p;
      position = row >> c.args_.pack_shift;
      head = (c.tile_.head << c.args_.pack_shift) + (row - (position << c.args_.pack_shift));
      batch = c.tile_.batch;
      token = c.range_.q_start + position;
      const int64_t query = p.cu_seqlens_q != nullptr ? token : batch * p.seqlen_q + position;
      partial = c.tile_.split * c.args_.partial_rows + query * p.heads_q + head;
      sink = p.sinks != nullptr && c.args_.splits == 1 ? p.sinks[head * p.sinks_stride] * kLog2e : -INFINITY;
    }
    __device__ __forceinline__ int64_t offset(const Operand& x) const {
      return batch * x.stride_b + token * x.stride_s + head * x.stride_h;
    }
  };

  __device__ __forceinline__ void put_lse(const Place& place, float lse) {
    const AttnParams& p = args_.p;
    if (args_.splits > 1) {
      args_.partial_lse[place.partial] = lse;
    } else if (p.lse.data != nullptr) {
      static_cast<float*>(p.lse.data)[place.offset(p.lse)] = lse;
    }
  }

  // The thread's pairs of row r.
  __device__ __forceinline__ void put_pairs(float* o, int r, float factor) {
    const int d_v = static_cast<int>(args_.p.d_v);
    const bool whole = d_v % 2 == 0;  // otherwise rows start between the words of a pair
#pragma unroll
    for (int j = 0; j < Traits::kDv / 8; ++j) {
      const int column = 8 * j + 2 * (lane_ % 4);
      const float low = out_[4 * j + 2 * r] * factor, high = out_[4 * j + 2 * r + 1] * factor;
      if (whole) {
        if (column < d_v) *reinterpret_cast<float2*>(o + column) = make_float2(low, high);
      } else {
        if (column < d_v) o[column] = low;
        if (column + 1 < d_v) o[column + 1] = high;
      }
    }
  }
  __device__ __forceinline__ void put_pairs(T* o, int r, float factor) {
    const int d_v = static_cast<int>(args_.p.d_v);
#pragma unroll
    for (int j = 0; j < Traits::kDv / 8; ++j) {
      const int column = 8 * j + 2 * (lane_ % 4);
      const uint32_t pair = pack_pair(out_[4 * j + 2 * r] * factor, out_[4 * j + 2 * r + 1] * factor, o);
      if (column + 1 < d_v) {
        *reinterpret_cast<uint32_t*>(o + column) = pair;
      } else if (column < d_v) {
        o[column] = reinterpret_cast<const T*>(&pair)[0];
      }
    }
  }
};

}  // namespace adaattn::cuda::sm90
