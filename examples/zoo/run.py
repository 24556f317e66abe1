"""Creates the data and trains several models in parallel, until a deadline.

    python run.py --corpus FOLDER --work FOLDER --out FOLDER --seconds N [--keep JOB ...] \
        DATA:ROWS:LENGTH ... -- JOB ...

DATA is "tasks", "retrieval" or "text", optionally followed by a dash and a label. A job is
MODEL@SEED:DATA. Jobs start in their order, `--side-by-side` at a time on each GPU. A job that fails
is run once more without compilation, after the others. A job that starts late skips rows.
`OUT/log.txt` has all lines of all jobs; the models of `--keep` are copied to OUT.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import torch

import recipes

HERE = Path(__file__).parent
# Seconds that a job needs in addition to its training, and the shortest useful training. Both are
# for six models on one GPU.
OVERHEAD, MIN_TRAINING = 60, 140
# The exit code of a training whose loss became infinite or NaN. It is not repeated.
DIVERGED = 3


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--keep", action="append", default=[])
    parser.add_argument("--side-by-side", type=int, default=1)
    parser.add_argument("--tests", default="whole")
    parser.add_argument("--batch-tokens", default=str(recipes.BATCH_TOKENS))
    parser.add_argument("--learning-rate", default=str(recipes.LEARNING_RATE))
    parser.add_argument("--decay", default="1")
    parser.add_argument("specs", nargs="+")
    a = parser.parse_args()
    data = [spec for spec in a.specs if spec.count(":") == 2]
    jobs = deque((*spec.split(":"), True) for spec in a.specs if spec.count(":") == 1)
    deadline = time.time() + a.seconds
    a.work.mkdir(parents=True, exist_ok=True)
    a.out.mkdir(parents=True, exist_ok=True)
    log, lock = open(a.out / "log.txt", "w", buffering=1), threading.Lock()

    def say(line):
        with lock:
            log.write(line.rstrip() + "\n")
            print(line.rstrip(), flush=True)

    data_ready = {}
    tests = a.work / "tests.npz"

    def make_data():
        def make(name, *command):
            began = time.time()
            subprocess.run([sys.executable, *map(str, command)], check=True)
            say(f"{name}: {time.time() - began:.1f} s")

        make("tests", HERE / "test_set.py", a.corpus, tests, "--set", a.tests)
        for spec in data:
            name, rows, length = spec.split(":")
            recipe = name.split("-")[0]
            make(name, HERE / "data.py", a.corpus, a.work / name, "--recipe", recipe, "--rows", rows, "--length", length)
            data_ready[name].set()

    for spec in data:
        data_ready[spec.split(":")[0]] = threading.Event()
    threading.Thread(target=make_data, daemon=True).start()
    running = []

    def train(model, data_set, compiled, gpu):
        name, seed = model.split("@")
        folder = a.work / f"{name}@{seed}-{data_set}"
        command = [
            sys.executable, HERE / "train.py", name, "--seed", seed, "--corpus", a.corpus, "--data", a.work / data_set, "--tests", tests,
            "--out", folder, "--seconds", deadline - OVERHEAD - time.time(), "--batch-tokens", a.batch_tokens,
            "--learning-rate", a.learning_rate, "--decay", a.decay,
        ]
        process = subprocess.Popen(
            [str(part) for part in command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "4", "TORCH_COMPILE_DISABLE": str(int(not compiled))},
        )
        running.append(process)
        for line in process.stdout:
            say(line)
        code = process.wait()
        if code != 0:
            say(f"{model} {data_set}: failed with {code}, compiled: {compiled}")
        # A model is written before it is tested.
        if f"{model}:{data_set}" in a.keep and (folder / "config.json").exists():
            for file in ("config.json", "model.safetensors"):
                shutil.copy(folder / file, a.out / f"{folder.name}.{file}")
        return code

    def run_jobs(gpu):
        while True:
            with lock:
                if not jobs:
                    return
                model, data_set, compiled = jobs.popleft()
            data_ready[data_set].wait()
            if deadline - time.time() < OVERHEAD + MIN_TRAINING:
                say(f"{model} {data_set}: no time left")
            elif train(model, data_set, compiled, gpu) not in (0, DIVERGED) and compiled:
                with lock:
                    jobs.append((model, data_set, False))

    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(max(1, torch.cuda.device_count()))))
    gpus = visible.split(",")
    say(f"{len(gpus)} GPUs, {os.cpu_count()} cores")
    threads = [threading.Thread(target=run_jobs, args=(gpu,), daemon=True) for gpu in gpus * a.side_by_side]
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
