// The choice of the instruction set: what was forced really ran, and what is missing is refused by name.
#include <gtest/gtest.h>

#include <set>

#include "backend.h"
#include "core/error.h"
#include "cpu_fallback/isa/registry.h"

namespace adaattn::cpu {
namespace {

Problem small_problem() {
  Problem p;
  p.max_batch = 1;
  p.max_seqlen_q = p.max_seqlen_k = 128;
  p.heads_q = p.heads_kv = 1;
  p.d_qk = p.d_v = 64;
  p.dtype_q = p.dtype_kv = p.dtype_o = Dtype::kF32;
  return p;
}

std::unique_ptr<Backend> backend(adaattn_isa_t isa) {
  BackendConfig config;
  config.isa = isa;
  config.num_threads = 1;
  return make_cpu_backend(config);
}

TEST(Isa, TheTableBehindAnIsaIsItsOwn) {
  std::set<const KernelTable*> tables;
  for (adaattn_isa_t isa : compiled_isa_list()) {
    const KernelTable* kernels = kernels_of(isa);
    ASSERT_NE(kernels, nullptr);
    // AMX is AVX-512 with tiles beside it.
    const std::string name = isa == ADAATTN_ISA_AMX ? kernels->prefill_bf16_name : kernels->prefill_name;
    EXPECT_NE(name.find(isa_name(isa)), std::string::npos) << name;
    EXPECT_TRUE(tables.insert(kernels).second) << isa_name(isa);
  }
}

TEST(Isa, AutoIsTheBestAvailable) {
  const std::string best = available_isas().substr(0, available_isas().find(' '));
  EXPECT_EQ(isa_name(resolve_isa(ADAATTN_ISA_AUTO)), best);
  EXPECT_EQ(backend(ADAATTN_ISA_AUTO)->get_option(ADAATTN_OPTION_ISA), resolve_isa(ADAATTN_ISA_AUTO));
}

TEST(Isa, AForcedOneIsWhatAPlanRunsAndNames) {
  for (adaattn_isa_t isa : compiled_isa_list()) {
    if (!isa_available(isa)) continue;
    const auto b = backend(isa);
    EXPECT_EQ(b->get_option(ADAATTN_OPTION_ISA), isa);
    const PlanInfo info = b->select(small_problem());
    EXPECT_EQ(info.isa, isa_name(isa));
    EXPECT_NE(info.kernel.find(isa == ADAATTN_ISA_AMX ? "avx512" : isa_name(isa)), std::string::npos) << info.kernel;
  }
}

TEST(Isa, CanBeSwitchedAndAPlanKeepsItsOwn) {
  const auto b = backend(ADAATTN_ISA_AUTO);
  for (adaattn_isa_t isa : compiled_isa_list()) {
    if (!isa_available(isa)) continue;
    const auto before = b->make_plan(small_problem());
    const std::string kept = before->info().isa;
    b->set_option(ADAATTN_OPTION_ISA, isa);
    EXPECT_EQ(b->get_option(ADAATTN_OPTION_ISA), isa);
    EXPECT_EQ(before->info().isa, kept);
    EXPECT_EQ(b->make_plan(small_problem())->info().isa, isa_name(isa));
  }
}

TEST(Isa, AMissingOneIsRefusedByName) {
  std::string available(" ");
  available.append(available_isas()).append(" ");
  int missing = 0;
  for (adaattn_isa_t isa = ADAATTN_ISA_BASELINE; isa <= ADAATTN_ISA_NEON; ++isa) {
    if (isa_available(isa)) continue;
    ++missing;
    try {
      backend(isa);
      FAIL() << isa_name(isa) << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.status(), ADAATTN_ERROR_NOT_SUPPORTED);
      EXPECT_NE(std::string(e.what()).find(isa_name(isa)), std::string::npos) << e.what();
    }
    EXPECT_EQ(available.find(std::string(" ") + isa_name(isa) + " "), std::string::npos);
  }
  EXPECT_GT(missing, 0);  // no machine has both AVX2 and NEON
}

TEST(Isa, AnUnknownNumberIsInvalid) {
  for (int64_t value : {int64_t{-1}, int64_t{6}, int64_t{1} << 32}) {
    try {
      resolve_isa(value);
      FAIL() << value << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.status(), ADAATTN_ERROR_INVALID_ARGUMENT);
    }
  }
}

}  // namespace
}  // namespace adaattn::cpu
