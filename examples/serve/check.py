"""Tests the server with the official `openai` package (pip install openai==1.109.1).

Start a server first, then:
    python check.py --url http://127.0.0.1:8080/v1 [--key KEY] api
    python check.py ... load     64 requests at once, a third of which is cut off by the client
    python check.py ... prefix   a second question on a document of 2,000 words
    python check.py ... held     conversations of 4,000 tokens until one has to wait
Each prints its figures and fails if an answer is not what it has to be.
"""

import argparse
import concurrent.futures
import random
import re
import time
import urllib.request

import openai

parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
parser.add_argument("--key", default="none")
parser.add_argument("what", choices=["api", "load", "prefix", "held"])
args = parser.parse_args()
client = openai.OpenAI(base_url=args.url, api_key=args.key, max_retries=0, timeout=3600)
MODEL = client.models.list().data[0].id


def gauge(name):
    text = urllib.request.urlopen(args.url.removesuffix("/v1") + "/metrics").read().decode()
    return float(re.search(rf"^longctx_{name}(?:_total)? (\S+)$", text, re.M).group(1))


def complete(prompt, most, **options):
    return client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=most, temperature=0, **options
    )


def words(seed, count):
    pick = random.Random(seed)
    return " ".join(pick.choice("the a river stone runs over old wide green slow".split()) for _ in range(count))


def api():
    whole = complete("The capital of France is", 8)
    assert whole.usage.completion_tokens <= 8 and whole.choices[0].finish_reason in ("stop", "length")
    pieces = list(complete("The capital of France is", 8, stream=True, stream_options={"include_usage": True}))
    text = "".join(p.choices[0].text for p in pieces if p.choices)
    assert text == whole.choices[0].text, (text, whole.choices[0].text)
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    stopped = complete("One, two, three, four,", 40, stop=[" seven"])
    assert " seven" not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop", stopped
    chat = dict(model=MODEL, messages=[{"role": "user", "content": "What is the capital of France?"}],
                max_tokens=24, temperature=0)
    answer = client.chat.completions.create(**chat).choices[0].message.content
    deltas = client.chat.completions.create(**chat, stream=True)
    assert "".join(d.choices[0].delta.content or "" for d in deltas) == answer
    same = [client.completions.create(model=MODEL, prompt="Once", max_tokens=12, temperature=0.9, seed=5)
            for _ in range(2)]
    assert same[0].choices[0].text == same[1].choices[0].text
    for wrong in [dict(prompt="x", n=2), dict(prompt=[]), dict(prompt="word " * 20_000)]:
        try:
            client.completions.create(model=MODEL, max_tokens=4, **wrong)
            raise SystemExit(f"accepted: {str(wrong)[:60]}")
        except openai.BadRequestError as error:
            print("refused:", error.message[:100])
    print("chat:", answer)


def load():
    prompts = [words(i, random.Random(i).randrange(5, 300)) for i in range(64)]
    alone = {i: complete(prompts[i], 16).choices[0].text for i in range(64) if i % 3 != 1}

    def run(i):
        if i % 3 == 1:
            stream = complete(prompts[i], 64, stream=True)
            # Every second client disconnects before its first token.
            for _ in zip(range(i % 2 * 3), stream):
                pass
            stream.close()
            return None
        return complete(prompts[i], 16).choices[0].text

    started = time.time()
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(run, range(64)))
    took = time.time() - started
    same = sum(answers[i] == text for i, text in alone.items())
    for _ in range(100):
        if gauge("requests_running") == 0:
            break
        time.sleep(0.1)
    print(f"64 requests in {took:.1f} s; {same} of {len(alone)} answers equal those alone;",
          f"{gauge('requests_cancelled'):.0f} cancelled; sequences left {gauge('sequences'):.0f},",
          f"bytes {gauge('kv_bytes'):.0f}")
    assert same == len(alone) and gauge("sequences") == 0 and gauge("kv_bytes") == 0


def prefix():
    document = words(1, 2000)

    def first_token(question):
        started = time.time()
        for _ in complete(document + question, 4, stream=True):
            return time.time() - started

    cold, warm = first_token("\nWhat runs?"), first_token("\nWhat is old?")
    print(f"first token after {cold:.2f} s, on the same document again after {warm:.3f} s: {cold / warm:.1f}x")


def held():
    # Sends requests until one has to wait; the others then run at the same time.
    def run(i):
        stream = client.completions.create(model=MODEL, prompt=[(7 * i + j) % 40_000 + 100 for j in range(3_900)],
                                           max_tokens=100, temperature=0, stream=True)
        for _ in stream:
            pass

    most = 0
    with concurrent.futures.ThreadPoolExecutor(160) as pool:
        jobs = [pool.submit(run, i) for i in range(160)]
        while not all(job.done() for job in jobs):
            most = max(most, gauge("requests_running"))
            if gauge("requests_waiting") > 0 and most > 0:
                break
            time.sleep(0.2)
        print(f"held at once: {most:.0f}")
        import os
        os._exit(0)


globals()[args.what]()
