"""Measures prefill of a model of Llama-3-8B's shape (random weights, f16) in PyTorch with its flash
attention.

    python3 benches/gpu/model_prefill.py [tokens ...]
"""
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB = 32, 4096, 14336, 32, 8, 128, 128256
OPTIONS = dict(device="cuda", dtype=torch.float16)


def weight(out, inner):
    return torch.empty(out, inner, **OPTIONS).normal_(std=0.02)


layers = [
    dict(norm=torch.ones(HIDDEN, **OPTIONS), qkv=weight((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), out=weight(HIDDEN, HEADS * DIM),
         ff_norm=torch.ones(HIDDEN, **OPTIONS), gate_up=weight(2 * INNER, HIDDEN), down=weight(HIDDEN, INNER))
    for _ in range(LAYERS)
]
embedding, head, last_norm = weight(VOCAB, HIDDEN), weight(VOCAB, HIDDEN), torch.ones(HIDDEN, **OPTIONS)
frequencies = 500000.0 ** (-torch.arange(0, DIM, 2, device="cuda", dtype=torch.float32) / DIM)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def forward(ids):
    tokens = ids.shape[0]
    angles = torch.arange(tokens, device="cuda", dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos().half()[:, None], angles.sin().half()[:, None]
    x, cache = embedding[ids], []
    for w in layers:
        y = F.rms_norm(x, (HIDDEN,), w["norm"], 1e-5)
        q, k, v = (y @ w["qkv"].T).view(tokens, -1, DIM).split((HEADS, KV_HEADS, KV_HEADS), 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        cache.append((k, v.contiguous()))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + y[0].transpose(0, 1).reshape(tokens, -1) @ w["out"].T
        # A long prompt is processed in parts, to bound the memory of the inner activations.
        for part in x.split(8192):
            gate, up = (F.rms_norm(part, (HIDDEN,), w["ff_norm"], 1e-5) @ w["gate_up"].T).chunk(2, -1)
            part += (F.silu(gate) * up) @ w["down"].T
    return (F.rms_norm(x[-1:], (HIDDEN,), last_norm, 1e-5) @ head.T).argmax().item()


with torch.inference_mode(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    print("| tokens | PyTorch, flash: prefill, s |\n|---:|---:|")
    for tokens in map(int, sys.argv[1:] or (8192, 32768, 131072)):
        ids = torch.arange(tokens, device="cuda") * 7919 % 128000
        times = []
        for _ in range(3 if tokens > 100000 else 6):
            torch.cuda.synchronize()
            start = time.perf_counter()
            forward(ids)
            times.append(time.perf_counter() - start)
        print(f"| {tokens} | {statistics.median(times[1:]):.4f} |", flush=True)
