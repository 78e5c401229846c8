// How a server keeps the keys and values of many sequences in pages: prompts of different lengths are computed in one
// packed call, then every sequence grows by a token a step and takes a page when its last one is full. The result of
// the last step is compared with attention over contiguous tensors.
#include <adaattn/adaattn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kSequences = 3, kSteps = 40, kPageSize = 16, kPages = 24, kPagesEach = 9, kMaxLength = kPagesEach * kPageSize };
enum { kHeadsQ = 8, kHeadsKv = 2, kHeadDim = 64, kQueryFloats = kHeadsQ * kHeadDim, kKeyFloats = kHeadsKv * kHeadDim };
static const int32_t kPrompts[kSequences] = {37, 5, 100};

// The pool that all sequences share, and what of it belongs to which.
static float k_pool[kPages][kPageSize][kKeyFloats], v_pool[kPages][kPageSize][kKeyFloats];
static int32_t block_table[kSequences][kPagesEach], lengths[kSequences], pages_taken;

static void check(adaattn_status_t status) {
  if (status == ADAATTN_SUCCESS) return;
  char text[512];
  adaattn_last_error(text, sizeof text);
  fprintf(stderr, "%s: %s\n", adaattn_status_name(status), text);
  exit(1);
}

// Stands for what a model computes: kind 0 is the query, 1 the key, 2 the value of one token.
static void project(int kind, int sequence, int position, int count, float* out) {
  uint32_t state = 1u + 7919u * (uint32_t)kind + 104729u * (uint32_t)sequence + 15485863u * (uint32_t)position;
  for (int i = 0; i < count; i++) {
    state = state * 1664525u + 1013904223u;
    out[i] = (float)(state >> 8) / (float)(1 << 23) - 1.0f;
  }
}

static void append_token(int sequence) {
  const int32_t position = lengths[sequence]++;
  // Pages need no order: these are handed out from the pool's end.
  if (position % kPageSize == 0) block_table[sequence][position / kPageSize] = kPages - 1 - pages_taken++;
  const int32_t page = block_table[sequence][position / kPageSize], slot = position % kPageSize;
  project(1, sequence, position, kKeyFloats, k_pool[page][slot]);
  project(2, sequence, position, kKeyFloats, v_pool[page][slot]);
}

static adaattn_tensor_t view(void* data, adaattn_dtype_t dtype, int ndim, int64_t a, int64_t b, int64_t c, int64_t d) {
  adaattn_tensor_t tensor;
  check(adaattn_tensor_init(&tensor, data, dtype, ADAATTN_DEVICE_CPU, 0, ndim, (int64_t[]){a, b, c, d}, NULL));
  return tensor;
}

static adaattn_attn_desc_t describe(adaattn_layout_t layout_q, int64_t max_seqlen_q) {
  adaattn_attn_desc_t desc;
  check(adaattn_attn_desc_init(&desc, sizeof desc));
  desc.max_batch = kSequences, desc.max_seqlen_q = max_seqlen_q, desc.max_seqlen_k = kMaxLength;
  desc.heads_q = kHeadsQ, desc.heads_kv = kHeadsKv, desc.head_dim_qk = kHeadDim, desc.dtype_q = ADAATTN_DTYPE_F32;
  desc.layout_q = layout_q, desc.layout_kv = ADAATTN_LAYOUT_PAGED, desc.page_size = kPageSize;
  desc.mask = ADAATTN_MASK_CAUSAL;  // of the end of the keys: a query sees all tokens up to its own
  return desc;
}

static adaattn_io_t paged_io(void) {
  adaattn_io_t io;
  check(adaattn_io_init(&io, sizeof io));
  io.k = view(k_pool, ADAATTN_DTYPE_F32, 4, kPages, kPageSize, kHeadsKv, kHeadDim);
  io.v = view(v_pool, ADAATTN_DTYPE_F32, 4, kPages, kPageSize, kHeadsKv, kHeadDim);
  io.block_table = view(block_table, ADAATTN_DTYPE_I32, 2, kSequences, kPagesEach, 0, 0);
  io.seqused_k = view(lengths, ADAATTN_DTYPE_I32, 1, kSequences, 0, 0, 0);
  return io;
}

// All prompts in one call, their queries one after another.
static void prefill(adaattn_context_t* context) {
  static float q[kMaxLength * kSequences][kQueryFloats], o[kMaxLength * kSequences][kQueryFloats];
  int32_t cu_seqlens[kSequences + 1] = {0};
  for (int s = 0; s < kSequences; s++) {
    for (int i = 0; i < kPrompts[s]; i++) {
      append_token(s);
      project(0, s, i, kQueryFloats, q[cu_seqlens[s] + i]);
    }
    cu_seqlens[s + 1] = cu_seqlens[s] + kPrompts[s];
  }
  const adaattn_attn_desc_t desc = describe(ADAATTN_LAYOUT_THD, kMaxLength);
  adaattn_io_t io = paged_io();
  io.q = view(q, ADAATTN_DTYPE_F32, 3, cu_seqlens[kSequences], kHeadsQ, kHeadDim, 0);
  io.o = view(o, ADAATTN_DTYPE_F32, 3, cu_seqlens[kSequences], kHeadsQ, kHeadDim, 0);
  io.cu_seqlens_q = view(cu_seqlens, ADAATTN_DTYPE_I32, 1, kSequences + 1, 0, 0, 0);
  check(adaattn_attention(context, &desc, NULL, &io, NULL));
}

// The newest query of one sequence over keys and values that are gathered from its pages.
static float difference(adaattn_context_t* context, int s, const float* q, const float* o) {
  static float k[kMaxLength][kKeyFloats], v[kMaxLength][kKeyFloats], expected[kQueryFloats];
  for (int j = 0; j < lengths[s]; j++) {
    memcpy(k[j], k_pool[block_table[s][j / kPageSize]][j % kPageSize], sizeof k[j]);
    memcpy(v[j], v_pool[block_table[s][j / kPageSize]][j % kPageSize], sizeof v[j]);
  }
  adaattn_attn_desc_t desc = describe(ADAATTN_LAYOUT_BSHD, 1);
  desc.layout_kv = ADAATTN_LAYOUT_BSHD, desc.page_size = 0;
  adaattn_io_t io;
  check(adaattn_io_init(&io, sizeof io));
  io.q = view((void*)q, ADAATTN_DTYPE_F32, 4, 1, 1, kHeadsQ, kHeadDim);
  io.o = view(expected, ADAATTN_DTYPE_F32, 4, 1, 1, kHeadsQ, kHeadDim);
  io.k = view(k, ADAATTN_DTYPE_F32, 4, 1, lengths[s], kHeadsKv, kHeadDim);
  io.v = view(v, ADAATTN_DTYPE_F32, 4, 1, lengths[s], kHeadsKv, kHeadDim);
  check(adaattn_attention(context, &desc, NULL, &io, NULL));
  float largest = 0;
  for (int i = 0; i < kQueryFloats; i++) largest = fmaxf(largest, fabsf(o[i] - expected[i]));
  return largest;
}

int main(void) {
  static float q[kSequences][kQueryFloats], o[kSequences][kQueryFloats];
  adaattn_context_t* context;
  adaattn_plan_t* plan;
  check(adaattn_create(NULL, &context));
  prefill(context);

  // One plan, one workspace and one set of views serve every step: only lengths and the block table change.
  const adaattn_attn_desc_t desc = describe(ADAATTN_LAYOUT_BSHD, 1);
  check(adaattn_plan_create(context, &desc, NULL, &plan));
  size_t bytes;
  check(adaattn_plan_workspace_size(plan, &bytes));
  void* workspace = malloc(bytes + 1);
  adaattn_io_t io = paged_io();
  io.q = view(q, ADAATTN_DTYPE_F32, 4, kSequences, 1, kHeadsQ, kHeadDim);
  io.o = view(o, ADAATTN_DTYPE_F32, 4, kSequences, 1, kHeadsQ, kHeadDim);
  for (int step = 0; step < kSteps; step++) {
    for (int s = 0; s < kSequences; s++) {
      project(0, s, lengths[s], kQueryFloats, q[s]);
      append_token(s);
    }
    check(adaattn_plan_execute(plan, &io, workspace, bytes, NULL));
  }
  // Lengths and page numbers are clamped rather than refused; this says whether one had to be.
  adaattn_plan_stats_t stats = {.struct_size = sizeof stats};
  check(adaattn_plan_get_stats(plan, ADAATTN_STATS_WAIT, &stats));

  float largest = 0;
  for (int s = 0; s < kSequences; s++) largest = fmaxf(largest, difference(context, s, q[s], o[s]));
  printf("%d sequences of %d, %d and %d tokens in %d pages of %d\n", kSequences, lengths[0], lengths[1], lengths[2],
         pages_taken, kPageSize);
  printf("largest difference to contiguous keys and values: %g\n", (double)largest);
  free(workspace);
  check(adaattn_plan_destroy(plan));
  check(adaattn_destroy(context));
  return stats.violation_field != ADAATTN_FIELD_NONE || !(largest < 1e-5f);
}
