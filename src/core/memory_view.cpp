#include "core/memory_view.h"

#include <algorithm>
#include <utility>

namespace adaattn {
namespace {

using Dimension = MemoryView::Dimension;

// A view on its way through the search: dimensions by falling stride, the dense innermost ones folded into width.
struct Lattice {
  int64_t span, width;
  int count;
  Dimension dims[4];
};

// At most four: insertion sort.
template <typename Before>
void sort_dims(Dimension* dims, int count, Before before) {
  for (int i = 1; i < count; ++i)
    for (int j = i; j > 0 && before(dims[j], dims[j - 1]); --j) std::swap(dims[j], dims[j - 1]);
}

Lattice lattice_of(const MemoryView& view) {
  Lattice lattice{view.span, view.width, view.count, {}};
  std::copy_n(view.dims, view.count, lattice.dims);
  sort_dims(lattice.dims, lattice.count, [](const Dimension& a, const Dimension& b) { return a.stride > b.stride; });
  while (lattice.count > 0 && lattice.dims[lattice.count - 1].stride <= lattice.width) {
    const Dimension& inner = lattice.dims[--lattice.count];
    lattice.width += (inner.extent - 1) * inner.stride;
  }
  return lattice;
}

// Removes the dimensions of the given stride, the largest left; returns how many steps of it they allow in all.
int64_t strip(Lattice& lattice, int64_t stride) {
  int64_t steps = 0;
  int first = 0;
  for (; first < lattice.count && lattice.dims[first].stride == stride; ++first)
    steps += lattice.dims[first].extent - 1;
  std::copy(lattice.dims + first, lattice.dims + lattice.count, lattice.dims);
  lattice.count -= first;
  lattice.span -= steps * stride;
  return steps;
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Whether a, starting delta bytes after b, shares a byte with it. The outermost stride M of the two is taken away:
// every difference k of the two indices along it leaves the inner views delta + k M apart.
bool meet(const Lattice& a, const Lattice& b, int64_t delta, int& budget) {
  if (delta >= b.span || -delta >= a.span) return false;
  if (--budget < 0) return true;
  const int64_t stride = std::max(a.count > 0 ? a.dims[0].stride : 0, b.count > 0 ? b.dims[0].stride : 0);
  if (stride == 0) return true;
  Lattice inner_a = a, inner_b = b;
  const int64_t steps_a = strip(inner_a, stride), steps_b = strip(inner_b, stride);
  const int64_t first = std::max(-steps_b, floor_div(-inner_a.span - delta, stride) + 1);
  const int64_t last = std::min(steps_a, floor_div(inner_b.span - 1 - delta, stride));
  for (int64_t k = first; k <= last; ++k)
    if (meet(inner_a, inner_b, delta + k * stride, budget)) return true;
  return false;
}

}  // namespace

MemoryView memory_view(const adaattn_tensor_t& tensor, int64_t element_size) {
  MemoryView view;
  view.begin = reinterpret_cast<uintptr_t>(tensor.data);
  view.width = element_size;
  int64_t last = 0;
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] == 0) return {};
    if (tensor.shape[i] == 1) continue;
    const int64_t stride = tensor.stride[i] * element_size;
    view.dims[view.count++] = {stride, tensor.shape[i]};
    last += (tensor.shape[i] - 1) * stride;
  }
  view.span = last + element_size;
  return view;
}

MemoryView memory_view(const void* data, int64_t bytes) {
  MemoryView view;
  view.begin = reinterpret_cast<uintptr_t>(data);
  view.span = view.width = bytes;
  return view;
}

bool overlap(const MemoryView& a, const MemoryView& b) {
  if (a.span == 0 || b.span == 0) return false;
  if (a.begin >= b.begin ? a.begin - b.begin >= static_cast<uintptr_t>(b.span)
                         : b.begin - a.begin >= static_cast<uintptr_t>(a.span))
    return false;
  int budget = 256;
  return meet(lattice_of(a), lattice_of(b), static_cast<int64_t>(a.begin - b.begin), budget);
}

bool overlaps_itself(const MemoryView& view) {
  Dimension dims[4];
  std::copy_n(view.dims, view.count, dims);
  sort_dims(dims, view.count, [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  int64_t span = view.width;
  for (int i = 0; i < view.count; ++i) {
    if (dims[i].stride < span) return true;
    span += (dims[i].extent - 1) * dims[i].stride;
  }
  return false;
}

}  // namespace adaattn
