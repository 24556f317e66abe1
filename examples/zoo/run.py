"""Creates the data and trains several models in parallel, until a deadline.

    python run.py --corpus FOLDER --work FOLDER --out FOLDER --seconds N [--keep MODEL ...] DATA:ROWS:LENGTH ... -- JOB ...

DATA is "tasks" or "text", optionally followed by a dash and a label. A job is
MODEL@SEED:DATA:SECONDS:WORKER. A worker is a GPU's number and a letter; its jobs run one after the
other. `OUT/log.txt` has all lines of all jobs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

import recipes

HERE = Path(__file__).parent


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--keep", action="append", default=[])
    parser.add_argument("--batch-tokens", default=str(recipes.BATCH_TOKENS))
    parser.add_argument("--learning-rate", default=str(recipes.LEARNING_RATE))
    parser.add_argument("--samples", default="128")
    parser.add_argument("--lengths", default="512,1024,2048,4096")
    parser.add_argument("specs", nargs="+")
    a = parser.parse_args()
    data = [spec for spec in a.specs if spec.count(":") == 2]
    jobs = [spec.split(":") for spec in a.specs if spec.count(":") == 3]
    deadline = time.time() + a.seconds
    a.work.mkdir(parents=True, exist_ok=True)
    a.out.mkdir(parents=True, exist_ok=True)
    log, lock = open(a.out / "log.txt", "w", buffering=1), threading.Lock()

    def say(line):
        with lock:
            log.write(line.rstrip() + "\n")
            print(line.rstrip(), flush=True)

    made = {}

    def make_data():
        for spec in data:
            name, rows, length = spec.split(":")
            began = time.time()
            command = [sys.executable, HERE / "data.py", a.corpus, a.work / name, "--recipe", name.split("-")[0]]
            subprocess.run([*map(str, command), "--rows", rows, "--length", length], check=True)
            say(f"data {name}: {time.time() - began:.1f} s")
            made[name].set()

    for spec in data:
        made[spec.split(":")[0]] = threading.Event()
    threading.Thread(target=make_data, daemon=True).start()
    running = []

    def work(mine, gpu):
        for model, of, seconds, _ in mine:
            made[of].wait()
            if time.time() > deadline - 20:
                say(f"{model} {of}: no time left")
                continue
            name, seed = model.split("@")
            folder = a.work / f"{name}@{seed}-{of}"
            command = [
                sys.executable, HERE / "train.py", name, "--seed", seed, "--corpus", a.corpus, "--data", a.work / of,
                "--out", folder, "--seconds", seconds, "--batch-tokens", a.batch_tokens, "--learning-rate", a.learning_rate,
                "--samples", a.samples, "--lengths", a.lengths,
            ]
            process = subprocess.Popen(
                [str(part) for part in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "OMP_NUM_THREADS": "4"},
            )
            running.append(process)
            for line in process.stdout:
                say(line)
            if process.wait() != 0:
                say(f"{model} {of}: failed with {process.returncode}")
            # A model is saved before it is tested.
            if name in a.keep and (folder / "config.json").exists():
                for file in ("config.json", "model.safetensors"):
                    shutil.copy(folder / file, a.out / f"{name}.{file}")

    gpus = max(1, torch.cuda.device_count())
    workers = sorted({job[3] for job in jobs})
    threads = [
        threading.Thread(target=work, args=([job for job in jobs if job[3] == w], int(w[:-1]) % gpus), daemon=True)
        for w in workers
    ]
    say(f"{gpus} GPUs, {os.cpu_count()} cores")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, deadline - time.time()))
    for process in running:
        process.kill()
    for thread in threads:
        thread.join(5)
    say(f"ended {deadline - time.time():.0f} s before the deadline")


if __name__ == "__main__":
    main()
