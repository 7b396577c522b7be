"""The benchmark's other side for a pretrained model: transformers, eager, with the same weights and tokens.

Called by benches/pretrained.rs: MODEL WORK.json [--compile]; the file holds the task, the tokens and targets of a batch, steps and threads.
Prints one JSON line: the seconds of every step (or of the task), the first loss, and the peak memory. LoRA is peft's where
it is installed, and else written out below in peft's arithmetic.
"""

import json
import math
import resource
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

began = time.perf_counter()
folder, work = sys.argv[1], json.load(open(sys.argv[2]))
torch.set_num_threads(work["threads"])
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402  (its import is no part of loading)


class Lora(nn.Module):
    """A frozen projection with a low-rank pair beside it."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * self.scale


def adapted(model, rank, alpha, targets):
    try:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0))
    except ImportError:
        model.requires_grad_(False)
        for module in list(model.modules()):
            for name in targets:
                if isinstance(getattr(module, name, None), nn.Linear):
                    setattr(module, name, Lora(getattr(module, name), rank, alpha))
        return model


def update_in_backward(learned):
    """Every parameter is updated as soon as its gradient is there, which is freed then; nothing is clipped."""
    optimizers = {p: torch.optim.AdamW([p], lr=0.0) for p in learned}

    def update(p):
        optimizers[p].step()
        optimizers[p].zero_grad(set_to_none=True)

    for p in learned:
        p.register_post_accumulate_grad_hook(update)


def train(model):
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = None if work["frugal"] else torch.optim.AdamW(learned, lr=0.0)
    if work["frugal"]:
        update_in_backward(learned)
        model.gradient_checkpointing_enable()
    tokens, targets = (torch.tensor(work[key]).view(work["batch"], work["seq"]) for key in ("tokens", "targets"))
    if "--compile" in sys.argv:
        model = torch.compile(model)
    seconds, first = [], None
    for _ in range(work["steps"]):
        start = time.perf_counter()
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        if optimizer is not None:
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        first = loss.item() if first is None else first
    return seconds, first


def evaluate(model):
    """The mean loss of a text in windows that do not overlap."""
    tokens = AutoTokenizer.from_pretrained(folder)(open(work["text"]).read(), return_tensors="pt").input_ids[0]
    total = 0.0
    for window in tokens.split(work["seq"]):
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        total += F.cross_entropy(logits[:-1], window[1:], reduction="sum").item()
    return total / (len(tokens) - math.ceil(len(tokens) / work["seq"]))


start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
loss, task = None, work["task"]
if work["trains"]:
    model.train()
    learned = adapted(model, work["rank"], work["alpha"], work["targets_of_lora"]) if work["adapters"] else model
    seconds, loss = train(learned)
else:
    prompt = torch.tensor([work["tokens"]])
    with torch.inference_mode():
        if task == "generate":
            options = dict(do_sample=False, pad_token_id=0)
            model.generate(prompt, min_new_tokens=4, max_new_tokens=4, **options)
            start = time.perf_counter()
            model.generate(prompt, min_new_tokens=work["new"], max_new_tokens=work["new"], **options)
        elif task == "prefill":
            prompt = AutoTokenizer.from_pretrained(folder)(open(work["prompt"]).read(), return_tensors="pt").input_ids
            model.generate(prompt[:, :16], max_new_tokens=1, do_sample=False, pad_token_id=0)
            start = time.perf_counter()
            model.generate(prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
        elif task == "evaluate":
            loss = evaluate(model)
        else:  # load: to the first token
            model(input_ids=prompt).logits[0, -1].argmax().item()
    seconds = [time.perf_counter() - start]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "first_loss": loss, "peak_bytes": peak}))
