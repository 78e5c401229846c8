// Reading and writing the number formats of the API as double, in plain integer arithmetic so that the oracle shares
// nothing with the library's own conversions.
#pragma once

#include <cstdint>

#include "adaattn/adaattn.h"

namespace adaattn::reference {

int64_t size_of(adaattn_dtype_t dtype);

// Element `index` of an array of dtype.
double load(const void* data, adaattn_dtype_t dtype, int64_t index);

// Rounds to nearest even, overflowing to infinity, E4M3 to its largest number; NaN stays NaN.
void store(void* data, adaattn_dtype_t dtype, int64_t index, double value);

// value after a round trip through dtype.
double rounded(double value, adaattn_dtype_t dtype);

// Element at the given indices of a host tensor.
double at(const adaattn_tensor_t& tensor, int64_t i0, int64_t i1 = 0, int64_t i2 = 0, int64_t i3 = 0);

}  // namespace adaattn::reference
