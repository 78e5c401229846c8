#include "attention/table.h"

namespace adaattn::test {
namespace {

INSTANTIATE_TEST_SUITE_P(Reduced, Attention, testing::ValuesIn(cells(true, uniform_dtypes())), cell_name);
INSTANTIATE_TEST_SUITE_P(E4m3, Attention, testing::ValuesIn(cells(true, e4m3_dtypes())), cell_name);

}  // namespace
}  // namespace adaattn::test
