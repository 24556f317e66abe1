"""The mixers of `hybrid-models` for training, over whole sequences.

Each module has the tensors of the `hybrid` layout (docs/hybrid-models.md) and maps
`[batch, tokens, hidden]` to the same shape. Attention, Mamba-2 and RWKV-5 are matrix products over
chunks; Mamba and RG-LRU scan all chunks in parallel.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def rotate(x, theta=10_000.0):
    """Rotates the pairs (i, i + head_dim / 2) of `[batch, heads, tokens, head_dim]` (RoPE)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, hidden, heads, kv_heads, head_dim, window=None):
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=False)

    def forward(self, x):
        batch, tokens, _ = x.shape
        heads = lambda y: y.view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        q, k, v = rotate(heads(self.q_proj(x))), rotate(heads(self.k_proj(x))), heads(self.v_proj(x))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mask = None
        if self.window is not None:
            at = torch.arange(tokens, device=x.device)
            distance = at[:, None] - at
            mask = (distance >= 0) & (distance < self.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))


def causal_conv(x, conv):
    """Causal depthwise convolution over tokens, as a sum over taps, which a compiler fuses."""
    tokens, taps = x.shape[1], conv.kernel_size[0]
    padded, weight = F.pad(x, (0, 0, taps - 1, 0)), conv.weight[:, 0].to(x.dtype)
    return sum(padded[:, tap : tap + tokens] * weight[:, tap] for tap in range(taps)) + conv.bias.to(x.dtype)


def depthwise(channels, taps):
    return nn.Conv1d(channels, channels, taps, groups=channels)


def segment_sums(x):
    """`[..., n]` to `[..., n, n]`: the sum of x over (u, t], and minus infinity for u > t."""
    n = x.shape[-1]
    sums = x.cumsum(-1)
    later = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(~later, -math.inf)


class Scan(torch.autograd.Function):
    """h(t) = a(t) h(t - 1) + b(t) along dimension 1, h(-1) = 0."""

    CHUNK = 32

    @staticmethod
    def scan(a, b):
        tokens, chunk = a.shape[1], Scan.CHUNK
        padding = -tokens % chunk
        if padding:
            pad = (0, 0) * (a.dim() - 2) + (0, padding)
            a, b = F.pad(a, pad), F.pad(b, pad)
        a, b = (x.unflatten(1, (-1, chunk)) for x in (a, b))
        h, decay = torch.empty_like(b), torch.empty_like(a)
        h[:, :, 0], decay[:, :, 0] = b[:, :, 0], a[:, :, 0]
        for t in range(1, chunk):
            torch.addcmul(b[:, :, t], a[:, :, t], h[:, :, t - 1], out=h[:, :, t])
            torch.mul(a[:, :, t], decay[:, :, t - 1], out=decay[:, :, t])
        # The state at the start of each chunk.
        carry = torch.zeros_like(h[:, :, 0])
        for c in range(1, h.shape[1]):
            torch.addcmul(h[:, c - 1, -1], decay[:, c - 1, -1], carry[:, c - 1], out=carry[:, c])
        h.addcmul_(decay, carry[:, :, None])
        return h.flatten(1, 2)[:, :tokens]

    @staticmethod
    def forward(ctx, a, b):
        h = Scan.scan(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, dh):
        a, h = ctx.saved_tensors
        ahead = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        db = Scan.scan(ahead.flip(1), dh.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        return db * before, db


@torch.compiler.disable
def scan(a, b):
    with torch.autocast(a.device.type, enabled=False):
        return Scan.apply(a, b)


class Mamba(nn.Module):
    def __init__(self, hidden, states=16, expand=2, taps=4):
        super().__init__()
        inner, rank = expand * hidden, math.ceil(hidden / 16)
        self.split = (rank, states, states)
        self.in_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.conv1d = depthwise(inner, taps)
        self.x_proj = nn.Linear(inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, states + 1).float().log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_proj.bias.data = time_step_bias(inner)

    def forward(self, x):
        u, gate = self.in_proj(x).chunk(2, -1)
        u = F.silu(causal_conv(u, self.conv1d))
        step, b, c = self.x_proj(u).split(self.split, -1)
        y = torch.utils.checkpoint.checkpoint(self.select, u, step, b, c, use_reentrant=False)
        return self.out_proj(y * F.silu(gate))

    def select(self, u, step, b, c):
        step = F.softplus(self.dt_proj(step).float())
        u, b, c = u.float(), b.float(), c.float()
        decay = torch.exp(step[..., None] * -self.A_log.float().exp())
        h = scan(decay, (step * u)[..., None] * b[:, :, None])
        return torch.einsum("btin,btn->bti", h, c) + self.D * u


def time_step_bias(count):
    """Returns biases whose softplus is log-uniform between 0.001 and 0.1."""
    step = torch.exp(torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)))
    return step + torch.log(-torch.expm1(-step))


class Mamba2(nn.Module):
    CHUNK = 64

    def __init__(self, hidden, states=64, head_dim=64, expand=2, taps=4):
        super().__init__()
        inner = expand * hidden
        self.heads, self.head_dim = inner // head_dim, head_dim
        self.sizes = (inner, states)
        self.in_proj = nn.Linear(hidden, 2 * inner + 2 * states + self.heads, bias=False)
        self.conv1d = depthwise(inner + 2 * states, taps)
        self.dt_bias = nn.Parameter(time_step_bias(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        inner, states = self.sizes
        gate, mixed, step = self.in_proj(x).split((inner, inner + 2 * states, self.heads), -1)
        u, b, c = F.silu(causal_conv(mixed, self.conv1d)).split((inner, states, states), -1)
        u = u.unflatten(-1, (self.heads, self.head_dim))
        step = F.softplus(step.float() + self.dt_bias)
        y = self.ssd(u * step[..., None].to(u.dtype), step * -self.A_log.exp(), b, c)
        y = y + self.D[:, None] * u
        return self.out_proj(self.norm(y.flatten(2) * F.silu(gate)).to(x.dtype))

    def ssd(self, u, log_decay, b, c):
        """H(t) = e^log_decay H(t - 1) + u b, y = H c in chunks (arXiv 2405.21060, section 6)."""
        tokens, chunk = u.shape[1], self.CHUNK
        padding = -tokens % chunk
        pad = lambda x: F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding)).unflatten(1, (-1, chunk))
        u, log_decay, b, c = pad(u), pad(log_decay).movedim(3, 1), pad(b), pad(c)
        # log_decay: [batch, heads, chunks, chunk]; the rest: [batch, chunks, chunk, ...].
        weights = segment_sums(log_decay).exp() * torch.einsum("bctn,bcsn->bcts", c, b)[:, None]
        within = torch.einsum("bhcts,bcshp->bcthp", weights.to(u.dtype), u)
        sums = log_decay.cumsum(-1)
        to_end = (sums[..., -1:] - sums).exp().to(u.dtype)
        added = torch.einsum("bhcs,bcsn,bcshp->bchnp", to_end, b, u)
        between = segment_sums(F.pad(sums[..., -1], (1, 0)))[..., :-1, 1:].exp()
        before = torch.einsum("bhcz,bzhnp->bchnp", between, added.float()).to(u.dtype)
        across = torch.einsum("bctn,bchnp,bhct->bcthp", c, before, sums.exp().to(u.dtype))
        return (within + across).flatten(1, 2)[:, :tokens]


class RgLru(nn.Module):
    def __init__(self, hidden, blocks, taps=4):
        super().__init__()
        self.linear_y = nn.Linear(hidden, hidden)
        self.linear_x = nn.Linear(hidden, hidden)
        self.conv_1d = depthwise(hidden, taps)
        self.rg_lru = Gates(hidden, blocks)
        self.linear_out = nn.Linear(hidden, hidden)

    def forward(self, x):
        u = causal_conv(self.linear_x(x), self.conv_1d)
        log_decay, i = self.rg_lru(u)
        root = torch.sqrt(-torch.expm1(2 * log_decay))
        # The first token has no past, so its input is not scaled.
        root = torch.cat([torch.ones_like(root[:, :1]), root[:, 1:]], 1)
        h = scan(log_decay.exp(), root * i * u.float())
        return self.linear_out(h.to(x.dtype) * F.gelu(self.linear_y(x), approximate="tanh"))


class Gates(nn.Module):
    """The gates of RG-LRU: the logarithm of the decay, and the input gate."""

    def __init__(self, width, blocks):
        super().__init__()
        block = width // blocks
        weight = lambda: nn.Parameter(torch.randn(blocks, block, block) * block**-0.5)
        self.recurrent_gate_weight, self.input_gate_weight = weight(), weight()
        self.recurrent_gate_bias = nn.Parameter(torch.zeros(blocks, block))
        self.input_gate_bias = nn.Parameter(torch.zeros(blocks, block))
        decay = torch.empty(width).uniform_(0.9**2, 0.999**2).sqrt()
        self.recurrent_param = nn.Parameter(torch.log(torch.expm1(-decay.log() / 8)))

    def forward(self, u):
        blocks = self.recurrent_gate_bias.shape[0]
        gate = lambda weight, bias: torch.sigmoid(
            (torch.einsum("btki,kij->btkj", u.unflatten(-1, (blocks, -1)), weight.to(u.dtype)).float() + bias).flatten(2)
        )
        r = gate(self.recurrent_gate_weight, self.recurrent_gate_bias)
        i = gate(self.input_gate_weight, self.input_gate_bias)
        return -8 * r * F.softplus(self.recurrent_param), i


class Rwkv5(nn.Module):
    CHUNK = 16

    def __init__(self, hidden, head_dim):
        super().__init__()
        heads = hidden // head_dim
        self.head_dim = head_dim
        ramp = torch.arange(hidden).float() / hidden
        for name in "kvrg":
            self.register_parameter(f"time_mix_{name}", nn.Parameter(ramp.clone().view(1, 1, -1)))
        self.time_decay = nn.Parameter((-6 + 5 * ramp).view(heads, head_dim))
        self.time_faaaa = nn.Parameter((0.5 * (1 - ramp)).view(heads, head_dim))
        matrix = lambda: nn.Linear(hidden, hidden, bias=False)
        self.receptance, self.key, self.value, self.gate, self.output = (matrix() for _ in range(5))
        self.ln_x = nn.GroupNorm(heads, hidden, eps=64e-5)

    def forward(self, x):
        batch, tokens, hidden = x.shape
        shifted = F.pad(x[:, :-1], (0, 0, 1, 0))
        mixed = lambda mix: (x * mix + shifted * (1 - mix)).to(x.dtype)
        heads = lambda y: y.float().view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        r = heads(self.receptance(mixed(self.time_mix_r)))
        k = heads(self.key(mixed(self.time_mix_k)))
        v = heads(self.value(mixed(self.time_mix_v)))
        with torch.autocast(x.device.type, enabled=False):
            y = self.wkv(r, k, v).transpose(1, 2).reshape(batch * tokens, hidden)
            y = self.ln_x(y).view(batch, tokens, hidden)
        return self.output(y.to(x.dtype) * F.silu(self.gate(mixed(self.time_mix_g))))

    def wkv(self, r, k, v):
        """S(t + 1) = w S(t) + kᵀ v, y = r (S + u kᵀ v), in chunks; w is constant per key
        channel."""
        tokens, chunk = r.shape[2], self.CHUNK
        padding = -tokens % chunk
        r, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, chunk)) for x in (r, k, v))
        log_w = -self.time_decay.float().exp()[:, None, None]
        at = torch.arange(chunk, device=r.device).float()[:, None]
        ahead = r * torch.exp(at * log_w)
        weights = ahead @ (k * torch.exp(-(at + 1) * log_w)).transpose(-1, -2)
        own = (r * self.time_faaaa[:, None, None] * k).sum(-1)
        within = weights.tril(-1) @ v + own[..., None] * v
        added = (k * torch.exp((chunk - 1 - at) * log_w)).transpose(-1, -2) @ v
        chunks = r.shape[2]
        gap = torch.arange(chunks, device=r.device)
        gap = (gap[:, None] - 1 - gap).float()
        between = torch.exp(gap.clamp(min=0) * chunk * log_w[:, 0, 0, :, None, None]) * (gap >= 0)
        before = torch.einsum("hdcz,bhzde->bhcde", between, added)
        return (within + ahead @ before).flatten(2, 3)[:, :, :tokens]
