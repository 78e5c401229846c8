"""One attention call and one error text through the C ABI with ctypes. usage: smoke.py path/to/libadaattn.so"""
import ctypes
import math
import sys

I32, I64, F32, F64, U32, SIZE = (ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_uint32,
                                 ctypes.c_size_t)
DTYPE_F32, DEVICE_CPU = 1, 1


class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("shape", I64 * 4), ("stride", I64 * 4), ("ndim", I32), ("dtype", I32),
                ("device", I32), ("device_id", I32), ("reserved", I64)]


class AttnDesc(ctypes.Structure):
    _fields_ = [("struct_size", SIZE), *[(name, I64) for name in (
        "max_batch", "max_seqlen_q", "max_seqlen_k", "max_total_q", "heads_q", "heads_kv", "head_dim_qk", "head_dim_v")],
        *[(name, I32) for name in ("dtype_q", "dtype_kv", "dtype_o", "math", "layout_q", "layout_kv")],
        ("page_size", I64), ("mask", I32), ("deterministic", I32), ("window_left", I64), ("window_right", I64),
        ("scale", F64), ("softcap", F64), ("flags", U32), ("outputs", U32)]


class Io(ctypes.Structure):
    _fields_ = [("struct_size", SIZE), *[(name, Tensor) for name in (
        "q", "k", "v", "o", "lse", "entropy", "bias", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k",
        "seqused_k", "block_table")]]


lib = ctypes.CDLL(sys.argv[1])
lib.adaattn_last_error.restype = SIZE
context, desc, io = ctypes.c_void_p(), AttnDesc(), Io()
by_ref, null = ctypes.byref, ctypes.c_void_p()
assert lib.adaattn_create(null, by_ref(context)) == 0
assert lib.adaattn_attn_desc_init(by_ref(desc), SIZE(ctypes.sizeof(desc))) == 0
assert lib.adaattn_io_init(by_ref(io), SIZE(ctypes.sizeof(io))) == 0
desc.max_batch = desc.max_seqlen_q = desc.heads_q = desc.heads_kv = 1
desc.max_seqlen_k = desc.head_dim_qk = 2
desc.dtype_q, desc.scale = DTYPE_F32, 1.0

# Scores ln 3 and 0, so the weights are 3/4 and 1/4.
q, k, v, o = (F32 * 2)(1, 0), (F32 * 4)(math.log(3), 0, 0, 0), (F32 * 4)(4, 0, 0, 8), (F32 * 2)()
for tensor, values, keys in ((io.q, q, 1), (io.k, k, 2), (io.v, v, 2), (io.o, o, 1)):
    assert lib.adaattn_tensor_init(by_ref(tensor), values, DTYPE_F32, DEVICE_CPU, 0, 4, (I64 * 4)(1, keys, 1, 2), null) == 0
assert lib.adaattn_attention(context, by_ref(desc), null, by_ref(io), null) == 0
assert abs(o[0] - 3) < 1e-5 and abs(o[1] - 2) < 1e-5, list(o)

desc.head_dim_qk = -1
assert lib.adaattn_attention(context, by_ref(desc), null, by_ref(io), null) != 0
text = ctypes.create_string_buffer(256)
assert lib.adaattn_last_error(text, SIZE(256)) > 0 and b"head_dim_qk" in text.value, text.value
assert lib.adaattn_destroy(context) == 0
print(f"o = {list(o)}; error: {text.value.decode()}")
