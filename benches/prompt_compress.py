"""Times llmlingua 0.2.2 on the files that the benchmark prompt_compress wrote to FOLDER.

Needs Python 3.11, llmlingua 0.2.2, transformers 4.40.2, torch 2.11.0 (CPU), and tiktoken 0.7.0 with
its encoding cl100k_base in the cache.

    python benches/prompt_compress.py FOLDER [THREADS]
"""

import resource
import sys
import time
from pathlib import Path

import torch
from llmlingua import PromptCompressor

folder = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 2)
text = (folder / "text.txt").read_text()
for batch in (50, 8):  # the package's default, and the benchmark's
    compressor = PromptCompressor(str(folder), device_map="cpu", use_llmlingua2=True, llmlingua2_config=dict(max_batch_size=batch))
    for _ in range(2):
        start = time.perf_counter()
        got = compressor.compress_prompt_llmlingua2(
            [text], rate=0.25, force_tokens=["\n", ".", "!", "?", ","], drop_consecutive=True, chunk_end_tokens=[".", "\n"]
        )
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(f"batch {batch}: {seconds:.2f} s, {got['origin_tokens']} tokens to {got['compressed_tokens']}, peak {peak} MiB", flush=True)
