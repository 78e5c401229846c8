// What this processor and operating system let us execute.
#pragma once

#include <string>

namespace adaattn::cpu {

struct CpuFeatures {
  bool baseline = false;     // x86-64 with SSE4.2
  bool avx2 = false;         // AVX2, FMA, F16C, BMI1/2, AES, PCLMUL
  bool avx512 = false;       // AVX-512 F, BW, CD, DQ, VL
  bool avx512_bf16 = false;  // vdpbf16ps
  bool avx512_vnni = false;  // vpdpbusd
  bool amx = false;  // tiles with products of bf16 and of bytes; the kernel's permission is asked for by request_amx()
  bool neon = false;
};

const CpuFeatures& cpu_features();

// Asks the operating system for the tile state, once per process. False where it is absent or refused.
bool request_amx();

std::string cpu_name();

}  // namespace adaattn::cpu
