"""Edits of a small Qwen3 (norms of queries and keys, grouped queries) in plain PyTorch, in f64, written as f32.

    python make_golden.py     # torch, transformers 5.24, safetensors

The forward is written out below and edited line by line. What it gives without edits is compared with transformers' own Qwen3ForCausalLM, and
so are edits that a hook of a module can make there: of z (before o_proj), of value heads (behind v_proj), of the residual stream (behind a layer).
"""

import json
import pathlib

import torch
import transformers
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

HERE = pathlib.Path(__file__).parent
L, D, F, V = 3, 24, 40, 32
H, KV, HD = 4, 2, 10
B, T = 2, 9
THETA, EPS = 1000.0, 1e-3


def model():
    torch.manual_seed(11)
    config = Qwen3Config(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=KV, head_dim=HD,
        rms_norm_eps=EPS, rope_parameters={"rope_type": "default", "rope_theta": THETA}, tie_word_embeddings=False,
        attention_bias=False, use_cache=False, max_position_embeddings=64, attn_implementation="eager")
    own = Qwen3ForCausalLM(config).double().eval()
    # Large enough for attention to be far from uniform and for every norm to matter.
    for name, parameter in own.named_parameters():
        with torch.no_grad():
            scale = 0.3 if "norm" in name else 0.25
            parameter.copy_(torch.randn(parameter.shape) * scale + (1.0 if "norm" in name else 0.0))
            parameter.copy_(parameter.float().double())  # as they are written
    return own


def norm(x, weight):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def rotated(x):
    half = HD // 2
    frequency = THETA ** (-torch.arange(half, dtype=torch.float64) * 2 / HD)
    angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


HEADS = {"q": H, "rot_q": H, "k": KV, "rot_k": KV, "v": KV, "scores": H, "weights": H, "attended": H, "z": H, "result": H}


class Case:
    """A list of edits, made at `at`; a prompt of `prompt` tokens, behind which tokens count as generated."""

    def __init__(self, edits, tensors, prompt=T):
        self.edits, self.tensors, self.prompt = edits, tensors, prompt

    def span(self, span, phase="both"):
        position = torch.arange(T)
        if span == "all":
            marks = position >= 0
        elif span == "first":
            marks = position == 0
        elif span == "prompt":
            marks = position < self.prompt
        elif span == "last_prompt_token":
            marks = position == self.prompt - 1
        else:
            marks = (position >= span["from"]) & (position < span["to"])
        generated = position >= self.prompt
        return marks & {"both": position >= 0, "prefill": ~generated, "decode": generated}[phase]

    def amount(self, amount, layer):
        """Broadcast over [batch, heads, positions, width or keys]."""
        if not isinstance(amount, str):
            return torch.tensor(float(amount), dtype=torch.float64)
        own = self.tensors[amount][layer]
        if own.dim() == 1:
            return own[None, :, None, None]
        return own[None, :, None, :] if own.dim() == 2 else own

    def at(self, site, layer, x, hidden=None):
        """x: [batch, heads, rows, columns]; `hidden` marks keys that a query does not read."""
        for edit in self.edits:
            if edit["site"] != site or layer not in edit.get("layers", range(L)):
                continue
            chosen = torch.ones_like(x, dtype=torch.bool)
            named = edit.get("heads", edit.get("kv_heads"))
            if named is not None:
                assert ("kv_heads" in edit) == (site in ("k", "rot_k", "v"))
                of_heads = torch.tensor([head in named for head in range(HEADS[site])])
                chosen = chosen & of_heads[None, :, None, None]
            chosen = chosen & self.span(edit.get("tokens", "all"), edit.get("phase", "both"))[None, None, :, None]
            if site in ("scores", "weights"):
                chosen = chosen & self.span(edit.get("keys", "all"))[None, None, None, :]
            (kind, how), = edit["change"].items()
            amount = lambda value: self.amount(value, layer)
            if kind == "scale":
                new = x * amount(how)
            elif kind == "add":
                new = x + amount(how)
            elif kind == "replace":
                new = amount(how).expand(x.shape)
            elif kind == "mix":
                new = amount(how["gate"]) * x + amount(how["value"])
            elif kind == "blend":
                new = (1 - amount(how["gate"])) * x + amount(how["gate"]) * amount(how["value"])
            elif kind == "reweight":
                new = torch.where(chosen, x * amount(how), x)
                touched = chosen.any(-1, keepdim=True)
                new = torch.where(touched, new / new.sum(-1, keepdim=True) * x.sum(-1, keepdim=True), x)
                chosen = torch.ones_like(chosen)
            elif kind == "clamp":
                direction = self.tensors[how["direction"]]
                direction = direction / direction.norm()
                new = x + (how["to"] - (x @ direction)[..., None]) * direction
            else:
                raise ValueError(kind)
            x = torch.where(chosen, new, x)
            if hidden is not None:
                x = x.masked_fill(hidden, -torch.inf if site == "scores" else 0.0)
        return x


def forward(w, ids, case):
    stream = lambda site, layer, x: case.at(site, layer, x[:, None])[:, 0]
    x = w["model.embed_tokens.weight"][ids]
    hidden = torch.ones(T, T).triu(1).bool()
    for layer in range(L):
        of = lambda name: w[f"model.layers.{layer}.{name}.weight"]
        x = stream("resid_pre", layer, x)
        h = norm(x, of("input_layernorm"))
        heads = lambda y, count: y.view(B, T, count, HD)
        q = norm(heads(h @ of("self_attn.q_proj").T, H), of("self_attn.q_norm")).transpose(1, 2)
        k = norm(heads(h @ of("self_attn.k_proj").T, KV), of("self_attn.k_norm")).transpose(1, 2)
        v = heads(h @ of("self_attn.v_proj").T, KV).transpose(1, 2)
        q, k, v = case.at("q", layer, q), case.at("k", layer, k), case.at("v", layer, v)
        q, k = case.at("rot_q", layer, rotated(q)), case.at("rot_k", layer, rotated(k))
        reads = torch.arange(H) // (H // KV)  # the key/value head of each query head
        scores = (q @ k[:, reads].transpose(2, 3) / HD**0.5).masked_fill(hidden, -torch.inf)
        weights = case.at("scores", layer, scores, hidden).softmax(-1)
        weights = case.at("weights", layer, weights, hidden)
        z = case.at("z", layer, case.at("attended", layer, weights @ v[:, reads]))
        out = of("self_attn.o_proj").view(D, H, HD)
        result = case.at("result", layer, torch.einsum("bhti,dhi->bhtd", z, out))
        x = stream("resid_mid", layer, x + stream("attn_out", layer, result.sum(1)))
        h = norm(stream("mlp_in", layer, x), of("post_attention_layernorm"))
        mlp = (torch.nn.functional.silu(h @ of("mlp.gate_proj").T) * (h @ of("mlp.up_proj").T)) @ of("mlp.down_proj").T
        x = stream("resid_post", layer, x + stream("mlp_out", layer, mlp))
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def by_hooks(own, ids, case):
    """The same by hooks of transformers' modules, for what they can do."""
    handles = []
    for layer, block in enumerate(own.model.layers):
        split = lambda x, count: x.view(B, T, count, HD).transpose(1, 2)
        joined = lambda x: x.transpose(1, 2).reshape(B, T, -1)
        attention = block.self_attn
        handles += [
            attention.o_proj.register_forward_pre_hook(
                lambda _, x, layer=layer: (joined(case.at("z", layer, split(x[0], H))),)),
            attention.v_proj.register_forward_hook(
                lambda _, x, y, layer=layer: joined(case.at("v", layer, split(y, KV)))),
            attention.q_norm.register_forward_hook(
                lambda _, x, y, layer=layer: case.at("q", layer, y.transpose(1, 2)).transpose(1, 2)),
            attention.k_norm.register_forward_hook(
                lambda _, x, y, layer=layer: case.at("k", layer, y.transpose(1, 2)).transpose(1, 2)),
            attention.register_forward_hook(
                lambda _, x, y, layer=layer: (case.at("attn_out", layer, y[0][:, None])[:, 0], *y[1:])),
            block.mlp.register_forward_hook(lambda _, x, y, layer=layer: case.at("mlp_out", layer, y[:, None])[:, 0]),
            block.register_forward_pre_hook(
                lambda _, x, layer=layer: (case.at("resid_pre", layer, x[0][:, None])[:, 0], *x[1:])),
            block.register_forward_hook(lambda _, x, y, layer=layer: case.at("resid_post", layer, y[:, None])[:, 0]),
        ]
    with torch.no_grad():
        logits = own(ids).logits
    [handle.remove() for handle in handles]
    return logits


HOOKED = {"q", "k", "v", "z", "attn_out", "mlp_out", "resid_pre", "resid_post"}


def main():
    own = model()
    w = {name: parameter.detach() for name, parameter in own.named_parameters()}
    torch.manual_seed(12)
    ids = torch.randint(0, V, (B, T))
    targets = torch.randint(0, V, (B, T))
    drawn = lambda *shape: torch.randn(shape).float().double()
    tensors = {
        "bias": drawn(L, H), "gate": drawn(L, H), "value": drawn(L, H, HD), "share": torch.sigmoid(drawn(L, H)).float().double(),
        "map_bias": drawn(L, 1, H, T, T), "map": drawn(L, 1, 1, T, T).abs(), "of_batch": drawn(L, B, H, T, HD),
        "key": drawn(L, KV, HD), "kv_gate": drawn(L, KV), "stream": drawn(L, 1, D), "direction": drawn(D),
    }
    some, late = {"from": 2, "to": 5}, {"from": 4, "to": T}
    edit = lambda site, change, **where: dict(site=site, change=change, **where)
    cases = {
        "plain": [],
        "scores_first_key_by_head": [edit("scores", {"add": "bias"}, keys="first")],
        "scores_span_of_two_heads": [edit("scores", {"add": -1.5}, layers=[1], heads=[0, 3], tokens=late, keys=some)],
        "scores_matrix": [edit("scores", {"add": "map_bias"}, heads=[1, 2])],
        "scores_scaled": [edit("scores", {"scale": 0.5}, layers=[0, 2], heads=[2])],
        "weights_reweighted": [edit("weights", {"reweight": 3}, heads=[1], tokens=late, keys=some)],
        "weights_scaled": [edit("weights", {"scale": "gate"}, layers=[1])],
        "weights_added": [edit("weights", {"add": 0.2}, layers=[2], heads=[0, 1], keys=some)],
        "weights_replaced": [edit("weights", {"replace": "map"}, layers=[0], heads=[3])],
        "head_zero": [edit("z", {"scale": 0}, layers=[1], heads=[2])],
        "head_scale": [edit("z", {"scale": "gate"})],
        "head_mean": [edit("z", {"replace": "value"}, layers=[0], heads=[0, 1])],
        "head_patch": [edit("z", {"replace": "of_batch"}, layers=[2], heads=[3], tokens="last_prompt_token")],
        "head_mix": [edit("z", {"mix": {"gate": "gate", "value": "value"}}, tokens=late)],
        "head_blend": [edit("z", {"blend": {"gate": "share", "value": "value"}}, tokens="last_prompt_token")],
        "attended": [edit("attended", {"scale": 0.25}, heads=[1])],
        "result": [edit("result", {"scale": "gate"}, layers=[1, 2], heads=[0, 2])],
        "query_heads": [edit("q", {"mix": {"gate": 0.5, "value": "value"}}, heads=[3], tokens=some)],
        "rotated_queries": [edit("rot_q", {"scale": 2}, layers=[1], heads=[0])],
        "key_head": [edit("k", {"add": "key"}, kv_heads=[0])],
        "rotated_keys": [edit("rot_k", {"scale": "kv_gate"}, tokens=some)],
        "value_head_zero": [edit("v", {"scale": 0}, layers=[2], kv_heads=[1])],
        "residual_add": [edit("resid_mid", {"add": "stream"}, layers=[1], tokens=late)],
        "residual_replace": [edit("resid_post", {"replace": "stream"}, layers=[0], tokens=some)],
        "residual_clamp": [edit("resid_pre", {"clamp": {"direction": "direction", "to": 3.0}}, layers=[2])],
        "feed_forward": [edit("mlp_in", {"scale": 0.5}, layers=[0]), edit("mlp_out", {"scale": -1}, layers=[1], tokens="first")],
        "attention_out": [edit("attn_out", {"add": "stream"}, tokens=some)],
        "several": [edit("scores", {"add": "bias"}, keys="first"), edit("v", {"scale": "kv_gate"}),
                    edit("z", {"scale": 0}, layers=[0], heads=[1]), edit("z", {"add": "value"}, layers=[0]),
                    edit("resid_post", {"add": "stream"})],
        "prefill": [edit("z", {"scale": "gate"}, phase="prefill"), edit("v", {"add": "key"}, tokens="prompt", kv_heads=[1])],
        "decode": [edit("z", {"scale": "gate"}, phase="decode"), edit("scores", {"add": -2.0}, keys="prompt", phase="decode")],
    }
    prompts = {"prefill": 6, "decode": 6, "head_blend": 7, "head_patch": 5}
    trained = [edit("scores", {"add": "bias"}, keys="first"), edit("z", {"mix": {"gate": "gate", "value": "value"}}),
               edit("v", {"scale": "kv_gate"}, tokens=late)]

    written = {f"w.{name}": parameter for name, parameter in w.items()} | {f"t.{name}": value for name, value in tensors.items()}
    written |= {"ids": ids, "targets": targets}
    plain, hooked = None, 0.0
    for name, edits in cases.items():
        case = Case(edits, tensors, prompts.get(name, T))
        logits = forward(w, ids, case)
        plain = logits if name == "plain" else plain
        assert name == "plain" or (logits - plain).abs().max() > 1e-2 * plain.abs().max(), name
        if all(edit["site"] in HOOKED for edit in edits):
            error = (by_hooks(own, ids, case) - logits).abs().max().item()
            hooked = max(hooked, error)
            assert error < 1e-6 * logits.abs().max(), (name, error)  # its rotations and softmax are in f32
            print(f"{name}: transformers agrees within {error:.1e}")
        written[f"{name}.logits"] = logits

    leaves = {name: tensors[name].clone().requires_grad_() for name in ("bias", "gate", "value", "kv_gate")}
    logits = forward(w, ids, Case(trained, leaves))
    loss = torch.nn.functional.cross_entropy(logits.view(-1, V), targets.view(-1), reduction="sum")
    loss.backward()
    written |= {"trained.logits": logits, "trained.loss": loss[None]}
    written |= {f"trained.grad.{name}": leaf.grad for name, leaf in leaves.items()}
    config = {
        "model": {"vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H,
                  "num_key_value_heads": KV, "head_dim": HD, "rms_norm_eps": EPS, "rope_theta": THETA},
        "cases": {name: {"prompt": prompts.get(name, T), "edits": edits} for name, edits in cases.items()},
        "trained": trained,
        "source": f"make_golden.py, torch {torch.__version__}, transformers {transformers.__version__}",
        "verified": f"plain and hooked cases by transformers' Qwen3ForCausalLM, within {hooked:.1e}",
    }
    typed = {name: value.detach().contiguous() if value.dtype == torch.int64 else value.detach().float().contiguous()
             for name, value in written.items()}
    save_file(typed, HERE / "qwen3.safetensors", metadata={"config": json.dumps(config)})


if __name__ == "__main__":
    main()
