"""Times other implementations of decode attention at the shapes that harness.cu times.

These are PyTorch's over an f16 cache, and KIVI's and BitDecoding's over packed caches if their
extensions can be imported.

    python3 benches/gpu/peers.py [part of a peer's name]

Build `kivi_gemv` in the folder `quant` of jy-yuan/KIVI (876b4d2), and `bit_decode` in
DD-DuDa/BitDecoding (e829b5a) with its CUTLASS, each by `python3 setup.py build_ext --inplace`. Add
both folders to PYTHONPATH. One query token, 128 channels. Times are medians of 60 between CUDA
events. Calls alternate between caches that exceed the L2 cache together.
"""

import importlib
import math
import statistics
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEAD_DIM = 128
L2_BYTES = 200 << 20
SHAPES = [(batch, heads, kv_heads, tokens)
          for batch in (1, 8)
          for tokens in (131072, 32768, 4096)
          for heads, kv_heads in ((32, 32), (32, 8))]


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


def randn(*shape):
    return torch.randn(shape, dtype=torch.float16, device="cuda")


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


class Sdpa:
    def __init__(self, name, backend):
        self.name, self.backend = name, backend

    def cache(self, batch, heads, kv_heads, tokens):
        return [randn(batch, kv_heads, tokens, HEAD_DIM) for _ in range(2)]

    def query(self, batch, heads):
        return randn(batch, heads, 1, HEAD_DIM)

    def attend(self, q, cache):
        with sdpa_kernel(self.backend):
            return scaled_dot_product_attention(q, *cache, enable_gqa=q.shape[1] != cache[0].shape[1])


class Kivi:
    """KIVI's two products with the softmax between them.

    The packed tensors already have the kernels' layout: the transpositions that KIVI's Python code
    does at every call are not timed.
    """

    def __init__(self, module, bits, group):
        self.name = f"KIVI, {bits} bits, group {group}"
        self.module, self.bits, self.group = module, bits, group

    def packed(self, rows, outputs, inputs):
        """Codes `[rows, outputs / codes per word, inputs]`, scales and minima
        `[rows, outputs / group, inputs]`."""
        codes = torch.randint(-(2**31), 2**31, (rows, outputs * self.bits // 32, inputs), dtype=torch.int32, device="cuda")
        params = [randn(rows, outputs // self.group, inputs) for _ in range(2)]
        return [codes, *params]

    def cache(self, batch, heads, kv_heads, tokens):
        self.heads, self.kv_heads = heads, kv_heads
        rows = batch * kv_heads
        return self.packed(rows, tokens, HEAD_DIM) + self.packed(rows, HEAD_DIM, tokens)

    def query(self, batch, heads):
        return randn(batch * heads, 1, HEAD_DIM) / math.sqrt(HEAD_DIM)

    def attend(self, q, cache):
        product = lambda x, packed: self.module.gemv_forward_cuda_outer_dim(x, *packed, self.bits, self.group, self.heads, self.kv_heads)
        scores = product(q, cache[:3])
        return product(torch.softmax(scores, dim=-1, dtype=torch.float32).half(), cache[3:])


class BitDecoding:
    def __init__(self, module, bits, group):
        self.name = f"BitDecoding, {bits} bits, group {group}"
        self.module, self.bits, self.group = module, bits, group

    def cache(self, batch, heads, kv_heads, tokens):
        per_word, group = 16 // self.bits, self.group
        empty = lambda dtype, *shape: torch.zeros(shape, dtype=dtype, device="cuda")
        k_pack = empty(torch.uint16, batch, tokens // per_word, kv_heads, HEAD_DIM)
        k_params = empty(torch.float32, batch, tokens // group, kv_heads, HEAD_DIM)
        v_pack = empty(torch.uint16, batch, tokens, kv_heads, HEAD_DIM // per_word)
        v_params = empty(torch.float32, batch, HEAD_DIM // group, kv_heads, tokens)
        starts = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device="cuda")
        k, v = (randn(batch, tokens, kv_heads, HEAD_DIM) for _ in range(2))
        self.module.kvcache_pack_int(k, k_pack, k_params, v, v_pack, v_params, None, starts, tokens, "k-channel", group, self.bits)
        return [k_pack, k_params, v_pack, v_params]

    def query(self, batch, heads):
        return randn(batch, 1, heads, HEAD_DIM)

    def attend(self, q, cache):
        return self.module.fwd_kvcache_int(q, *cache, None, 1 / math.sqrt(HEAD_DIM), "k-channel", self.group, self.bits)


def peers():
    yield Sdpa("PyTorch, flash, f16", SDPBackend.FLASH_ATTENTION)
    yield Sdpa("PyTorch, cuDNN, f16", SDPBackend.CUDNN_ATTENTION)
    for name, peer, groups in (("kivi_gemv", Kivi, (32,)), ("bit_decode", BitDecoding, (32, 128))):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            print(f"skipped: {name}: {error}")
            continue
        yield from (peer(module, bits, group) for bits in (4, 2) for group in groups)


def measure(peer, batch, heads, kv_heads, tokens, copy):
    label = f"{peer.name:28} batch {batch} heads {heads}/{kv_heads:2} tokens {tokens:6} |"
    try:
        cache = peer.cache(batch, heads, kv_heads, tokens)
        size = nbytes(cache)
        caches = [cache] + [[t.clone() for t in cache] for _ in range(max(1, L2_BYTES // size))]
        q = peer.query(batch, heads)
        ms = median_ms(lambda i: peer.attend(q, caches[i % len(caches)]))
    except RuntimeError as error:
        print(f"{label} {str(error).splitlines()[0][:90]}", flush=True)
        return
    gbs = size / ms * 1e-6
    print(f"{label} {ms:8.4f} ms {gbs:6.0f} GB/s {100 * gbs / copy:5.1f}%", flush=True)


def main(wanted=""):
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, copy: {copy:.0f} GB/s")
    for peer in peers():
        # A kernel that fails ends the process; the argument selects one peer.
        for shape in SHAPES if wanted in peer.name else []:
            measure(peer, *shape, copy)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
