// What the processor itself can do, measured beside the results that are held against it.
#pragma once

namespace adaattn::bench {

// f32 multiply-add rate of the widest vector unit, all threads together, in GFLOP/s (2 per multiply-add).
double fma_gflops(int threads);
// Reading a buffer far larger than the caches, all threads together.
double read_gbps(int threads);

}  // namespace adaattn::bench
