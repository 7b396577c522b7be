#!/usr/bin/env python3
"""Makes the golden numbers for plain softmax attention (see README.md beside this file).

    pip install torch transformers safetensors
    python make_golden.py [OUT_DIR]        # default: this folder

The reference is the attention module of transformers itself (Llama, Qwen2), run
eagerly in float32 on the CPU; what those do not cover comes from plain torch. Each
case is computed a second time, independently, and nothing is written unless the two
agree. The weights are random, from a fixed seed: nothing is downloaded.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2

STD = 0.3  # of weights and biases: large enough for clearly non-uniform scores

# `source` is what computes the numbers that are written.
LLAMA = f"transformers {transformers.__version__} LlamaAttention (eager, float32, CPU)"
QWEN2 = f"transformers {transformers.__version__} Qwen2Attention (eager, float32, CPU)"
SDPA = f"torch {torch.__version__.split('+')[0]} scaled_dot_product_attention (float32, CPU)"
PLAIN = "plain torch einsum reference (float32, CPU)"


def case(seed, batch, seq, d_model, n_q_heads, n_kv_heads, head_dim, source,
         causal=True, rope_theta=0.0, rope_layout="neox"):
    return dict(mechanism="softmax", causal=causal, rope=rope_theta > 0, rope_layout=rope_layout,
                batch=batch, seq=seq, d_model=d_model, head_dim=head_dim, n_q_heads=n_q_heads,
                n_kv_heads=n_kv_heads, rope_theta=rope_theta, seed=seed, source=source)


CASES = {
    "mha_rope_llama": case(201, 2, 7, 32, 4, 4, 8, LLAMA, rope_theta=10000.0),
    "gqa_rope_llama": case(202, 1, 13, 24, 6, 2, 8, LLAMA, rope_theta=500000.0),
    "mqa_norope_bidir": case(203, 2, 6, 16, 4, 1, 4, SDPA, causal=False),
    "gqa_bias_qwen2": case(204, 2, 9, 32, 4, 2, 8, QWEN2, rope_theta=1000000.0),
    "gqa_interleaved_ref": case(205, 3, 5, 24, 4, 2, 6, PLAIN, rope_theta=10000.0,
                                rope_layout="interleaved"),
}


def draw(c):
    """Input, cotangent and weights (torch layout [out, in])."""
    gen = torch.Generator().manual_seed(c["seed"])
    randn = lambda *shape: torch.randn(*shape, generator=gen)
    q_dim, kv_dim = c["n_q_heads"] * c["head_dim"], c["n_kv_heads"] * c["head_dim"]
    x = randn(c["batch"], c["seq"], c["d_model"])
    cotangent = randn(c["batch"], c["seq"], c["d_model"])
    w = {
        "q_proj.weight": STD * randn(q_dim, c["d_model"]),
        "k_proj.weight": STD * randn(kv_dim, c["d_model"]),
        "v_proj.weight": STD * randn(kv_dim, c["d_model"]),
        "o_proj.weight": STD * randn(c["d_model"], q_dim),
    }
    if c["source"] == QWEN2:
        w |= {"q_proj.bias": STD * randn(q_dim), "k_proj.bias": STD * randn(kv_dim),
              "v_proj.bias": STD * randn(kv_dim)}
    return x, cotangent, w


def project(c, x, w):
    """q [B, S, n_q_heads, d], k and v [B, S, n_kv_heads, d]."""
    return [F.linear(x, w[f"{n}_proj.weight"], w.get(f"{n}_proj.bias")).unflatten(-1, (-1, c["head_dim"]))
            for n in "qkv"]


def plain(c, x, w):
    """Attention written out; query head h reads k/v head h // (n_q_heads / n_kv_heads)."""
    q, k, v = project(c, x, w)
    seq, d, group = c["seq"], c["head_dim"], c["n_q_heads"] // c["n_kv_heads"]
    if c["rope"]:
        freq = c["rope_theta"] ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
        angle = torch.outer(torch.arange(seq, dtype=x.dtype), freq)[:, None]  # [S, 1, d/2]
        cos, sin = angle.cos(), angle.sin()

        def rotate(t):
            if c["rope_layout"] == "neox":  # pairs (i, i + d/2)
                a, b = t[..., : d // 2], t[..., d // 2 :]
                return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
            a, b = t[..., 0::2], t[..., 1::2]  # pairs (2i, 2i + 1)
            return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

        q, k = rotate(q), rotate(k)
    q = q.unflatten(2, (c["n_kv_heads"], group))
    scores = torch.einsum("bsngd,btnd->bngst", q, k) * d**-0.5
    if c["causal"]:
        scores = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), float("-inf"))
    heads = torch.einsum("bngst,btnd->bsngd", scores.softmax(-1), v)
    return F.linear(heads.flatten(2), w["o_proj.weight"])


def sdpa(c, x, w):
    q, k, v = (t.transpose(1, 2) for t in project(c, x, w))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=c["causal"], enable_gqa=True)
    return F.linear(heads.transpose(1, 2).flatten(2), w["o_proj.weight"])


def from_transformers(c, x, w):
    """LlamaAttention, or Qwen2Attention where there are biases."""
    name, mod = ("Qwen2", qwen2) if "q_proj.bias" in w else ("Llama", llama)
    size = dict(hidden_size=c["d_model"], head_dim=c["head_dim"], num_attention_heads=c["n_q_heads"],
                num_key_value_heads=c["n_kv_heads"], num_hidden_layers=1, max_position_embeddings=64,
                attn_implementation="eager")
    if int(transformers.__version__.split(".")[0]) >= 5:
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": c["rope_theta"]}}
    else:
        rope = {"rope_theta": c["rope_theta"]}
    config = getattr(transformers, name + "Config")(**size, **rope)
    attention = getattr(mod, name + "Attention")(config, layer_idx=0).eval()
    assert {n: p.shape for n, p in attention.named_parameters()} == {n: t.shape for n, t in w.items()}
    cos_sin = getattr(mod, name + "RotaryEmbedding")(config)(x, torch.arange(c["seq"])[None])
    mask = torch.full((c["seq"], c["seq"]), float("-inf")).triu(1)[None, None] if c["causal"] else None
    call = {"hidden_states": x, "position_embeddings": cos_sin, "attention_mask": mask}
    return torch.func.functional_call(attention, w, (), call)[0]


def from_transformers_interleaved(c, x, w):
    """Interleaved RoPE through LlamaAttention: reorder the q and k rows of every head
    (even channels first), after which rotate-half turns the same pairs."""
    order = torch.cat((torch.arange(0, c["head_dim"], 2), torch.arange(1, c["head_dim"], 2)))
    reorder = lambda t: t.unflatten(0, (-1, c["head_dim"]))[:, order].flatten(0, 1)
    w = {n: reorder(t) if n in ("q_proj.weight", "k_proj.weight") else t for n, t in w.items()}
    return from_transformers(c, x, w)


def run(forward, c, x, cotangent, w, dtype=torch.float32):
    """Output, and the gradients of sum(out * cotangent)."""
    x = x.detach().to(dtype).requires_grad_()
    w = {n: t.detach().to(dtype).requires_grad_() for n, t in w.items()}
    out = forward(c, x, w)
    (out * cotangent.to(dtype)).sum().backward()
    return {"out": out.detach(), "grad.x": x.grad} | {f"grad.{n}": t.grad for n, t in w.items()}


def main():
    out_dir = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    forwards = {LLAMA: from_transformers, QWEN2: from_transformers, SDPA: sdpa, PLAIN: plain}
    for name, c in CASES.items():
        x, cotangent, w = draw(c)
        golden = run(forwards[c["source"]], c, x, cotangent, w)
        # The second opinion: plain() in float64, or transformers where plain() is the source.
        if c["source"] == PLAIN:
            check = run(from_transformers_interleaved, c, x, cotangent, w)
        else:
            check = run(plain, c, x, cotangent, w, torch.float64)
        out_diff = (golden["out"] - check["out"]).abs().max().item()
        grad_diff = max(((golden[n] - check[n]).abs().max() / check[n].abs().max()).item()
                        for n in golden if n != "out")
        assert out_diff < 5e-6 and grad_diff < 5e-6, (name, out_diff, grad_diff)

        tensors = {"x": x, "cotangent": cotangent} | golden | {f"w.{n}": t for n, t in w.items()}
        tensors = {n: t.contiguous() for n, t in tensors.items()}
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())
        save_file(tensors, out_dir / f"{name}.safetensors", {"config": json.dumps(c)})
        print(f"{name:20} max |out diff| {out_diff:.1e}, max relative gradient diff {grad_diff:.1e}")


if __name__ == "__main__":
    main()
