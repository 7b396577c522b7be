"""Tokens per second of transformers' `generate` on an exported model: FOLDER NEW_TOKENS THREADS. The first call warms up."""

import sys
import time

import torch
from transformers import AutoModelForCausalLM

folder, count, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = torch.tensor([list(b"Once upon a time")])
options = dict(do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)
model.generate(prompt, **(options | dict(min_new_tokens=8, max_new_tokens=8)))
start = time.perf_counter()
made = model.generate(prompt, **options)
print((made.shape[1] - prompt.shape[1]) / (time.perf_counter() - start))
