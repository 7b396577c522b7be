#!/usr/bin/env python3
"""Reads an exported grouped differential model in plain PyTorch and compares its logits with Polyhead's.

    polyhead export RUN --to EXPORTED && polyhead logits RUN --tokens 1,2,3,4,5,6,7 --out LOGITS.safetensors
    python check_export.py EXPORTED LOGITS.safetensors        # pip install torch safetensors

Written from the description of the format (arXiv 2510.06949, Motif's names and head layout), not from
Polyhead's code. Two things differ from Motif's own models and are read from config.json: the feed-forward
layer is SwiGLU (hidden_act "silu"), and lambda_init is stated per layer.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

TOLERANCE = 1e-5


class Weights:
    """The file's tensors; remembers which were used."""

    def __init__(self, folder):
        self.tensors = load_file(folder / "model.safetensors")
        self.unused = set(self.tensors)

    def __call__(self, name, *shape):
        self.unused.discard(name)
        assert self.tensors[name].shape == torch.Size(shape), (name, self.tensors[name].shape, shape)
        return self.tensors[name]


def rms_norm(x, weight, eps):
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotate(x, theta):
    """Rotate-half RoPE over all channels of [seq, heads, d]: pairs (i, i + d/2)."""
    seq, _, d = x.shape
    freq = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.outer(torch.arange(seq, dtype=torch.float64), freq)[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def attention(c, w, layer, x):
    """x is [seq, hidden]; heads are striped: the signals of a group, then its noise head."""
    hidden, d, heads = c["hidden_size"], c["head_dim"], c["num_attention_heads"]
    noises, pairs = c["num_noise_heads"], c["num_key_value_heads"] // 2
    ratio = heads // noises - 1
    signals, seq = noises * ratio, len(x)
    name = f"model.layers.{layer}.self_attn."
    q = (x @ w(name + "q_proj.weight", heads * d, hidden).T).view(seq, heads, d)
    k = (x @ w(name + "k_proj.weight", 2 * pairs * d, hidden).T).view(seq, 2 * pairs, d)
    v = (x @ w(name + "v_proj.weight", 2 * pairs * d, hidden).T).view(seq, pairs, 2 * d)
    q, k = rotate(q, c["rope_theta"]), rotate(k, c["rope_theta"])

    def attend(query_head, key_head, pair):
        scores = q[:, query_head] @ k[:, key_head].T / math.sqrt(d)
        scores = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), float("-inf"))
        return scores.softmax(-1) @ v[:, pair]  # [seq, 2 d]

    vectors = {n: w(f"{name}lambda_{n}", d) for n in ("q1", "k1", "q2", "k2")}
    lambda_init = c["lambda_init"][layer]
    lam = ((vectors["q1"] * vectors["k1"]).sum().exp() - (vectors["q2"] * vectors["k2"]).sum().exp() + lambda_init)
    out = []
    for signal in range(signals):
        group = signal // ratio
        pair = signal // (signals // pairs)
        assert pair == group // (noises // pairs)
        first = attend(group * (ratio + 1) + signal % ratio, 2 * pair, pair)
        second = attend(group * (ratio + 1) + ratio, 2 * pair + 1, pair)
        y = rms_norm(first - lam * second, w(name + "subln.weight", 2 * d), c["attn_rms_norm_eps"])
        out.append(y * (1 - lambda_init))
    return torch.cat(out, -1) @ w(name + "o_proj.weight", hidden, signals * 2 * d).T


def feed_forward(c, w, layer, x):
    assert c["hidden_act"] == "silu"
    hidden, inner, name = c["hidden_size"], c["intermediate_size"], f"model.layers.{layer}.mlp."
    gate, up = (x @ w(f"{name}{n}_proj.weight", inner, hidden).T for n in ("gate", "up"))
    return (F.silu(gate) * up) @ w(name + "down_proj.weight", hidden, inner).T


def logits(c, w, tokens):
    hidden, vocab, eps = c["hidden_size"], c["vocab_size"], c["rms_norm_eps"]
    embedding = w("model.embed_tokens.weight", vocab, hidden)
    x = embedding[tokens]
    for layer in range(c["num_hidden_layers"]):
        norm = lambda n: rms_norm(x, w(f"model.layers.{layer}.{n}.weight", hidden), eps)
        x = x + attention(c, w, layer, norm("input_layernorm"))
        x = x + feed_forward(c, w, layer, norm("post_attention_layernorm"))
    head = embedding if c["tie_word_embeddings"] else w("lm_head.weight", vocab, hidden)
    return rms_norm(x, w("model.norm.weight", hidden), eps) @ head.T


def main():
    folder, ours = Path(sys.argv[1]), load_file(sys.argv[2])
    c = json.loads((folder / "config.json").read_text())
    assert c["architectures"] == ["MotifForCausalLM"], c["architectures"]
    w = Weights(folder)
    theirs = logits(c, w, ours["tokens"][0].long())
    assert not w.unused, f"tensors that nothing reads: {sorted(w.unused)}"
    off = (theirs - ours["logits"][0]).abs().max().item()
    print(f"{folder}: {len(theirs)} tokens, logits up to {theirs.abs().max():.2f}, largest difference {off:.1e}")
    sys.exit(0 if off <= TOLERANCE else f"more than {TOLERANCE}")


if __name__ == "__main__":
    main()
