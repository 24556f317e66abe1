"""Trains one model of the zoo, tests it and writes it in the `hybrid` layout.

    python train.py MODEL --corpus FOLDER --data PREFIX --out FOLDER [--seconds N] [--seed 0]

The learning rate decreases with the share of rows read, or of seconds passed if that is larger. A run
that is short of time skips rows, so it still completes the schedule. `FOLDER/log.jsonl` has the
losses and, at the end, the test results.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import export
import recipes
import tasks
from data import Rows
from model import Model

EVERY = 100
NATURAL, ANSWER = 10, 20


def losses(hidden, head, targets, weights):
    """Returns the weighted loss; sums over natural text and over answers; and right answers."""
    logits = F.linear(hidden, head).flatten(0, 1).float()
    targets, weights = targets.flatten(), weights.flatten()
    each = F.cross_entropy(logits, targets, reduction="none")
    right = (logits.detach().argmax(-1) == targets).float()
    natural, answers = (weights == NATURAL).float(), (weights == ANSWER).float()
    seen = each.detach()
    sums = [(seen * natural).sum(), natural.sum(), (seen * answers).sum(), (right * answers).sum(), answers.sum()]
    weights = weights.float()
    return (each * weights).sum() / weights.sum(), torch.stack(sums)


def schedule(progress):
    """Returns the learning rate relative to its maximum."""
    return min(1.0, progress / recipes.WARM_UP) * max(0.02, 1 - progress)


def optimizer(model, device):
    decays = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decays, "weight_decay": recipes.WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device == "cuda")


def train(model, data, device, seconds, batch_tokens, learning_rate, log):
    tokens = np.load(f"{data}.tokens.npy", mmap_mode="r")
    weights = np.load(f"{data}.weights.npy", mmap_mode="r")
    rows = max(1, batch_tokens // (tokens.shape[1] - 1))
    steps = len(tokens) // rows
    optim, score = optimizer(model, device), losses
    if device == "cuda":
        for layer in model.layers:
            layer.compile(dynamic=False)
        score = torch.compile(losses, dynamic=False)
    began, step, at = None, 0, 0
    sums = torch.zeros(5, device=device)
    while True:
        # The time excludes compilation in the first step.
        elapsed = time.time() - began if began else 0.0
        progress = max(at / steps, elapsed / seconds)
        if progress >= 1:
            break
        for group in optim.param_groups:
            group["lr"] = learning_rate * schedule(progress)
        batch = slice(at * rows, (at + 1) * rows)
        ids, weight = (torch.from_numpy(x[batch].astype(np.int64)).to(device, non_blocking=True) for x in (tokens, weights))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, part = score(model.hidden(ids[:, :-1]), model.embed.weight, ids[:, 1:], weight[:, 1:])
        optim.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        sums += part
        step += 1
        if began is None:
            part.sum().item()
            began = time.time()
        at = min(steps, max(at + 1, math.ceil(progress * steps)))
        if step % EVERY == 0:
            natural, n, answer, right, a = sums.tolist()
            sums.zero_()
            elapsed = time.time() - began
            log({
                "step": step, "row": batch.stop, "seconds": round(elapsed, 1),
                "tokens_per_second": round((step - 1) * rows * (tokens.shape[1] - 1) / elapsed),
                "natural": round(natural / max(n, 1), 4), "answers": round(answer / max(a, 1), 4), "right": round(right / max(a, 1), 4),
            })
    for layer in model.layers:
        layer._compiled_call_impl = None


@torch.no_grad()
def test(model, corpus, device, samples, lengths, log):
    """Tests a model: right answers under greedy decoding by kind and length; held-out loss."""
    rows = Rows(corpus, "tasks", 0)
    held_out = np.load(corpus / "held_out.npy").astype(np.int64)
    for length in lengths:
        if len(held_out) <= length:
            continue
        usable = len(held_out) // (length + 1) * (length + 1)
        texts = torch.from_numpy(held_out[:usable]).view(-1, length + 1)[: max(1, 131_072 // length)].to(device)
        total = 0.0
        for text in texts.split(max(1, 32_768 // length)):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                logits = model(text[:, :-1]).float()
            total += F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="sum").item()
        log({"test": "held_out", "length": length, "loss": round(total / texts[:, 1:].numel(), 4)})
    for length in lengths:
        for kind in tasks.KINDS:
            maker = tasks.Maker(random.Random(f"test {kind} {length}"), *rows.haystacks)
            documents, aim = [], length * 0.97
            while len(documents) < samples:
                tokens, weights = rows.encode(maker.document(kind, int(aim)))
                if len(tokens) <= length:
                    documents.append((tokens, weights))
                else:
                    aim *= 0.99
            whole = right = count = 0
            size = max(1, 32_768 // length)
            for start in range(0, samples, size):
                some = documents[start : start + size]
                tokens = np.zeros((len(some), length), np.int64)
                answers = np.zeros((len(some), length), bool)
                for i, (ids, weights) in enumerate(some):
                    tokens[i, : len(ids)], answers[i, : len(ids)] = ids, weights == ANSWER
                tokens, answers = torch.from_numpy(tokens).to(device), torch.from_numpy(answers)[:, 1:].to(device)
                with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                    guessed = model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
                whole += (guessed | ~answers).all(1).sum().item()
                right += (guessed & answers).sum().item()
                count += answers.sum().item()
            log({"test": kind, "length": length, "samples": samples, "whole": whole, "tokens_right": round(right / count, 4)})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=recipes.BATCH_TOKENS)
    parser.add_argument("--learning-rate", type=float, default=recipes.LEARNING_RATE)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--lengths", default="512,1024,2048,4096")
    a = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(a.seed)
    torch.set_float32_matmul_precision("high")
    a.out.mkdir(parents=True, exist_ok=True)
    settings = recipes.named(a.model)
    model = Model(settings).to(device)
    with open(a.out / "log.jsonl", "w", buffering=1) as file:
        began = time.time()

        def log(line):
            file.write(json.dumps(line) + "\n")
            print(a.out.name, json.dumps(line), flush=True)

        log({"model": a.model, "seed": a.seed, "data": Path(a.data).name, "parameters": recipes.parameters(settings)})
        train(model, a.data, device, a.seconds, a.batch_tokens, a.learning_rate, log)
        weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
        export.hybrid(weights, settings, a.out, a.corpus / "tokenizer.json", torch.float16)
        log({"trained": round(time.time() - began, 1)})
        model.eval()
        test(model, a.corpus, device, a.samples, [int(length) for length in a.lengths.split(",")], log)
        log({"done": round(time.time() - began, 1)})


if __name__ == "__main__":
    main()
