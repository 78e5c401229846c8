#include "attention/table.h"

namespace adaattn::test {
namespace {

INSTANTIATE_TEST_SUITE_P(Reduced, Attention, testing::ValuesIn(cells(true, uniform_dtypes())), cell_name);
// What a device makes of products in E4M3 has tests of its own.
INSTANTIATE_TEST_SUITE_P(E4m3, Attention, testing::ValuesIn(cells(true, kOnCpu ? e4m3_dtypes() : e4m3_cache_dtypes())),
                         cell_name);

}  // namespace
}  // namespace adaattn::test
