// K and V in 8 bits as the quantise pass leaves them and the int8 attend kernels read them. A tile is 128 keys of one
// (sequence, KV head), anchored at the sequence's start; tiles lie in the order [batch, heads_kv, key_tiles], each as
// the shared-memory image that the matrix instructions read, so that one bulk copy loads it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/attn_params.h"

namespace adaattn::cuda {

constexpr int kInt8TileK = 128;      // keys of a tile
constexpr int kInt8ScaleBlock = 64;  // keys that share a scale of K

// What restores a tile: k = k8 * k[key / 64] + k_mean, v = v8 * v + v_mean. v is a power of two.
struct alignas(16) Int8Scales {
  float k[kInt8TileK / kInt8ScaleBlock];
  float v, v_inverse;
};

struct Int8Tables {
  int32_t key_tiles = 0;  // of the longest sequence
  // K tile: 128 lines of d_qk bytes (a key each, int8), in 16-byte words swizzled at the line's width.
  uint8_t* k = nullptr;
  // V tile: d_v lines of 128 bytes (e4m3), in 16-byte words swizzled at 128 bytes. Byte i of a line is key v_key(i).
  uint8_t* v = nullptr;
  Int8Scales* scales = nullptr;
  float* k_mean = nullptr;  // [batch, heads_kv, d_qk]
  float* v_mean = nullptr;  // [batch, heads_kv, d_v]
};

// A thread's accumulators of S are two adjacent keys in each group of eight, its 8-bit A operand is four adjacent bytes
// in each group of 16: with this order of V's keys the one is the other.
ADAATTN_HD constexpr int v_key(int byte) { return byte / 16 * 16 + byte % 2 + byte / 2 % 2 * 8 + byte % 16 / 4 * 2; }

// Bytes of the tables of `batch` sequences of at most seqlen_k keys; every array starts on 256 bytes.
size_t int8_tables_bytes(int64_t batch, int64_t heads_kv, int64_t seqlen_k, int64_t d_qk, int64_t d_v);
Int8Tables lay_out_int8_tables(const AttnParams& params, void* memory);

// Means of a sample of K's and V's rows, then one read of K and V. d_qk = d_v is 64 or 128, rows start on 16 bytes.
// Compute capability 9.0; capture-safe.
cudaError_t launch_quantize(const AttnParams& params, const Int8Tables& tables, cudaStream_t stream);

}  // namespace adaattn::cuda
