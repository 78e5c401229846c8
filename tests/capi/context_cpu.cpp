#include "capi/call.h"

namespace adaattn::test {

adaattn_context_t* make_context() {
  adaattn_context_t* context = nullptr;
  adaattn_create(nullptr, &context);
  return context;
}

}  // namespace adaattn::test
