// Marks the inline functions that the host compiler alone and nvcc alike compile.
#pragma once

#if defined(__CUDACC__)
#define ADAATTN_HD __host__ __device__
#else
#define ADAATTN_HD
#endif
