"""Attention by libadaattn on arrays that speak DLPack (NumPy, PyTorch, CuPy, JAX), through ctypes and without copies.

    q, k, v = (numpy.random.default_rng(i).standard_normal((1, 128, 8, 64), numpy.float32) for i in range(3))
    o = numpy.empty_like(q)
    with adaattn.Context() as context:
        context.attention(q, k, v, o, mask="causal")

The loader finds libadaattn.so.0, or ADAATTN_LIBRARY names it. Arrays, layouts and options are those of adaattn.h. On
CUDA `stream` is the stream's handle (of PyTorch: torch.cuda.current_stream().cuda_stream), and calls only enqueue.
"""
import ctypes
import math
import os
from ctypes import POINTER, byref, c_char, c_char_p, c_double, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p

DEVICES = {"cpu": 1, "cuda": 2}
ISAS = {"auto": 0, "baseline": 1, "avx2": 2, "avx512": 3, "amx": 4, "neon": 5}
LAYOUTS = {"bshd": 1, "bhsd": 2, "thd": 3, "paged": 4}
MASKS = {"none": 0, "causal": 1, "causal_top_left": 2}
POLICIES = {"exact": 0, "quality": 1, "balanced": 2, "speed": 3, "custom": 4}
_SWITCHES = {"default": 0, "on": 1, "off": 2}
_PRECISIONS = {"default": 0, "i8": 1, "bf16": 2, "f16": 3, "f32": 4}
ADAPTIVE = {  # fields of adaattn_adaptive_desc_t that are enumerations; switches may be True or False too
    "probe": {"default": 0, "off": 1, "rank": 2, "full": 3},
    "rank_mode": {"default": 0, "off": 1, "fixed": 2, "energy": 3},
    "min_precision": _PRECISIONS, "max_precision": _PRECISIONS, "on_exceed": {"report": 0, "recompute": 1},
    "far_field": _SWITCHES, "feedback": _SWITCHES, "freeze": _SWITCHES}
FLAGS = {"alibi_slopes": 1, "sinks": 2, "bias": 4}
OUTPUTS = {"lse": 1, "entropy": 2}
_BYTES = {1: 4, 2: 2, 3: 2, 4: 4, 5: 8, 6: 1}  # of an element, by dtype
_HEADS = {"bshd": 2, "bhsd": 1, "thd": 1, "paged": 2}  # where a layout keeps its heads, and its tokens
_TOKENS = {"bshd": 1, "bhsd": 2, "thd": 0, "paged": 1}


class _Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("shape", c_int64 * 4), ("stride", c_int64 * 4), ("ndim", c_int32),
                ("dtype", c_int32), ("device", c_int32), ("device_id", c_int32), ("reserved", c_int64)]


def _struct(name, fields, sized=True):
    """A struct of the C API; fields: "type name name .., type name"; sized: its first field is struct_size."""
    types = {"i32": c_int32, "i64": c_int64, "u32": c_uint32, "u64": c_uint64, "f64": c_double, "ptr": c_void_p,
             "tensor": _Tensor, "text128": c_char * 128, "text32": c_char * 32}
    members = [("struct_size", c_size_t)] if sized else []
    for group in fields.split(","):
        kind, *names = group.split()
        members += [(member, types[kind]) for member in names]
    return type(name, (ctypes.Structure,), {"_fields_": members})


_Config = _struct("Config", """
    i32 device device_id num_threads isa, ptr parallel_for parallel_for_user alloc free alloc_user""")
_AttnDesc = _struct("AttnDesc", """
    i64 max_batch max_seqlen_q max_seqlen_k max_total_q heads_q heads_kv head_dim_qk head_dim_v,
    i32 dtype_q dtype_kv dtype_o math layout_q layout_kv, i64 page_size, i32 mask deterministic,
    i64 window_left window_right, f64 scale softcap, u32 flags outputs, i64 descale_block""")
_AdaptiveDesc = _struct("AdaptiveDesc", """
    i32 policy probe, f64 tolerance tile_mass, i64 probe_rank, f64 needle_share, i32 far_field rank_mode,
    f64 rank_ratio rank_threshold, i64 min_rank, i32 min_precision max_precision, i64 verify_rows,
    i32 feedback on_exceed freeze reserved0, u64 seed max_workspace_bytes""")
_Io = _struct("Io", """
    tensor q k v o lse entropy bias alibi_slopes sinks cu_seqlens_q cu_seqlens_k seqused_k block_table q_descale
    k_descale v_descale""")
_PlanInfo = _struct("PlanInfo", """
    text128 kernel, text32 isa, i32 tile_q tile_k splits capture_safe deterministic exact, u64 workspace_bytes""")
_PlanStats = _struct("PlanStats", """
    u64 calls query_rows score_pairs, f64 flops, i32 violation_field reserved0, i64 violation_index violation_value,
    u64 heads heads_dense heads_low_rank heads_f32 heads_f16 heads_bf16 heads_i8 tiles tiles_kept tiles_probed_in,
    f64 flops_done rank_v_sum entropy_sum entropy_min entropy_max predicted_error_sum dropped_mass_sum,
    u64 verified_heads verified_rows, f64 measured_error_sum measured_error_max measured_row_error_max,
    u64 heads_over_tolerance heads_recomputed, f64 seconds_analyze seconds_decide seconds_attend seconds_verify""")

_HeadStats = _struct("HeadStats", """
    i64 batch head, f64 entropy kept_tiles dropped_mass predicted_error measured_error feedback, i64 rank_v,
    f64 rank_energy, i32 precision dense""", sized=False)

try:
    _lib = ctypes.CDLL(os.environ.get("ADAATTN_LIBRARY", "libadaattn.so.0"))
except OSError as missing:
    raise ImportError(f"{missing}; ADAATTN_LIBRARY=/path/to/libadaattn.so.0 says where it is") from missing
_lib.adaattn_last_error.argtypes, _lib.adaattn_last_error.restype = [c_char_p, c_size_t], c_size_t
_lib.adaattn_status_name.restype = _lib.adaattn_build_info.restype = c_char_p
_lib.adaattn_plan_execute.argtypes = [c_void_p, POINTER(_Io), c_void_p, c_size_t, c_void_p]
_lib.adaattn_attention.argtypes = [c_void_p, POINTER(_AttnDesc), POINTER(_AdaptiveDesc), POINTER(_Io), c_void_p]
_lib.adaattn_plan_create.argtypes = [c_void_p, POINTER(_AttnDesc), POINTER(_AdaptiveDesc), POINTER(c_void_p)]
_lib.adaattn_plan_get_stats.argtypes = [c_void_p, c_uint32, POINTER(_PlanStats)]
_lib.adaattn_plan_get_head_stats.argtypes = [c_void_p, POINTER(_HeadStats), c_size_t, c_size_t, POINTER(c_size_t)]
_lib.adaattn_plan_get_tile_map.argtypes = [c_void_p, c_int64, c_int64, c_char_p, c_size_t, POINTER(c_int64),
                                           POINTER(c_int64)]
_lib.adaattn_tensor_from_dlpack.argtypes = [POINTER(_Tensor), c_void_p]
for _name in "adaattn_destroy", "adaattn_plan_destroy":
    getattr(_lib, _name).argtypes = [c_void_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes, _capsule_pointer.restype = [ctypes.py_object, c_char_p], c_void_p


class Error(RuntimeError):
    """A call that was refused or failed; status is adaattn_status_t."""

    def __init__(self, status):
        text = ctypes.create_string_buffer(1024)
        _lib.adaattn_last_error(text, len(text))
        super().__init__(f"{_lib.adaattn_status_name(status).decode()}: {text.value.decode()}")
        self.status = status


def _check(status):
    if status != 0:
        raise Error(status)


def _defaults(struct, init):
    _check(init(byref(struct), c_size_t(ctypes.sizeof(struct))))
    return struct


def _choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(choices)}")
    return choices[value]


def _adaptive_value(name, value):
    if isinstance(value, bool) and ADAPTIVE.get(name) is _SWITCHES:
        return _SWITCHES["on" if value else "off"]
    return _choice(name, value, ADAPTIVE[name]) if name in ADAPTIVE and isinstance(value, str) else value


def _view(name, array, stream, view):
    """Makes `view` one of the array; what has to live while it is used."""
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"{name} is of type {type(array).__name__}; accepted: arrays that speak DLPack")
    on_cpu = array.__dlpack_device__()[0] in (1, 3)  # kDLCPU, kDLCUDAHost
    # 1 is DLPack's number of the default stream: the producer lets that one wait for its own work.
    capsule = array.__dlpack__() if on_cpu else array.__dlpack__(stream=stream or 1)
    _check(_lib.adaattn_tensor_from_dlpack(byref(view), _capsule_pointer(capsule, b"dltensor")))
    return capsule


def _views(arrays, stream):
    """The io of a call, and what has to live while it runs."""
    io = _defaults(_Io(), _lib.adaattn_io_init)
    return io, [_view(name, array, stream, getattr(io, name)) for name, array in arrays.items() if array is not None]


def _describe(io, layout="bshd", layout_kv=None, mask="none", window=(-1, -1), scale=0.0, softcap=0.0, policy="exact",
              max_batch=None, max_seqlen_q=None, max_seqlen_k=None, descale_block=0, fast_f32=False, **adaptive):
    """The descriptors of tensors like these: what is not given is as large as they are."""
    layout_kv = layout_kv or layout
    desc = _defaults(_AttnDesc(), _lib.adaattn_attn_desc_init)
    desc.layout_q, desc.layout_kv = _choice("layout", layout, LAYOUTS), _choice("layout_kv", layout_kv, LAYOUTS)
    packed, paged = layout == "thd", layout_kv == "paged"
    seqlen_k = io.k.shape[_TOKENS[layout_kv]]
    desc.max_batch = max_batch or (io.cu_seqlens_q.shape[0] - 1 if packed else io.q.shape[0])
    desc.max_seqlen_q = io.q.shape[_TOKENS[layout]] if max_seqlen_q is None else max_seqlen_q
    most_keys = seqlen_k * io.block_table.shape[1] if paged else seqlen_k
    desc.max_seqlen_k = most_keys if max_seqlen_k is None else max_seqlen_k
    desc.max_total_q = io.q.shape[0] if packed else 0
    desc.page_size = seqlen_k if paged else 0
    desc.heads_q, desc.heads_kv = io.q.shape[_HEADS[layout]], io.k.shape[_HEADS[layout_kv]]
    desc.head_dim_qk, desc.head_dim_v = io.q.shape[io.q.ndim - 1], io.v.shape[io.v.ndim - 1]
    desc.dtype_q, desc.dtype_kv, desc.dtype_o = io.q.dtype, io.k.dtype, io.o.dtype
    desc.mask, desc.math = _choice("mask", mask, MASKS), int(fast_f32)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window is {window!r}; accepted: (left, right), -1 for an open side")
    desc.window_left, desc.window_right = window
    desc.scale, desc.softcap, desc.descale_block = scale, softcap, descale_block
    desc.flags = sum(bit for name, bit in FLAGS.items() if getattr(io, name).ndim)
    desc.outputs = sum(bit for name, bit in OUTPUTS.items() if getattr(io, name).ndim)
    fields = _defaults(_AdaptiveDesc(), _lib.adaattn_adaptive_desc_init)
    fields.policy = _choice("policy", policy, POLICIES)
    known = {name for name, _ in _AdaptiveDesc._fields_}
    for name, value in adaptive.items():
        if name not in known:
            raise TypeError(f"{name} is no option; accepted: attention()'s and fields of adaattn_adaptive_desc_t")
        setattr(fields, name, _adaptive_value(name, value))
    return desc, fields


def _split(options):
    """Tensors and options of a call, apart."""
    names = {name for name, _ in _Io._fields_}
    return ({name: value for name, value in options.items() if name in names},
            {name: value for name, value in options.items() if name not in names})


def _fields(struct):
    values = {name: getattr(struct, name) for name, _ in struct._fields_ if name not in ("struct_size", "reserved0")}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


class _Owner:
    """Of a handle; one that cannot be destroyed yet stays usable."""

    def close(self):
        _check(self._destroy(self._handle))
        self._handle = c_void_p()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Context(_Owner):
    """One device. May be used from several threads; close() it, or leave its with block, after its plans."""

    _destroy = _lib.adaattn_destroy

    def __init__(self, device="cpu", device_id=0, num_threads=0, isa="auto"):
        self._handle = c_void_p()
        config = _defaults(_Config(), _lib.adaattn_config_init)
        config.device, config.isa = _choice("device", device, DEVICES), _choice("isa", isa, ISAS)
        config.device_id, config.num_threads = device_id, num_threads
        _check(_lib.adaattn_create(byref(config), byref(self._handle)))

    def attention(self, q, k, v, o, *, stream=0, **options):
        """Writes attention to o. options: the other tensors of adaattn_io_t by name; layout, layout_kv, mask, window,
        scale, softcap, fast_f32, descale_block, max_batch, max_seqlen_q, max_seqlen_k; policy and the fields of
        adaattn_adaptive_desc_t, enumerations by name (probe="off", freeze=True). Where lengths grow from call to call,
        give their maxima: one plan then serves all. With a policy make a plan() for each layer: it learns from calls."""
        tensors, options = _split(options)
        io, _alive = _views({"q": q, "k": k, "v": v, "o": o, **tensors}, stream)
        desc, adaptive = _describe(io, **options)
        _check(_lib.adaattn_attention(self._handle, byref(desc), byref(adaptive), byref(io), stream or None))

    def plan(self, q, k, v, o, **options):
        """A plan for tensors like these, with the options of attention()."""
        tensors, options = _split(options)
        io, _alive = _views({"q": q, "k": k, "v": v, "o": o, **tensors}, 0)
        return Plan(self, *_describe(io, **options))


class Plan(_Owner):
    """A problem and its kernels; with a policy also one layer's feedback and statistics. One call at a time."""

    _destroy = _lib.adaattn_plan_destroy

    def __init__(self, context, desc, adaptive):
        self._context, self._handle = context, c_void_p()
        _check(_lib.adaattn_plan_create(context._handle, byref(desc), byref(adaptive), byref(self._handle)))

    def execute(self, q, k, v, o, *, stream=0, workspace=None, **tensors):
        """workspace: a contiguous array of info()["workspace_bytes"] bytes or more, of a type that q may have or of
        integers of 4 or 8 bytes; calls that a CUDA graph captures need one. Without, the library allocates it."""
        io, alive = _views({"q": q, "k": k, "v": v, "o": o, **tensors}, stream)
        space, count = _Tensor(), 0
        if workspace is not None:
            alive.append(_view("workspace", workspace, stream, space))
            count = math.prod(space.shape[:space.ndim]) * _BYTES[space.dtype]
        _check(_lib.adaattn_plan_execute(self._handle, byref(io), space.data, count, stream or None))

    def info(self):
        """adaattn_plan_info_t as a dictionary."""
        info = _PlanInfo(struct_size=ctypes.sizeof(_PlanInfo))
        _check(_lib.adaattn_plan_get_info(self._handle, byref(info)))
        return _fields(info)

    def stats(self, wait=True, reset=False):
        """adaattn_plan_stats_t as a dictionary; wait: after the enqueued work, else a snapshot."""
        stats = _PlanStats(struct_size=ctypes.sizeof(_PlanStats))
        _check(_lib.adaattn_plan_get_stats(self._handle, int(wait) + 2 * int(reset), byref(stats)))
        return _fields(stats)

    def head_stats(self):
        """The newest call's adaattn_head_stats_t as dictionaries, one for each (batch, query head)."""
        count, size = c_size_t(), ctypes.sizeof(_HeadStats)
        _check(_lib.adaattn_plan_get_head_stats(self._handle, None, size, 0, byref(count)))
        heads = (_HeadStats * count.value)()
        _check(_lib.adaattn_plan_get_head_stats(self._handle, heads, size, len(heads), byref(count)))
        return [_fields(head) for head in heads]

    def tile_map(self, batch, head):
        """What the newest call did with each 128 x 128 tile, a bytes object for each query tile: 0 no visible pair,
        1 not computed exactly, 2 computed exactly."""
        rows, columns = c_int64(), c_int64()
        extents = byref(rows), byref(columns)
        _check(_lib.adaattn_plan_get_tile_map(self._handle, batch, head, None, 0, *extents))
        tiles = ctypes.create_string_buffer(max(1, rows.value * columns.value))
        _check(_lib.adaattn_plan_get_tile_map(self._handle, batch, head, tiles, len(tiles), *extents))
        return [tiles.raw[i * columns.value:(i + 1) * columns.value] for i in range(rows.value)]


def build_info():
    return _lib.adaattn_build_info().decode()
