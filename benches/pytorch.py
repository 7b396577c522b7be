"""The benchmark's PyTorch side: the same decoder, the same first weights and the same batch, in plain PyTorch.

Called by benches/side_by_side.rs with a JSON file that describes the work; prints one JSON line with the time of every
step, the first loss, and the peak memory. `--compile` runs it through torch.compile. On CUDA products run in bf16 under
autocast where the work says so, and the memory of a process is read from outside.
"""

import json
import math
import resource
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def linear(d_input, d_output):
    return nn.Linear(d_input, d_output, bias=False)


class Softmax(nn.Module):
    def __init__(self, work, layer):
        super().__init__()
        d, self.heads = work["d_model"], work["n_heads"]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = linear(d, d), linear(d, d), linear(d, d), linear(d, d)

    def forward(self, x, cos, sin):
        batch, seq, d = x.shape
        split = lambda y: y.view(batch, seq, self.heads, -1).transpose(1, 2)
        q, k = rotate(split(self.q_proj(x)), cos, sin), rotate(split(self.k_proj(x)), cos, sin)
        y = F.scaled_dot_product_attention(q, k, split(self.v_proj(x)), is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq, d))


class GroupedDifferential(nn.Module):
    """Grouped differential attention as its authors' code computes it: two attentions, then the subtraction."""

    def __init__(self, work, layer):
        super().__init__()
        d, self.heads, self.noise = work["d_model"], work["n_heads"], work["n_noise_heads"]
        self.width = d // self.heads
        self.signal, self.ratio = self.heads - self.noise, self.heads // self.noise - 1
        kv = 2 * self.noise * self.width
        self.q_proj, self.k_proj, self.v_proj = linear(d, d), linear(d, kv), linear(d, kv)
        self.o_proj = linear(self.signal * 2 * self.width, d)
        for name in ["lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"]:
            setattr(self, name, nn.Parameter(torch.zeros(self.width)))
        self.subln = RMSNorm(2 * self.width)
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)

    def forward(self, x, cos, sin):
        batch, seq, _ = x.shape
        split = lambda y, heads: y.view(batch, seq, heads, -1).transpose(1, 2)
        q = rotate(split(self.q_proj(x), self.heads), cos, sin)
        q = q.view(batch, self.noise, self.ratio + 1, seq, self.width)
        k = rotate(split(self.k_proj(x), 2 * self.noise), cos, sin)
        k = k.view(batch, self.noise, 2, seq, self.width)
        v = split(self.v_proj(x), self.noise)
        share = lambda y: y.repeat_interleave(self.ratio, 1)
        q1 = q[:, :, : self.ratio].reshape(batch, self.signal, seq, self.width)
        # One call per half of the values, so that widths are equal and the fast kernel applies (as the authors do).
        attend = lambda q, k, v: torch.cat(
            [F.scaled_dot_product_attention(q, k, half, is_causal=True) for half in v.chunk(2, -1)], -1
        )
        signal = attend(q1, share(k[:, :, 0]), share(v))
        noise = attend(q[:, :, self.ratio], k[:, :, 1], v)
        dot = lambda a, b: torch.exp((a * b).sum())
        lam = dot(self.lambda_q1, self.lambda_k1) - dot(self.lambda_q2, self.lambda_k2) + self.lambda_init
        y = self.subln(signal - lam * share(noise)) * (1 - self.lambda_init)
        return self.o_proj(y.transpose(1, 2).reshape(batch, seq, -1))


class Mlp(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(d_model, d_ff), linear(d_model, d_ff), linear(d_ff, d_model)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, work, layer):
        super().__init__()
        mechanism = {"softmax": Softmax, "grouped_differential": GroupedDifferential}[work["mechanism"]]
        self.attention_norm, self.mlp_norm = RMSNorm(work["d_model"]), RMSNorm(work["d_model"])
        self.attention, self.mlp = mechanism(work, layer), Mlp(work["d_model"], work["d_ff"])

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(self, work):
        super().__init__()
        self.embedding = nn.Embedding(work["vocab"], work["d_model"])
        self.layers = nn.ModuleList(Block(work, layer) for layer in range(work["n_layers"]))
        self.norm, self.head = RMSNorm(work["d_model"]), linear(work["d_model"], work["vocab"])
        width = work["d_model"] // work["n_heads"]
        angles = torch.outer(torch.arange(work["seq"]).float(), 1e4 ** (-torch.arange(0, width, 2).float() / width))
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def main():
    work = json.load(open(sys.argv[1]))
    torch.set_num_threads(work["threads"])
    device = torch.device(work["device"])
    cuda, narrow = device.type == "cuda", work["precision"] == "bf16"
    model = Decoder(work).to(device)
    # Linear weights are [in, out] in Polyhead's files.
    transposed = lambda name: name.endswith("_proj.weight") or name == "head.weight"
    weights = {name: w.T if transposed(name) else w for name, w in load_file(work["weights"]).items()}
    model.load_state_dict(weights)
    tokens = torch.tensor(work["tokens"]).view(work["batch"], work["seq"]).to(device)
    targets = torch.tensor(work["targets"]).view(work["batch"], work["seq"]).to(device)
    forward = torch.compile(model) if "--compile" in sys.argv else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.01, fused=cuda or None)
    seconds, first_loss = [], None
    for _ in range(work["steps"]):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=narrow):
            loss = forward(tokens, targets)
        value = loss.item()
        first_loss = value if first_loss is None else first_loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    version = torch.__version__
    print(json.dumps({"seconds": seconds, "first_loss": first_loss, "peak_bytes": peak, "version": version}))


main()
