"""What the layers of the tiny models of ../hf make of their tokens, as transformers 5 computes it: `hidden_states[1:]`, pooled.

    python make_golden.py        # with transformers 5; writes pooled.safetensors
"""

import pathlib

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
tensors = {}
for folder in sorted((HERE.parent / "hf").glob("*_v5")):
    with safe_open(folder / "expected.safetensors", "pt") as file:
        tokens = file.get_tensor("tokens").long()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        states = torch.stack(model(tokens, output_hidden_states=True).hidden_states[1:], 1)  # [texts, layers, tokens, d]
    tensors[f"{folder.name}.mean"] = states.mean(2).contiguous()
    tensors[f"{folder.name}.last"] = states[:, :, -1].contiguous()
save_file(tensors, HERE / "pooled.safetensors")
