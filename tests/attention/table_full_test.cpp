#include "attention/table.h"

namespace adaattn::test {
namespace {

INSTANTIATE_TEST_SUITE_P(Full, Attention, testing::ValuesIn(cells(false, uniform_dtypes())), cell_name);
INSTANTIATE_TEST_SUITE_P(Mixed, Attention, testing::ValuesIn(cells(true, mixed_dtypes())), cell_name);

}  // namespace
}  // namespace adaattn::test
