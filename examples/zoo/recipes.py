"""The models of the zoo and their common training settings."""

from model import config, parameters

VOCABULARY, HIDDEN, LAYERS = 4096, 256, 12
# Number of parameters of each compared model, within 5 %.
SIZE = 9_600_000
BATCH_TOKENS = 65_536
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 0.02, 0.1

# Layers with attention, counted from 0.
PLACES = {
    "1-middle": [6],
    "1-early": [1],
    "1-late": [11],
    "2-spread": [3, 9],
    "2-early": [1, 2],
    "2-middle": [5, 6],
    "2-late": [10, 11],
    "3-spread": [2, 6, 10],
    "4-spread": [1, 4, 7, 10],
    "6-spread": [1, 3, 5, 7, 9, 11],
}


def sized(mixers, window=None):
    """Returns a config whose feed-forward width, a multiple of 32, gives about SIZE parameters."""
    make = lambda inner: config(mixers, VOCABULARY, HIDDEN, inner, window=window)
    a_channel = 3 * HIDDEN * len(mixers)
    return make(32 * round((SIZE - parameters(make(0))) / a_channel / 32))


def names():
    mixers = ["attention", "mamba2", "rg_lru", "rwkv5", "mamba"]
    hybrids = [f"{mixer}+{places}" for mixer in mixers[1:] for places in PLACES]
    return ["tiny", "default", *mixers, *hybrids, "rg_lru+local"]


def named(name):
    """Returns a model's config."""
    if name == "tiny":  # For tests of the programs on a CPU.
        return config(["attention", "attention", "rg_lru", "mamba2"], VOCABULARY, 64, 128, heads=2, kv_heads=1)
    if name == "default":
        return config(["attention"] * 8, VOCABULARY, HIDDEN, 704)
    if name == "rg_lru+local":
        return sized(["attention" if i % 3 == 2 else "rg_lru" for i in range(LAYERS)], window=512)
    mixer, _, places = name.partition("+")
    attention = PLACES[places] if places else []
    return sized(["attention" if i in attention else mixer for i in range(LAYERS)])


if __name__ == "__main__":
    for name in names():
        settings = named(name)
        print(f"{name:20} {parameters(settings):>10} parameters, feed-forward {settings['mlp']['intermediate_size']}")
