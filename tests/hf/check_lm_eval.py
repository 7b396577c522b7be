"""lm-eval on an export of every mechanism, with tasks that are defined by the files in tests/hf/lm_eval.

    python tests/hf/check_lm_eval.py BINARY [NAME ...]       the environment needs lm-eval besides torch and transformers

Likelihoods are compared with those of Polyhead's own logits. Nothing is downloaded.
"""

import json
import math
import os
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
            tasks=["polyhead_completion", "polyhead_lines", "polyhead_copy"], task_manager=manager, batch_size=3, device="cpu",
            bootstrap_iters=0, verbosity="ERROR",
        )["results"]  # fmt: skip
        ours = bits_per_byte(binary, export)
    accuracy = results["polyhead_completion"]["acc,none"]
    theirs = results["polyhead_lines"]["bits_per_byte,none"]
    copied = results["polyhead_copy"]["exact_match,none"]
    good = abs(theirs - ours) < 1e-4 * ours and 0 <= accuracy <= 1 and 0 <= copied <= 1
    print(f"{name:34} {'ok' if good else 'FAILED':7} accuracy {accuracy:.2f}, bits per byte {theirs:.4f} (Polyhead's logits: {ours:.4f})", flush=True)
    return good


if __name__ == "__main__":
    torch.set_num_threads(1)  # the models are tiny
    binary, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        manager = tasks(Path(temporary))
        passed = [check(Path(binary).resolve(), name, manager) for name in names or ONE_EACH]
    sys.exit(0 if all(passed) else 1)
