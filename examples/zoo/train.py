"""Trains one model of the zoo, tests it and writes it in the `hybrid` layout.

    python train.py MODEL --corpus FOLDER --data PREFIX --tests FILE --out FOLDER \
        [--seconds N] [--seed 0]

The learning rate decreases with the share of rows read, or of seconds passed if that is larger. A
run that is short of time skips rows, so it still completes the schedule. `FOLDER/log.jsonl` has the
losses, test results during training ("probe") and, at the end, the test results.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import export
import recipes
import test_set
from model import Model

EVERY = 100
NATURAL, ANSWER = 10, 20
# Number of the shortest documents of each kind that are tested during training, and how often.
PROBE_SAMPLES, PROBES = 64, 12
DIVERGED = 3


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


def schedule(progress, decay):
    """Returns the learning rate relative to its maximum. It decreases in the last `decay` of the
    run."""
    return min(1.0, progress / recipes.WARM_UP, max(0.02, (1 - progress) / decay))


def optimizer(model, device):
    decays = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decays, "weight_decay": recipes.WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device == "cuda")


def train(model, data, device, a, log, probe):
    # The data is copied to the device once: a copy in each step would wait for earlier steps.
    tokens = torch.from_numpy(np.load(f"{data}.tokens.npy").view(np.int16)).to(device)
    weights = torch.from_numpy(np.load(f"{data}.weights.npy")).to(device)
    rows = max(1, a.batch_tokens // (tokens.shape[1] - 1))
    steps = len(tokens) // rows
    optim, score = optimizer(model, device), losses
    if device == "cuda":
        for layer in model.layers:
            layer.compile(dynamic=False)
        score = torch.compile(losses, dynamic=False)
    began, step, at, probed = None, 0, 0, 0
    sums = torch.zeros(5, device=device)
    while True:
        # The time excludes compilation in the first step.
        elapsed = time.time() - began if began else 0.0
        progress = max(at / steps, elapsed / a.seconds)
        if progress >= 1:
            break
        for group in optim.param_groups:
            group["lr"] = a.learning_rate * schedule(progress, a.decay)
        batch = slice(at * rows, (at + 1) * rows)
        ids, weight = tokens[batch].long(), weights[batch].long()
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
            natural, n, answer, right, count = sums.tolist()
            sums.zero_()
            elapsed = time.time() - began
            log({
                "step": step, "row": batch.stop, "seconds": round(elapsed, 1),
                "tokens_per_second": round((step - 1) * rows * (tokens.shape[1] - 1) / elapsed),
                "natural": round(natural / max(n, 1), 4), "answers": round(answer / max(count, 1), 4),
                "right": round(right / max(count, 1), 4),
            })
            if not math.isfinite(natural + answer):
                log({"diverged": step})
                raise SystemExit(DIVERGED)
        if int(at / steps * PROBES) > probed:
            probed = int(at / steps * PROBES)
            probe(step * rows * (tokens.shape[1] - 1))
    log({"trained_tokens": step * rows * (tokens.shape[1] - 1)})


class Tester:
    """Tests a model. Compiled layers are not used, since they are compiled for one shape."""

    def __init__(self, model, tests, corpus, device):
        self.model, self.device = model, device
        self.units = list(test_set.load(tests))
        self.held_out = np.load(corpus / "held_out.npy").astype(np.int64)

    def logits(self, tokens):
        layers = self.model.layers
        compiled = [layer._compiled_call_impl for layer in layers]
        for layer in layers:
            layer._compiled_call_impl = None
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.model(tokens)
        for layer, call in zip(layers, compiled):
            layer._compiled_call_impl = call
        return logits

    def unit(self, tokens, answers):
        """Returns the number of documents whose answers are all right under greedy decoding, and
        the share of right tokens."""
        whole = right = count = 0
        size = max(1, 32_768 // tokens.shape[1])
        for start in range(0, len(tokens), size):
            some = torch.from_numpy(tokens[start : start + size].astype(np.int64)).to(self.device)
            asked = torch.from_numpy(answers[start : start + size, 1:]).to(self.device)
            guessed = self.logits(some[:, :-1]).argmax(-1) == some[:, 1:]
            whole += (guessed | ~asked).all(1).sum().item()
            right += (guessed & asked).sum().item()
            count += asked.sum().item()
        return {"samples": len(tokens), "whole": whole, "tokens_right": round(right / count, 4)}

    def probe(self, log, trained_tokens):
        shortest = min(length for _, length, _, _ in self.units)
        found = {}
        for kind, length, tokens, answers in self.units:
            if length == shortest:
                unit = self.unit(tokens[:PROBE_SAMPLES], answers[:PROBE_SAMPLES])
                found[kind] = [unit["whole"], unit["tokens_right"]]
        log({"probe": found, "trained_tokens": trained_tokens})

    def loss(self, length):
        usable = len(self.held_out) // (length + 1) * (length + 1)
        texts = torch.from_numpy(self.held_out[:usable]).view(-1, length + 1)[: max(1, 131_072 // length)]
        total = 0.0
        for text in texts.split(max(1, 32_768 // length)):
            text = text.to(self.device)
            total += F.cross_entropy(self.logits(text[:, :-1]).float().flatten(0, 1), text[:, 1:].flatten(), reduction="sum").item()
        return total / texts[:, 1:].numel()

    def test(self, log):
        for length in sorted({length for _, length, _, _ in self.units}):
            if len(self.held_out) > length:
                log({"test": "held_out", "length": length, "loss": round(self.loss(length), 4)})
        for kind, length, tokens, answers in self.units:
            log({"test": kind, "length": length, **self.unit(tokens, answers)})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tests", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=recipes.BATCH_TOKENS)
    parser.add_argument("--learning-rate", type=float, default=recipes.LEARNING_RATE)
    parser.add_argument("--decay", type=float, default=1.0)
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
        tester = Tester(model, a.tests, a.corpus, device)
        train(model, a.data, device, a, log, lambda tokens: tester.probe(log, tokens))
        weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
        export.hybrid(weights, settings, a.out, a.corpus / "tokenizer.json", torch.float16)
        log({"trained": round(time.time() - began, 1)})
        tester.test(log)
        log({"done": round(time.time() - began, 1)})


if __name__ == "__main__":
    main()
