"""Times PyTorch's prefill attention at the shapes that prefill.cu times.

    python3 benches/gpu/prefill.py [brief]

Medians between CUDA events. FLOPs count the pairs of query and key within the mask, as in
prefill.cu.
"""

import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
# tokens, heads, kv_heads, head_dim, dtype, causal
BRIEF = [(8192, 32, 8, 128, torch.bfloat16, True), (32768, 32, 8, 128, torch.bfloat16, True),
         (8192, 32, 8, 128, torch.float16, True), (8192, 32, 8, 128, torch.bfloat16, False),
         (8192, 32, 32, 128, torch.bfloat16, True), (8192, 32, 8, 64, torch.bfloat16, True),
         (8192, 32, 8, 96, torch.bfloat16, True), (8192, 32, 8, 256, torch.bfloat16, True)]
MORE = [(tokens, 32, 8, 128, torch.bfloat16, True) for tokens in (512, 1024, 2048, 4096, 131072)] + \
       [(8192, 32, 8, head_dim, torch.bfloat16, False) for head_dim in (64, 96, 256)]


def median_ms(run, count):
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for _ in range(3):
        run()
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def matmul_tflops(size=8192):
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * size**3 / median_ms(lambda: a @ b, 20) * 1e-9


def measure(name, tokens, heads, kv_heads, head_dim, dtype, causal):
    q = torch.randn(1, heads, tokens, head_dim, dtype=dtype, device="cuda")
    k, v = (torch.randn(1, kv_heads, tokens, head_dim, dtype=dtype, device="cuda") for _ in range(2))
    label = f"{name} {str(dtype)[6:]:8} d {head_dim:3} heads {heads}/{kv_heads} tokens {tokens:6} {'causal' if causal else 'full':6} |"
    try:
        with sdpa_kernel(BACKENDS[name]):
            run = lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=heads != kv_heads)
            ms = median_ms(run, 10 if tokens > 32768 else 20)
    except RuntimeError as error:
        print(label, str(error).splitlines()[0][:100], flush=True)
        return
    flops = 4 * tokens**2 * head_dim * heads * (0.5 if causal else 1)
    print(f"{label} {ms:9.4f} ms {flops / ms * 1e-9:6.1f} TFLOP/s", flush=True)


def main(brief):
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, bf16 matrix product: {matmul_tflops():.0f} TFLOP/s")
    for shape in BRIEF if brief else BRIEF + MORE:
        for name in BACKENDS:
            measure(name, *shape)


if __name__ == "__main__":
    main("brief" in sys.argv[1:])
