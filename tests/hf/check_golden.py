"""The PyTorch classes of exports against tests/golden: outputs, gradients and decoding by the authors' code.

    python tests/hf/check_golden.py

Covered are the files of single layers that a decoder can have; the others are encoders, whole models or searches. Key-driven grouping
has files of encoders only: there the layers see all positions, and nothing is decoded.
"""

import itertools
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

sys.dont_write_bytecode = True  # beside what is compiled into the binary
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "crates/models/src/hf"))
from python import modeling_polyhead as modeling  # noqa: E402
from python.configuration_polyhead import PolyheadConfig  # noqa: E402

OUTPUT, GRADIENT = 1e-5, 1e-4  # relative to the largest; gradients add over positions, as in tests/it/golden.rs


def pick(config, **names):
    return {ours: config[theirs] for ours, theirs in names.items() if config.get(theirs) is not None}


def softmax(c):
    heads = c.get("n_heads", c.get("n_q_heads"))
    return {"n_heads": heads, **pick(c, n_kv_heads="n_kv_heads", head_dim="head_dim")}


def sink(c):
    return {**softmax(c), "window": c["window"], "qkv_bias": c["bias"], "o_bias": c["bias"]}


def moh(c):
    straight = "all" if c.get("ste") else "nobody"
    router = {"query_norm": {"straight_through": straight}} if "ste" in c else {"learned": {}}
    return {**softmax(c), "shared_heads": c["shared_heads"], "top_k": c["routed_topk"], "router": router}


def gda(c):
    names = {"n_heads": "n_q_heads", "n_noise_heads": "n_noise", "n_kv_heads": "n_kv_heads", "head_dim": "head_dim"}
    return {**pick(c, **names), "lambda_init": {"constant": c["lambda_init"]}}


def mla(c):
    names = ("n_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {**pick(c, **{name: name for name in names}), "attention_bias": c["bias"]}


def delta(c):
    return pick(c, n_heads="n_v_heads", n_key_heads="n_k_heads", head_k_dim="head_k_dim", head_v_dim="head_v_dim", conv_kernel="conv_kernel")


def gated(c):
    return {**softmax(c), "qk_norm": True, "granularity": c["gate"]}


def gated_file(tensors, c):
    """The authors' q_proj has the rows of queries and those of gates in turn: of the heads of a group, or of each head."""
    if c["gate_position"] != "G1" or c["qk_norm_eps"] != 1e-6 or c["bias"]:
        raise ValueError(f"another gate than the class has: {c}")
    together = c["n_heads"] // c["n_kv_heads"] if c["q_proj_layout"].startswith("per kv head") else 1
    rows = [together * c["head_dim"], together * (1 if c["gate"] == "headwise" else c["head_dim"])]
    found = {key: tensor for key, tensor in tensors.items() if not key.startswith(("w.", "grad.")) or key == "grad.x"}
    for prefix in ("w.", "grad."):
        for name in ("k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            found[f"{prefix}softmax.{name}.weight"] = tensors[f"{prefix}{name}.weight"]
        blocks = tensors[f"{prefix}q_proj.weight"].split(rows * (c["n_heads"] // together))
        found[f"{prefix}softmax.q_proj.weight"] = torch.cat(blocks[0::2])
        found[f"{prefix}g_proj.weight"] = torch.cat(blocks[1::2])
    if c["qk_norm_weight"].startswith("zero-centred"):  # y = (1 + w) x / rms
        for name in ("q_norm", "k_norm"):
            found[f"w.softmax.{name}.weight"] = 1 + found[f"w.softmax.{name}.weight"]
    return found, c


def decoupled(c):
    return {"n_heads": c["num_heads"], "head_dim": c["head_dim"], "key_map": c["key_map"], "value_map": c["value_map"]}


def decoupled_file(tensors, c):
    """The final layer of a file: the queries and outputs of its parent, and keys and values collapsed to few heads."""
    found = {"x": tensors["x"], "cotangent": tensors["cotangent"], "out": tensors["dha.out"], "grad.x": tensors["dha.grad.x"]}
    for name in "qkvo":
        found[f"w.{name}_proj.weight"] = tensors[f"collapse.w.{name}" if name in "kv" else f"w.{name}"]
        found[f"grad.{name}_proj.weight"] = tensors[f"dha.grad.w.{name}"]
    return found, {**c, "key_map": tensors["group.k"].tolist(), "value_map": tensors["group.v"].tolist(), "rope_layout": "neox"}


def key_driven(c):
    sizes = {"fixed": {"query_heads": c["alloc"]}} if "alloc" in c else {"even": {}}
    return {"n_heads": c["num_heads"], "n_kv_heads": c["num_kv_heads"], "allocation": sizes, "qkv_bias": c["qkv_bias"], "o_bias": True}


def key_driven_file(tensors, c):
    """Equal groups, or groups of the sizes that the norms of the keys gave; other files change them from call to call."""
    if c.get("scheme") not in ("gqa", "kdgqa"):
        return None
    found = dict(tensors)
    for prefix, part in itertools.product(("w.", "grad."), ("weight", "bias")):
        for theirs, ours in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"}.items():
            if f"{prefix}{theirs}.{part}" in found:
                found[f"{prefix}{ours}.{part}"] = found.pop(f"{prefix}{theirs}.{part}")
    return found, {**c, "d_model": c["dim"]}


SINK = [("", "softmax."), ("softmax.sinks", "sinks")]
MLA = [("q_b_proj", "q_proj"), ("layernorm", "norm"), ("kv_a_proj_with_mqa", "kv_a_proj")]
DELTA = [("in_proj_qkvz", "qkvz_proj"), ("in_proj_ba", "ba_proj"), ("conv1d", "conv"), ("A_log", "a_log"), ("out_proj", "o_proj")]
MOH = [("wg.", "router.routed."), ("wg_0.", "router.kinds."), ("wg_1.", "router.shared.")]

# folder: (mechanism, settings of a file, their names and ours, and where a file has another form, what brings it into this one)
FOLDERS = {
    "softmax": ("softmax", lambda c: {**softmax(c), "qkv_bias": "Qwen2" in c["source"]}, []),
    "sliding_window": ("softmax", lambda c: {**softmax(c), **pick(c, window="window", softcap="softcap", scale="scale")}, []),
    "sink": ("sink", sink, SINK),
    "diff_v2": ("diff_v2", softmax, []),
    "gda": ("grouped_differential", gda, []),
    "moh": ("mixture_of_head", moh, MOH),
    "mla": ("mla", mla, MLA),
    "gated_delta_net": ("gated_delta_net", delta, DELTA),
    "gated_attention": ("gated_attention", gated, [], gated_file),
    "dha": ("decoupled_head", decoupled, [], decoupled_file),
    "kdgqa": ("key_driven", key_driven, [], key_driven_file),
}


class Encoder(modeling.Call):
    """A call in which every position sees all of them."""

    def mask(self, keys, seq, window):
        return torch.ones(1, 1, seq, keys.shape[2], dtype=torch.bool)


def close(name, ours, theirs, bound, problems, beside=None):
    """`beside`: numbers of which the largest is what a difference is measured by, where it is not that of `theirs`."""
    ours, largest = ours.detach(), (theirs if beside is None else beside).abs().max()
    same = ours.shape == theirs.shape and ours.isfinite().all() and ours.numel() > 0
    difference = ((ours - theirs).abs().max() / largest.clamp_min(1e-30)).item() if same else float("inf")
    if not difference <= bound:
        problems.append(f"{name} differs by {difference:.1e} of the largest")
    return difference


def check(path, mechanism, settings, names, form=None):
    """The worst difference of a file's numbers and the problems; `None` where it is no layer that a decoder can have."""
    with safe_open(path, "pt") as file:
        tensors, config = {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["config"])
    causal = config.get("causal", mechanism == "gated_delta_net")
    if form is not None:
        formed = form(tensors, config)
        if formed is None:
            return None
        tensors, config = formed
    elif not causal or "w.o_proj.weight" not in tensors and "w.out_proj.weight" not in tensors:
        return None

    def renamed(prefix):
        found = {}
        for key, tensor in tensors.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                for theirs, ours in names:
                    name = ours + name if theirs == "" else name.replace(theirs, ours)
                found[name] = tensor.T if name.startswith("router.") else tensor
        return found

    model = PolyheadConfig(
        hidden_size=config["d_model"], num_hidden_layers=1, attention={}, rms_norm_eps=1e-6, rope=config.get("rope", True),
        partial_rotary_factor=config["rotary_dim"] / config["head_dim"] if "rotary_dim" in config else 1.0,
        rope_theta=config.get("rope_theta", 1e4), rope_layout={"neox": "rotate_half"}.get(config.get("rope_layout"), "interleaved"),
    )  # fmt: skip
    layer = modeling.MECHANISMS[mechanism](model, 0, **settings(config))
    layer.load_state_dict(renamed("w."))
    x, problems = tensors["x"].clone().requires_grad_(), []
    seq = x.shape[1]
    call = (modeling.Call if causal else Encoder)(model, torch.arange(seq)[None], None, None)
    out = layer(x, call)
    worst = close("out", out, tensors["out"], OUTPUT, problems)
    (out * tensors["cotangent"]).sum().backward()
    gradients = {"x": x.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}
    expected = {"x": tensors["grad.x"], **{name: grad for name, grad in renamed("grad.").items() if name in gradients}}
    if gradients.keys() != expected.keys():
        problems.append(f"gradients of {sorted(gradients.keys() ^ expected.keys())} are on one side only")
    for name in gradients.keys() & expected.keys():
        # The same for all keys changes nothing: the gradient of their bias is what rounding leaves, beside that of the values.
        beside = expected["v_proj.bias"] if name == "k_proj.bias" and mechanism == "key_driven" else None
        close(f"gradient of {name}", gradients[name], expected[name], GRADIENT, problems, beside)
    if not causal:
        return worst, problems
    cache, parts = modeling.PolyheadCache(1), []
    with torch.no_grad():
        for at in range(seq):
            call = modeling.Call(model, torch.tensor([[at]]), None, cache)
            parts.append(layer(x[:, at : at + 1], call))
            cache.length += 1
    close("decoding", torch.cat(parts, 1), tensors["out"], OUTPUT, problems)
    return worst, problems


if __name__ == "__main__":
    failed, counted = False, dict.fromkeys(FOLDERS, 0)
    for folder, how in FOLDERS.items():
        for path in sorted((ROOT / "tests/golden" / folder).glob("*.safetensors")):
            result = check(path, *how)
            if result is not None:
                counted[folder] += 1
                failed |= bool(result[1])
                print(f"{folder + '/' + path.stem:52} {'FAILED' if result[1] else 'ok':7} {result[0]:.1e}", *result[1], sep="\n    " if result[1] else "")
    empty = [folder for folder, count in counted.items() if count == 0]
    sys.exit(f"no file of {empty} was compared" if empty else int(failed))
