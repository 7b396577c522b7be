"""Further files of the format that README.md describes: growth by signal replication and width cloning, in NumPy.

Both layers, the small one and the grown one, are computed from `../gda/README.md` in float64; that they agree is asserted
here too. `--check` computes growth_r1_to_r4.safetensors, which is not made here, again.

    pip install numpy safetensors
    python make_golden.py
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
SOURCE = "numpy reference of ../gda/README.md and of the map in README.md, float64 (make_golden.py)"
LAMBDAS = ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"]

# name: base, replication of signal heads, clones of each channel
CASES = {
    "growth_r1_to_r2_width2": (dict(n_q_heads=4, n_noise=2, n_kv_heads=4, seed=301), 2, 2),
    "growth_r2_to_r6_width3_gqa": (
        dict(n_q_heads=6, n_noise=2, n_kv_heads=2, seed=302, rope_layout="interleaved", rope_theta=500000.0), 3, 3,
    ),
    "growth_width2_only_norope": (dict(n_q_heads=3, n_noise=1, n_kv_heads=2, seed=303, rope=False, causal=False), 1, 2),
}


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x, config):
    if not config["rope"]:
        return x
    seq, d = x.shape[-2:]
    angles = np.arange(seq)[:, None] * config["rope_theta"] ** (-2 * np.arange(d // 2) / d)
    cos, sin = np.cos(angles), np.sin(angles)
    neox = config["rope_layout"] == "neox"
    a, b = (x[..., : d // 2], x[..., d // 2 :]) if neox else (x[..., ::2], x[..., 1::2])
    turned = [a * cos - b * sin, a * sin + b * cos]
    return np.concatenate(turned, -1) if neox else np.stack(turned, -1).reshape(x.shape)


def attention(config, w, x):
    batch, seq, _ = x.shape
    d, noises, all_heads, kv = (config[k] for k in ("head_dim", "n_noise", "n_q_heads", "n_kv_heads"))
    r = all_heads // noises - 1
    split = lambda name, width: (x @ w[name].T).reshape(batch, seq, -1, width).swapaxes(1, 2)
    q, k, v = rotate(split("q_proj.weight", d), config), rotate(split("k_proj.weight", d), config), split("v_proj.weight", 2 * d)
    hidden = np.triu(np.full((seq, seq), -np.inf), 1) if config["causal"] else 0.0
    dot = lambda i, j: np.exp(w[LAMBDAS[i]] @ w[LAMBDAS[j]])
    lam = dot(0, 1) - dot(2, 3) + config["lambda_init"]
    out = []
    for group in range(noises):
        pair = group * (kv // 2) // noises
        look = lambda head, key: softmax(q[:, head] @ k[:, key].swapaxes(1, 2) * d**-0.5 + hidden) @ v[:, pair]
        first = group * (r + 1)
        noise = look(first + r, 2 * pair + 1)
        for signal in range(first, first + r):
            y = look(signal, 2 * pair) - lam * noise
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + config["subln_eps"]) * w["subln.weight"]
            out.append((1 - config["lambda_init"]) * y)
    return np.concatenate(out, -1) @ w["o_proj.weight"].T


def grown_weights(config, w, times, clones):
    d, noises = config["head_dim"], config["n_noise"]
    r = config["n_q_heads"] // noises - 1
    rows = [group * (r + 1) + head for group in range(noises) for head in range(r + 1) for _ in range(times if head < r else 1)]
    signals = [signal for signal in range(noises * r) for _ in range(times)]
    channels = lambda heads, width: np.concatenate([np.arange(h * width, (h + 1) * width) for h in heads])
    new = dict(w)
    new["q_proj.weight"] = w["q_proj.weight"][channels(rows, d)]
    new["o_proj.weight"] = np.tile(w["o_proj.weight"][:, channels(signals, 2 * d)] / times, (clones, 1))
    for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
        new[name] = np.tile(new[name], (1, clones)) / clones
    return new


def compute(base, grown, times, clones, x, w):
    wide = {k: v.astype(np.float64) for k, v in w.items()}
    x = x.astype(np.float64)
    more = grown_weights(base, wide, times, clones)
    cloned = np.tile(x, (1, 1, clones))
    out, after = attention(base, wide, x), attention(grown, more, cloned)
    assert np.abs(after - np.tile(out, (1, 1, clones))).max() < 1e-12
    return {"base.out": out, "grown.x": cloned, "grown.out": after, **{f"grown.w.{k}": v for k, v in more.items()}}


def write(name, base, times, clones):
    base = dict(causal=True, rope_layout="neox", subln_eps=1e-5, rope=True, rope_theta=10000.0, batch=2, seq=7,
                d_model=12, head_dim=4, layer_idx=1, lambda_init=0.2) | base
    noises = base["n_noise"]
    grown = base | {
        "d_model": base["d_model"] * clones, "n_q_heads": (base["n_q_heads"] - noises) * times + noises,
    }
    rng, d, width = np.random.default_rng(base["seed"]), base["head_dim"], base["d_model"]
    normal = lambda *shape: (rng.normal(0, 1, shape) / np.sqrt(shape[-1])).astype(np.float32)
    w = {
        "q_proj.weight": normal(base["n_q_heads"] * d, width), "k_proj.weight": normal(base["n_kv_heads"] * d, width),
        "v_proj.weight": normal(base["n_kv_heads"] * d, width),
        "o_proj.weight": normal(width, (base["n_q_heads"] - noises) * 2 * d),
        "subln.weight": rng.uniform(0.5, 1.5, 2 * d).astype(np.float32),
        **{k: rng.normal(0, 0.3, d).astype(np.float32) for k in LAMBDAS},
    }
    x = rng.normal(0, 1, (base["batch"], base["seq"], width)).astype(np.float32)
    tensors = {"base.x": x, **{f"base.w.{k}": v for k, v in w.items()}, **compute(base, grown, times, clones, x, w)}
    tensors = {k: np.ascontiguousarray(v.astype(np.float32)) for k, v in tensors.items()}
    config = dict(base=base, grown=grown, signal_replication=times, width_clone=clones, source=SOURCE)
    save_file(tensors, HERE / f"{name}.safetensors", {"config": json.dumps(config)})
    print(name, {k: list(v.shape) for k, v in tensors.items() if k.endswith(".x") or "o_proj" in k})


def check(name):
    with safe_open(HERE / name, "np") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(HERE / name)
    w = {k[len("base.w."):]: v for k, v in tensors.items() if k.startswith("base.w.")}
    times, clones = config["signal_replication"], config["width_clone"]
    found = compute(config["base"], config["grown"], times, clones, tensors["base.x"], w)
    print(name, "off by", max(float(np.abs(v - tensors[k]).max()) for k, v in found.items()))


if __name__ == "__main__":
    if "--check" in sys.argv:
        check("growth_r1_to_r4.safetensors")
    else:
        for name, (base, times, clones) in CASES.items():
            write(name, base, times, clones)
