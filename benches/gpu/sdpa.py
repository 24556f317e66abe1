"""PyTorch's attention over an f16 cache, for the shapes that harness.cu times:

    python3 benches/gpu/sdpa.py

One query token, 128 channels. Times are medians of 60 between CUDA events; caches take turns in more memory than the L2 cache holds.
"""

import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
HEAD_DIM = 128
L2_BYTES = 200 << 20


def median_ms(run, count=60):
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for i in range(5):
        run(i)
    for i, (start, end) in enumerate(events):
        start.record()
        run(i)
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def copy_bandwidth():
    source = torch.ones(4 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda _: target.copy_(source), 20) * 1e-6


def time_sdpa(name, batch, heads, kv_heads, tokens, copy):
    shape = (batch, kv_heads, tokens, HEAD_DIM)
    bytes_ = 2 * 2 * batch * kv_heads * tokens * HEAD_DIM
    copies = max(2, L2_BYTES // bytes_ + 1)
    q = torch.randn(batch, heads, 1, HEAD_DIM, dtype=torch.float16, device="cuda")
    try:
        caches = [[torch.randn(shape, dtype=torch.float16, device="cuda") for _ in range(2)] for _ in range(copies)]
        with sdpa_kernel(BACKENDS[name]):
            ms = median_ms(lambda i: scaled_dot_product_attention(q, *caches[i % copies], enable_gqa=heads != kv_heads))
    except RuntimeError as error:
        print(f"{name:6} batch {batch} heads {heads}/{kv_heads:2} tokens {tokens:6} | {str(error).splitlines()[0][:90]}")
        return
    gbs = bytes_ / ms * 1e-6
    print(f"{name:6} batch {batch} heads {heads}/{kv_heads:2} tokens {tokens:6} | {ms:8.4f} ms {gbs:6.0f} GB/s {100 * gbs / copy:5.1f}%")


def main():
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, copy: {copy:.0f} GB/s")
    for batch in (1, 8):
        for tokens in (131072, 32768, 4096):
            for heads, kv_heads in ((32, 32), (32, 8)):
                for name in BACKENDS:
                    time_sdpa(name, batch, heads, kv_heads, tokens, copy)
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
