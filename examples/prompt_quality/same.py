"""Checks that llmlingua 0.2.2 and `longctx compress` give the same texts with a trained checkpoint.

Python 3.11, llmlingua 0.2.2, transformers 4.46.3, torch 2.11.0 (CPU), numpy 2.4.6, tiktoken 0.7.0.

    cargo build --release -p longctx
    python examples/prompt_quality/same.py CHECKPOINT target/release/longctx LONGBENCH CL100K

CHECKPOINT is a folder (stand_in.py creates one). LONGBENCH is a folder of LongBench samples in JSON
lines; the first 4,000 characters of every fifth sample are used. CL100K is the file
cl100k_base.tiktoken (the crate tiktoken-rs contains it).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

checkpoint, program, longbench, cl100k = map(Path, sys.argv[1:])
cache = tempfile.mkdtemp()
# The name of the file in tiktoken's cache.
shutil.copy(cl100k, Path(cache) / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4")
os.environ["TIKTOKEN_CACHE_DIR"] = cache

from llmlingua import PromptCompressor

PAPER = dict(force_tokens=["\n", ".", "!", "?", ","], drop_consecutive=True, chunk_end_tokens=[".", "\n"])

compressor = PromptCompressor(str(checkpoint), device_map="cpu", use_llmlingua2=True, llmlingua2_config=dict(max_batch_size=8))
texts = []
for path in sorted(longbench.glob("*.jsonl")):
    lines = path.read_text(encoding="utf-8").split("\n")
    texts += [(path.stem, json.loads(line)["context"][:4000]) for line in lines[::5] if line]
for rate in (0.5, 0.25):
    same = 0
    for name, text in texts:
        theirs = compressor.compress_prompt_llmlingua2([text], rate=rate, **PAPER)["compressed_prompt"]
        run = [program, "compress", "--method", "llmlingua2", "--encoder", checkpoint, "--rate", str(rate)]
        ours = subprocess.run(run, input=text.encode(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout.decode()
        same += ours == theirs
        if ours != theirs:
            print(f"{name} at {rate}:\n  {theirs!r}\n  {ours!r}")
    print(f"rate {rate}: {same} of {len(texts)} texts the same", flush=True)
