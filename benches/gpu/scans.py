"""Times the selective scan as a plain Triton kernel, for comparison with `scans.cu`.

Mamba-2.8b's shape, f16, 8,192 tokens.

    python3 benches/gpu/scans.py
"""

import torch
import triton
import triton.language as tl


@triton.jit
def scan(u, steps, z, b, c, a, d, bias, y, tokens, channels, BLOCK: tl.constexpr):
    entry = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    state = tl.arange(0, 16)
    a = tl.load(a + channel[:, None] * 16 + state[None, :]) * 1.4426950408889634
    d, bias = tl.load(d + channel), tl.load(bias + channel)
    h = tl.zeros((BLOCK, 16), tl.float32)
    for t in range(tokens):
        row = entry * tokens + t
        at = row * channels + channel
        x = tl.load(u + at).to(tl.float32)
        gate = tl.load(z + at).to(tl.float32)
        dt = tl.load(steps + at).to(tl.float32) + bias
        dt = tl.where(dt > 20, dt, tl.log(1 + tl.exp(dt)))
        bt = tl.load(b + row * 16 + state).to(tl.float32)
        ct = tl.load(c + row * 16 + state).to(tl.float32)
        h = tl.exp2(dt[:, None] * a) * h + (dt * x)[:, None] * bt[None, :]
        sum = tl.sum(h * ct[None, :], 1) + d * x
        tl.store(y + at, (sum * gate * tl.sigmoid(gate)).to(tl.float16))


channels, tokens = 5120, 8192
a = -torch.randn(channels, 16, device="cuda").exp()
d, bias = torch.randn(2, channels, device="cuda")
for batch in (1, 4, 8):
    u, steps, z = torch.randn(3, batch, tokens, channels, device="cuda", dtype=torch.float16)
    b, c = torch.randn(2, batch, tokens, 16, device="cuda", dtype=torch.float16)
    y = torch.empty_like(u)
    best = None
    for block, warps in ((8, 1), (16, 1), (16, 2), (32, 4)):
        run = lambda: scan[(channels // block, batch)](u, steps, z, b, c, a, d, bias, y, tokens, channels, BLOCK=block, num_warps=warps)
        time = triton.testing.do_bench(run, warmup=10, rep=50, return_mode="median")
        best = min(best or (time, block, warps), (time, block, warps))
    print(f"Triton, batch {batch}: {best[0]:.4f} ms (blocks of {best[1]} channels, {best[2]} warps)")
