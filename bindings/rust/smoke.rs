//! One attention call and one error text through the C ABI, with nothing but std. Build with
//! rustc --edition 2021 -L PREFIX/lib -l adaattn smoke.rs
use std::ffi::{c_char, c_void, CStr};
use std::mem::{size_of, zeroed};
use std::ptr::{null, null_mut};

#[repr(C)]
struct Tensor { data: *mut f32, shape: [i64; 4], stride: [i64; 4], ndim: i32, dtype: i32, device: i32, device_id: i32, reserved: i64 }

#[repr(C)]
struct AttnDesc {
    struct_size: usize, max_batch: i64, max_seqlen_q: i64, max_seqlen_k: i64, max_total_q: i64,
    heads_q: i64, heads_kv: i64, head_dim_qk: i64, head_dim_v: i64,
    dtype_q: i32, dtype_kv: i32, dtype_o: i32, math: i32, layout_q: i32, layout_kv: i32, page_size: i64,
    mask: i32, deterministic: i32, window_left: i64, window_right: i64, scale: f64, softcap: f64, flags: u32, outputs: u32,
}

/// `optional`: lse, entropy, bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seqused_k and block_table.
#[repr(C)]
struct Io { struct_size: usize, q: Tensor, k: Tensor, v: Tensor, o: Tensor, optional: [Tensor; 9] }

const DTYPE_F32: i32 = 1;
const DEVICE_CPU: i32 = 1;

extern "C" {
    fn adaattn_create(config: *const c_void, context: *mut *mut c_void) -> i32;
    fn adaattn_destroy(context: *mut c_void) -> i32;
    fn adaattn_attn_desc_init(desc: *mut AttnDesc, size: usize) -> i32;
    fn adaattn_io_init(io: *mut Io, size: usize) -> i32;
    fn adaattn_tensor_init(tensor: *mut Tensor, data: *mut f32, dtype: i32, device: i32, device_id: i32, ndim: i32,
                           shape: *const i64, stride: *const i64) -> i32;
    fn adaattn_attention(context: *mut c_void, desc: *const AttnDesc, adaptive: *const c_void, io: *const Io, stream: *mut c_void) -> i32;
    fn adaattn_last_error(buf: *mut c_char, cap: usize) -> usize;
}

fn main() {
    // Scores ln 3 and 0, so the weights are 3/4 and 1/4.
    let (mut q, mut k, mut v, mut o) = ([1f32, 0.0], [3f32.ln(), 0.0, 0.0, 0.0], [4f32, 0.0, 0.0, 8.0], [f32::NAN; 2]);
    let mut text = [0 as c_char; 256];
    unsafe {
        let (mut context, mut desc, mut io): (*mut c_void, AttnDesc, Io) = (null_mut(), zeroed(), zeroed());
        assert_eq!(adaattn_create(null(), &mut context), 0);
        assert_eq!(adaattn_attn_desc_init(&mut desc, size_of::<AttnDesc>()), 0);
        assert_eq!(adaattn_io_init(&mut io, size_of::<Io>()), 0);
        desc = AttnDesc { max_batch: 1, max_seqlen_q: 1, max_seqlen_k: 2, heads_q: 1, heads_kv: 1, head_dim_qk: 2, dtype_q: DTYPE_F32, scale: 1.0, ..desc };
        for (tensor, data, keys) in [(&mut io.q, q.as_mut_ptr(), 1), (&mut io.k, k.as_mut_ptr(), 2), (&mut io.v, v.as_mut_ptr(), 2), (&mut io.o, o.as_mut_ptr(), 1)] {
            assert_eq!(adaattn_tensor_init(tensor, data, DTYPE_F32, DEVICE_CPU, 0, 4, [1i64, keys, 1, 2].as_ptr(), null()), 0);
        }
        assert_eq!(adaattn_attention(context, &desc, null(), &io, null_mut()), 0);
        assert!((o[0] - 3.0).abs() < 1e-5 && (o[1] - 2.0).abs() < 1e-5, "{o:?}");

        desc.head_dim_qk = -1;
        assert_ne!(adaattn_attention(context, &desc, null(), &io, null_mut()), 0);
        assert!(adaattn_last_error(text.as_mut_ptr(), text.len()) > 0);
        let text = CStr::from_ptr(text.as_ptr()).to_str().unwrap();
        assert!(text.contains("head_dim_qk"), "{text}");
        assert_eq!(adaattn_destroy(context), 0);
        println!("o = {o:?}; error: {text}");
    }
}
