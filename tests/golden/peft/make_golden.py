"""LoRA adapters as PEFT saves them, for two of the models in tests/golden/hf, with the logits of base and adapter together.

    python make_golden.py       # with torch, transformers 5 and peft
"""

import json
import pathlib
import shutil

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

HERE = pathlib.Path(__file__).parent
# name: (base, settings)
ADAPTERS = {
    "llama_patterns": ("llama_v5", dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
                                        rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 3})),
    "gpt_neox_rslora": ("gpt_neox_v5", dict(r=3, lora_alpha=5, use_rslora=True, target_modules=["query_key_value", "dense"])),
}

for name, (base, settings) in ADAPTERS.items():
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_pretrained(HERE.parent / "hf" / base, dtype=torch.float32, attn_implementation="eager")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, **settings)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
        tokens = torch.randint(0, 48, (2, 19))
        logits = model(tokens).logits
    # The base model is beside its adapter, so that a folder is whole.
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE.parent / "hf" / base, folder)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "."
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    about = {"config": json.dumps({"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__})}
    save_file({"tokens": tokens.float(), "logits": logits}, folder / "expected.safetensors", about)
