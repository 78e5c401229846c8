"""Times PyTorch's SDPA back-ends for the rows of a JSON file and prints {"ceilings": ..., "rows": {row: {peer: us}}}."""
import json
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

warnings.filterwarnings("ignore")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PEERS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
RUNS = 15


def timed(call, cold=False, seconds=10.0, calls=1):
    """Median of device times of a call in us; a spin hides the launches, a write over the L2 cache makes runs cold. A
    run is that many calls in a row: where the card meets its power limit, they are slower than calls with rests. Slow
    calls are run less often, so that all runs take about that many seconds, but at least once."""
    flush = torch.empty(torch.cuda.get_device_properties(0).L2_cache_size * 2 if cold else 1, dtype=torch.uint8, device="cuda")
    started = time.monotonic()
    call()
    torch.cuda.synchronize()
    first = time.monotonic() - started
    for _ in range(2 if first < seconds / RUNS else 0):
        call()
    times = []
    for _ in range(max(1, min(RUNS, int(seconds / max(first, 1e-6))))):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(300_000)
        if cold:
            flush.zero_()
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / calls * 1e3)
    return sorted(times)[len(times) // 2]


def peers_of(row):
    dtype = DTYPES[row["dtype"]]

    def make(seqlen, heads):
        shape = (row["batch"], seqlen, heads, row["head_dim"])
        return torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2)

    q = make(row["seqlen_q"], row["heads_q"])
    k, v = make(row["seqlen_k"], row["heads_kv"]), make(row["seqlen_k"], row["heads_kv"])
    mask = {"is_causal": row["causal"]}
    if row["causal"] and row["seqlen_q"] != row["seqlen_k"]:  # is_causal aligns the first query with the first key
        mask = {"attn_mask": causal_lower_right(row["seqlen_q"], row["seqlen_k"])}
    found = {}
    for name, backend in PEERS.items():
        if name == "efficient" and row["dtype"] != "f32":
            continue
        if name == "cudnn" and "attn_mask" in mask:  # would read the mask as a tensor
            continue
        try:
            with sdpa_kernel(backend):
                grouped = row["heads_q"] != row["heads_kv"]
                call = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **mask)
                version = f"-{torch.backends.cudnn.version()}" if name == "cudnn" else f"-torch{torch.__version__}"
                found[name + version] = timed(call, row["cold"], calls=row.get("calls", 1))
        except RuntimeError:  # this back-end does not serve the row
            pass
    return found


def main():
    with open(sys.argv[1]) as file:
        rows = json.load(file)
    n = 8192
    ceilings = {}
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("f32", torch.float32, False)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        ceilings[name + "_tflops"] = 2 * n**3 / timed(lambda: a @ b, seconds=1.0) * 1e-6
    print(json.dumps({"ceilings": ceilings, "rows": {row["name"]: peers_of(row) for row in rows}}))


if __name__ == "__main__":
    main()
