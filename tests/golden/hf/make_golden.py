"""Tiny models with random weights in Hugging Face's format, with the logits that transformers computes from them in f32.

    python make_golden.py [NAME ...]     # once with transformers 4 and once with 5: each writes the folders that bear its number

Weights are drawn large enough for attention to be far from uniform and for every norm, bias and rotation to matter.
"""

import json
import pathlib
import shutil
import sys

import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
MAJOR = int(transformers.__version__.split(".")[0])

SIZE = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)


def rope(theta, partial=None, **scaling):
    """The settings of rotary positions, as this version of transformers takes them."""
    if MAJOR >= 5:
        extra = {} if partial is None else {"partial_rotary_factor": partial}
        return dict(rope_parameters={"rope_type": "default", "rope_theta": theta, **scaling, **extra})
    return dict(rope_theta=theta, **({"rope_scaling": scaling} if scaling else {}))


def neox_rope(theta, partial):
    return rope(theta, partial) if MAJOR >= 5 else dict(rotary_emb_base=theta, rotary_pct=partial)


# name: (family, settings, type of the stored weights, largest shard)
MODELS = {
    "llama": ("Llama", dict(num_key_value_heads=2, head_dim=12, **rope(500.0, **LLAMA3)), torch.float32, "40KB"),
    "llama_linear": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=True, attention_bias=True,
                                   **rope(1000.0, rope_type="linear", factor=2.5)), torch.bfloat16, "1GB"),
    "mistral": ("Mistral", dict(num_key_value_heads=1, sliding_window=None, **rope(1000.0)), torch.float16, "1GB"),
    "qwen2": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True, **rope(1000.0)), torch.bfloat16, "1GB"),
    "qwen3": ("Qwen3", dict(num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-3, **rope(1000.0)), torch.float32, "1GB"),
    # Windows shorter than the texts: in all layers, from a layer on, and by name.
    "mistral_window": ("Mistral", dict(num_key_value_heads=2, sliding_window=5, **rope(1000.0)), torch.float32, "1GB"),
    "qwen2_window": ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4,
                                   max_window_layers=1, **rope(1000.0)), torch.float32, "1GB"),
    "qwen3_window": ("Qwen3", dict(num_key_value_heads=2, head_dim=16, use_sliding_window=True, sliding_window=3,
                                   layer_types=["sliding_attention", "full_attention"], **rope(1000.0)),
                     torch.float32, "1GB"),
    "gpt_neox": ("GPTNeoX", dict(hidden_act="gelu", use_parallel_residual=True, **neox_rope(1000.0, 0.5)),
                 torch.float32, "1GB"),
    "gpt_neox_serial": ("GPTNeoX", dict(hidden_act="gelu", use_parallel_residual=False, tie_word_embeddings=True,
                                        **neox_rope(1000.0, 0.25)), torch.float16, "1GB"),
}


def spread(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_((1.0 if name.endswith("norm.weight") else 0.0) + 0.3 * torch.randn_like(parameter))
            else:
                embedding = any(part in name for part in ("embed", "lm_head"))
                parameter.copy_(torch.randn_like(parameter) * (0.3 if embedding else 1.2 * parameter.shape[-1] ** -0.5))


def make(name, family, settings, dtype, shard):
    torch.manual_seed(sum(map(ord, name)) + MAJOR)
    config = getattr(transformers, f"{family}Config")(**{**SIZE, **settings})
    model_class = getattr(transformers, f"{family}ForCausalLM")
    model = model_class(config)
    spread(model)
    folder = HERE / f"{name}_v{MAJOR}"
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    # Read back, so that the logits are those of the stored weights, computed in f32.
    model = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.randint(0, SIZE["vocab_size"], (2, 19))
    with torch.no_grad():
        logits = model(tokens).logits
    about = {"config": json.dumps({"transformers": transformers.__version__, "torch": torch.__version__})}
    save_file({"tokens": tokens.float(), "logits": logits}, folder / "expected.safetensors", about)


for name in sys.argv[1:] or MODELS:
    make(name, *MODELS[name])
