"""Runs what docs/src/guides/from-the-hub.md shows, block by block, with a tiny random model in a cache of its own.

    python tests/hf/check_page.py BINARY         the environment needs torch, transformers, tokenizers; lm-eval where it is to run

Nothing is downloaded: the model is Llama's form with grouped queries 9:3, a tied head and a chat template, as SmolLM2-135M-Instruct has
them, under that name in a cache of Hugging Face. lm-eval runs tests/hf/lm_eval in the place of its own tasks, which it would fetch.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
NAME, COMMIT = "HuggingFaceTB/SmolLM2-135M-Instruct", "0123456789abcdef0123456789abcdef01234567"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Of a run for show, a few steps; of lm-eval's tasks, one that is here.
SHORT = "training.steps=4 training.batch_size=2 training.seq_len=512 lr_scheduler.warmup_steps=1 validation.batches=1 validation.interval=4 checkpoint.interval=4"


def model(cache):
    """The tiny model, as `hf download` leaves one: files in `blobs`, links to them in the snapshot of a commit."""
    home = cache / f"hub/models--{NAME.replace('/', '--')}"
    made = cache / "made"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(made)
    size = {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**size, vocab_size=len(fast), max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(made)
    snapshot = home / "snapshots" / COMMIT
    for folder in (home / "blobs", home / "refs", snapshot):
        folder.mkdir(parents=True)
    (home / "refs/main").write_text(COMMIT)
    for file in made.iterdir():
        file.rename(home / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)


def blocks(page):
    """Language, what is said behind it, and text of each block."""
    return re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", page, re.S | re.M)


def listens(server):
    """Whether a server comes up before 20 s are over, by what it says of itself."""
    said = threading.Thread(target=lambda: server.said.append(next((line for line in server.stdout if "http://" in line), "")))
    server.said = []
    said.start()
    said.join(20)
    return any(server.said)


def main(binary):
    work = Path(tempfile.mkdtemp())
    tasks = work / "tasks"
    shutil.copytree(ROOT / "tests/hf/lm_eval", tasks)
    for file in tasks.glob("*.yaml"):
        file.write_text(file.read_text().replace("FOLDER", str(tasks)))
    for name in ("recipes", "datasets", "docs", "README.md"):
        (work / name).symlink_to(ROOT / name)
    model(work / "cache")
    shim = work / "bin"
    shim.mkdir()
    (shim / "polyhead").write_text(f'#!/bin/sh\n[ "$1" = train ] && exec {binary} "$@" {SHORT}\nexec {binary} "$@"\n')
    (shim / "polyhead").chmod(0o755)
    variables = {**os.environ, "HF_HOME": str(work / "cache"), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
    variables["PATH"] = f"{shim}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables.pop("HF_HUB_CACHE", None)
    has_lm_eval = subprocess.run([sys.executable, "-c", "import lm_eval"], capture_output=True).returncode == 0
    servers, run, left_out, failed = [], 0, [], []

    def start(command, **more):
        return subprocess.Popen(command, cwd=work, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)

    for language, note, text in blocks((ROOT / "docs/src/guides/from-the-hub.md").read_text()):
        commands = [text] if language == "python" else [line for line in text.splitlines() if line.strip()]
        for command in commands:
            if command.startswith("lm_eval"):
                if not has_lm_eval:
                    left_out.append(command)
                    continue
                command = command.replace("--tasks lambada_openai", f"--include_path {tasks} --tasks polyhead_completion")
            shown = command.splitlines()[0] if language == "sh" else "the Python block"
            if "serves" in note:
                servers.append(start(["bash", "-c", f"exec {command}"]))
                run += 1
                up = listens(servers[-1])
                print(f"{'ok' if up else 'FAILED':7}{shown}")
                failed += [] if up else [shown]
                continue
            process = start([sys.executable, "-W", "ignore", "-c", command] if language == "python" else ["bash", "-c", command])
            said = process.communicate()[0]
            run += 1
            print(f"{'ok' if process.returncode == 0 else 'FAILED':7}{shown}")
            if process.returncode != 0:
                failed.append(shown)
                print("    " + "\n    ".join(said.splitlines()[-8:]))
    for server in servers:
        server.terminate()
        server.wait()
    for command in left_out:
        print(f"left out (no lm-eval here): {command}")
    shutil.rmtree(work)
    if run < 8:
        sys.exit(f"only {run} commands of the page were found: has its form changed?")
    sys.exit(f"{len(failed)} of {run} failed" if failed else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
