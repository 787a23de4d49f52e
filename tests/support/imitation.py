"""A small profile, and a slow NumPy reference of what `ProfileDrawer` draws from one (docs/generate.md)."""

import numpy as np

from moetrace.generators import Profile


def a_profile(layers=3, experts=16, top_k=3, **changes):
    values = {
        "name": "small",
        "model": "small",
        "layers": layers,
        "experts": experts,
        "top_k": top_k,
        "dimensions": 6,
        "request": 0.1,
        "slow": 0.2,
        "slow_rows": 30.0,
        "fast": 0.3,
        "fast_rows": 1.5,
        "token": 0.1,
        "vocabulary": 50,
        "token_zipf": 1.0,
        "depth": 0.8,
        "phase": 0.3,
        "sink": 1.0,
        "skew": [0.5] * layers,
        "curve": [2.0, 0.5, -0.5, -1.5],
    }
    return Profile(**values | changes)


def rows_of(requests, length):
    """Request and position, int32, of requests one after another."""
    request = np.repeat(np.arange(requests, dtype=np.int32), length)
    return request, np.tile(np.arange(length, dtype=np.int32), requests)


def reference(profile, tables, random, requests, length, prompt):
    """Experts int [requests, length, layers, top_k] by the formulas of docs/generate.md, with NumPy's numbers."""
    size, layers = profile.dimensions, profile.layers
    rest = 1 - profile.request - profile.slow - profile.fast - profile.token
    frequency = np.arange(1, profile.vocabulary + 1) ** -profile.token_zipf
    words = random.normal(size=(profile.vocabulary, size))
    experts = np.empty((requests, length, layers, profile.top_k), int)
    topic, slow, fast = random.normal(size=(3, requests, size))
    for position in range(length):
        if position:
            for state, span in ((slow, profile.slow_rows), (fast, profile.fast_rows)):
                keep = np.exp(-1 / span)
                state[:] = keep * state + np.sqrt(1 - keep**2) * random.normal(size=state.shape)
        word = words[random.choice(profile.vocabulary, requests, p=frequency / frequency.sum())]
        common = np.sqrt(profile.request) * topic + np.sqrt(profile.slow) * slow
        common = common + np.sqrt(profile.fast) * fast + np.sqrt(profile.token) * word
        noise = random.normal(size=common.shape)
        for layer in range(layers):
            if layer:
                noise = profile.depth * noise + np.sqrt(1 - profile.depth**2) * random.normal(size=noise.shape)
            bias = tables.bias[int(position >= prompt), layer]
            logits = (common + np.sqrt(rest) * noise) @ tables.router[layer] + bias
            experts[:, position, layer] = np.argsort(-logits, axis=1)[:, : profile.top_k]
    return experts
