// Tensors of more than 2^31 elements: sequences and pages on either side of what 32 bits can index, in every class of
// kernel.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "attention/fixture.h"
#include "gpu/eight_bits.h"
#include "gpu/tile_plans.h"

namespace adaattn::test {
namespace {

class LargeTensors : public OnHopper {};

constexpr int64_t kElements = int64_t{1} << 31;

void copy(void* to, const void* from, size_t bytes) { require(cudaMemcpy(to, from, bytes, cudaMemcpyDefault)); }

bool fits(size_t bytes) {
  size_t free = 0, total = 0;
  require(cudaMemGetInfo(&free, &total));
  return bytes < free;
}

// Where the sequences of a small problem stand in a large one. The first of them fills all other places, so that what
// an index gone wrong finds is not what is there.
struct Places {
  int64_t batch = 0;
  std::vector<int64_t> at;

  // Before and behind 2^31 bytes of 16-bit elements, 2^31 elements, and at the end.
  explicit Places(int64_t elements_of_sequence)
      : batch(kElements / elements_of_sequence + 3),
        at({0, kElements / 2 / elements_of_sequence, kElements / elements_of_sequence, batch - 1}) {}
};

// A contiguous tensor whose first dimension is that of the sequences, or of their tokens, on the device.
class Spread {
 public:
  Spread(Tensor& few, const Places& places)
      : few_(few),
        places_(places),
        bytes_(few.buffer()->bytes() / places.at.size()),
        memory_(bytes_ * static_cast<size_t>(places.batch)) {}

  void write() const {
    copy(place(0), sequence(0), bytes_);
    for (int64_t done = 1; done < places_.batch; done *= 2)
      copy(place(done), place(0), bytes_ * static_cast<size_t>(std::min(done, places_.batch - done)));
    for (size_t i = 1; i < places_.at.size(); ++i) copy(place(places_.at[i]), sequence(i), bytes_);
  }
  void read() const {
    for (size_t i = 0; i < places_.at.size(); ++i) copy(sequence(i), place(places_.at[i]), bytes_);
  }
  adaattn_tensor_t view() const {
    std::vector<int64_t> shape = few_.shape();
    shape[0] = shape[0] / static_cast<int64_t>(places_.at.size()) * places_.batch;
    adaattn_tensor_t t;
    EXPECT_TRUE(succeeded(adaattn_tensor_init(&t, memory_.data(), few_.dtype(), ADAATTN_DEVICE_CUDA, 0,
                                              static_cast<int32_t>(shape.size()), shape.data(), nullptr)));
    return t;
  }

 private:
  char* place(int64_t i) const { return static_cast<char*>(memory_.data()) + static_cast<size_t>(i) * bytes_; }
  std::byte* sequence(size_t i) const { return few_.buffer()->data() + i * bytes_; }

  Tensor& few_;
  const Places& places_;
  size_t bytes_;
  DeviceMemory memory_;
};

// The small problem's outputs, computed where its sequences stand in the large one; false where memory does not
// suffice.
bool compute_spread(const Context& context, AttentionData& data, const Places& places,
                    const adaattn_adaptive_desc_t* adaptive, const std::string& kernel) {
  const int64_t few = static_cast<int64_t>(places.at.size());
  const bool packed = data.desc.layout_q == ADAATTN_LAYOUT_THD;
  data.desc.max_batch = places.batch;
  if (packed) data.desc.max_total_q = data.desc.max_total_q / few * places.batch;
  adaattn_plan_t* made = nullptr;
  EXPECT_TRUE(succeeded(adaattn_plan_create(context.get(), &data.desc, adaptive, &made)));
  const std::unique_ptr<adaattn_plan_t, decltype(&adaattn_plan_destroy)> plan(made, adaattn_plan_destroy);
  adaattn_plan_info_t info{};
  info.struct_size = sizeof info;
  EXPECT_TRUE(succeeded(adaattn_plan_get_info(made, &info)));
  EXPECT_EQ(info.kernel, kernel);

  adaattn_io_t io = data.io();
  std::vector<std::pair<Tensor*, adaattn_tensor_t*>> inputs = {{&data.q, &io.q},
                                                               {&data.k, &io.k},
                                                               {&data.v, &io.v},
                                                               {&data.q_descale, &io.q_descale},
                                                               {&data.v_descale, &io.v_descale}};
  const std::pair<Tensor*, adaattn_tensor_t*> outputs[] = {{&data.o, &io.o}, {&data.lse, &io.lse}};
  size_t bytes = info.workspace_bytes + (size_t{1} << 30);
  const auto add = [&](const Tensor& t) {
    if (t.present()) bytes += t.buffer()->bytes() / places.at.size() * static_cast<size_t>(places.batch);
  };
  for (const auto& [tensor, view] : inputs) add(*tensor);
  for (const auto& [tensor, view] : outputs) add(*tensor);
  if (!fits(bytes)) return false;

  std::vector<std::unique_ptr<Spread>> written;
  for (const auto& [tensor, view] : inputs) {
    if (!tensor->present()) continue;
    written.push_back(std::make_unique<Spread>(*tensor, places));
    written.back()->write();
    *view = written.back()->view();
  }
  std::vector<std::unique_ptr<Spread>> results;
  for (const auto& [tensor, view] : outputs) {
    if (!tensor->present()) continue;
    results.push_back(std::make_unique<Spread>(*tensor, places));
    *view = results.back()->view();
  }
  // The same for all sequences.
  for (const auto& [tensor, view] :
       {std::pair{&data.k_descale, &io.k_descale}, {&data.alibi_slopes, &io.alibi_slopes}}) {
    if (!tensor->present()) continue;
    tensor->upload(kDevice, 0);
    *view = tensor->on(kDevice, 0);
  }
  std::vector<int32_t> starts(static_cast<size_t>(places.batch) + 1);
  for (size_t i = 0; i < starts.size(); ++i)
    starts[i] = static_cast<int32_t>(i) * static_cast<int32_t>(data.desc.max_seqlen_q);
  const Tensor cu_seqlens(starts);
  if (packed) {
    cu_seqlens.upload(kDevice, 0);
    io.cu_seqlens_q = io.cu_seqlens_k = cu_seqlens.on(kDevice, 0);
  }
  const DeviceMemory workspace(info.workspace_bytes);
  EXPECT_TRUE(succeeded(adaattn_plan_execute(made, &io, workspace.data(), workspace.bytes(), nullptr)));
  require(cudaDeviceSynchronize());
  for (const auto& result : results) result->read();
  data.desc.max_batch = few;
  if (packed) data.desc.max_total_q = data.desc.max_total_q / places.batch * few;
  return true;
}

int64_t elements_of_sequence(const AttentionCase& c) { return c.seqlen_k * c.heads_kv * c.d_qk; }

struct Large {
  const char* kernel;
  Dtypes dtypes;
  AttentionCase c;
  bool packed = false;
};

void PrintTo(const Large& large, std::ostream* out) { *out << large.kernel; }

AttentionCase shape(const char* name, int64_t heads, int64_t seqlen, int64_t d, adaattn_mask_t mask) {
  AttentionCase c = {.name = name, .heads_q = heads, .heads_kv = heads, .seqlen_q = seqlen, .seqlen_k = seqlen};
  c.d_qk = c.d_v = d;
  c.mask = mask;
  return c;
}

class LargeExact : public LargeTensors, public testing::WithParamInterface<Large> {};

TEST_P(LargeExact, AgreesWithTheOracle) {
  AttentionCase c = GetParam().c;
  const Places places(elements_of_sequence(c));
  c.batch = static_cast<int64_t>(places.at.size());
  if (GetParam().packed) {
    c.layout_q = c.layout_kv = ADAATTN_LAYOUT_THD;
    c.lens_q.assign(places.at.size(), static_cast<int32_t>(c.seqlen_q));
    c.lens_k = c.lens_q;
  }
  const Context context(kCuda);
  AttentionData data(c, GetParam().dtypes, run_seed(), GetParam().packed ? 0 : ADAATTN_OUTPUT_LSE);
  if (!compute_spread(context, data, places, nullptr, GetParam().kernel)) GTEST_SKIP() << "too little device memory";
  const auto expected = reference::attention(data.desc, data.io());
  if (std::string(GetParam().kernel).find("sm90_e4m3") == 0) {
    EXPECT_TRUE(matches(data, expected, {.o = 6e-2, .lse = 4e-2, .entropy = 0}));
  } else {
    EXPECT_TRUE(matches(data, expected, Weights::kInputTypeOrF16));
  }
}

constexpr adaattn_mask_t kFull = ADAATTN_MASK_NONE, kCausal = ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT;

std::vector<Large> large_cases() {
  AttentionCase alibi = shape("Alibi", 4, 300, 128, kCausal), decode = shape("Decode", 8, 500, 128, kFull),
                softcap = shape("Softcap", 2, 300, 256, kCausal);
  alibi.flags = ADAATTN_FLAG_ALIBI;
  decode.seqlen_q = 1;
  softcap.softcap = 20;
  const Dtypes e4m3 = {"e4m3", ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_E4M3, ADAATTN_DTYPE_BF16};
  return {
      {"sm90_forward_bf16_d128_plain", kBf16All, shape("Full", 4, 300, 128, kFull)},
      {"sm90_forward_bf16_d128_masked", kBf16All, shape("Causal", 4, 300, 128, kCausal)},
      {"sm90_forward_bf16_d128_masked", kBf16All, shape("Packed", 4, 300, 128, kCausal), true},
      {"sm90_forward_bf16_d128_tall", kBf16All, shape("Tall", 4, 600, 128, kCausal)},
      {"sm90_forward_f16_d128_tall", kF16All, shape("PackedTall", 4, 700, 128, kCausal), true},
      {"sm90_forward_f16_d64_masked", kF16All, shape("HeadDim64", 4, 300, 64, kCausal)},
      {"sm90_forward_bf16_d256_softcap", kBf16All, softcap},
      {"sm80_forward_bf16_d128_extras", kBf16All, alibi},
      {"sm80_decode_bf16_d128_plain", kBf16All, decode},
      {"sm80_exactf32_f32_d64_extras", kF32All, shape("F32", 4, 200, 64, kCausal)},
      {"sm90_e4m3_e4m3_d128_masked", e4m3, shape("E4m3", 4, 300, 128, kCausal)},
  };
}
INSTANTIATE_TEST_SUITE_P(Table, LargeExact, testing::ValuesIn(large_cases()),
                         [](const auto& info) { return std::string(info.param.c.name); });

// Adaptive plans give the bits that they give a small batch.
void expect_bits_of_a_small_batch(const AttentionCase& base, const adaattn_adaptive_desc_t& adaptive,
                                  const std::string& kernel) {
  AttentionCase c = base;
  const Places places(elements_of_sequence(c));
  c.batch = static_cast<int64_t>(places.at.size());
  const Context context(kCuda);
  AttentionData data = structured(c);
  AttentionData small = with_own_outputs(data);
  const AdaptivePlan plan(context, small.desc, adaptive);
  ASSERT_NO_FATAL_FAILURE(execute(plan, small));
  if (!compute_spread(context, data, places, &adaptive, kernel)) GTEST_SKIP() << "too little device memory";
  EXPECT_TRUE(same_outputs(data, small));
}

TEST_F(LargeTensors, SkipTheTilesThatASmallBatchSkips) {
  expect_bits_of_a_small_batch(shape("Walk", 2, 2000, 128, kCausal), adaptive_desc(ADAATTN_POLICY_SPEED),
                               "sm90_walk_bf16_d128");
}

TEST_F(LargeTensors, AreQuantisedAsThoseOfASmallBatch) {
  expect_bits_of_a_small_batch(shape("Int8", 4, 300, 128, kCausal), eight_bits(), "sm90_int8_bf16_d128_masked");
}

// Pages far apart in a pool of more than 2^31 elements.
TEST_F(LargeTensors, PagesOfALargePoolAreFound) {
  const Context context(kCuda);
  for (const int64_t seqlen_q : {1, 300}) {
    AttentionCase c = shape("Pages", 8, 640, 128, kCausal);
    c.seqlen_q = seqlen_q;
    c.batch = 3;
    c.layout_kv = ADAATTN_LAYOUT_PAGED;
    c.page_size = 16;
    c.used_k = {640, 333, 500};
    SCOPED_TRACE(describe(c));
    AttentionData data(c, kBf16All, run_seed(), ADAATTN_OUTPUT_LSE);
    const auto expected = reference::attention(data.desc, data.io());
    const int64_t few = data.k.shape()[0];
    const size_t page_bytes = data.k.buffer()->bytes() / static_cast<size_t>(few);
    const int64_t pages = kElements / (c.page_size * c.heads_kv * c.d_qk) + 5;
    const auto place = [&](int64_t page) { return page * ((pages - 1) / (few - 1)); };
    if (!fits(2 * page_bytes * static_cast<size_t>(pages) + (size_t{1} << 30)))
      GTEST_SKIP() << "too little device memory";
    data.poison_outputs();
    data.upload(kDevice);
    adaattn_io_t io = data.io(kDevice);
    std::vector<std::unique_ptr<DeviceMemory>> pools;
    for (auto [tensor, view] : {std::pair{&data.k, &io.k}, {&data.v, &io.v}}) {
      pools.push_back(std::make_unique<DeviceMemory>(page_bytes * static_cast<size_t>(pages)));
      for (int64_t page = 0; page < few; ++page)
        copy(static_cast<char*>(pools.back()->data()) + page_bytes * static_cast<size_t>(place(page)),
             tensor->buffer()->data() + page_bytes * static_cast<size_t>(page), page_bytes);
      view->data = pools.back()->data();
      view->shape[0] = pages;
    }
    Tensor table(ADAATTN_DTYPE_I32, data.block_table.shape());
    table.for_each([&](const auto& index, int64_t) {
      const auto page = static_cast<int64_t>(data.block_table.get(index));
      table.set(index, static_cast<double>(page < few ? place(page) : pages));
    });
    table.upload(kDevice, 0);
    io.block_table = table.on(kDevice, 0);
    const Plan plan(context, data.desc);
    ASSERT_TRUE(succeeded(adaattn_plan_execute(plan.get(), &io, nullptr, 0, nullptr)));
    require(cudaDeviceSynchronize());
    data.download(kDevice);
    EXPECT_TRUE(matches(data, expected, Weights::kInputTypeOrF16)) << plan.info().kernel;
    EXPECT_EQ(plan.stats().violation_field, ADAATTN_FIELD_NONE);
  }
}

}  // namespace
}  // namespace adaattn::test
