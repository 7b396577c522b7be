"""The attention of `measure.rs attention` in PyTorch: scaled_dot_product_attention, forward and backward, by length.

Prints the same table, so that both can be laid beside each other. FLOPs are those that the mask leaves.
"""

import sys
import time

import torch
import torch.nn.functional as F

TOKENS = 16384
# query heads, key and value heads, width
CASES = {"MHA": (16, 16, 64), "MHA, wide heads": (8, 8, 128), "GQA 4:1": (16, 4, 64)}


def seconds(run):
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    runs = int(min(max(0.3 / max(time.perf_counter() - start, 1e-5), 1), 1000))
    start = time.perf_counter()
    for _ in range(runs):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / runs


def measure(name, heads, kv_heads, width, seq):
    batch = TOKENS // seq
    make = lambda n: torch.randn(batch, n, seq, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = make(heads), make(kv_heads), make(kv_heads)
    run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    with torch.no_grad():
        forward = seconds(run)
    out_grad = torch.ones(batch, heads, seq, width, device="cuda", dtype=torch.bfloat16)
    both = seconds(lambda: run().backward(out_grad))
    work = 2.0 * batch * heads * seq * (seq + 1) / 2 * 2 * width
    backward = max(both - forward, 1e-9)
    print(
        f"| {name} | {seq} | BF16 | SDPA | {1e3 * forward:.3f} | {work / forward / 1e12:.1f} "
        f"| {1e3 * backward:.3f} | {2.5 * work / backward / 1e12:.1f} |",
        flush=True,
    )


def products():
    for rows, d_input, d_output in [(4096,) * 3, (8192,) * 3, (16384, 1024, 1024), (16384, 1024, 3328), (16384, 3328, 1024)]:
        x = torch.randn(rows, d_input, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(d_input, d_output, device="cuda", dtype=torch.bfloat16)
        took = seconds(lambda: x @ weight)
        speed = 2.0 * rows * d_input * d_output / took / 1e12
        print(f"| {rows} x {d_input} x {d_output} | BF16 | cuBLAS | {1e3 * took:.3f} | {speed:.1f} |", flush=True)


def main():
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU")
    print(f"PyTorch {torch.__version__} on {torch.cuda.get_device_name()}\n")
    print("| product | type | kernel | ms | TFLOP/s |\n|---|---|---|---|---|")
    products()
    print("\n| attention | T | type | kernel | forward ms | TFLOP/s | backward ms | TFLOP/s |\n|---|---|---|---|---|---|---|---|")
    for name, (heads, kv_heads, width) in CASES.items():
        for seq in [512, 1024, 2048, 4096, 8192, 16384]:
            measure(name, heads, kv_heads, width, seq)


main()
