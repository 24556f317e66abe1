"""Task documents that ask for earlier content, each with the loss weights of its characters.

Needles and long generation have the texts of longctx-eval's tasks. Associations are the multi-query
associative recall of Zoology (arXiv 2312.04927). Swaps are the word problem of the group S3, a
measure of state tracking (arXiv 2404.08819).
"""

import itertools
import random
from dataclasses import dataclass, field

NAMES = (
    "Anna Bruno Clara Daniel Edith Felix Greta Henry Ida Jonas Katrin Leo Marta Nils Olga Peter Rosa Simon Tilda Viktor"
).split()
THINGS = "lantern letter map basket notebook ladder kettle rope mirror violin cart hammer bench clock boat chair".split()
CITIES = "Almaty Belgrade Cairo Dakar Helsinki Istanbul Jakarta Lisbon Mumbai Nairobi Sofia Toronto".split()
MORE_CITIES = CITIES + (
    "Chicago Yangon Colombo Sydney Lagos Amsterdam Kigali Tashkent Barcelona Bratislava Santiago Copenhagen"
).split()
STATES = "red green blue white black grey".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# Unpredictable characters, text, and answers that follow from the document.
NOISE, TEXT, ANSWER = 0, 1, 2
KINDS = ["needle", "multi_needle", "pairs", "copy", "recall", "listing", "table_edit", "state_machine"]
# Kinds that the tokenizer was not trained on.
DENSE_KINDS = ["associations", "repetition", "swaps", "ring"]


@dataclass
class Document:
    """A document: pieces of text and the class of each."""

    pieces: list = field(default_factory=list)

    def add(self, text, kind=TEXT):
        self.pieces.append((text, kind))
        return self

    @property
    def text(self):
        return "".join(text for text, _ in self.pieces)


class Maker:
    """Creates documents. `prose` and `natural`: words of haystacks, with the tokens per word.
    `vocabulary`: words of one token each, with the space before them."""

    TOKENS_A_WORD = (1.18, 1.9)

    def __init__(self, rng, prose, natural, vocabulary=()):
        self.rng, self.haystacks, self.vocabulary = rng, (prose, natural), vocabulary

    def document(self, kind, tokens, **options):
        """Returns a document of about `tokens` tokens."""
        return getattr(self, kind)(tokens, **options)

    def words(self, tokens):
        which = self.rng.randrange(2)
        words, count = self.haystacks[which], max(0, int(tokens / self.TOKENS_A_WORD[which]))
        start = self.rng.randrange(max(1, len(words) - count))
        return words[start : start + count]

    def digits(self, count):
        return "".join(self.rng.choice("0123456789") for _ in range(count))

    def key(self):
        return self.digits(self.rng.choice([4, 5, 6, 7, 7, 7, 7, 7, 7, 8, 10, 24]))

    def hidden(self, sentences, tokens):
        """Returns an instruction, then words with the sentences (lists of pieces) between them."""
        rng = self.rng
        document = Document()
        if rng.random() < 0.7:
            document.add(
                "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
                "I will quiz you about the important information there.\n"
            )
        words = self.words(tokens - 75 - 45 * len(sentences))
        depths = sorted(rng.choice([0.0, 1.0, rng.random(), rng.random(), rng.random()]) for _ in sentences)
        start = 0
        for depth, sentence in zip(depths, sentences):
            end = int(len(words) * depth)
            document.add(" ".join(words[start:end]) + " ")
            for piece in sentence:
                document.add(*piece)
            document.add(" ")
            start = end
        return document.add(" ".join(words[start:]) + " ")

    def needle(self, tokens):
        key = self.key()
        sentence = [("The pass key is", TEXT), (f" {key}", NOISE), (". Remember it. ", TEXT), (key, ANSWER),
                    (" is the pass key.", TEXT)]
        document = self.hidden([sentence], tokens)
        return document.add("\nWhat is the pass key? The pass key is").add(f" {key}", ANSWER).add(".")

    def multi_needle(self, tokens):
        rng = self.rng
        count = rng.randrange(2, max(3, min(12, tokens // 60)))
        cities = rng.sample(MORE_CITIES, count)
        keys = [self.key() for _ in cities]
        tell = [
            [(f"The pass key of {city} is", TEXT), (f" {key}", NOISE), (". Remember it.", TEXT)]
            for city, key in zip(cities, keys)
        ]
        rng.shuffle(tell)
        document = self.hidden(tell, tokens)
        asked = list(zip(cities, keys))
        rng.shuffle(asked)
        for city, key in asked[: rng.randrange(1, count + 1)]:
            document.add(f"\nWhat is the pass key of {city}? The pass key of {city} is").add(f" {key}", ANSWER).add(".")
        return document

    def pairs(self, tokens):
        """Associative recall: 1 to 64 pairs, then all of them again in a different order."""
        rng = self.rng
        count = max(1, min(64, tokens // 14))
        word = lambda: "".join(rng.choice(LETTERS) for _ in range(2))
        names = list({word() for _ in range(count)})
        value = (lambda: self.digits(2)) if rng.random() < 0.5 else (lambda: rng.choice(THINGS))
        values = {name: value() for name in names}
        document = Document()
        for name in names:
            document.add(f"{name}: {values[name]}\n", NOISE)
        rng.shuffle(names)
        for name in names:
            document.add(f"{name}:", NOISE).add(f" {values[name]}", ANSWER).add("\n")
        return document

    def copy(self, tokens):
        rng = self.rng
        count = max(4, tokens // 3)
        if rng.random() < 0.3:
            text = self.digits(min(64, count))
        else:
            text = " ".join(rng.choice(THINGS + CITIES + NAMES + STATES) for _ in range(count))
        return Document().add("Copy this: ").add(text, NOISE).add("\nHere it is:").add(f" {text}", ANSWER)

    def person(self, i):
        name = NAMES[i % len(NAMES)]
        return name if i < len(NAMES) else f"{name} {i // len(NAMES) + 1}"

    def recall(self, tokens):
        rng = self.rng
        people = [self.person(i) for i in range(max(2, (tokens - 150) // 28))]
        codes = [str(rng.randrange(10_000, 100_000)) for _ in people]
        document = Document().add("<|user|>Remember these facts. I will ask about them.\n\n")
        for person, code in zip(people, codes):
            document.add(f"{person} took the ").add(f"{rng.choice(THINGS)} to {rng.choice(CITIES)}", NOISE)
            document.add(f". The code of {person} is").add(f" {code}", NOISE).add(".\n")
        for turn in range(8):
            i = rng.randrange(len(people))
            document.add("<|user|>" if turn else "").add(f"\nWhat is the code of {people[i]}? Answer with the number only.")
            document.add("<|end|><|assistant|>").add(codes[i], ANSWER).add("<|end|>", ANSWER)
        return document

    def listing(self, tokens):
        rng = self.rng
        city = rng.choice(CITIES)
        others = [other for other in CITIES if other != city]
        document = Document().add("<|user|>Each line is a record: name; thing; city.\n\n")
        matches = []
        for i in range(max(3, (tokens - 60) // 11)):
            match = rng.random() < 1 / 3
            document.add(f"{self.person(i)};").add(f" {rng.choice(THINGS)}; {city if match else rng.choice(others)}", NOISE)
            document.add("\n")
            if match:
                matches.append(self.person(i))
        document.add(f"\nList the names of all records whose city is {city}, in full, one name a line and nothing else.")
        document.add("<|end|><|assistant|>")
        return document.add("".join(f"{name}\n" for name in matches), ANSWER).add("<|end|>", ANSWER)

    def table_edit(self, tokens):
        rng = self.rng
        city = rng.choice(CITIES)
        document = Document().add("<|user|>Here is a table with the columns name, thing, city, number.\n\n")
        rows = []
        for i in range(max(2, (tokens - 80) // 22)):
            person, thing, place = self.person(i), rng.choice(THINGS), rng.choice(CITIES)
            number = rng.randrange(100, 1000)
            document.add(f"{person},").add(f"{thing},{place},{number}", NOISE).add("\n")
            rows.append(f"{person},{'compass' if place == city else thing},{place},{number}\n")
        document.add(
            "\nWrite the whole table again, line by line and in the same order. "
            f"Where the city is {city}, write compass as the thing. Write nothing else.<|end|><|assistant|>"
        )
        return document.add("".join(rows), ANSWER).add("<|end|>", ANSWER)

    def state_machine(self, tokens):
        rng = self.rng
        rules = {state: [rng.choice(STATES) for _ in "ab"] for state in STATES}
        state = rng.choice(STATES)
        document = Document().add("<|user|>A machine has these rules.\n\n")
        for name, (a, b) in rules.items():
            document.add(f"{name}: a goes to ").add(a, NOISE).add(", b goes to ").add(b, NOISE).add(".\n")
        document.add("\nIt starts in ").add(state, NOISE).add(". Its inputs are:\n\n")
        answer = ""
        for step in range(1, max(4, (tokens - 150) // 11) + 1):
            given = rng.choice("ab")
            state = rules[state]["ab".index(given)]
            document.add(f"{step}. ").add(given, NOISE).add("\n")
            answer += f"{step}. {state}\n"
        document.add(
            "\nWrite the state after each input, one a line, numbered like the inputs, and nothing else.<|end|><|assistant|>"
        )
        return document.add(answer, ANSWER).add("<|end|>", ANSWER)

    def associations(self, tokens):
        """Returns pairs of words, then keys in another order, each followed by its value."""
        rng = self.rng
        count = max(1, min(128, int(tokens / rng.choice([4, 5, 6, 8]))))
        keys = rng.sample(self.vocabulary, count)
        values = {key: rng.choice(self.vocabulary) for key in keys}
        document = Document().add("Pairs:").add("".join(key + values[key] for key in keys), NOISE).add("\nAgain:")
        asked = max(1, (tokens - 2 * count - 8) // 2)
        for key in rng.sample(keys, min(count, asked)) + rng.choices(keys, k=max(0, asked - count)):
            document.add(key, NOISE).add(values[key], ANSWER)
        return document

    def repetition(self, tokens):
        """Returns random words twice."""
        text = "".join(self.rng.choices(self.vocabulary, k=max(4, (tokens - 8) // 2)))
        return Document().add("Words:").add(text, NOISE).add("\nAgain:").add(text, ANSWER)

    def swaps(self, tokens, gap=None):
        """Tracks the order of three things: `a` swaps the first two, `b` the last two."""
        orders = list(itertools.permutations(range(3)))
        move = lambda state, input: orders.index(
            tuple(orders[state][i] for i in ((1, 0, 2) if input == "a" else (0, 2, 1)))
        )
        return self.tracked("swaps", move, tokens, gap)

    def ring(self, tokens, gap=None):
        """Tracks a counter modulo 6: `a` adds one, `b` subtracts one."""
        return self.tracked("ring", lambda state, input: (state + (1 if input == "a" else -1)) % 6, tokens, gap)

    def tracked(self, name, move, tokens, gap):
        """Asks for the state after every `gap` inputs; `None`: after 1 to 32, small numbers more
        often."""
        rng = self.rng
        state, used = rng.randrange(6), 8
        document = Document().add(f"Machine {name}:").add(f" {STATES[state]}", NOISE)
        while True:
            inputs = rng.choices("ab", k=gap or int(32 ** rng.random()))
            used += len(inputs) + 2
            if used > tokens:
                return document
            for input in inputs:
                state = move(state, input)
            document.add("".join(f" {input}" for input in inputs), NOISE).add(" =").add(f" {STATES[state]}", ANSWER)
