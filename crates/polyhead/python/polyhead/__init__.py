"""What Polyhead's runs have made, in Python. The program itself is `polyhead` on the command line, or `python -m polyhead`."""

import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

__all__ = ["binary", "checkpoint", "load_model", "load_state_dict"]


def binary():
    """The program's path: the one that was installed with this package, or else the one on the path."""
    name = "polyhead.exe" if os.name == "nt" else "polyhead"
    places = [Path(sysconfig.get_path("scripts")) / name, Path(sysconfig.get_path("scripts", f"{os.name}_user")) / name]
    found = next((str(place) for place in places if place.exists()), None) or shutil.which("polyhead")
    if found is None:
        raise FileNotFoundError(f"{name} is neither in {places[0].parent} nor on the path: pip install polyhead")
    return found


def checkpoint(run, which="latest"):
    """The folder of a run's checkpoint: the "latest", or the "best" by validation loss. A checkpoint stays what it is.

    Of a run in stages, that of its last stage.
    """
    run = Path(run)
    if which not in ("latest", "best"):
        raise ValueError(f"which ({which!r}) must be 'latest' or 'best'")
    if (run / "manifest.json").exists():
        return run
    stages = run / "stages.json"
    if stages.exists():
        # 1-parent, 2-search, ...: those that have begun.
        begun = [folder for folder in run.iterdir() if folder.is_dir() and folder.name.split("-")[0].isdigit()]
        run = max(begun, key=lambda folder: int(folder.name.split("-")[0]), default=run)
    steps = [folder for folder in run.glob("step-*") if (folder / "manifest.json").exists()]
    if not steps:
        raise FileNotFoundError(f"{run} has no complete checkpoint")
    if which == "best":
        best = run / "best.json"
        if not best.exists():
            raise FileNotFoundError(f"{run} has never been validated: there is no best.json")
        step = json.loads(best.read_text())["step"]
        steps = [folder for folder in steps if int(folder.name.removeprefix("step-")) == step]
        if not steps:
            raise FileNotFoundError(f"{run}: the best checkpoint, of step {step}, is not there any more")
    return max(steps, key=lambda folder: int(folder.name.removeprefix("step-")))


def load_state_dict(run, which="latest"):
    """The weights of a run or checkpoint as tensors of PyTorch, by Polyhead's names (see Weights in the documentation)."""
    from safetensors.torch import load_file

    folder = checkpoint(run, which)
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"{folder} holds what LoRA learned alone: `polyhead export` merges it with its base model")
    return load_file(folder / "model.safetensors")


def load_model(run, which="latest"):
    """A model of transformers with the weights of a run or checkpoint, whatever its mechanism."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "exported"
        command = [binary(), "export", str(checkpoint(run, which)), "--out", str(exported)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip())
        # The code that may run is the one that Polyhead has just written.
        return AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
