// Every kind of wrong argument of the attention calls: the status, the text naming the field, outputs untouched, and a
// context that works afterwards.
#include <gtest/gtest.h>

#include <cfloat>
#include <cmath>
#include <limits>
#include <memory>

#include "capi/call.h"

namespace adaattn::test {
namespace {

struct BadInput {
  const char* name;
  Form form;
  void (*spoil)(Call&);
  adaattn_status_t status;
  const char* text;  // what the message has to contain
};

void PrintTo(const BadInput& bad, std::ostream* out) { *out << bad.name; }

constexpr Form kBSHD = Form::kBSHD, kBHSD = Form::kBHSD, kPacked = Form::kPacked, kPaged = Form::kPaged,
               kPackedPaged = Form::kPackedPaged;
constexpr adaattn_status_t kArgument = ADAATTN_ERROR_INVALID_ARGUMENT, kNull = ADAATTN_ERROR_NULL_POINTER,
                           kShape = ADAATTN_ERROR_INVALID_SHAPE, kDtype = ADAATTN_ERROR_INVALID_DTYPE,
                           kStride = ADAATTN_ERROR_INVALID_STRIDE, kOverlap = ADAATTN_ERROR_OVERLAP,
                           kOverflow = ADAATTN_ERROR_SIZE_OVERFLOW, kStructSize = ADAATTN_ERROR_STRUCT_SIZE,
                           kDevice = ADAATTN_ERROR_WRONG_DEVICE;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();

// The call with E4M3 tensors; the floats' bytes are read as numbers of 8 bits.
void make_e4m3(Call& c) {
  c.desc.dtype_q = c.desc.dtype_kv = ADAATTN_DTYPE_E4M3;
  c.desc.dtype_o = ADAATTN_DTYPE_F32;
  for (adaattn_tensor_t* t : {&c.io.q, &c.io.k, &c.io.v}) t->dtype = ADAATTN_DTYPE_E4M3;
  for (adaattn_tensor_t* t : {&c.io.q_descale, &c.io.k_descale, &c.io.v_descale})
    *t = tensor(c.slopes.data(), ADAATTN_DTYPE_F32, {1, 1});
}

const BadInput kBadDescriptors[] = {
    {"DescNull", kBSHD, [](Call& c) { c.desc_pointer = nullptr; }, kNull, "desc is NULL"},
    {"DescSizeZero", kBSHD, [](Call& c) { c.desc.struct_size = 0; }, kStructSize, "desc.struct_size is 0"},
    {"DescSizeHuge", kBSHD, [](Call& c) { c.desc.struct_size = SIZE_MAX; }, kStructSize, "desc.struct_size is 1844674"},
    {"DescSizeCutsField", kBSHD, [](Call& c) { c.desc.struct_size -= 4; }, kStructSize, "desc.struct_size"},
    {"BatchZero", kBSHD, [](Call& c) { c.desc.max_batch = 0; }, kArgument, "desc.max_batch is 0"},
    {"BatchNegative", kBSHD, [](Call& c) { c.desc.max_batch = -2; }, kArgument, "desc.max_batch is -2"},
    {"SeqlenQNegative", kBSHD, [](Call& c) { c.desc.max_seqlen_q = -1; }, kArgument, "desc.max_seqlen_q is -1"},
    {"SeqlenKTooLong", kBSHD, [](Call& c) { c.desc.max_seqlen_k = INT64_MAX; }, kArgument,
     "desc.max_seqlen_k is 92233"},
    {"HeadsQZero", kBSHD, [](Call& c) { c.desc.heads_q = 0; }, kArgument, "desc.heads_q is 0"},
    {"HeadsKvZero", kBSHD, [](Call& c) { c.desc.heads_kv = 0; }, kArgument, "desc.heads_kv is 0"},
    {"HeadsNotDivisible", kBSHD, [](Call& c) { c.desc.heads_kv = 3; }, kArgument,
     "desc.heads_q is 4; accepted: a multiple of desc.heads_kv, 3"},
    {"HeadDimZero", kBSHD, [](Call& c) { c.desc.head_dim_qk = 0; }, kArgument, "desc.head_dim_qk is 0"},
    {"HeadDimTooLarge", kBSHD, [](Call& c) { c.desc.head_dim_qk = 513; }, kArgument, "accepted: 1 to 512"},
    {"HeadDimVNegative", kBSHD, [](Call& c) { c.desc.head_dim_v = -1; }, kArgument, "desc.head_dim_v is -1"},
    {"DtypeQMissing", kBSHD, [](Call& c) { c.desc.dtype_q = ADAATTN_DTYPE_NONE; }, kDtype, "desc.dtype_q is 0 (NONE)"},
    {"DtypeQInteger", kBSHD, [](Call& c) { c.desc.dtype_q = ADAATTN_DTYPE_I32; }, kDtype, "desc.dtype_q is 4 (I32)"},
    {"DtypeKvUnknown", kBSHD, [](Call& c) { c.desc.dtype_kv = 99; }, kDtype, "desc.dtype_kv is 99"},
    {"DtypeOUnknown", kBSHD, [](Call& c) { c.desc.dtype_o = -1; }, kDtype, "desc.dtype_o is -1"},
    {"E4m3QueriesAlone", kBSHD,
     [](Call& c) { c.desc.dtype_q = ADAATTN_DTYPE_E4M3, c.desc.dtype_kv = ADAATTN_DTYPE_BF16; }, kDtype,
     "desc.dtype_kv is 3 (BF16); accepted: E4M3"},
    {"E4m3Output", kBSHD, [](Call& c) { make_e4m3(c), c.desc.dtype_o = ADAATTN_DTYPE_E4M3; }, kDtype,
     "desc.dtype_o is 6 (E4M3)"},
    {"DescaleBlockUncalledFor", kBSHD, [](Call& c) { c.desc.descale_block = 64; }, kArgument,
     "desc.descale_block is 64"},
    {"DescaleBlockNegative", kBSHD, [](Call& c) { make_e4m3(c), c.desc.descale_block = -64; }, kArgument,
     "desc.descale_block is -64"},
    {"DescaleBlockNotOf64", kBSHD, [](Call& c) { make_e4m3(c), c.desc.descale_block = 96; }, kArgument,
     "desc.descale_block is 96"},
    {"MathUnknown", kBSHD, [](Call& c) { c.desc.math = 2; }, kArgument, "desc.math is 2"},
    {"LayoutQUnknown", kBSHD, [](Call& c) { c.desc.layout_q = 0; }, kArgument, "desc.layout_q is 0"},
    {"LayoutQPaged", kBSHD, [](Call& c) { c.desc.layout_q = ADAATTN_LAYOUT_PAGED; }, kArgument, "desc.layout_q is 4"},
    {"LayoutKvUnknown", kBSHD, [](Call& c) { c.desc.layout_kv = 9; }, kArgument, "desc.layout_kv is 9"},
    {"LayoutKvPackedAlone", kBSHD, [](Call& c) { c.desc.layout_kv = ADAATTN_LAYOUT_THD; }, kArgument,
     "desc.layout_kv is 3"},
    {"LayoutQPackedAlone", kBSHD, [](Call& c) { c.desc.layout_q = ADAATTN_LAYOUT_THD; }, kArgument,
     "desc.layout_kv is 1"},
    {"PageSizeMissing", kPaged, [](Call& c) { c.desc.page_size = 0; }, kArgument, "desc.page_size is 0"},
    {"PageSizeUnused", kBSHD, [](Call& c) { c.desc.page_size = 4; }, kArgument, "desc.page_size is 4"},
    {"TotalQUnused", kBSHD, [](Call& c) { c.desc.max_total_q = 4; }, kArgument, "desc.max_total_q is 4"},
    {"TotalQNegative", kPacked, [](Call& c) { c.desc.max_total_q = -4; }, kArgument, "desc.max_total_q is -4"},
    {"MaskUnknown", kBSHD, [](Call& c) { c.desc.mask = 3; }, kArgument, "desc.mask is 3"},
    {"DeterministicUnknown", kBSHD, [](Call& c) { c.desc.deterministic = 2; }, kArgument, "desc.deterministic is 2"},
    {"WindowLeftNegative", kBSHD, [](Call& c) { c.desc.window_left = -2; }, kArgument, "desc.window_left is -2"},
    {"WindowRightNegative", kBSHD, [](Call& c) { c.desc.window_right = INT64_MIN; }, kArgument, "desc.window_right is"},
    {"ScaleNan", kBSHD, [](Call& c) { c.desc.scale = kNan; }, kArgument, "desc.scale is nan"},
    {"ScaleInfinite", kBSHD, [](Call& c) { c.desc.scale = -kInf; }, kArgument, "desc.scale is -inf"},
    {"ScaleBeyondFloat", kBSHD, [](Call& c) { c.desc.scale = 1e300; }, kArgument, "desc.scale is 1e+300"},
    {"SoftcapNan", kBSHD, [](Call& c) { c.desc.softcap = kNan; }, kArgument, "desc.softcap is nan"},
    {"SoftcapNegative", kBSHD, [](Call& c) { c.desc.softcap = -1; }, kArgument, "desc.softcap is -1"},
    {"SoftcapUnderflows", kBSHD, [](Call& c) { c.desc.softcap = 1e-60; }, kArgument, "desc.softcap is 1e-60"},
    {"FlagUnknown", kBSHD, [](Call& c) { c.desc.flags |= 8; }, kArgument, "desc.flags is 0xf"},
    {"OutputUnknown", kBSHD, [](Call& c) { c.desc.outputs = 4; }, kArgument, "desc.outputs is 0x4"},
    {"SizeProductOverflows", kBSHD,
     [](Call& c) { c.desc.max_batch = c.desc.max_seqlen_k = INT32_MAX, c.desc.heads_kv = c.desc.heads_q = 65535; },
     kOverflow, "desc.max_seqlen_k"},
    {"StreamOnCpu", kBSHD, [](Call& c) { c.stream = reinterpret_cast<adaattn_stream_t>(&c); }, kArgument, "stream"},
};

const BadInput kBadTensors[] = {
    {"IoNull", kBSHD, [](Call& c) { c.io_pointer = nullptr; }, kNull, "io is NULL"},
    {"IoSizeZero", kBSHD, [](Call& c) { c.io.struct_size = 0; }, kStructSize, "io.struct_size is 0"},
    {"IoSizeCutsTensor", kBSHD, [](Call& c) { c.io.struct_size -= 8; }, kStructSize, "io.struct_size"},
    {"QAbsent", kBSHD, [](Call& c) { c.io.q = {}; }, kNull, "io.q is absent"},
    {"QNullData", kBSHD, [](Call& c) { c.io.q.data = nullptr; }, kNull, "io.q.data is NULL"},
    {"QZeroDimsButSet", kBSHD, [](Call& c) { c.io.q.ndim = 0; }, kShape, "io.q.ndim is 0"},
    {"QThreeDims", kBSHD, [](Call& c) { c.io.q.ndim = 3; }, kShape, "io.q.ndim is 3; accepted: 4"},
    {"QFiveDims", kBSHD, [](Call& c) { c.io.q.ndim = 5; }, kShape, "io.q.ndim is 5"},
    {"QNegativeDims", kBSHD, [](Call& c) { c.io.q.ndim = -1; }, kShape, "io.q.ndim is -1"},
    {"QDtype", kBSHD, [](Call& c) { c.io.q.dtype = ADAATTN_DTYPE_F16; }, kDtype,
     "io.q.dtype is 2 (F16); accepted: F32"},
    {"QReserved", kBSHD, [](Call& c) { c.io.q.reserved = 1; }, kArgument, "io.q.reserved is 1"},
    {"QMisaligned", kBSHD, [](Call& c) { c.io.q.data = static_cast<char*>(c.io.q.data) + 1; }, kArgument, "io.q.data"},
    {"QNegativeExtent", kBSHD, [](Call& c) { c.io.q.shape[1] = -3; }, kShape, "io.q.shape[1] is -3"},
    {"QTooManySequences", kBSHD, [](Call& c) { c.io.q.shape[0] = 3; }, kShape, "io.q.shape[0] is 3; accepted: 0 to 2"},
    {"QTooLong", kBSHD, [](Call& c) { c.io.q.shape[1] = 4; }, kShape, "io.q.shape[1] is 4; accepted: 0 to 3"},
    {"QHeads", kBSHD, [](Call& c) { c.io.q.shape[2] = 5; }, kShape, "io.q.shape[2] is 5; accepted: 4"},
    {"QHeadsOfBHSD", kBHSD, [](Call& c) { c.io.q.shape[1] = 5; }, kShape, "io.q.shape[1] is 5; accepted: 4"},
    {"QDim", kBSHD, [](Call& c) { c.io.q.shape[3] = 7; }, kShape, "io.q.shape[3] is 7; accepted: 8"},
    {"QLastStride", kBSHD, [](Call& c) { c.io.q.stride[3] = 2; }, kStride, "io.q.stride[3] is 2; accepted: 1"},
    {"QNegativeStride", kBSHD, [](Call& c) { c.io.q.stride[1] = -1; }, kStride, "io.q.stride[1] is -1"},
    {"QBroadcast", kBSHD, [](Call& c) { c.io.q.stride[0] = 0; }, kStride, "io.q.stride[0] is 0"},
    {"QStrideOverflows", kBSHD, [](Call& c) { c.io.q.stride[1] = INT64_MAX; }, kOverflow, "io.q.stride[1] is 92233"},
    {"QStridesSumOverflows", kBSHD, [](Call& c) { c.io.q.stride[0] = c.io.q.stride[2] = int64_t{1} << 57; }, kOverflow,
     "io.q.stride"},
    {"QLeavesAddressSpace", kBSHD, [](Call& c) { c.io.q.data = reinterpret_cast<void*>(UINTPTR_MAX - 63); }, kOverflow,
     "io.q.data"},
    {"QOnCuda", kBSHD, [](Call& c) { c.io.q.device = ADAATTN_DEVICE_CUDA; }, kDevice, "io.q.device is 2 (CUDA)"},
    {"QOnUnknownDevice", kBSHD, [](Call& c) { c.io.q.device = 0; }, kDevice, "io.q.device is 0"},
    {"QOnAnotherId", kBSHD, [](Call& c) { c.io.q.device_id = 1; }, kDevice, "io.q.device_id is 1"},
    {"KAbsent", kBSHD, [](Call& c) { c.io.k = {}; }, kNull, "io.k is absent"},
    {"KDtype", kBSHD, [](Call& c) { c.io.k.dtype = ADAATTN_DTYPE_BF16; }, kDtype, "io.k.dtype is 3"},
    {"KBatch", kBSHD, [](Call& c) { c.io.k.shape[0] = 1; }, kShape, "io.k.shape[0] is 1; accepted: 2"},
    {"KTooLong", kBSHD, [](Call& c) { c.io.k.shape[1] = 9; }, kShape, "io.k.shape[1] is 9; accepted: 0 to 8"},
    {"KHeads", kBSHD, [](Call& c) { c.io.k.shape[2] = 4; }, kShape, "io.k.shape[2] is 4; accepted: 2"},
    {"KDim", kBSHD, [](Call& c) { c.io.k.shape[3] = 6; }, kShape, "io.k.shape[3] is 6; accepted: 8"},
    {"KLastStride", kBSHD, [](Call& c) { c.io.k.stride[3] = 0; }, kStride, "io.k.stride[3] is 0; accepted: 1"},
    {"VAbsent", kBSHD, [](Call& c) { c.io.v = {}; }, kNull, "io.v is absent"},
    {"VLength", kBSHD, [](Call& c) { c.io.v.shape[1] = 7; }, kShape, "io.v.shape[1] is 7; accepted: 8"},
    {"VBatch", kBSHD, [](Call& c) { c.io.v.shape[0] = 1; }, kShape, "io.v.shape[0] is 1"},
    {"VDim", kBSHD, [](Call& c) { c.io.v.shape[3] = 8; }, kShape, "io.v.shape[3] is 8; accepted: 6"},
    {"OAbsent", kBSHD, [](Call& c) { c.io.o = {}; }, kNull, "io.o is absent"},
    {"ODtype", kBSHD, [](Call& c) { c.io.o.dtype = ADAATTN_DTYPE_F16; }, kDtype, "io.o.dtype is 2"},
    {"OLength", kBSHD, [](Call& c) { c.io.o.shape[1] = 2; }, kShape, "io.o.shape[1] is 2; accepted: 3"},
    {"OBatch", kBSHD, [](Call& c) { c.io.o.shape[0] = 1; }, kShape, "io.o.shape[0] is 1; accepted: 2"},
    {"ODim", kBSHD, [](Call& c) { c.io.o.shape[3] = 8; }, kShape, "io.o.shape[3] is 8; accepted: 6"},
    {"OBroadcast", kBSHD, [](Call& c) { c.io.o.stride[1] = 0; }, kStride, "io.o.stride[1] is 0"},
    {"ORowsShareMemory", kBSHD, [](Call& c) { c.io.o.stride[2] = 5; }, kOverlap, "io.o.stride"},
    {"OOverlapsQ", kBSHD, [](Call& c) { c.io.o.data = c.io.q.data; }, kOverlap, "io.o overlaps io.q"},
    {"OOverlapsVByOneElement", kBSHD, [](Call& c) { c.io.o.data = c.v.data() + c.v.size() - 1; }, kOverlap,
     "io.o overlaps io.v"},
    {"LseOverlapsBias", kBSHD, [](Call& c) { c.io.lse.data = c.io.bias.data; }, kOverlap, "io.lse overlaps io.bias"},
    {"EntropyOverlapsLse", kBSHD, [](Call& c) { c.io.entropy.data = c.io.lse.data; }, kOverlap, "io.entropy overlaps"},
    {"LseOverlapsSequsedK", kBSHD, [](Call& c) { c.io.lse.data = c.io.seqused_k.data; }, kOverlap, "io.seqused_k"},
    {"LseAbsent", kBSHD, [](Call& c) { c.io.lse = {}; }, kNull, "io.lse is absent"},
    {"LseUncalledFor", kBSHD, [](Call& c) { c.desc.outputs = ADAATTN_OUTPUT_ENTROPY; }, kArgument, "io.lse is present"},
    {"LseDims", kBSHD, [](Call& c) { c.io.lse.ndim = 2; }, kShape, "io.lse.ndim is 2"},
    {"LseShape", kBSHD, [](Call& c) { c.io.lse.shape[2] = 4; }, kShape, "io.lse.shape[2] is 4; accepted: 3"},
    {"LseDtype", kBSHD, [](Call& c) { c.io.lse.dtype = ADAATTN_DTYPE_BF16; }, kDtype, "io.lse.dtype is 3"},
    {"EntropyUncalledFor", kBSHD, [](Call& c) { c.desc.outputs = ADAATTN_OUTPUT_LSE; }, kArgument,
     "io.entropy is present"},
    {"BiasAbsent", kBSHD, [](Call& c) { c.io.bias = {}; }, kNull, "io.bias is absent"},
    {"BiasUncalledFor", kBSHD, [](Call& c) { c.desc.flags &= ~ADAATTN_FLAG_BIAS; }, kArgument, "io.bias is present"},
    {"BiasDtype", kBSHD, [](Call& c) { c.io.bias.dtype = ADAATTN_DTYPE_F16; }, kDtype, "io.bias.dtype is 2"},
    {"BiasHeads", kBSHD, [](Call& c) { c.io.bias.shape[1] = 2; }, kShape, "io.bias.shape[1] is 2; accepted: 4"},
    {"BiasKeys", kBSHD, [](Call& c) { c.io.bias.shape[3] = 5; }, kShape, "io.bias.shape[3] is 5; accepted: 8"},
    {"BiasKeysOfPaged", kPaged, [](Call& c) { c.io.bias.shape[3] = 9; }, kShape, "io.bias.shape[3] is 9"},
    {"AlibiAbsent", kBSHD, [](Call& c) { c.io.alibi_slopes = {}; }, kNull, "io.alibi_slopes is absent"},
    {"AlibiUncalledFor", kBSHD, [](Call& c) { c.desc.flags &= ~ADAATTN_FLAG_ALIBI; }, kArgument, "io.alibi_slopes"},
    {"AlibiHeads", kBSHD, [](Call& c) { c.io.alibi_slopes.shape[0] = 2; }, kShape, "io.alibi_slopes.shape[0] is 2"},
    {"SinksAbsent", kBSHD, [](Call& c) { c.io.sinks = {}; }, kNull, "io.sinks is absent"},
    {"SinksUncalledFor", kBSHD, [](Call& c) { c.desc.flags &= ~ADAATTN_FLAG_SINK; }, kArgument, "io.sinks is present"},
    {"SinksHeads", kBSHD, [](Call& c) { c.io.sinks.shape[0] = 3; }, kShape, "io.sinks.shape[0] is 3; accepted: 4"},
    {"SequsedDtype", kBSHD, [](Call& c) { c.io.seqused_k.dtype = ADAATTN_DTYPE_I64; }, kDtype,
     "io.seqused_k.dtype is 5"},
    {"SequsedBatch", kBSHD, [](Call& c) { c.io.seqused_k.shape[0] = 1; }, kShape, "io.seqused_k.shape[0] is 1"},
    {"SequsedStride", kBSHD, [](Call& c) { c.io.seqused_k.stride[0] = 2; }, kStride, "io.seqused_k.stride[0] is 2"},
    {"CuSeqlensUncalledFor", kBSHD, [](Call& c) { c.io.cu_seqlens_q = c.io.seqused_k; }, kArgument,
     "io.cu_seqlens_q is present"},
    {"CuSeqlensKUncalledFor", kPackedPaged, [](Call& c) { c.io.cu_seqlens_k = c.io.cu_seqlens_q; }, kArgument,
     "io.cu_seqlens_k is present"},
    {"BlockTableUncalledFor", kBSHD, [](Call& c) { c.io.block_table = c.io.seqused_k; }, kArgument,
     "io.block_table is present"},
    {"CuSeqlensQAbsent", kPacked, [](Call& c) { c.io.cu_seqlens_q = {}; }, kNull, "io.cu_seqlens_q is absent"},
    {"CuSeqlensQEmpty", kPacked, [](Call& c) { c.io.cu_seqlens_q.shape[0] = 0; }, kShape,
     "io.cu_seqlens_q.shape[0] is 0; accepted: 1 to 3"},
    {"CuSeqlensQTooMany", kPacked, [](Call& c) { c.io.cu_seqlens_q.shape[0] = 4; }, kShape,
     "io.cu_seqlens_q.shape[0] is 4"},
    {"CuSeqlensKAbsent", kPacked, [](Call& c) { c.io.cu_seqlens_k = {}; }, kNull, "io.cu_seqlens_k is absent"},
    {"CuSeqlensKCount", kPacked, [](Call& c) { c.io.cu_seqlens_k.shape[0] = 2; }, kShape,
     "io.cu_seqlens_k.shape[0] is 2; accepted: 3"},
    {"TotalQTooLarge", kPacked, [](Call& c) { c.desc.max_total_q = 5; }, kShape,
     "io.q.shape[0] is 6; accepted: 0 to 5"},
    {"PackedLseShape", kPacked, [](Call& c) { c.io.lse.shape[1] = 3; }, kShape, "io.lse.shape[1] is 3; accepted: 6"},
    {"BlockTableAbsent", kPaged, [](Call& c) { c.io.block_table = {}; }, kNull, "io.block_table is absent"},
    {"BlockTableBatch", kPaged, [](Call& c) { c.io.block_table.shape[0] = 1; }, kShape, "io.block_table.shape[0] is 1"},
    {"BlockTableDims", kPaged, [](Call& c) { c.io.block_table.ndim = 1; }, kShape, "io.block_table.ndim is 1"},
    {"BlockTableStride", kPaged, [](Call& c) { c.io.block_table.stride[1] = 2; }, kStride,
     "io.block_table.stride[1] is 2"},
    {"SequsedAbsentForPages", kPaged, [](Call& c) { c.io.seqused_k = {}; }, kNull, "io.seqused_k is absent"},
    {"PageSizeOfK", kPaged, [](Call& c) { c.desc.page_size = 8; }, kShape, "io.k.shape[1] is 4; accepted: 8"},
    {"E4m3Tensor", kBSHD, [](Call& c) { c.io.q.dtype = ADAATTN_DTYPE_E4M3; }, kDtype, "io.q.dtype is 6 (E4M3)"},
    {"DescaleUncalledFor", kBSHD, [](Call& c) { c.io.k_descale = c.io.sinks; }, kArgument, "io.k_descale is present"},
    {"QDescaleAbsent", kBSHD, [](Call& c) { make_e4m3(c), c.io.q_descale = {}; }, kNull, "io.q_descale is absent"},
    {"KDescaleAbsent", kPacked, [](Call& c) { make_e4m3(c), c.io.k_descale = {}; }, kNull, "io.k_descale is absent"},
    {"VDescaleAbsent", kPaged, [](Call& c) { make_e4m3(c), c.io.v_descale = {}; }, kNull, "io.v_descale is absent"},
    {"VDescaleDtype", kBSHD, [](Call& c) { make_e4m3(c), c.io.v_descale.dtype = ADAATTN_DTYPE_BF16; }, kDtype,
     "io.v_descale.dtype is 3"},
    {"KDescaleDims", kBSHD, [](Call& c) { make_e4m3(c), c.desc.descale_block = 64; }, kShape,
     "io.k_descale.ndim is 2; accepted: 3"},
    {"QDescaleBatch", kBSHD, [](Call& c) { make_e4m3(c), c.io.q_descale.shape[0] = 3; }, kShape,
     "io.q_descale.shape[0] is 3; accepted: 2"},
    {"VDescaleHeads", kBSHD, [](Call& c) { make_e4m3(c), c.io.v_descale.shape[1] = 4; }, kShape,
     "io.v_descale.shape[1] is 4; accepted: 2"},
    {"PagesOfV", kPaged, [](Call& c) { c.io.v.shape[0] = 4; }, kShape, "io.v.shape[0] is 4; accepted: 5"},
};

class BadAttention : public testing::TestWithParam<BadInput> {};

TEST_P(BadAttention, IsRefusedByNameAndLeavesEverythingUsable) {
  const BadInput& bad = GetParam();
  const std::unique_ptr<adaattn_context_t, decltype(&adaattn_destroy)> context(make_context(), adaattn_destroy);
  ASSERT_NE(context, nullptr);

  Call call(bad.form);
  bad.spoil(call);
  EXPECT_EQ(call.attention(context.get()), bad.status) << last_error();
  EXPECT_NE(last_error().find(bad.text), std::string::npos) << last_error();
  EXPECT_NE(last_error().find("; accepted"), std::string::npos) << last_error();
  EXPECT_TRUE(call.outputs_untouched());

  Call good(bad.form);
  ASSERT_EQ(good.attention(context.get()), ADAATTN_SUCCESS) << last_error();
  EXPECT_TRUE(good.outputs_written());
}

std::string name_of(const testing::TestParamInfo<BadInput>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(Descriptor, BadAttention, testing::ValuesIn(kBadDescriptors), name_of);
INSTANTIATE_TEST_SUITE_P(Tensor, BadAttention, testing::ValuesIn(kBadTensors), name_of);

class BadDescriptor : public testing::TestWithParam<BadInput> {};

// One selector: what attention refuses, check_support and plan_create refuse in the same words.
TEST_P(BadDescriptor, IsRefusedAlikeByCheckSupportAndPlanCreate) {
  const BadInput& bad = GetParam();
  const std::unique_ptr<adaattn_context_t, decltype(&adaattn_destroy)> context(make_context(), adaattn_destroy);
  Call call(bad.form);
  bad.spoil(call);
  if (call.stream != nullptr) return;  // no part of a plan
  char reason[512];
  EXPECT_EQ(adaattn_check_support(context.get(), call.desc_pointer, call.adaptive, reason, sizeof reason), bad.status);
  EXPECT_EQ(reason, last_error());
  EXPECT_NE(last_error().find(bad.text), std::string::npos) << last_error();
  auto* const sentinel = reinterpret_cast<adaattn_plan_t*>(&call);
  adaattn_plan_t* plan = sentinel;
  EXPECT_EQ(adaattn_plan_create(context.get(), call.desc_pointer, call.adaptive, &plan), bad.status);
  EXPECT_EQ(plan, sentinel);
  EXPECT_EQ(reason, last_error());
}

INSTANTIATE_TEST_SUITE_P(Descriptor, BadDescriptor, testing::ValuesIn(kBadDescriptors), name_of);

TEST(GoodAttention, EveryFormIsAccepted) {
  const std::unique_ptr<adaattn_context_t, decltype(&adaattn_destroy)> context(make_context(), adaattn_destroy);
  for (Form form : {kBSHD, kBHSD, kPacked, kPaged, kPackedPaged}) {
    Call call(form);
    ASSERT_EQ(call.attention(context.get()), ADAATTN_SUCCESS) << last_error();
    EXPECT_TRUE(call.outputs_written());
  }
}

TEST(GoodAttention, OutputInterleavedWithAFusedProjectionIsAccepted) {
  const std::unique_ptr<adaattn_context_t, decltype(&adaattn_destroy)> context(make_context(), adaattn_destroy);
  Call call;
  // [batch, seqlen, heads of q, k, v and o]: four slices of every token's row.
  constexpr int64_t kLength = 3,
                    kRow = Call::kHeadsQ * (Call::kDimQk + Call::kDimV) + Call::kHeadsKv * (Call::kDimQk + Call::kDimV);
  std::vector<float> fused(Call::kBatch * kLength * kRow, 0.25f);
  const auto slice = [&](int64_t first, int64_t heads, int64_t dim) {
    return tensor(fused.data() + first, ADAATTN_DTYPE_F32, {Call::kBatch, kLength, heads, dim},
                  {kLength * kRow, kRow, dim, 1});
  };
  int64_t first = 0;
  call.io.q = slice(first, Call::kHeadsQ, Call::kDimQk);
  first += Call::kHeadsQ * Call::kDimQk;
  call.io.k = slice(first, Call::kHeadsKv, Call::kDimQk);
  first += Call::kHeadsKv * Call::kDimQk;
  call.io.v = slice(first, Call::kHeadsKv, Call::kDimV);
  first += Call::kHeadsKv * Call::kDimV;
  call.io.o = slice(first, Call::kHeadsQ, Call::kDimV);
  call.io.bias = tensor(call.bias.data(), ADAATTN_DTYPE_F32, {1, Call::kHeadsQ, kLength, kLength});
  ASSERT_EQ(call.attention(context.get()), ADAATTN_SUCCESS) << last_error();

  call.poison();
  call.io.o.data = static_cast<float*>(call.io.o.data) - 1;  // the last element of v's slice
  const std::vector<float> before = fused;
  EXPECT_EQ(call.attention(context.get()), ADAATTN_ERROR_OVERLAP);
  EXPECT_NE(last_error().find("io.o overlaps io.v"), std::string::npos) << last_error();
  EXPECT_EQ(fused, before);
}

TEST(GoodAttention, EmptyTensorsNeedNoMemory) {
  const std::unique_ptr<adaattn_context_t, decltype(&adaattn_destroy)> context(make_context(), adaattn_destroy);
  Call call;
  for (adaattn_tensor_t* t : {&call.io.q, &call.io.o}) t->shape[1] = 0, t->data = nullptr;
  for (adaattn_tensor_t* t : {&call.io.lse, &call.io.entropy, &call.io.bias}) t->shape[2] = 0, t->data = nullptr;
  EXPECT_EQ(call.attention(context.get()), ADAATTN_SUCCESS) << last_error();
  EXPECT_TRUE(call.outputs_untouched());
}

TEST(GoodAttention, StridesOfSingleElementsAndBroadcastsMayBeAnything) {
  const std::unique_ptr<adaattn_context_t, decltype(&adaattn_destroy)> context(make_context(), adaattn_destroy);
  Call call;
  call.io.k.stride[0] = call.io.v.stride[0] = 0;
  call.io.bias = tensor(call.bias.data(), ADAATTN_DTYPE_F32, {1, 1, Call::kSeqlenQ, 1}, {INT64_MIN, INT64_MAX, 0, -7});
  for (adaattn_tensor_t* t : {&call.io.q, &call.io.o}) t->shape[1] = 1, t->stride[1] = INT64_MIN;
  for (adaattn_tensor_t* t : {&call.io.lse, &call.io.entropy}) t->shape[2] = 1;
  call.io.bias.shape[2] = 1;
  EXPECT_EQ(call.attention(context.get()), ADAATTN_SUCCESS) << last_error();
}

}  // namespace
}  // namespace adaattn::test
