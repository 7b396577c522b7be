"""Further files of the format that README.md describes, from its equations and those of the published code.

Everything is computed in float64; gradients are derivatives by complex steps, which are exact to rounding (no difference is
taken). The files that came from the authors' code are not made here; `--check` computes them again and tells how far off
this script is.

    pip install numpy safetensors
    python make_golden.py            # writes the files of CASES beside it
    python make_golden.py --check    # the authors' files against this script
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
STEP = 1e-30
OURS = "numpy reference of the published equations, float64, gradients by complex steps (make_golden.py)"

CASES = {
    # Only the first layer knows its padding: the residual doubles it, and 2 * -1.5 is data to the second.
    "block3_padded_negative": dict(
        kind="product_block_residual", norm_axes=[1, 1, 2], num_heads=[3, 2, 2], num_gaussians=[2, 3, 1], num_layers=3,
        padding_value=-1.5, lens=[11, 8], x_shape=[2, 11, 6], seed=41,
    ),
    # 0 is doubled to 0: all layers know it.
    "block2_padded_zero": dict(
        kind="product_block_residual", norm_axes=[1, 1], num_heads=[2, 4], num_gaussians=[2, 1], num_layers=2,
        padding_value=0.0, lens=[12, 9, 5], x_shape=[3, 12, 4], seed=42,
    ),
    "multihead_4d_remainder": dict(
        kind="product_multi_head", norm_axis=1, num_heads=3, num_gaussians=2, padding_value=None, lens=None,
        x_shape=[2, 11, 3, 2], head_chunks=[3, 3, 5], seed=43,
    ),
    "multihead_4d_padded_last_axis": dict(
        kind="product_multi_head", norm_axis=-1, num_heads=2, num_gaussians=3, padding_value=2.5, lens=[7, 5],
        x_shape=[2, 3, 2, 7], head_chunks=[3, 4], seed=44,
    ),
    # A head by itself is the one place where the package's eps is heard.
    "single_eps_padded": dict(
        kind="product_single_head", norm_axis=1, num_gaussians=2, padding_value=0.1, lens=[9, 6], eps=1e-2,
        x_shape=[2, 9, 4], seed=45,
    ),
    "sum_mixture_padded": dict(
        kind="sum_mixture_multi_head", norm_axis=1, num_heads=2, num_gaussians=3, padding_value=-0.75, lens=[10, 7, 4],
        c_init=2.0, x_shape=[3, 10, 4], seed=46,
    ),
    # 11 = 3 * 3 + 2: the last two are dropped, and the output is shorter.
    "sum_mixture_4d_dropped_eps": dict(
        kind="sum_mixture_multi_head", norm_axis=1, num_heads=3, num_gaussians=2, padding_value=0.0, lens=[11, 8],
        eps=1e-3, c_init=2.0, x_shape=[2, 11, 2, 2], seed=47,
    ),
}


def head(x, p, axis, eps, padding, mixture):
    """One head over its chunk: output, and what it multiplies by. p: mean_offsets, c, and weights of a mixture."""
    mask = np.ones(x.shape, bool) if padding is None else x.real != np.float32(padding)
    known = np.where(mask, x, 0)
    n = x.shape[axis]
    mean = known.sum(axis, keepdims=True) / n
    variance = ((known - mean) ** 2).sum(axis, keepdims=True) / (n - 1) + eps
    y = [(x - (mean + offset)) / np.sqrt(variance) for offset in p["mean_offsets"]]
    if mixture:
        e = np.exp(p["weights"])
        w = sum(share * np.exp(-(y_i**2) / (2 * c**2)) for share, y_i, c in zip(e / e.sum(), y, p["c"]))
    else:
        w = 1
        for y_i, c in zip(y, p["c"]):
            w = w * np.exp(-(y_i**2) / (2 * c**2)) / np.sqrt(2 * np.pi * c**2)
    total = w.sum(axis, keepdims=True)
    w = w / np.where(total.real < eps, eps, total)
    return np.where(mask, x * w, x), w


def heads(x, params, prefix, axis, count, eps, padding, mixture):
    """All heads of a layer: the last one takes the remainder, or a mixture drops it."""
    axis %= x.ndim
    chunk = x.shape[axis] // count
    out, weights = [], []
    for i in range(count):
        end = x.shape[axis] if i == count - 1 and not mixture else (i + 1) * chunk
        part = np.take(x, range(i * chunk, end), axis)
        own = {k: params[f"{prefix(i)}{k}"] for k in ("mean_offsets", "c", "weights") if f"{prefix(i)}{k}" in params}
        o, w = head(part, own, axis, eps, padding, mixture)
        out.append(o)
        weights.append(w)
    return np.concatenate(out, axis), np.concatenate(weights, axis)


def forward(config, x, params):
    """Output, and what is told beside it."""
    kind, padding = config["kind"], config["padding_value"]
    if kind == "product_block_residual":
        aux = {}
        for layer in range(config["num_layers"]):
            axis, count = config["norm_axes"][layer], config["num_heads"][layer]
            # Heads of a block do not hear of eps.
            out, w = heads(x, params, lambda i: f"layer{layer}.head{i}.", axis, count, 1e-8, padding, False)
            aux[f"aux.attn.layer{layer}"], x = w, out + x
        return x, aux
    if kind == "product_single_head":
        out, w = heads(x, params, lambda i: "", config["norm_axis"], 1, config["eps"], padding, False)
        return out, {"aux.attn": w}
    mixture = kind == "sum_mixture_multi_head"
    eps = config["eps"] if mixture else 1e-8
    out, w = heads(x, params, lambda i: f"head{i}.", config["norm_axis"], config["num_heads"], eps, padding, mixture)
    return out, {} if mixture else {"aux.attn": w}


def derivative(function, value):
    """Of a real function of an array, by a complex step at each of its elements."""
    slope = np.zeros(value.shape)
    for at in np.ndindex(*value.shape):
        moved = value.astype(complex)
        moved[at] += 1j * STEP
        slope[at] = function(moved).imag / STEP
    return slope


def results(config, x, params, cotangent):
    x = x.astype(np.float64)
    params = {k: v.astype(np.float64) for k, v in params.items()}
    loss = lambda x, params: (forward(config, x, params)[0] * cotangent).sum()
    out, aux = forward(config, x, params)
    found = {"out": out, **aux, "grad.x": derivative(lambda x: loss(x, params), x)}
    for key in params:
        found[f"grad.w.{key}"] = derivative(lambda p: loss(x, {**params, key: p}), params[key])
    return found


def draw(config):
    rng = np.random.default_rng(config["seed"])
    x = rng.normal(0.3, 1.2, config["x_shape"]).astype(np.float32)
    if config["padding_value"] is not None:
        # Along the last axis where that is the one that is normalised, else along axis 1.
        axis = x.ndim - 1 if config.get("norm_axis") == -1 else 1
        places = np.arange(x.shape[axis]).reshape([-1] + [1] * (x.ndim - 1 - axis))
        for row, length in enumerate(config["lens"]):
            x[row] = np.where(places >= length, np.float32(config["padding_value"]), x[row])
    layers = range(config["num_layers"]) if "num_layers" in config else [None]
    params = {}
    for layer in layers:
        count = config.get("num_heads", 1) if layer is None else config["num_heads"][layer]
        gaussians = config["num_gaussians"] if layer is None else config["num_gaussians"][layer]
        for i in range(count):
            prefix = "" if layer is None else f"layer{layer}."
            prefix += "" if config["kind"] == "product_single_head" else f"head{i}."
            params[f"{prefix}mean_offsets"] = rng.normal(0, 0.3, gaussians)
            params[f"{prefix}c"] = rng.uniform(0.8, 2.5, gaussians)
            if config["kind"] == "sum_mixture_multi_head":
                params[f"{prefix}weights"] = rng.normal(1, 0.5, gaussians)
    return x, {k: v.astype(np.float32) for k, v in params.items()}, rng


def write(name, config):
    config = {"eps": 1e-8, **config}
    x, params, rng = draw(config)
    cotangent = rng.normal(0, 1, forward(config, x.astype(np.float64), params)[0].shape).astype(np.float32)
    tensors = {"x": x, "cotangent": cotangent, **{f"w.{k}": v for k, v in params.items()}}
    tensors |= {k: v.astype(np.float32) for k, v in results(config, x, params, cotangent).items()}
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    metadata = {"name": name, "config": json.dumps(config), "provenance": OURS}
    save_file(tensors, HERE / f"{name}.safetensors", metadata)
    print(name, {k: list(v.shape) for k, v in tensors.items() if k in ("x", "out")})


def check():
    for path in sorted(HERE.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            config = json.loads(file.metadata()["config"])
        if config["kind"].startswith("paper") or path.stem in CASES:
            continue
        tensors = load_file(path)
        params = {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}
        found = results(config, tensors["x"], params, tensors["cotangent"])
        off = {k: float(np.abs(v - tensors[k]).max() / np.abs(tensors[k]).max()) for k, v in found.items()}
        assert set(found) | {"x", "cotangent"} | {f"w.{k}" for k in params} == set(tensors), path.name
        print(path.stem, "off by", f"{max(off.values()):.1e}", "of the largest")


if __name__ == "__main__":
    if "--check" in sys.argv:
        check()
    else:
        for name, config in CASES.items():
            write(name, config)
