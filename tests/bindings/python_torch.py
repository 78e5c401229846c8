"""bindings/python/adaattn.py on CUDA tensors of PyTorch, against float64. usage: python_torch.py LIBRARY SOURCE_DIR"""
import os
import pathlib
import sys

try:
    import torch
except ImportError:
    print(f"Skipped: no PyTorch for {sys.executable}")
    sys.exit(77)
if not torch.cuda.is_available():
    print("Skipped: PyTorch finds no GPU")
    sys.exit(77)
os.environ["ADAATTN_LIBRARY"] = sys.argv[1]
sys.path.insert(0, str(pathlib.Path(sys.argv[2]) / "bindings/python"))
import adaattn

# The rounding of outputs of order 1 and of weights: two steps of the format.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def reference(q, k, v):
    """Causal, [batch, tokens, heads, head_dim]."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(
        ~torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def main():
    seed = int(os.environ.get("ADAATTN_TEST_SEED", "1"))
    print(f"ADAATTN_TEST_SEED={seed}")
    torch.manual_seed(seed)
    stream = torch.cuda.Stream()
    with adaattn.Context(device="cuda") as context, torch.cuda.stream(stream):
        for dtype, tolerance in TOLERANCES.items():
            q, k, v = (torch.randn(2, 300, heads, 64, device="cuda").to(dtype) for heads in (8, 2, 2))
            o = torch.full_like(q, torch.nan)
            context.attention(q, k, v, o, mask="causal", stream=stream.cuda_stream)
            worst = (o.double() - reference(q, k, v)).abs().max().item()
            print(dtype, worst)
            assert worst < tolerance, worst
        try:
            context.attention(q, k, v, o.cpu(), stream=stream.cuda_stream)
        except adaattn.Error as error:
            assert "io.o.device is 1 (CPU); accepted: 2 (CUDA)" in str(error), error
        else:
            raise AssertionError("a tensor of the host was accepted")


main()
