#include "capi/call.h"
#include "capi/context.h"
#include "capi/fake_backend.h"

namespace adaattn::test {

adaattn_context_t* make_context() { return new adaattn_context(make_fake_backend(std::make_shared<FakeState>())); }

}  // namespace adaattn::test
