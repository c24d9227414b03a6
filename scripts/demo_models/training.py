"""One loop for all: steps by seed, a checkpoint from which it goes on, a line of progress."""

import functools
import json
import os
import random
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Between two checkpoints, in seconds.
OFTEN = 60


def flat(weights, prefix=""):
    """Weights by path, as files have them."""
    for name, value in weights.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def save(path, weights):
    """Complete or not there."""
    part = Path(path).with_suffix(".part.npz")
    np.savez(part, **{name: np.asarray(value) for name, value in flat(weights)})
    os.replace(part, path)


def load(path):
    weights = {}
    with np.load(path) as file:
        for name in file.files:
            *folders, last = name.split("/")
            inner = weights
            for folder in folders:
                inner = inner.setdefault(folder, {})
            inner[last] = jnp.asarray(file[name])
    return weights


def train(name, path: Path, start, loss, batch, steps, rate, warm_up=50, decay=0.02, b2=0.98):
    """Trains `start()` for so many steps and writes it to `path`; nothing is done where that is there.

    `loss(weights, *batch(random, step))` gives the loss and numbers to show. The random numbers of a step are the step's own, so
    that a training that was broken off goes on as if it had not been.
    """
    if path.exists():
        return load(path)
    chain = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=b2), optax.add_decayed_weights(decay))
    weights, done = start(), 0
    state = chain.init(weights)
    checkpoint = path.with_suffix(".checkpoint.npz")
    if checkpoint.exists():
        kept = load(checkpoint)
        leaves, shape = jax.tree.flatten((weights, state))
        leaves = [kept["leaves"][str(i)] for i in range(len(leaves))]
        weights, state = jax.tree.unflatten(shape, leaves)
        done = int(kept["step"])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, state, rate, inputs):
        (_, shown), slope = jax.value_and_grad(loss, has_aux=True)(weights, *inputs)
        update, state = chain.update(slope, state, weights)
        return jax.tree.map(lambda w, u: w - rate * u, weights, update), state, shown

    log = path.with_suffix(".log").open("a")
    begun, kept_at, shown_at, sums, count = time.monotonic(), time.monotonic(), time.monotonic(), None, 0
    first = done
    for at in range(done, steps):
        now_rate = rate * min(1.0, (at + 1) / warm_up) * (1 - at / steps) ** 0.8
        weights, state, shown = step(weights, state, now_rate, batch(random.Random(f"{name} {at}"), at))
        sums = shown if sums is None else jax.tree.map(jnp.add, sums, shown)
        count += 1
        if time.monotonic() - shown_at > 15 or at + 1 == steps:
            means = {key: round(float(value) / count, 4) for key, value in sums.items()}
            speed = (at + 1 - first) / (time.monotonic() - begun)
            left = (steps - at - 1) / speed / 60
            print(f"{name}: step {at + 1} of {steps}, {json.dumps(means)}, {left:.1f} min left", flush=True)
            log.write(json.dumps({"step": at + 1, "seconds": round(time.monotonic() - begun, 1), **means}) + "\n")
            log.flush()
            shown_at, sums, count = time.monotonic(), None, 0
        if time.monotonic() - kept_at > OFTEN:
            leaves = jax.tree.leaves((weights, state))
            save(checkpoint, {"step": np.asarray(at + 1), "leaves": {str(i): leaf for i, leaf in enumerate(leaves)}})
            kept_at = time.monotonic()
    save(path, weights)
    checkpoint.unlink(missing_ok=True)
    return weights
