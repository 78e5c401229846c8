// One attention call and one error text through the C ABI with cgo. CGO_CFLAGS and CGO_LDFLAGS say where the header
// and the library are.
package main

// #cgo LDFLAGS: -ladaattn
// #include <adaattn/adaattn.h>
// #include <stdlib.h>
import "C"

import (
	"fmt"
	"math"
	"strings"
	"unsafe"
)

func check(ok bool, what ...any) {
	if !ok {
		panic(fmt.Sprint(what...))
	}
}

// tensor fills a [1, keys, 1, 2] view of C memory: a struct handed to C must not hold Go pointers.
func tensor(view *C.adaattn_tensor_t, keys int64, values ...float32) []float32 {
	data := C.calloc(C.size_t(keys*2), 4)
	floats := unsafe.Slice((*float32)(data), keys*2)
	copy(floats, values)
	shape := [4]C.int64_t{1, C.int64_t(keys), 1, 2}
	check(C.adaattn_tensor_init(view, data, C.ADAATTN_DTYPE_F32, C.ADAATTN_DEVICE_CPU, 0, 4, &shape[0], nil) == 0)
	return floats
}

func main() {
	var context *C.adaattn_context_t
	var desc C.adaattn_attn_desc_t
	var io C.adaattn_io_t
	check(C.adaattn_create(nil, &context) == 0)
	check(C.adaattn_attn_desc_init(&desc, C.sizeof_adaattn_attn_desc_t) == 0)
	check(C.adaattn_io_init(&io, C.sizeof_adaattn_io_t) == 0)
	desc.max_batch, desc.max_seqlen_q, desc.max_seqlen_k = 1, 1, 2
	desc.heads_q, desc.heads_kv, desc.head_dim_qk = 1, 1, 2
	desc.dtype_q, desc.scale = C.ADAATTN_DTYPE_F32, 1

	// Scores ln 3 and 0, so the weights are 3/4 and 1/4.
	tensor(&io.q, 1, 1, 0)
	tensor(&io.k, 2, float32(math.Log(3)))
	tensor(&io.v, 2, 4, 0, 0, 8)
	o := tensor(&io.o, 1)
	check(C.adaattn_attention(context, &desc, nil, &io, nil) == 0)
	check(math.Abs(float64(o[0]-3)) < 1e-5 && math.Abs(float64(o[1]-2)) < 1e-5, o)

	desc.head_dim_qk = -1
	check(C.adaattn_attention(context, &desc, nil, &io, nil) != 0)
	var text [256]C.char
	check(C.adaattn_last_error(&text[0], 256) > 0)
	check(strings.Contains(C.GoString(&text[0]), "head_dim_qk"), C.GoString(&text[0]))
	check(C.adaattn_destroy(context) == 0)
	fmt.Println("o =", o, "; error:", C.GoString(&text[0]))
}
