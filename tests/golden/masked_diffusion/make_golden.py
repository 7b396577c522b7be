"""Golden numbers of the loss of masked diffusion: LLaDA's formulas, on a small Llama of transformers that reads both sides.

    python make_golden.py        writes the .safetensors files beside itself; needs torch, transformers, safetensors
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
EPS = 1e-3
SOURCE = "LLaDA, GUIDELINES.md (github.com/ML-GSAI/LLaDA): pretraining and SFT losses; transformers' LlamaForCausalLM, eager"


def model(vocab):
    """A small Llama whose attention hides nothing, with weights that are large enough for its logits to differ."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-5, tie_word_embeddings=False, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(7)
    llama = LlamaForCausalLM(config).train()
    with torch.no_grad():
        for name, weight in llama.named_parameters():
            weight.copy_(1 + 0.1 * torch.randn_like(weight) if "norm" in name else 0.3 * torch.randn_like(weight))
    described = {
        "hidden_act": "silu", "rope_layout": "neox", "tie_word_embeddings": False, "num_hidden_layers": 2, "hidden_size": 16,
        "intermediate_size": 24, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "vocab_size": vocab, "masked_diffusion": True,
    }
    return llama, described


def token_loss(llama, ids, masked, p_mask, mask_id):
    """LLaDA's -log p / p_mask of each masked token."""
    noisy = torch.where(masked, mask_id, ids)
    everything = torch.zeros(ids.shape[0], 1, ids.shape[1], ids.shape[1], dtype=llama.dtype)
    logits = llama(input_ids=noisy, attention_mask=everything).logits
    return F.cross_entropy(logits[masked], ids[masked], reduction="none") / p_mask[masked]


def pretraining(loss, ids, prompt, masked):
    return loss.sum() / (ids.shape[0] * ids.shape[1])


def finetuning(loss, ids, prompt, masked):
    lengths = (ids.shape[1] - prompt)[:, None].expand(ids.shape)
    return torch.sum(loss / lengths[masked]) / ids.shape[0]


@torch.no_grad()
def by_hand(llama, ids, masked, p_mask, mask_id, kind, prompt):
    """The same in float64, token by token."""
    llama = llama.double()
    batch, seq = ids.shape
    total = 0.0
    for row in range(batch):
        noisy = ids[row].clone()
        noisy[masked[row]] = mask_id
        everything = torch.zeros(1, 1, seq, seq, dtype=torch.float64)
        log_p = torch.log_softmax(llama(input_ids=noisy[None], attention_mask=everything).logits[0], -1)
        for at in range(seq):
            if masked[row, at]:
                weight = 1 / (seq * batch) if kind == "pretraining" else 1 / ((seq - int(prompt[row])) * batch)
                total += -float(log_p[at, ids[row, at]]) / float(p_mask[row, at]) * weight
    llama.float()
    return total


def write(name, kind, formula, prompt, last_is_target):
    vocab = 12  # the mask is the last id, one behind those of the data
    mask_id, batch, seq = vocab - 1, 3, 10
    llama, described = model(vocab)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, mask_id, (batch, seq), generator=generator)
    prompt = torch.tensor(prompt)
    t = torch.rand(batch, generator=generator)
    p_mask = ((1 - EPS) * t + EPS)[:, None].repeat(1, seq)
    masked = torch.rand((batch, seq), generator=generator) < p_mask
    masked &= torch.arange(seq)[None] >= prompt[:, None]
    assert masked.any(1).all(), "every row has a masked token"
    loss = formula(token_loss(llama, ids, masked, p_mask, mask_id), ids, prompt, masked)
    again = by_hand(llama, ids, masked, p_mask, mask_id, kind, prompt)
    assert abs(float(loss.detach()) - again) < 1e-6 * again, (float(loss.detach()), again)
    llama.zero_grad()
    loss = formula(token_loss(llama, ids, masked, p_mask, mask_id), ids, prompt, masked)
    loss.backward()
    tensors = {f"w.{key}": value.detach().clone() for key, value in llama.named_parameters()}
    tensors |= {f"grad.{key}": value.grad.clone() for key, value in llama.named_parameters()}
    tensors |= {"ids": ids, "prompt": prompt, "p_mask": p_mask[:, 0].contiguous(), "masked": masked.float(), "loss": loss.detach()[None]}
    config = {
        "kind": kind, "model": described, "mask_id": mask_id, "last_is_target": last_is_target, "source": SOURCE,
        "verified": "recomputed in float64, token by token: within 1e-6",
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / f"{name}.safetensors", {"config": json.dumps(config)})
    print(name, float(loss.detach()), again)


write("pretraining", "pretraining", pretraining, [1, 1, 1], True)
write("finetuning", "finetuning", finetuning, [4, 4, 4], False)
