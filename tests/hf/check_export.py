"""Exports of every mechanism in transformers: makes tiny models, exports them, and compares what transformers computes.

    python tests/hf/check_export.py BINARY [NAME ...]       the environment needs torch, transformers and safetensors

One line per model, with the worst difference of logits relative to the largest logit; exit code 1 if any check fails.
"""

import copy
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

logging.getLogger("transformers").setLevel(logging.ERROR)

CLOSE = 1e-5  # of logits in f32, relative to the largest
VOCAB, D_MODEL, LAYERS = 37, 24, 4
TOKENS = [(7 * at * at + 3 * at + 1) % VOCAB for at in range(19)]

heads = {"n_heads": 4}
grouped = {"n_heads": 4, "n_kv_heads": 2}
moh = {"n_heads": 6, "head_dim": 4, "shared_heads": 2, "top_k": 2}
gda = {"n_heads": 6, "n_noise_heads": 2, "head_dim": 4}
gate = {"product": {"axis": -1, "n_heads": 5, "n_gaussians": 2}}
mixture = {"mixture": {"axis": -1, "n_heads": 2, "n_gaussians": 3}}

# name: (attention, other settings of the decoder, class in config.json)
OWN, MOTIF = "PolyheadForCausalLM", "MotifForCausalLM"
# Models that `--native` writes as DiffLlama.
NATIVE = ("differential", "differential_interleaved")
MODELS = {
    "softmax_window": ({"softmax": {**grouped, "window": 4}}, {}, "MistralForCausalLM"),
    "softmax_windows_qkv_bias": ({"softmax": {**grouped, "window": [0, 4, 4, 0], "qkv_bias": True}}, {}, "Qwen2ForCausalLM"),
    "softmax_windows_qk_norm": ({"softmax": {**grouped, "window": 3, "qk_norm": True}}, {}, "Qwen3ForCausalLM"),
    "softmax_windows": ({"softmax": {**grouped, "window": [4, 0, 4, 0]}}, {}, OWN),
    "softmax_windows_softcap_scale": (
        {"softmax": {**grouped, "window": [3, 0, 5, 0], "softcap": 2.0, "scale": 0.7, "qk_norm": True, "qkv_bias": True}},
        {},
        OWN,
    ),
    "softmax_o_bias": ({"softmax": {**heads, "o_bias": True}}, {"tie_embeddings": False}, OWN),
    "softmax_neox_gqa": (
        {"softmax": grouped},
        {"norm": "layer", "mlp": "gelu", "rope_fraction": 0.67, "parallel_residual": True},
        OWN,
    ),
    "softmax_no_rope_gates": (
        {"softmax": heads},
        {"rope": False, "attention_gate": {"gates": [gate, mixture], "residual": True}},
        OWN,
    ),
    "softmax_learned_positions": (
        {"softmax": heads},
        {"rope": False, "learned_positions": 64, "norm": "layer", "mlp": "identity", "tie_embeddings": False, "head_bias": True},
        OWN,
    ),
    "gated_delta_net_learned_positions": ({"gated_delta_net": {"n_heads": 4}}, {"rope": False, "learned_positions": 64}, OWN),
    "softmax_gate_alone": ({"softmax": heads}, {"attention_gate": {"gates": [mixture]}}, OWN),
    "grouped_differential": ({"grouped_differential": gda}, {}, MOTIF),
    "grouped_differential_interleaved": (
        {"grouped_differential": {**gda, "n_kv_heads": 2, "lambda_init": "motif"}},
        {"rope_layout": "interleaved"},
        MOTIF,
    ),
    "grouped_differential_window": (
        {"grouped_differential": {**gda, "window": 5, "lambda_init": {"constant": 0.3}}},
        {"rope_layout": "interleaved"},
        OWN,
    ),
    "grouped_differential_no_subln": ({"grouped_differential": {**gda, "subln": False}}, {}, OWN),
    "differential": ({"grouped_differential": {**heads, "n_noise_heads": 2, "n_kv_heads": 2}}, {}, MOTIF),
    "differential_interleaved": (
        {"grouped_differential": {"n_heads": 8, "n_noise_heads": 4, "n_kv_heads": 4, "head_dim": 6}},
        {"rope_layout": "interleaved"},
        MOTIF,
    ),
    "mixture_of_head": ({"mixture_of_head": {**moh, "n_kv_heads": 3, "qkv_bias": True, "window": 5}}, {}, OWN),
    "mixture_of_head_paper": (
        {
            "mixture_of_head": {
                **moh,
                "top_k": [1, 2, 3, 4],
                "o_bias": True,
                "router": {"learned": {"gate_norm": "paper", "two_stage": False}},
            }
        },
        {},
        OWN,
    ),
    "mixture_of_head_all_shared": ({"mixture_of_head": {**heads, "shared_heads": 4, "top_k": 0}}, {}, OWN),
    "mixture_of_head_one_shared": ({"mixture_of_head": {**heads, "shared_heads": [0, 1, 0, 1], "top_k": 2}}, {}, OWN),
    "mixture_of_head_query_norm": ({"mixture_of_head": {**moh, "router": {"query_norm": {}}}}, {}, OWN),
    "mixture_of_head_query_norm_all": (
        {"mixture_of_head": {**moh, "router": {"query_norm": {"straight_through": "all"}}}},
        {},
        OWN,
    ),
    "decoupled_head": (
        {"decoupled_head": {**heads, "key_map": [0, 1, 0, 2], "value_map": [0, 0, 1, 0], "qkv_bias": True}},
        {"rope_layout": "interleaved"},
        "DecoupledHeadForCausalLM",
    ),
    "decoupled_head_fusing": (
        {"decoupled_head": {**heads, "key_map": [0, 1, 0, 2], "value_map": [0, 0, 1, 0], "fusing": True}},
        {},
        OWN,
    ),
    "decoupled_head_window_qk_norm": (
        {
            "decoupled_head": {
                **heads, "key_map": [0, 1, 0, 2], "value_map": [0, 0, 1, 0], "qk_norm": True, "window": [0, 4, 0, 4],
            }
        },
        {},
        OWN,
    ),
    "decoupled_head_fusing_gqa": (
        {"decoupled_head": {**grouped, "key_map": [0, 0, 1, 1], "value_map": [0, 0, 0, 0], "fusing": True, "qk_norm": True}},
        {},
        OWN,
    ),
    "mixture_of_head_qk_norm": ({"mixture_of_head": {**moh, "qk_norm": True, "window": 4}}, {}, OWN),
    "key_driven_fixed": (
        {"key_driven": {"n_heads": 6, "head_dim": 4, "n_kv_heads": 3, "allocation": {"fixed": {"query_heads": [1, 0, 5]}}}},
        {"rope_scaling": {"linear": {"factor": 3.0}}},
        OWN,
    ),
    "diff_v2": ({"diff_v2": {**grouped, "window": [0, 4, 0, 4]}}, {}, OWN),
    "gated_attention": ({"gated_attention": {**grouped, "qk_norm": True, "qkv_bias": True}}, {}, OWN),
    "gated_attention_values": ({"gated_attention": {**grouped, "gated": "values", "granularity": "headwise"}}, {}, OWN),
    "gated_attention_keys": ({"gated_attention": {**grouped, "gated": "keys", "window": 3}}, {}, OWN),
    "gated_attention_queries": (
        {"gated_attention": {**grouped, "gated": "queries", "granularity": "headwise", "o_bias": True}},
        {},
        OWN,
    ),
    "gated_attention_output": ({"gated_attention": {**heads, "gated": "output"}}, {}, OWN),
    "sink": ({"sink": {**grouped, "window": [4, 0, 4, 0], "qkv_bias": True, "o_bias": True}}, {}, OWN),
    "mla": (
        {"mla": {**heads, "kv_lora_rank": 10, "q_lora_rank": 12, "v_head_dim": 5, "attention_bias": True}},
        {"rope_layout": "interleaved"},
        OWN,
    ),
    "mla_direct": ({"mla": {**heads, "kv_lora_rank": 8, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4}}, {}, OWN),
    "gated_delta_net": ({"gated_delta_net": {**heads, "n_key_heads": 2, "head_k_dim": 5, "head_v_dim": 6}}, {}, OWN),
    "gated_delta_net_kernel_2": ({"gated_delta_net": {"n_heads": 3, "conv_kernel": 2}}, {}, OWN),
    "hybrid": (
        [{"gated_delta_net": heads}, {"sink": heads}, {"mla": {**heads, "kv_lora_rank": 8}}, {"mixture_of_head": moh}],
        {
            "rope_scaling": {
                "llama3": {
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            }
        },
        OWN,
    ),
}

# Masked diffusion: name: (attention, other settings of the decoder).
MASKED = {
    "masked_softmax": ({"softmax": {**grouped, "qk_norm": True}}, {}),
    "masked_window": ({"softmax": {**heads, "window": [4, 0, 4, 0]}}, {"tie_embeddings": False}),
    "masked_grouped_differential": ({"grouped_differential": gda}, {"norm": "layer", "mlp": "gelu"}),
    "masked_mixture_of_head": ({"mixture_of_head": moh}, {}),
    "masked_mla": ({"mla": {**heads, "kv_lora_rank": 8}}, {}),
    "masked_key_driven": (
        {"key_driven": {"n_heads": 4, "n_kv_heads": 2, "allocation": {"fixed": {"query_heads": [3, 1]}}}},
        {"rope": False, "learned_positions": 64},
    ),
}


def toml(value):
    """A value as TOML writes it in one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    return "[" + ", ".join(map(toml, value)) + "]" if isinstance(value, list) else json.dumps(value)


def run(*command, cwd=None):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode != 0:
        raise RuntimeError(f"{command} failed:\n{done.stderr}")
    return done.stderr


MARKOV = f"""
data.markov.states = {VOCAB}
training = {{ steps = 2, seq_len = 48, batch_size = 2 }}
"""


def trained(binary, folder, attention, more, data=MARKOV):
    """A run of a few steps, exported; gives the folder of the export."""
    decoder = {"d_model": D_MODEL, "n_layers": LAYERS, "attention": attention, **more}
    recipe = "".join(f"model.decoder.{key} = {toml(value)}\n" for key, value in decoder.items())
    (folder / "recipe.toml").write_text(recipe + data)
    run(binary, "train", folder / "recipe.toml", "--out", folder / "run", cwd=folder)
    run(binary, "export", folder / "run", "--out", folder / "export")
    return folder / "export"


def spread(folder, loudness=0.3):
    """Draws louder weights, so that every part of a mechanism matters; they stay those of the mechanism elsewhere."""
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in sorted(tensors.items()):
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(("energy", "a_log")):
            continue
        if name.endswith("anneal"):
            tensors[name] = torch.tensor([0.3])
        elif name.endswith(".c"):  # the width of a Gaussian: near 0, rounding alone would decide
            tensors[name] = 1.0 + 0.2 * noise
        else:
            tensors[name] = noise * (loudness if tensor.dim() > 1 else 0.2) + (tensor if tensor.dim() == 1 else 0.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def ours(binary, folder, tokens):
    """Polyhead's logits, [tokens, vocab]."""
    out = folder.parent / "logits.safetensors"
    run(binary, "logits", folder, "--tokens", ",".join(map(str, tokens)), "--out", out)
    return load_file(out)["logits"][0]


class Checks:
    def __init__(self):
        self.failed, self.worst = [], 0.0

    def close(self, name, a, b, bound=CLOSE):
        a, b = a.detach().float(), b.detach().float()
        if a.shape != b.shape or a.numel() == 0 or not (a.isfinite().all() and b.isfinite().all()):
            return self.failed.append(f"{name}: shapes {list(a.shape)} and {list(b.shape)}, or numbers that are not finite")
        difference = ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
        if bound == CLOSE:
            self.worst = max(self.worst, difference)
        if difference > bound:
            self.failed.append(f"{name}: differs by {difference:.1e} of the largest, more than {bound:.0e}")

    def true(self, name, holds):
        if not holds:
            self.failed.append(name)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def generated(model, rows, **options):
    """What is generated after rows of different lengths, padded on the left; one list per row."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=14, do_sample=False, pad_token_id=0, eos_token_id=None, **options
    )
    return out[:, longest:].tolist()


def check_logits(checks, model, expected):
    tokens = torch.tensor([TOKENS])
    whole = model(tokens).logits[0]
    checks.close("logits", whole, expected)
    # In pieces, through the cache.
    cache, parts = None, []
    for start, end in ((0, 7), (7, 8), (8, 14), (14, 19)):
        out = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits[0])
    checks.close("logits through the cache", torch.cat(parts), expected)
    checks.true("the cache counts tokens", cache.get_seq_length() == len(TOKENS))
    # Padding on either side changes nothing.
    row = TOKENS[:11]
    alone = model(torch.tensor([row])).logits[0]
    padded = torch.tensor([TOKENS, [0] * 8 + row, row + [0] * 8])
    mask = torch.tensor([[1] * 19, [0] * 8 + [1] * 11, [1] * 11 + [0] * 8])
    logits = model(padded, attention_mask=mask).logits
    checks.close("logits of a batch", logits[0], expected)
    checks.close("logits with padding on the left", logits[1, 8:], alone)
    checks.close("logits with padding on the right", logits[2, :11], alone)
    checks.close("the last logits only", model(tokens, logits_to_keep=2).logits[0], expected[-2:])
    states = model(tokens, output_hidden_states=True).hidden_states
    checks.true("hidden states of all layers", len(states) == LAYERS + 1)
    checks.close("hidden states", model.lm_head(states[-1])[0], expected)
    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits[0]
    checks.close("from embeddings", embedded, expected)


def check_generation(checks, model):
    rows = [TOKENS[:9], TOKENS[4:8], TOKENS[2:13]]
    uncached = generated(model, rows, use_cache=False)
    checks.true("generation with a cache", generated(model, rows) == uncached)
    checks.true("generation row by row", [generated(model, [row])[0] for row in rows] == uncached)
    beams = {"num_beams": 3, "length_penalty": 0.0}
    checks.true(
        "beam search with a cache", generated(model, rows, **beams) == generated(model, rows, use_cache=False, **beams)
    )


def gradients(model, tokens, labels):
    model.zero_grad()
    loss = model(tokens, labels=labels).loss
    loss.backward()
    named = model.named_parameters()
    zero = torch.zeros(1)
    return loss, {name: (zero if p.grad is None else p.grad).clone() for name, p in named if p.requires_grad}


def check_training(checks, model):
    model = copy.deepcopy(model).train()
    tokens = torch.tensor([TOKENS, TOKENS[::-1]])
    labels = tokens.clone()
    labels[0, :4] = -100
    loss, plain = gradients(model, tokens, labels)
    logits = model(tokens).logits[:, :-1].reshape(-1, VOCAB)
    checks.close("loss", loss, torch.nn.functional.cross_entropy(logits, labels[:, 1:].reshape(-1)))
    still = [name for name, grad in plain.items() if grad.isnan().any() or grad.abs().max() == 0]
    # Norms are compared over all heads of a group: where all take part, they decide nothing.
    checks.true(f"a gradient for every parameter, not {still}", not still)
    model.gradient_checkpointing_enable()
    _, checkpointed = gradients(model, tokens, labels)
    for name, grad in plain.items():
        checks.close(f"gradient of {name} with checkpointing", checkpointed[name], grad)
    model.gradient_checkpointing_disable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        last = model(tokens, labels=labels).loss
        last.backward()
        optimizer.step()
    checks.true(f"training lowers the loss ({loss.item():.3f} to {last.item():.3f})", last < 0.9 * loss)


def check_folders(checks, binary, folder, model, expected, tokens=TOKENS, load=load):
    """Saved by transformers it is read by transformers and by Polyhead."""
    saved = folder.parent / "saved"
    model.save_pretrained(saved)
    both = [(path / "modeling_polyhead.py").exists() for path in (saved, folder)]
    checks.true("the code is saved too, where there is one", both[0] == both[1])
    rows = torch.tensor([tokens])
    checks.true("a saved folder is the same", torch.equal(load(saved)(rows).logits, model(rows).logits))
    checks.close("a saved folder in Polyhead", ours(binary, saved, tokens), expected)
    half = folder.parent / "half"
    load(folder, dtype=torch.bfloat16).save_pretrained(half)
    checks.true("a saved folder keeps its type", load(half, dtype="auto").dtype == torch.bfloat16)


def check_native(checks, binary, folder, expected):
    """The same numbers by a class of transformers' own, which needs no code."""
    native = folder.parent / "native"
    run(binary, "export", folder, "--out", native, "--native")
    model = AutoModelForCausalLM.from_pretrained(native).eval()
    checks.true(f"a class of transformers: {type(model).__name__}", type(model).__module__.startswith("transformers.models."))
    checks.close(f"logits of {type(model).__name__}", model(torch.tensor([TOKENS])).logits[0], expected)


def check_types(checks, folder, expected):
    tokens = torch.tensor([TOKENS])
    # 8 bits of mantissa through four layers, whose routers may choose other heads at ties.
    for dtype in (torch.bfloat16, torch.float16):
        model = load(folder).to(dtype)
        logits = model(tokens).logits
        checks.true(f"{dtype} logits are {logits.dtype}", logits.dtype == dtype and logits.isfinite().all())
        typical = (logits[0].float() - expected).abs().median() / expected.abs().max()
        checks.true(f"{dtype} logits differ by {typical:.1e} in the middle", typical < 0.03)
        mask = torch.tensor([[0] * 5 + [1] * 14])
        checks.true(f"{dtype} with padding is finite", model(tokens, attention_mask=mask).logits[:, 5:].isfinite().all())
        checks.true(f"{dtype} generates", len(generated(model, [TOKENS[:5]])[0]) == 14)


def check_model(binary, name):
    attention, more, architecture = MODELS[name]
    checks = Checks()
    with tempfile.TemporaryDirectory() as temporary:
        folder = trained(binary, Path(temporary), attention, more)
        config = json.loads((folder / "config.json").read_text())
        checks.true(f"written as {config['architectures']}", config["architectures"] == [architecture])
        with torch.no_grad():
            checks.close("logits as trained", load(folder)(torch.tensor([TOKENS])).logits[0], ours(binary, folder.parent / "run", TOKENS))
        spread(folder)
        expected = ours(binary, folder, TOKENS)
        model = load(folder)
        with torch.no_grad():
            check_logits(checks, model, expected)
            check_generation(checks, model)
            check_types(checks, folder, expected)
            check_folders(checks, binary, folder, model, expected)
            if name in NATIVE:
                check_native(checks, binary, folder, expected)
            base = AutoModel.from_pretrained(folder, trust_remote_code=True)
            checks.close("AutoModel", model.lm_head(base(torch.tensor([TOKENS]))[0])[0], expected)
            fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True)
            checks.true("fresh weights", fresh(torch.tensor([TOKENS])).logits.isfinite().all())
        check_training(checks, model)
    return told(name, checks)


def told(name, checks):
    """Prints the outcome; whether all is well."""
    print(f"{name:34} {'FAILED' if checks.failed else 'ok':7} {checks.worst:.1e}", flush=True)
    for failure in checks.failed:
        print(f"    {failure}", flush=True)
    return not checks.failed


TEXT = """
data.text.paths = ["text.txt"]
tokenizer.bytes = {}
training = { steps = 2, seq_len = 32, batch_size = 4 }
"""


def check_masked(binary, name):
    """A masked diffusion model: logits, generation and training, and the way back."""
    attention, more = MASKED[name]
    checks = Checks()
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        (temporary / "text.txt").write_text("abcdefghij" * 300)
        folder = trained(binary, temporary, attention, {**more, "masked_diffusion": True}, TEXT)
        config = json.loads((folder / "config.json").read_text())
        checks.true(f"written as {config['architectures']}", config["architectures"] == ["PolyheadForMaskedLM"])

        def read(folder, **options):
            return AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, **options).eval()

        spread(folder)
        mask, model = config["mask_token_id"], read(folder)
        text = model.diffuse(torch.tensor([list(b"abcdefgh")]), max_new_tokens=21, steps=8, block_length=6)[0].tolist()
        command = [binary, "generate", folder, "--prompt", "abcdefgh", "--temperature", "0"]
        command += ["--max-new-tokens", "21", "--diffusion-steps", "8", "--block-length", "6"]
        said = subprocess.run(command, capture_output=True, check=True).stdout.decode().rstrip()
        text = bytes(text).decode(errors="replace").rstrip()
        checks.true(f"generates {said!r}, not {text!r}", len(set(text)) > 9 and said == text)
        tokens = [mask if at % 3 == 1 else token for at, token in enumerate(TOKENS)]
        expected = ours(binary, folder, tokens)
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits
            checks.close("logits", logits[0, :, :mask], expected)
            checks.true("later tokens are read", (model(torch.tensor([tokens[:-1]])).logits[0, 0] - logits[0, 0]).abs().max() > 1e-4)
            padded = torch.tensor([[0] * 5 + tokens, tokens + [0] * 5])
            seen = torch.tensor([[0] * 5 + [1] * 19, [1] * 19 + [0] * 5])
            padded = model(padded, attention_mask=seen).logits[..., :mask]
            checks.close("logits with padding on the left", padded[0, 5:], expected)
            checks.close("logits with padding on the right", padded[1, :19], expected)
            check_folders(checks, binary, folder, model, expected, tokens, read)
            half = read(folder).half()(torch.tensor([tokens])).logits
            checks.true("half is finite", half.dtype == torch.float16 and half.isfinite().all())
        model.train()
        optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
        labels = torch.tensor([[token if place == mask else -100 for token, place in zip(TOKENS, tokens)]])
        for _ in range(15):
            optimizer.zero_grad()
            losses.append(model(torch.tensor([tokens]), labels=labels).loss)
            losses[-1].backward()
            optimizer.step()
        checks.true("training lowers the loss", losses[-1] < 0.9 * losses[0])
    return told(name, checks)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are tiny
    torch.manual_seed(0)
    binary, *names = sys.argv[1:]
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    binary = Path(binary).resolve()
    passed = [(check_masked if name in MASKED else check_model)(binary, name) for name in names or [*MODELS, *MASKED]]
    sys.exit(0 if all(passed) else 1)
