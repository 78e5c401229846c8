// libFuzzer target: arbitrary structs into every function that takes one, over a back-end that computes nothing. What
// is accepted must keep every kernel inside the tensors that the caller declared.
//
// Input: operation, form of the call to start from, then patches {target, offset lo, offset hi, value ...} of the
// structs. Structs lie in heap blocks of exactly the size they claim, so that the address sanitizer sees a read beyond.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "adaattn/adaattn.h"
#include "capi/call.h"
#include "capi/context.h"
#include "capi/fake_backend.h"
#include "decide/tile_mass.h"

namespace adaattn::test {
namespace {

constexpr size_t kLargestStruct = 4096;

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  bool empty() const { return left_ == 0; }
  uint8_t byte() {
    if (left_ == 0) return 0;
    --left_;
    return *data_++;
  }
  uint64_t word() {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value = value << 8 | byte();
    return value;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

// Numbers at which arithmetic breaks, or eight bytes of the input.
uint64_t interesting(Input& in) {
  constexpr int64_t kNumbers[] = {0,         1,         -1,        2,         3,         4,         7,
                                  8,         9,         63,        64,        512,       513,       65535,
                                  65536,     INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, 1LL << 31, 1LL << 32,
                                  1LL << 58, 1LL << 60, 1LL << 61, 1LL << 62, -8,        6,         5};
  const uint8_t choice = in.byte();
  if (choice < std::size(kNumbers)) return static_cast<uint64_t>(kNumbers[choice]);
  if (choice < 128) return choice;
  return in.word();
}

// A struct in memory of exactly its claimed size (as far as the library may read).
class Block {
 public:
  template <typename T>
  explicit Block(const T& value) : bytes_(sizeof(T)) {
    std::memcpy(bytes_.data(), &value, sizeof(T));
  }
  void patch(size_t offset, uint64_t value, int width) {
    bytes_.resize(std::max(bytes_.size(), std::min(offset + 8, kLargestStruct)));
    for (int i = 0; i < width && offset + static_cast<size_t>(i) < bytes_.size(); ++i)
      bytes_[offset + static_cast<size_t>(i)] = static_cast<unsigned char>(value >> 8 * i);
  }
  // The heap copy handed to the library. Unversioned structs are copied whole.
  template <typename T>
  T* versioned() {
    size_t claimed;
    std::memcpy(&claimed, bytes_.data(), sizeof claimed);
    const size_t readable = claimed > kLargestStruct ? sizeof claimed : std::max(claimed, sizeof claimed);
    bytes_.resize(std::max(bytes_.size(), readable));
    copy_ = std::make_unique<unsigned char[]>(readable);
    std::memcpy(copy_.get(), bytes_.data(), readable);
    return reinterpret_cast<T*>(copy_.get());
  }
  template <typename T>
  T* plain() {
    bytes_.resize(std::max(bytes_.size(), sizeof(T)));
    copy_ = std::make_unique<unsigned char[]>(sizeof(T));
    std::memcpy(copy_.get(), bytes_.data(), sizeof(T));
    return reinterpret_cast<T*>(copy_.get());
  }

 private:
  std::vector<unsigned char> bytes_;
  std::unique_ptr<unsigned char[]> copy_;
};

void patch_all(Input& in, std::vector<Block*> blocks) {
  while (!in.empty()) {
    Block& block = *blocks[in.byte() % blocks.size()];
    const uint8_t place = in.byte();
    // Mostly whole 4- or 8-byte fields; sometimes any byte.
    const size_t offset =
        place < 250 ? size_t{4} * ((place & 1) * 256 + in.byte()) : size_t{in.byte()} * 16 + place % 16;
    block.patch(offset, interesting(in), place & 2 ? 4 : 8);
  }
}

[[noreturn]] void defect(const char* what, const char* field) {
  std::fprintf(stderr, "accepted call reaches outside its tensor: %s %s\n", what, field);
  std::abort();
}

// In 128 bits, independently of the library's arithmetic.
__int128 declared_bytes(const adaattn_tensor_t& t) {
  const __int128 size = t.dtype == ADAATTN_DTYPE_E4M3                                  ? 1
                        : t.dtype == ADAATTN_DTYPE_I64                                 ? 8
                        : t.dtype == ADAATTN_DTYPE_F32 || t.dtype == ADAATTN_DTYPE_I32 ? 4
                                                                                       : 2;
  __int128 last = 0;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 0) return 0;
    if (t.shape[i] > 1) last += static_cast<__int128>(t.shape[i] - 1) * t.stride[i];
  }
  return (last + 1) * size;
}

void expect_inside(const Reach& reach, const adaattn_tensor_t& declared) {
  if (reach.bytes == 0) return;
  if (reach.data != declared.data) defect("pointer", reach.field);
  if (reach.bytes < 0 || reach.bytes > declared_bytes(declared)) defect("bytes", reach.field);
}

// io as the library saw it: what a shorter struct lacks is absent.
adaattn_io_t whole(const adaattn_io_t* io) {
  adaattn_io_t all = {};
  std::memcpy(static_cast<void*>(&all), io, std::min(io->struct_size, sizeof all));
  return all;
}

void expect_inside(const AttnParams& params, const adaattn_io_t& io) {
  const struct {
    const char* field;
    const adaattn_tensor_t& tensor;
  } tensors[] = {{"q", io.q},
                 {"k", io.k},
                 {"v", io.v},
                 {"o", io.o},
                 {"lse", io.lse},
                 {"entropy", io.entropy},
                 {"bias", io.bias},
                 {"alibi_slopes", io.alibi_slopes},
                 {"sinks", io.sinks},
                 {"cu_seqlens_q", io.cu_seqlens_q},
                 {"cu_seqlens_k", io.cu_seqlens_k},
                 {"seqused_k", io.seqused_k},
                 {"block_table", io.block_table},
                 {"q_descale", io.q_descale},
                 {"k_descale", io.k_descale},
                 {"v_descale", io.v_descale}};
  for (const Reach& reach : reach_of(params))
    for (const auto& row : tensors)
      if (std::strcmp(row.field, reach.field) == 0) expect_inside(reach, row.tensor);
}

struct Harness {
  std::shared_ptr<FakeState> state = std::make_shared<FakeState>();
  adaattn_context_t* context;
  float memory[4096] = {};
  Harness() {
    state->write_outputs = false;
    context = new adaattn_context(make_fake_backend(state));
  }
};

Harness& harness() {
  static Harness* const instance = new Harness;  // lives as long as the process
  return *instance;
}

// Options as every back-end may rely on them; the negations refuse NaN.
void expect_sound(const Problem& problem) {
  const decide::Options& o = problem.adaptive;
  if (o.policy == decide::Policy::kExact) return;
  const auto within = [](int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; };
  const auto fraction = [](float x) { return x > 0 && x <= 1; };
  if (!(o.tolerance > 0 && o.tolerance <= std::numeric_limits<float>::max())) defect("option", "tolerance");
  if (!within(o.min_level, 0, decide::kDenseLevel)) defect("option", "min_level");
  if (!within(static_cast<int>(o.probe), 0, 2)) defect("option", "probe");
  if (!within(o.probe_rank, 1, problem.d_qk)) defect("option", "probe_rank");
  if (!fraction(o.needle_share)) defect("option", "needle_share");
  if (!within(static_cast<int>(o.rank_mode), 0, 2)) defect("option", "rank_mode");
  if (!fraction(o.rank_ratio)) defect("option", "rank_ratio");
  if (!fraction(o.rank_threshold)) defect("option", "rank_threshold");
  if (!within(o.min_rank, 1, problem.d_v)) defect("option", "min_rank");
  if (o.min_precision > o.max_precision) defect("option", "min_precision");
  if (!within(o.verify_rows, 0, 4096)) defect("option", "verify_rows");
  if ((o.feedback || o.recompute) && o.verify_rows == 0) defect("option", "feedback");
}

// form: of the call to start from; those above the layouts bring an adaptive descriptor.
void fuzz_attention(Input& in, bool through_plan) {
  Harness& h = harness();
  const uint8_t form = in.byte() % 10;
  Call call(static_cast<Form>(form % 5));
  adaattn_adaptive_desc_t allowed;
  adaattn_adaptive_desc_init(&allowed, sizeof allowed);
  allowed.policy = ADAATTN_POLICY_CUSTOM;
  Block desc(call.desc), io(call.io), adaptive(allowed);
  const bool is_adaptive = form >= 5;
  if (is_adaptive) {
    patch_all(in, {&adaptive, &desc, &adaptive, &io});
  } else {
    patch_all(in, {&desc, &io});
  }
  const auto* d = desc.versioned<adaattn_attn_desc_t>();
  const auto* x = io.versioned<adaattn_io_t>();
  const auto* a = is_adaptive ? adaptive.versioned<adaattn_adaptive_desc_t>() : nullptr;
  if (adaattn_check_support(h.context, d, a, nullptr, 0) == ADAATTN_SUCCESS) expect_sound(h.state->problem);
  adaattn_status_t status;
  if (through_plan) {
    adaattn_plan_t* plan = nullptr;
    if (adaattn_plan_create(h.context, d, a, &plan) != ADAATTN_SUCCESS) return;
    status = adaattn_plan_execute(plan, x, nullptr, 0, nullptr);
    adaattn_plan_destroy(plan);
  } else {
    status = adaattn_attention(h.context, d, a, x, nullptr);
  }
  if (status == ADAATTN_SUCCESS) expect_inside(h.state->attention, whole(x));
}

void fuzz_entropy(Input& in) {
  Harness& h = harness();
  Call call(static_cast<Form>(in.byte() % 5));
  call.desc.outputs = 0;
  call.io.v = call.io.o = call.io.lse = {};
  adaattn_entropy_desc_t settings;
  adaattn_entropy_desc_init(&settings, sizeof settings);
  Block attn(call.desc), desc(settings), io(call.io);
  Block heads(tensor(h.memory, ADAATTN_DTYPE_F32, {Call::kBatch, Call::kHeadsQ}));
  patch_all(in, {&attn, &desc, &io, &heads});
  const auto* x = io.versioned<adaattn_io_t>();
  const auto* head_entropy = heads.plain<adaattn_tensor_t>();
  if (adaattn_entropy(h.context, attn.versioned<adaattn_attn_desc_t>(), desc.versioned<adaattn_entropy_desc_t>(), x,
                      head_entropy, nullptr, 0, nullptr) != ADAATTN_SUCCESS)
    return;
  const EntropyParams& p = h.state->entropy;
  expect_inside(p.attn, whole(x));
  if (p.head_entropy != nullptr && p.attn.batch > 0)
    expect_inside({"head_entropy", p.head_entropy,
                   4 * ((p.attn.batch - 1) * p.head_stride_b + (p.attn.heads_q - 1) * p.head_stride_h + 1)},
                  *head_entropy);
}

// Six tensors of matrices in one arena, given to the tool that the input picks.
void fuzz_matrices(Input& in) {
  Harness& h = harness();
  constexpr auto kF32 = ADAATTN_DTYPE_F32;
  adaattn_low_rank_desc_t settings;
  adaattn_low_rank_desc_init(&settings, sizeof settings);
  settings.batch = 2;
  settings.rows = 6;
  settings.cols = 5;
  settings.rank = 3;
  const uint8_t tool = in.byte() % 4;
  Block desc(settings), a(tensor(h.memory, kF32, {2, 6, 5}));
  Block second(tool == 0   ? tensor(h.memory + 100, kF32, {2, 6, 3})
               : tool == 1 ? tensor(h.memory + 100, kF32, {2, 5, 3})
               : tool == 2 ? tensor(h.memory + 100, ADAATTN_DTYPE_I32, {2})
                           : tensor(h.memory + 100, kF32, {2}));
  Block third(tool == 0 ? tensor(h.memory + 200, kF32, {2, 3}) : tensor(h.memory + 200, kF32, {2, 5}));
  Block fourth(tool == 0 ? tensor(h.memory + 300, kF32, {2, 5, 3}) : tensor(h.memory + 300, kF32, {2, 6, 3}));
  Block fifth(tensor(h.memory + 400, kF32, {2, 6})), sixth(tensor(h.memory + 500, kF32, {2}));
  const uint64_t number = interesting(in);
  patch_all(in, {&a, &second, &third, &fourth, &fifth, &sixth, &desc});
  const adaattn_tensor_t* t[6];
  Block* const blocks[6] = {&a, &second, &third, &fourth, &fifth, &sixth};
  for (int i = 0; i < 6; ++i) t[i] = blocks[i]->plain<adaattn_tensor_t>();
  double threshold;
  std::memcpy(&threshold, &number, sizeof threshold);
  std::vector<std::pair<MatrixBatch, int>> seen;
  if (tool == 0) {
    if (adaattn_low_rank(h.context, desc.versioned<adaattn_low_rank_desc_t>(), t[0], t[1], t[2], t[3], nullptr, 0,
                         nullptr) != ADAATTN_SUCCESS)
      return;
    const LowRankParams& p = h.state->low_rank;
    seen = {{p.a, 0}, {p.u, 1}, {p.s, 2}, {p.v, 3}};
  } else if (tool == 1) {
    if (adaattn_low_rank_project(h.context, t[0], t[1], t[2], t[3], t[4], t[5], nullptr) != ADAATTN_SUCCESS) return;
    const ProjectParams& p = h.state->project;
    seen = {{p.a, 0}, {p.basis, 1}, {p.mean, 2}, {p.y, 3}, {p.row_residual, 4}, {p.residual, 5}};
  } else if (tool == 2) {
    if (adaattn_effective_rank(h.context, t[0], number % 2 ? threshold : 0.5, t[1], t[2], nullptr, 0, nullptr) !=
        ADAATTN_SUCCESS)
      return;
    const EffectiveRankParams& p = h.state->effective_rank;
    seen = {{p.a, 0}, {p.ranks, 1}, {p.singular_values, 2}};
  } else {
    if (adaattn_spectral_norm(h.context, t[0], number % 2 ? threshold : 0, static_cast<int64_t>(number), 0, t[1],
                              nullptr, 0, nullptr) != ADAATTN_SUCCESS)
      return;
    const SpectralNormParams& p = h.state->spectral_norm;
    seen = {{p.a, 0}, {p.norms, 1}};
  }
  for (const auto& [matrix, index] : seen) expect_inside(reach_of(matrix, "matrix"), *t[index]);
}

void fuzz_merge(Input& in) {
  Harness& h = harness();
  constexpr auto kF32 = ADAATTN_DTYPE_F32;
  const bool packed = in.byte() % 2 != 0;
  std::vector<Block> blocks;
  for (int i = 0; i < 3; ++i) {
    float* const o = h.memory + 300 * i;
    blocks.emplace_back(packed ? tensor(o, kF32, {6, 4, 8}) : tensor(o, kF32, {2, 3, 4, 8}));
    blocks.emplace_back(packed ? tensor(o + 200, kF32, {4, 6}) : tensor(o + 200, kF32, {2, 4, 3}));
  }
  std::vector<Block*> pointers;
  for (Block& block : blocks) pointers.push_back(&block);
  patch_all(in, pointers);
  const adaattn_tensor_t* t[6];
  for (size_t i = 0; i < 6; ++i) t[i] = blocks[i].plain<adaattn_tensor_t>();
  const int runs = h.state->tools_run;
  if (adaattn_merge(h.context, t[0], t[1], t[2], t[3], t[4], t[5], nullptr) != ADAATTN_SUCCESS ||
      h.state->tools_run == runs)
    return;
  const MergeParams& p = h.state->merge;
  const Operand* operands[6] = {&p.o_a, &p.lse_a, &p.o_b, &p.lse_b, &p.o, &p.lse};
  for (int i = 0; i < 6; ++i) {
    const Operand& x = *operands[i];
    if (x.data == nullptr || p.d_v == 0) continue;
    const int64_t last = (p.batch - 1) * x.stride_b + (p.tokens - 1) * x.stride_s + (p.heads - 1) * x.stride_h +
                         (i % 2 == 0 ? p.d_v - 1 : 0);
    expect_inside({"merge", x.data, (last + 1) * dtype_size(x.dtype)}, *t[i]);
  }
}

void fuzz_small_calls(Input& in) {
  const uint64_t number = interesting(in);
  const size_t size = number % 3 == 0 ? number : number % 8192;
  const auto block = std::make_unique<unsigned char[]>(std::max(std::min(size, kLargestStruct), size_t{1}));
  adaattn_config_init(reinterpret_cast<adaattn_config_t*>(block.get()), size);
  adaattn_attn_desc_init(reinterpret_cast<adaattn_attn_desc_t*>(block.get()), size);
  adaattn_io_init(reinterpret_cast<adaattn_io_t*>(block.get()), size);
  adaattn_adaptive_desc_init(reinterpret_cast<adaattn_adaptive_desc_t*>(block.get()), size);
  adaattn_entropy_desc_init(reinterpret_cast<adaattn_entropy_desc_t*>(block.get()), size);
  adaattn_low_rank_desc_init(reinterpret_cast<adaattn_low_rank_desc_t*>(block.get()), size);

  int64_t shape[4], stride[4];
  for (int i = 0; i < 4; ++i)
    shape[i] = static_cast<int64_t>(interesting(in)), stride[i] = static_cast<int64_t>(number);
  adaattn_tensor_t view;
  const auto small = [&] { return static_cast<int32_t>(interesting(in)); };
  const int32_t ndim = small();
  adaattn_tensor_init(&view, block.get(), small(), small(), small(), std::clamp(ndim, -1, 5), shape,
                      number % 2 ? stride : nullptr);
  struct {
    void* data;
    int32_t device, id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
  } dl = {block.get(), small(),   small(), std::clamp(small(), -1, 5),    in.byte(),
          in.byte(),   in.byte(), shape,   number % 2 ? stride : nullptr, interesting(in)};
  adaattn_tensor_from_dlpack(&view, &dl);

  adaattn_status_name(small());
  adaattn_status_string(small());
  adaattn_set_option(harness().context, small(), static_cast<int64_t>(interesting(in)));
  adaattn_get_option(harness().context, small(), &shape[0]);
  char text[64];
  adaattn_last_error(text, std::min<size_t>(in.byte(), sizeof text));
}

}  // namespace
}  // namespace adaattn::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace adaattn::test;
  Input in(data, size);
  switch (in.byte() % 6) {
    case 0:
      fuzz_attention(in, false);
      break;
    case 1:
      fuzz_attention(in, true);
      break;
    case 2:
      fuzz_entropy(in);
      break;
    case 3:
      fuzz_matrices(in);
      break;
    case 4:
      fuzz_merge(in);
      break;
    default:
      fuzz_small_calls(in);
  }
  return 0;
}
