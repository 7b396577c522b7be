"""lm-eval on an export of every mechanism, with tasks that are defined by the files in tests/hf/lm_eval.

    python tests/hf/check_lm_eval.py BINARY [NAME ...]       the environment needs lm-eval besides torch and transformers

Likelihoods are compared with those of Polyhead's own logits, and with those that `polyhead serve` gives to lm-eval's
`local-completions`, which writes the same texts too. Nothing is downloaded.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import check_export  # noqa: E402
import torch  # noqa: E402
from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

TASKS = Path(__file__).parent / "lm_eval"
ONE_EACH = [
    "softmax_windows_softcap_scale", "grouped_differential", "mixture_of_head", "mixture_of_head_query_norm",
    "decoupled_head", "key_driven_fixed", "diff_v2", "gated_attention", "sink", "mla", "gated_delta_net", "hybrid",
]  # fmt: skip
TRAINED = """
tokenizer.bytes = {}
data.text.paths = ["text.txt"]
training = { steps = 3, seq_len = 96, batch_size = 2 }
"""


def tasks(folder):
    """The tasks with the place of their data, as lm-eval wants it."""
    for path in TASKS.glob("*.yaml"):
        (folder / path.name).write_text(path.read_text().replace("FOLDER", str(TASKS.resolve())))
    return TaskManager(include_path=str(folder), include_defaults=False)


CLOSE = 1e-4  # of a log-likelihood in nats
SETTINGS = {"tasks": ["polyhead_completion", "polyhead_lines", "polyhead_copy"], "batch_size": 3, "bootstrap_iters": 0, "verbosity": "ERROR"}


def answers(results):
    """What the model said to each request, task by task: likelihoods, whether they are the greedy choice, texts."""
    rows = [(task, sample["doc_id"], sample["resps"]) for task, samples in results["samples"].items() for sample in samples]
    return [answer for _, _, resps in sorted(rows, key=lambda row: row[:2]) for answers in resps for answer in answers]


def served(binary, export, manager):
    """The answers of the same tasks through HTTP, from a server that ends with them."""
    command = [binary, "serve", str(export), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = next(line for line in server.stderr if "http://" in line).split(" at ")[1].split()[0]
            model_args = {
                "model": str(export), "tokenizer": str(export), "base_url": f"{url}/completions", "max_length": 96,
                "tokenizer_backend": "huggingface", "num_concurrent": 2,
            }  # fmt: skip
            results = simple_evaluate(model="local-completions", model_args=model_args, task_manager=manager, **SETTINGS)
        finally:
            server.terminate()
        if server.wait(timeout=30) != 0:
            raise RuntimeError("the server did not stop cleanly")
    return answers(results)


def largest_difference(ours, theirs):
    """Of likelihoods; infinite where a text, a greedy choice or the number of answers differs."""

    def difference(one, other):
        if isinstance(one, str):
            return 0.0 if one == other else math.inf
        one, other = (answer if isinstance(answer, (tuple, list)) else [answer] for answer in (one, other))
        apart = abs(float(one[0]) - float(other[0]))
        return apart if math.isfinite(apart) and list(one[1:]) == list(other[1:]) else math.inf

    return max(map(difference, ours, theirs)) if ours and len(ours) == len(theirs) else math.inf


def bits_per_byte(binary, folder):
    """Of the lines of the task, by Polyhead's logits: the prefix token is the one that ends texts."""
    config = json.loads((folder / "config.json").read_text())
    bits, count = 0.0, 0
    for line in (TASKS / "completion.jsonl").read_text().splitlines():
        row = json.loads(line)
        text = (row["start"] + row["endings"][row["right"]]).encode()
        tokens = [config["bos_token_id"], *text]
        logits = check_export.ours(binary, folder, tokens)[:-1].double()
        chosen = logits.log_softmax(-1)[torch.arange(len(text)), torch.tensor(tokens[1:])]
        bits, count = bits - chosen.sum().item() / math.log(2), count + len(text)
    return bits / count


def check(binary, name, manager):
    attention, more, _ = check_export.MODELS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text.txt").write_text("\n".join(Path(__file__).read_text().splitlines() * 3))
        export = check_export.trained(binary, folder, attention, more, TRAINED)
        check_export.spread(export, 0.15)
        results = simple_evaluate(
            model="hf", model_args={"pretrained": str(export), "trust_remote_code": True, "dtype": "float32"},
            task_manager=manager, device="cpu", **SETTINGS,
        )  # fmt: skip
        ours = bits_per_byte(binary, export)
        apart = largest_difference(served(binary, export, manager), answers(results))
        results = results["results"]
    accuracy = results["polyhead_completion"]["acc,none"]
    theirs = results["polyhead_lines"]["bits_per_byte,none"]
    copied = results["polyhead_copy"]["exact_match,none"]
    good = abs(theirs - ours) < 1e-4 * ours and apart < CLOSE and 0 <= accuracy <= 1 and 0 <= copied <= 1
    print(f"{name:34} {'ok' if good else 'FAILED':7} accuracy {accuracy:.2f}, bits per byte {theirs:.4f} (Polyhead's logits: {ours:.4f}), served: {apart:.1e}", flush=True)
    return good


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are tiny
    binary, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        manager = tasks(Path(temporary))
        passed = [check(Path(binary).resolve(), name, manager) for name in names or ONE_EACH]
    sys.exit(0 if all(passed) else 1)
