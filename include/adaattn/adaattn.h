/* libadaattn: attention for any language that can call C.
 *
 * SPDX-License-Identifier: BSD-3-Clause
 *
 * This header is the whole contract. It is C11, compiles alone as C and as C++, and includes nothing but
 * <stddef.h> and <stdint.h>.
 *
 * Conventions
 *   Status      Every call that can fail returns adaattn_status_t; 0 is success. adaattn_last_error() has the text.
 *   Structs     Input structs start with `size_t struct_size` and have an `_init` function that fills in the
 *               defaults. A shorter struct (an older caller) gets defaults for what it lacks; a longer one is
 *               accepted while its unknown tail is zero. Of an output struct, at most `struct_size` bytes are
 *               written; set `struct_size` before the call.
 *   Enums       int32_t typedefs with constants. An unknown value is refused, never guessed.
 *   Sizes       int64_t counts and element strides, checked for overflow.
 *   Streams     The stream is an argument of every call that launches work. On the CPU it must be NULL and the
 *               call is synchronous.
 *   Threads     A context may be used from several threads. Calls on one plan must not overlap; different plans
 *               run concurrently. The error text belongs to the calling thread.
 *   Ownership   The library never keeps a caller's pointer beyond the call, except hooks and their user data,
 *               which must live as long as the context. */
#ifndef ADAATTN_ADAATTN_H_
#define ADAATTN_ADAATTN_H_

#include <stddef.h>
#include <stdint.h>

#define ADAATTN_VERSION_MAJOR 0
#define ADAATTN_VERSION_MINOR 1
#define ADAATTN_VERSION_PATCH 0
/* (major << 16) | (minor << 8) | patch; compare with adaattn_version(). */
#define ADAATTN_VERSION ((ADAATTN_VERSION_MAJOR << 16) | (ADAATTN_VERSION_MINOR << 8) | ADAATTN_VERSION_PATCH)

#if defined(_WIN32)
#define ADAATTN_API
#else
#define ADAATTN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Status ------------------------------------------------------------------------------------------------ */

typedef int32_t adaattn_status_t;

#define ADAATTN_SUCCESS 0
/* 1000: the call is wrong. Nothing was written; everything stays usable. */
#define ADAATTN_ERROR_INVALID_ARGUMENT 1000
#define ADAATTN_ERROR_NULL_POINTER 1001
#define ADAATTN_ERROR_INVALID_SHAPE 1002
#define ADAATTN_ERROR_INVALID_DTYPE 1003
#define ADAATTN_ERROR_INVALID_STRIDE 1004
#define ADAATTN_ERROR_OVERLAP 1005
#define ADAATTN_ERROR_SIZE_OVERFLOW 1006
#define ADAATTN_ERROR_STRUCT_SIZE 1007
#define ADAATTN_ERROR_WRONG_DEVICE 1008
#define ADAATTN_ERROR_WORKSPACE_TOO_SMALL 1009
#define ADAATTN_ERROR_IN_USE 1010
#define ADAATTN_ERROR_CAPTURE 1011
/* 2000: the call is right and this build, device or version does not serve it. */
#define ADAATTN_ERROR_NOT_SUPPORTED 2000
#define ADAATTN_ERROR_NOT_BUILT 2001
/* 3000: a resource is missing. */
#define ADAATTN_ERROR_OUT_OF_MEMORY 3000
/* 4000: the device or its driver. */
#define ADAATTN_ERROR_DEVICE 4000
#define ADAATTN_ERROR_NO_DEVICE 4001
#define ADAATTN_ERROR_DRIVER_TOO_OLD 4002
#define ADAATTN_ERROR_LIBRARY_NOT_FOUND 4003
/* 5000: a defect of the library. */
#define ADAATTN_ERROR_INTERNAL 5000

/* ---- Basic types ------------------------------------------------------------------------------------------- */

typedef int32_t adaattn_dtype_t;
#define ADAATTN_DTYPE_NONE 0
#define ADAATTN_DTYPE_F32 1
#define ADAATTN_DTYPE_F16 2
#define ADAATTN_DTYPE_BF16 3
#define ADAATTN_DTYPE_I32 4
#define ADAATTN_DTYPE_I64 5
#define ADAATTN_DTYPE_E4M3 6 /* OCP FP8 E4M3: 1 byte, largest finite number 448, NaN and no infinity */

typedef int32_t adaattn_device_t;
#define ADAATTN_DEVICE_CPU 1
#define ADAATTN_DEVICE_CUDA 2

/* The CUDA runtime's stream type, declared forward so that no CUDA header is needed. */
typedef struct CUstream_st* adaattn_stream_t;

typedef struct adaattn_context adaattn_context_t;
typedef struct adaattn_plan adaattn_plan_t;

/* A view of memory the caller owns: 96 bytes, plain data, passed by value inside other structs.
 * An absent tensor is all zero (ndim 0). Strides are in elements and may be anything for extents of 1; stride 0
 * (broadcast) is accepted for k, v and bias; q, k, v and o need a last stride of 1. Strides are not negative. data
 * may be any multiple of the element's size. */
typedef struct adaattn_tensor {
  void* data;
  int64_t shape[4];
  int64_t stride[4];
  int32_t ndim;
  adaattn_dtype_t dtype;
  adaattn_device_t device;
  int32_t device_id;
  int64_t reserved; /* must be 0 */
} adaattn_tensor_t;

/* ---- Library ----------------------------------------------------------------------------------------------- */

/* Version of the loaded library, packed as ADAATTN_VERSION. */
ADAATTN_API uint32_t adaattn_version(void);

/* One line: version, back-ends, instruction sets or architectures compiled in, compiler. Static storage. */
ADAATTN_API const char* adaattn_build_info(void);

/* "ADAATTN_ERROR_INVALID_SHAPE" and the like; "ADAATTN_ERROR_UNKNOWN" for any other number. Static storage. */
ADAATTN_API const char* adaattn_status_name(adaattn_status_t status);

/* One sentence that explains the status. Static storage. */
ADAATTN_API const char* adaattn_status_string(adaattn_status_t status);

/* Copies the calling thread's most recent error text (zero-terminated, cut to cap bytes) and returns its full
 * length without the zero. buf may be NULL when cap is 0. The text names the field, the value and what would be
 * accepted; it stays valid until the same thread's next failing call. */
ADAATTN_API size_t adaattn_last_error(char* buf, size_t cap);

typedef int32_t adaattn_log_level_t;
#define ADAATTN_LOG_OFF 0
#define ADAATTN_LOG_ERROR 1
#define ADAATTN_LOG_WARNING 2
#define ADAATTN_LOG_INFO 3
#define ADAATTN_LOG_DEBUG 4

typedef void (*adaattn_log_fn)(void* user, adaattn_log_level_t level, const char* message);

/* Sends messages at `level` and below to fn, which may be called from any thread, one call at a time. fn NULL
 * switches logging off, as at start: the library prints nothing of its own. Inside fn the callback cannot be set. */
ADAATTN_API adaattn_status_t adaattn_set_log_callback(adaattn_log_fn fn, void* user, adaattn_log_level_t level);

/* Number of usable devices of a kind. CPU: 1. CUDA: 0 without a driver, with one too old, or in a build without
 * CUDA, and then adaattn_last_error() says which; the status is success all the same. */
ADAATTN_API adaattn_status_t adaattn_device_count(adaattn_device_t device, int32_t* count);

typedef struct {
  size_t struct_size;
  adaattn_device_t device;
  int32_t device_id;
  int32_t compute_units;      /* CPU: hardware threads available to this process. CUDA: multiprocessors. */
  int32_t compute_capability; /* CUDA: major * 10 + minor. CPU: 0. */
  int64_t memory_bytes;       /* physical memory of the device */
  char name[128];             /* the processor's own name */
  char isa[128];              /* CPU: the instruction sets usable here, best first, e.g. "amx avx512 avx2 baseline" */
} adaattn_device_info_t;
/* One device, of ids from 0 on. ADAATTN_ERROR_NO_DEVICE: no such id; ADAATTN_ERROR_NOT_BUILT: no such back-end. */
ADAATTN_API adaattn_status_t adaattn_device_info(adaattn_device_t device, int32_t device_id,
                                                 adaattn_device_info_t* info);

/* ---- Context ----------------------------------------------------------------------------------------------- */

/* Instruction sets of the CPU back-end. AMX means AVX-512 kernels plus tile kernels where they apply. */
typedef int32_t adaattn_isa_t;
#define ADAATTN_ISA_AUTO 0
#define ADAATTN_ISA_BASELINE 1 /* x86-64 with SSE4.2 */
#define ADAATTN_ISA_AVX2 2
#define ADAATTN_ISA_AVX512 3
#define ADAATTN_ISA_AMX 4
#define ADAATTN_ISA_NEON 5

/* Runs task(task_user, i) for every i in [0, n), in any order and on any threads, and returns when all are done. */
typedef void (*adaattn_parallel_for_fn)(void* user, int64_t n, void (*task)(void* task_user, int64_t i),
                                        void* task_user);

/* Memory hooks. alloc returns memory of at least `bytes` aligned to `alignment` (a power of two), or NULL; on CUDA
 * it is device memory ordered by `stream`. free gets the same size back. */
typedef void* (*adaattn_alloc_fn)(void* user, size_t bytes, size_t alignment, adaattn_stream_t stream);
typedef void (*adaattn_free_fn)(void* user, void* ptr, size_t bytes, adaattn_stream_t stream);

typedef struct adaattn_config {
  size_t struct_size;
  adaattn_device_t device;              /* default CPU */
  int32_t device_id;                    /* default 0 */
  int32_t num_threads;                  /* CPU threads, the calling one included; 0 (default): all available */
  adaattn_isa_t isa;                    /* CPU: default AUTO, the best one; a set the CPU lacks is refused */
  adaattn_parallel_for_fn parallel_for; /* NULL (default): the library's own small pool */
  void* parallel_for_user;
  adaattn_alloc_fn alloc; /* both or neither; NULL (default): the library's own */
  adaattn_free_fn free;
  void* alloc_user;
} adaattn_config_t;

/* Fills the defaults; size is the caller's sizeof(adaattn_config_t). */
ADAATTN_API adaattn_status_t adaattn_config_init(adaattn_config_t* config, size_t size);

/* Creates a context on one device. config NULL: all defaults. CUDA contexts heed two variables of the environment:
 * ADAATTN_CUDA_LIB_DIR, a folder in which cuBLAS and cuSOLVER are looked for where the loader does not find them, and
 * ADAATTN_CUDA_LIBRARIES=off, which keeps both closed: the low-rank tools then run the library's own kernels. */
ADAATTN_API adaattn_status_t adaattn_create(const adaattn_config_t* config, adaattn_context_t** context);

/* Destroys the context; ADAATTN_ERROR_IN_USE while plans made from it live. NULL is accepted. */
ADAATTN_API adaattn_status_t adaattn_destroy(adaattn_context_t* context);

typedef int32_t adaattn_option_t;
/* Check that data pointers belong to the context's device (1, default on CUDA) or trust them (0). */
#define ADAATTN_OPTION_CHECK_POINTERS 1
/* Threads of a CPU context, 0 (all) to 4096; ADAATTN_ERROR_IN_USE while a call is running on the context. */
#define ADAATTN_OPTION_NUM_THREADS 2
/* The ADAATTN_ISA_* in use; settable like the number of threads (ADAATTN_ISA_AUTO chooses again). Plans keep the
 * set they were created with. */
#define ADAATTN_OPTION_ISA 3
/* Plans kept by adaattn_attention(), 0 (none) to 65536; default 64. Setting it drops plans over the limit. */
#define ADAATTN_OPTION_PLAN_CACHE_SIZE 4
ADAATTN_API adaattn_status_t adaattn_set_option(adaattn_context_t* context, adaattn_option_t option, int64_t value);
ADAATTN_API adaattn_status_t adaattn_get_option(adaattn_context_t* context, adaattn_option_t option, int64_t* value);

/* ---- Problem ----------------------------------------------------------------------------------------------- */

/* Fills a tensor view of 1 to 4 dimensions. stride NULL: contiguous, last dimension fastest. data is not read. */
ADAATTN_API adaattn_status_t adaattn_tensor_init(adaattn_tensor_t* tensor, void* data, adaattn_dtype_t dtype,
                                                 adaattn_device_t device, int32_t device_id, int32_t ndim,
                                                 const int64_t* shape, const int64_t* stride);

/* The same from a DLPack tensor without a copy: CPU or CUDA, 1 to 4 dimensions, one lane of a dtype above. dl_tensor is
 * a DLTensor*, whose type has no name that could be declared here. */
ADAATTN_API adaattn_status_t adaattn_tensor_from_dlpack(adaattn_tensor_t* tensor, const void* dl_tensor);

/* Order of the dimensions of q/o and of k/v. Strides are free, so each is a naming of dimensions, not a memory
 * layout.  BSHD [batch, seqlen, heads, head_dim] · BHSD [batch, heads, seqlen, head_dim] · THD [total tokens,
 * heads, head_dim], sequences packed one after another and delimited by cu_seqlens · PAGED (k and v only)
 * [pages, page_size, heads_kv, head_dim], found through block_table. */
typedef int32_t adaattn_layout_t;
#define ADAATTN_LAYOUT_BSHD 1
#define ADAATTN_LAYOUT_BHSD 2
#define ADAATTN_LAYOUT_THD 3
#define ADAATTN_LAYOUT_PAGED 4

/* Query i may see key j when ...  off = 0 for CAUSAL_TOP_LEFT and seqlen_k - seqlen_q (of the sequence's actual
 * lengths) otherwise.
 *   NONE                 i + off - window_left <= j <= i + off + window_right
 *   CAUSAL_*             the same, and j <= i + off
 * A window side of -1 is open. */
typedef int32_t adaattn_mask_t;
#define ADAATTN_MASK_NONE 0
#define ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT 1
#define ADAATTN_MASK_CAUSAL ADAATTN_MASK_CAUSAL_BOTTOM_RIGHT
#define ADAATTN_MASK_CAUSAL_TOP_LEFT 2

/* Features a call may bring in its io; each flag makes the tensor of that name mandatory. */
#define ADAATTN_FLAG_ALIBI 1u /* io.alibi_slopes */
#define ADAATTN_FLAG_SINK 2u  /* io.sinks */
#define ADAATTN_FLAG_BIAS 4u  /* io.bias */
#define ADAATTN_FLAG_ALL 7u
/* Extra outputs. */
#define ADAATTN_OUTPUT_LSE 1u     /* io.lse */
#define ADAATTN_OUTPUT_ENTROPY 2u /* io.entropy */
#define ADAATTN_OUTPUT_ALL 3u

/* Arithmetic. EXACT: products of the inputs as they are, f32 accumulation, probabilities rounded at most to the
 * input type. FAST_F32 allows TF32 or bf16 products for f32 inputs where the device gains from it. */
typedef int32_t adaattn_math_t;
#define ADAATTN_MATH_EXACT 0
#define ADAATTN_MATH_FAST_F32 1

/* What will be computed; sizes are maxima, the actual ones come with each call's tensors.
 *   s_ij = scale * (q_i . k_j)                       scale 0 means 1/sqrt(head_dim_qk)
 *   s_ij = softcap * tanh(s_ij / softcap)            if softcap > 0
 *   s_ij = s_ij - alibi_slopes[h] * |i + off - j|    if ALIBI
 *   s_ij = s_ij + bias[b,h,i,j]                      if BIAS
 *   o_i  = sum_j p_ij v_j,  p_ij = exp(s_ij) / (sum_j' exp(s_ij') + exp(sinks[h]) if SINK)   over visible keys j
 *   lse_i = ln of that denominator;  entropy_i = -sum_j w_ij ln w_ij in nats, w = p renormalised over real keys
 * A query that sees no key has o = 0, lse = -inf (or the sink) and entropy 0. Query head h reads key head
 * h / (heads_q / heads_kv). Elements of E4M3 tensors stand for their value times the tensor's descale factor; adaptive
 * policies and the entropy tool refuse them. */
typedef struct adaattn_attn_desc {
  size_t struct_size;
  int64_t max_batch;    /* sequences in a call, >= 1 */
  int64_t max_seqlen_q; /* of one sequence, >= 0 */
  int64_t max_seqlen_k;
  int64_t max_total_q; /* THD only: packed query tokens; 0 (default) means max_batch * max_seqlen_q */
  int64_t heads_q;     /* a multiple of heads_kv */
  int64_t heads_kv;
  int64_t head_dim_qk;      /* 1..512 */
  int64_t head_dim_v;       /* 1..512; 0 (default) means head_dim_qk */
  adaattn_dtype_t dtype_q;  /* E4M3 only with dtype_kv E4M3 */
  adaattn_dtype_t dtype_kv; /* NONE (default): as q */
  adaattn_dtype_t dtype_o;  /* NONE (default): as q, BF16 where q is E4M3; E4M3 is refused */
  adaattn_math_t math;
  adaattn_layout_t layout_q;  /* of q and o; default BSHD */
  adaattn_layout_t layout_kv; /* default BSHD; THD exactly when layout_q is THD, or PAGED */
  int64_t page_size;          /* PAGED only: tokens in a page, >= 1 */
  adaattn_mask_t mask;
  int32_t deterministic; /* 1: bitwise repeatable (the CPU always is) */
  int64_t window_left;   /* default -1 */
  int64_t window_right;  /* default -1 */
  double scale;
  double softcap;
  uint32_t flags;   /* ADAATTN_FLAG_* */
  uint32_t outputs; /* ADAATTN_OUTPUT_* */
  /* E4M3 k and v: 0 (default), one descale factor per key head; or a multiple of 64, one per so many keys of it. */
  int64_t descale_block;
} adaattn_attn_desc_t;

ADAATTN_API adaattn_status_t adaattn_attn_desc_init(adaattn_attn_desc_t* desc, size_t size);

/* The tensors of one call. Absent ones stay zero; a present one that the descriptor does not call for is refused.
 *   q [.., heads_q, head_dim_qk]   o [.., heads_q, head_dim_v]   in layout_q, o in dtype_o
 *   k [.., heads_kv, head_dim_qk]  v [.., heads_kv, head_dim_v]  in layout_kv, dtype_kv
 *   lse, entropy   f32 [batch, heads_q, seqlen_q], THD: [heads_q, total_q]
 *   bias           f32 or dtype_q, [batch, heads_q, seqlen_q, seqlen_k] (THD: batch = sequences, the last two the
 *                  maxima of the call), any strides, extents of 1 broadcast
 *   alibi_slopes   f32 [heads_q] or [batch, heads_q]
 *   sinks          f32 [heads_q]
 *   cu_seqlens_q   i32 [batch + 1], THD: prefix sums of the sequence lengths, first 0
 *   cu_seqlens_k   i32 [batch + 1], THD keys
 *   seqused_k      i32 [batch], optional (mandatory for PAGED): actual key lengths
 *   block_table    i32 [batch, max pages of a sequence], PAGED: page of each page_size keys
 *   q_descale      f32 [batch, heads_kv], mandatory where q is E4M3
 *   k_descale, v_descale   f32 [batch, heads_kv], mandatory where k and v are E4M3; with descale_block [batch,
 *                  heads_kv, blocks], block i holds keys [i, i + 1) * descale_block of the sequence in every layout.
 *                  Any strides, extents of 1 broadcast: [1, 1] is one factor for the tensor. Factors are finite and
 *                  not negative
 * Values in cu_seqlens, seqused_k and block_table are clamped to what exists, never followed out of bounds; the
 * first violation is reported by adaattn_plan_get_stats(). o, lse and entropy must not overlap any other tensor. */
typedef struct adaattn_io {
  size_t struct_size;
  adaattn_tensor_t q;
  adaattn_tensor_t k;
  adaattn_tensor_t v;
  adaattn_tensor_t o;
  adaattn_tensor_t lse;
  adaattn_tensor_t entropy;
  adaattn_tensor_t bias;
  adaattn_tensor_t alibi_slopes;
  adaattn_tensor_t sinks;
  adaattn_tensor_t cu_seqlens_q;
  adaattn_tensor_t cu_seqlens_k;
  adaattn_tensor_t seqused_k;
  adaattn_tensor_t block_table;
  adaattn_tensor_t q_descale;
  adaattn_tensor_t k_descale;
  adaattn_tensor_t v_descale;
} adaattn_io_t;

ADAATTN_API adaattn_status_t adaattn_io_init(adaattn_io_t* io, size_t size);

/* ---- Adaptive attention ------------------------------------------------------------------------------------- */

/* The error of a head, the unit of every tolerance here:
 *   err = sqrt(mean_i ||o_i - o'_i||^2) / sqrt(mean_j ||v_j - mu||^2),  mu the head's mean of v
 * over query rows i and keys j of one (batch, head), o exact and o' computed. */

typedef int32_t adaattn_policy_t;
#define ADAATTN_POLICY_EXACT 0   /* default: as if no descriptor was given */
#define ADAATTN_POLICY_QUALITY 1 /* named policies set probe, tile_mass and the fields from probe_rank to min_rank */
#define ADAATTN_POLICY_BALANCED 2
#define ADAATTN_POLICY_SPEED 3
#define ADAATTN_POLICY_CUSTOM 4 /* the fields below, each 0 taking the BALANCED value */

typedef int32_t adaattn_switch_t;
#define ADAATTN_SWITCH_DEFAULT 0
#define ADAATTN_SWITCH_ON 1
#define ADAATTN_SWITCH_OFF 2

/* A search of the skipped tiles for single keys that block statistics cannot see. RANK: scores in a projection of q
 * and k of probe_rank dimensions, finds them statistically. FULL: all dimensions; no key that holds needle_share of a
 * row or more is dropped, short of the rounding of the probe's scores. */
typedef int32_t adaattn_probe_t;
#define ADAATTN_PROBE_DEFAULT 0
#define ADAATTN_PROBE_OFF 1
#define ADAATTN_PROBE_RANK 2
#define ADAATTN_PROBE_FULL 3

/* Projection of V on its principal directions. FIXED: rank_ratio * head_dim_v; ENERGY: the least rank that keeps
 * rank_threshold of V's energy, at most rank_ratio * head_dim_v, at least min_rank. Ranks are rounded up to those the
 * kernels offer. */
typedef int32_t adaattn_rank_mode_t;
#define ADAATTN_RANK_DEFAULT 0
#define ADAATTN_RANK_OFF 1
#define ADAATTN_RANK_FIXED 2
#define ADAATTN_RANK_ENERGY 3

/* Arithmetic of the products in increasing precision. */
typedef int32_t adaattn_precision_t;
#define ADAATTN_PRECISION_DEFAULT 0
#define ADAATTN_PRECISION_I8 1
#define ADAATTN_PRECISION_BF16 2
#define ADAATTN_PRECISION_F16 3
#define ADAATTN_PRECISION_F32 4

typedef int32_t adaattn_on_exceed_t;
#define ADAATTN_ON_EXCEED_REPORT 0    /* default: heads measured over the tolerance are counted in the statistics */
#define ADAATTN_ON_EXCEED_RECOMPUTE 1 /* and computed again exactly before the call returns */

/* How much error to allow in exchange for time. Zero means the policy's own value; what a named policy sets must stay
 * zero. A plan with an adaptive descriptor holds the feedback and statistics of one layer: use one plan per layer. The
 * CPU serves every field. CUDA serves compute capability 9.0 and rows that start on 16 bytes: policies for BF16 with
 * head_dim 128 (CUSTOM in 8 bits, both precisions I8, with probe, far_field and rank_mode OFF), and every tile in 8
 * bits (tile_mass 1, rank_mode OFF, verify_rows -1) for F16 and BF16 with head_dim 64 or 128. */
typedef struct adaattn_adaptive_desc {
  size_t struct_size;
  adaattn_policy_t policy;
  adaattn_probe_t probe;
  double tolerance;           /* error allowed per head, > 0; QUALITY 0.1, BALANCED 0.2, SPEED 0.4 unless given */
  double tile_mass;           /* least share of the estimated mass whose key tiles are computed exactly, in (0, 1] */
  int64_t probe_rank;         /* 1..head_dim_qk */
  double needle_share;        /* in (0, 1]: share of a row that a key must hold to be searched for */
  adaattn_switch_t far_field; /* represent skipped tiles by centroids of 32 keys (CUDA: 128) */
  adaattn_rank_mode_t rank_mode;
  double rank_ratio;                 /* in (0, 1] */
  double rank_threshold;             /* in (0, 1] */
  int64_t min_rank;                  /* 1..head_dim_v */
  adaattn_precision_t min_precision; /* default: the input's own */
  adaattn_precision_t max_precision;
  int64_t verify_rows; /* rows per head recomputed exactly to measure the error, at most 4096; -1: none */
  adaattn_switch_t feedback;
  adaattn_on_exceed_t on_exceed;
  adaattn_switch_t freeze; /* ON: a head keeps what the first call (or replay) to compute it decided; default OFF */
  int32_t reserved0;       /* must be 0 */
  uint64_t seed;
  uint64_t max_workspace_bytes; /* the work is done in parts that fit: of heads (CPU), queries (CUDA); 0: no limit */
} adaattn_adaptive_desc_t;

ADAATTN_API adaattn_status_t adaattn_adaptive_desc_init(adaattn_adaptive_desc_t* desc, size_t size);

/* Whether a plan for desc can be made on this context, decided by the code that makes it. The status says no, and
 * the reason (as adaattn_last_error() would give it) is copied to reason when that is not NULL. */
ADAATTN_API adaattn_status_t adaattn_check_support(adaattn_context_t* context, const adaattn_attn_desc_t* desc,
                                                   const adaattn_adaptive_desc_t* adaptive, char* reason,
                                                   size_t reason_cap);

/* ---- Attention --------------------------------------------------------------------------------------------- */

/* Makes a plan: validates desc, selects the kernels. Cheap (microseconds) and independent of actual lengths. On CUDA
 * it may allocate device memory, past the hook: not in a capture. adaptive NULL: an exact plan. */
ADAATTN_API adaattn_status_t adaattn_plan_create(adaattn_context_t* context, const adaattn_attn_desc_t* desc,
                                                 const adaattn_adaptive_desc_t* adaptive, adaattn_plan_t** plan);

/* Exact number of bytes adaattn_plan_execute() needs for any call within the plan's maxima; may be 0. */
ADAATTN_API adaattn_status_t adaattn_plan_workspace_size(adaattn_plan_t* plan, size_t* bytes);

/* Computes attention. workspace: device memory of at least workspace_bytes >= adaattn_plan_workspace_size(), any
 * alignment on the CPU and 256 bytes on CUDA, of which nothing lasts beyond the call: plans whose calls do not overlap
 * may share one. NULL with 0 bytes lets the library allocate it through the context's hook (refused under stream
 * capture). CUDA: only enqueues work on stream, capture-safe with a workspace. */
ADAATTN_API adaattn_status_t adaattn_plan_execute(adaattn_plan_t* plan, const adaattn_io_t* io, void* workspace,
                                                  size_t workspace_bytes, adaattn_stream_t stream);

typedef struct adaattn_plan_info {
  size_t struct_size;
  char kernel[128]; /* name of the kernel that a call of the plan's maxima runs */
  char isa[32];     /* CPU: instruction set, CUDA: architecture of that kernel */
  int32_t tile_q;   /* query rows and keys of its tile */
  int32_t tile_k;
  int32_t splits;           /* parts that the keys of one query tile are split into at the maxima */
  int32_t capture_safe;     /* 1: execute may be captured in a CUDA graph */
  int32_t deterministic;    /* 1: bitwise repeatable */
  int32_t exact;            /* 1: calls are exact ones, with a policy too where its statistics would not see enough */
  uint64_t workspace_bytes; /* as adaattn_plan_workspace_size() says */
} adaattn_plan_info_t;

ADAATTN_API adaattn_status_t adaattn_plan_get_info(adaattn_plan_t* plan, adaattn_plan_info_t* info);

/* Fields that a value in device memory can violate (adaattn_plan_stats_t.violation_field). */
typedef int32_t adaattn_field_t;
#define ADAATTN_FIELD_NONE 0
#define ADAATTN_FIELD_CU_SEQLENS_Q 1
#define ADAATTN_FIELD_CU_SEQLENS_K 2
#define ADAATTN_FIELD_SEQUSED_K 3
#define ADAATTN_FIELD_BLOCK_TABLE 4

/* flags of adaattn_plan_get_stats(). */
#define ADAATTN_STATS_WAIT 1u  /* finish enqueued work first (not while capturing); without it, a snapshot */
#define ADAATTN_STATS_RESET 2u /* and set the counters to zero */

typedef struct adaattn_plan_stats {
  size_t struct_size;
  uint64_t calls;                  /* successful adaattn_plan_execute() calls */
  uint64_t query_rows;             /* query rows x heads computed */
  uint64_t score_pairs;            /* (query, visible key) pairs x heads, i.e. the scores a dense kernel owes */
  double flops;                    /* 2 * (head_dim_qk + head_dim_v) * score_pairs */
  adaattn_field_t violation_field; /* first out-of-range value seen in a length or index array */
  int32_t reserved0;
  int64_t violation_index; /* its index in that array, rows flattened */
  int64_t violation_value;

  /* Adaptive plans: what was decided and measured, summed over calls, batch and heads. */
  uint64_t heads;          /* (batch, query head) pairs */
  uint64_t heads_dense;    /* of these, computed exactly because nothing was worth saving */
  uint64_t heads_low_rank; /* of these, computed with a projected V */
  uint64_t heads_f32;      /* by precision of their products */
  uint64_t heads_f16;
  uint64_t heads_bf16;
  uint64_t heads_i8;
  uint64_t tiles;           /* 128 x 128 tiles with any visible pair */
  uint64_t tiles_kept;      /* of these, computed exactly */
  uint64_t tiles_probed_in; /* of the kept ones, found by the probe */
  double flops_done;        /* of every stage, in the same unit as flops */
  double rank_v_sum;        /* over heads, head_dim_v where not projected */
  double entropy_sum;       /* normalized entropy estimated from block statistics, over heads */
  double entropy_min;
  double entropy_max;
  double predicted_error_sum; /* over heads */
  double dropped_mass_sum;    /* estimated share of the mass in tiles not computed exactly, over heads */
  uint64_t verified_heads;
  uint64_t verified_rows;
  double measured_error_sum; /* over verified heads */
  double measured_error_max;
  double measured_row_error_max; /* largest error of one sampled row, relative to the same spread */
  uint64_t heads_over_tolerance;
  uint64_t heads_recomputed;
  double seconds_analyze; /* time of the stages, on CUDA by the device's clock; 0 where every tile is 8-bit there */
  double seconds_decide;
  double seconds_attend;
  double seconds_verify;
} adaattn_plan_stats_t;

ADAATTN_API adaattn_status_t adaattn_plan_get_stats(adaattn_plan_t* plan, uint32_t flags, adaattn_plan_stats_t* stats);

/* The newest call's decisions for one (batch, query head); exact plans have none. */
typedef struct adaattn_head_stats {
  int64_t batch;
  int64_t head;
  double entropy;    /* normalized, estimated from block statistics */
  double kept_tiles; /* fraction */
  double dropped_mass;
  double predicted_error;
  double measured_error; /* NaN where not verified */
  double feedback;       /* multiplier on the prediction, for the next call */
  int64_t rank_v;        /* head_dim_v where V is not projected */
  double rank_energy;    /* share of V's energy that the projection keeps */
  adaattn_precision_t precision;
  int32_t dense;
} adaattn_head_stats_t;

/* Copies up to `cap` entries, each cut to element_size bytes (the caller's sizeof), heads fastest, and says in *count
 * how many there are; array may be NULL when cap is 0. CUDA: waits for the device, so not in a capture. */
ADAATTN_API adaattn_status_t adaattn_plan_get_head_stats(adaattn_plan_t* plan, adaattn_head_stats_t* array,
                                                         size_t element_size, size_t cap, size_t* count);

/* What the newest call did with each 128 x 128 tile of one (batch, query head): 0 no visible pair, 1 not computed
 * exactly, 2 computed exactly. As decided: a head that was computed again for its error keeps its map. Row-major
 * [*query_tiles][*key_tiles], for the lengths of that call; 0 x 0 where there was none. cap 0 (map may be NULL) asks
 * for the two extents alone; a cap of fewer bytes than tiles is refused. Adaptive plans keep the maps while those of
 * all heads at the plan's maxima take at most 16 MiB, one bit per tile, rows padded to 64 bits; all other plans refuse
 * with ADAATTN_ERROR_NOT_SUPPORTED. CUDA: waits for the device, so not in a capture. */
ADAATTN_API adaattn_status_t adaattn_plan_get_tile_map(adaattn_plan_t* plan, int64_t batch, int64_t head, uint8_t* map,
                                                       size_t cap, int64_t* query_tiles, int64_t* key_tiles);

/* NULL is accepted. CUDA: work under way is finished first; graphs that captured a call must not be replayed again. */
ADAATTN_API adaattn_status_t adaattn_plan_destroy(adaattn_plan_t* plan);

/* One call: attention over a plan kept inside the context, found by the descriptor. Thread-safe; the workspace
 * comes from the context's hook, so it cannot be captured. */
ADAATTN_API adaattn_status_t adaattn_attention(adaattn_context_t* context, const adaattn_attn_desc_t* desc,
                                               const adaattn_adaptive_desc_t* adaptive, const adaattn_io_t* io,
                                               adaattn_stream_t stream);

/* Joins two results over disjoint sets of keys into the result over their union (chunked prefill, shared prefixes,
 * context parallelism):  lse = ln(e^lse_a + e^lse_b),  o = o_a e^(lse_a - lse) + o_b e^(lse_b - lse).
 * o* [..., head_dim_v], 3 or 4 dimensions BSHD or THD order [.., seqlen, heads, head_dim], one dtype for the three
 * or f32 inputs with a narrower o; lse* f32 [batch, heads, seqlen] or [heads, tokens]. lse may be absent; o and
 * lse may be the very views o_a and lse_a (in place). -inf on both sides gives o = 0, lse = -inf. Capture-safe. */
ADAATTN_API adaattn_status_t adaattn_merge(adaattn_context_t* context, const adaattn_tensor_t* o_a,
                                           const adaattn_tensor_t* lse_a, const adaattn_tensor_t* o_b,
                                           const adaattn_tensor_t* lse_b, const adaattn_tensor_t* o,
                                           const adaattn_tensor_t* lse, adaattn_stream_t stream);

/* ---- Tools ------------------------------------------------------------------------------------------------- */

/* Workspaces are as in execute; a tool without a query takes none. Matrices are the last two dimensions of f32 tensors
 * of 2 to 4 dimensions with free strides, leading ones are the batch. Streams and captures: as in execute. */

typedef int32_t adaattn_entropy_mode_t;
#define ADAATTN_ENTROPY_EXACT 0   /* every query row */
#define ADAATTN_ENTROPY_SAMPLED 1 /* sample_rows rows per head, one drawn from each of as many equal strata */

typedef struct adaattn_entropy_desc {
  size_t struct_size;
  adaattn_entropy_mode_t mode;
  int32_t normalized;  /* 1: H / ln n, n the keys the row sees (0 where n < 2); 0 (default): nats */
  int64_t sample_rows; /* SAMPLED: default 256; all rows if the sequence has no more */
  uint64_t seed;       /* SAMPLED: the same seed draws the same rows on every device */
} adaattn_entropy_desc_t;

ADAATTN_API adaattn_status_t adaattn_entropy_desc_init(adaattn_entropy_desc_t* desc, size_t size);

/* Entropy of the attention distribution without computing attention. attn describes the problem (head_dim_v and
 * dtype_o are not used), io brings q, k and the optional inputs; v, o and lse stay absent. io.entropy: every row's
 * entropy, EXACT mode only, optional when head_entropy is given. head_entropy: f32 [batch, heads_q], mean over the
 * rows computed; NULL if not wanted. */
ADAATTN_API adaattn_status_t adaattn_entropy_workspace_size(adaattn_context_t* context, const adaattn_attn_desc_t* attn,
                                                            const adaattn_entropy_desc_t* desc, size_t* bytes);
ADAATTN_API adaattn_status_t adaattn_entropy(adaattn_context_t* context, const adaattn_attn_desc_t* attn,
                                             const adaattn_entropy_desc_t* desc, const adaattn_io_t* io,
                                             const adaattn_tensor_t* head_entropy, void* workspace,
                                             size_t workspace_bytes, adaattn_stream_t stream);

typedef struct adaattn_low_rank_desc {
  size_t struct_size;
  int64_t batch; /* matrices in a call, default 1 */
  int64_t rows;  /* m */
  int64_t cols;  /* n */
  int64_t rank;  /* r, 1..min(m, n); CUDA, min(m, n) > 1024: r + oversampling at most 1024, under 3/4 of min(m, n) */
  int64_t oversampling;     /* default 8 */
  int64_t power_iterations; /* default 2, at most 1000 */
  uint64_t seed;
} adaattn_low_rank_desc_t;

ADAATTN_API adaattn_status_t adaattn_low_rank_desc_init(adaattn_low_rank_desc_t* desc, size_t size);

/* Randomized truncated SVD, a ~ u diag(s) v^T, singular values in descending order (Halko, Martinsson and Tropp,
 * SIAM Review 53(2), 2011, algorithms 4.4 and 5.1). a [.., m, n], u [.., m, r], s [.., r], v [.., n, r]; u and v
 * may be NULL. Repeatable for a seed. */
ADAATTN_API adaattn_status_t adaattn_low_rank_workspace_size(adaattn_context_t* context,
                                                             const adaattn_low_rank_desc_t* desc, size_t* bytes);
ADAATTN_API adaattn_status_t adaattn_low_rank(adaattn_context_t* context, const adaattn_low_rank_desc_t* desc,
                                              const adaattn_tensor_t* a, const adaattn_tensor_t* u,
                                              const adaattn_tensor_t* s, const adaattn_tensor_t* v, void* workspace,
                                              size_t workspace_bytes, adaattn_stream_t stream);

/* Projects rows on a basis: y = (a - mean) basis, row_residual_i = ||(a_i - mean) - y_i basis^T||_2, residual =
 * ||rows' residuals||_2 / ||a - mean||_F (0 for a zero matrix). a [.., m, n]; basis [.., n, r], orthonormal columns;
 * mean [.., n] or NULL for 0; y [.., m, r], row_residual [.., m], residual [.., 1] or [..]: at least one of the three.
 * CUDA: n + r <= 5632; residual takes memory from the context's hook, which a capture refuses. */
ADAATTN_API adaattn_status_t adaattn_low_rank_project(adaattn_context_t* context, const adaattn_tensor_t* a,
                                                      const adaattn_tensor_t* basis, const adaattn_tensor_t* mean,
                                                      const adaattn_tensor_t* y, const adaattn_tensor_t* row_residual,
                                                      const adaattn_tensor_t* residual, adaattn_stream_t stream);

/* Effective rank by energy: the smallest r with sum_{i<=r} sigma_i^2 >= threshold * sum_i sigma_i^2, threshold in
 * (0, 1]; 0 for a zero matrix. a [.., m, n] with min(m, n) <= 1024; ranks i32, one per matrix; singular_values
 * f32 [.., min(m, n)] or NULL. */
ADAATTN_API adaattn_status_t adaattn_effective_rank_workspace_size(adaattn_context_t* context,
                                                                   const adaattn_tensor_t* a, size_t* bytes);
ADAATTN_API adaattn_status_t adaattn_effective_rank(adaattn_context_t* context, const adaattn_tensor_t* a,
                                                    double threshold, const adaattn_tensor_t* ranks,
                                                    const adaattn_tensor_t* singular_values, void* workspace,
                                                    size_t workspace_bytes, adaattn_stream_t stream);

/* Largest singular value by power iteration on a^T a from a seeded start, at most max_iterations (0: 1000), until
 * the estimate changes by less than `tolerance` < 1 relatively (0: 1e-6). a [.., m, n]; norms f32, one per matrix. */
ADAATTN_API adaattn_status_t adaattn_spectral_norm_workspace_size(adaattn_context_t* context, const adaattn_tensor_t* a,
                                                                  size_t* bytes);
ADAATTN_API adaattn_status_t adaattn_spectral_norm(adaattn_context_t* context, const adaattn_tensor_t* a,
                                                   double tolerance, int64_t max_iterations, uint64_t seed,
                                                   const adaattn_tensor_t* norms, void* workspace,
                                                   size_t workspace_bytes, adaattn_stream_t stream);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* ADAATTN_ADAATTN_H_ */
