// The float64 matrix product of tensor cores, m8n8k4: compute capability 8.0 and 9.0 run it at twice the rate of
// multiply-adds.
#pragma once

namespace adaattn::cuda {

// d (8 x 8) += a (8 x 4) b (4 x 8). A lane holds a[lane / 4][lane % 4], b[lane % 4][lane / 4] and
// d[lane / 4][2 (lane % 4) + {0, 1}].
__device__ __forceinline__ void mma_f64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

// d (16 x 8) += a (16 x 16) b (16 x 8): a[h][s] is the element [8 h + lane / 4][4 s + lane % 4], b[s] the element
// [4 s + lane % 4][lane / 4], d[h] as above for rows 8 h and on.
__device__ __forceinline__ void mma_f64_16x16(double (&d)[2][2], const double (&a)[2][4], const double (&b)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7, %8, %9, %10, %11}, "
      "{%12, %13, %14, %15}, {%0, %1, %2, %3};"
      : "+d"(d[0][0]), "+d"(d[0][1]), "+d"(d[1][0]), "+d"(d[1][1])
      : "d"(a[0][0]), "d"(a[1][0]), "d"(a[0][1]), "d"(a[1][1]), "d"(a[0][2]), "d"(a[1][2]), "d"(a[0][3]), "d"(a[1][3]),
        "d"(b[0]), "d"(b[1]), "d"(b[2]), "d"(b[3]));
#else
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    mma_f64(d[0], a[0][s], b[s]);
    mma_f64(d[1], a[1][s], b[s]);
  }
#endif
}

// As above with a (16 x 8) b (8 x 8).
__device__ __forceinline__ void mma_f64_16x8(double (&d)[2][2], const double (&a)[2][2], const double (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+d"(d[0][0]), "+d"(d[0][1]), "+d"(d[1][0]), "+d"(d[1][1])
      : "d"(a[0][0]), "d"(a[1][0]), "d"(a[0][1]), "d"(a[1][1]), "d"(b[0]), "d"(b[1]));
#else
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    mma_f64(d[0], a[0][s], b[s]);
    mma_f64(d[1], a[1][s], b[s]);
  }
#endif
}

}  // namespace adaattn::cuda
