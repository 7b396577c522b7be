#!/usr/bin/env python3
"""Makes the golden numbers for the optimisers (see README.md beside this file).

    pip install torch safetensors
    python make_golden.py [OUT_DIR]        # default: this folder

AdamW and the clipping are torch's own, in float32 on the CPU. Muon is written out below from
its equations, in float64: torch.optim.Muon orthogonalises in bfloat16, which is too coarse to
compare with. Each case is computed a second time, independently (AdamW: written out in float64;
Muon: torch.optim.Muon, within what bfloat16 allows), and nothing is written unless the two agree.
Weights and gradients are random, from a fixed seed.
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

TORCH = torch.__version__.split("+")[0]
ADAMW = f"torch {TORCH} torch.optim.AdamW (float32, CPU)"
MUON = "Muon written out in float64, torch.optim.AdamW for the rest"

# By the names that a decoder has: Muon takes the matrices of the layers, AdamW all else.
SHAPES = {
    "embedding": (7, 4),
    "layers.0.square": (4, 4),
    "layers.0.wide": (3, 10),
    "layers.0.tall": (9, 4),
    "layers.0.vector": (6,),
    "norm": (4,),
}
STEPS = 6
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024


def case(seed, source, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, momentum=None,
         max_norm=0.0, gradient_scale=1.0):
    """`lr` is one number per step, `max_norm` 0 does not clip, `momentum` is Muon's."""
    return dict(optimizer="muon" if momentum else "adamw", seed=seed, source=source, lr=lr, beta1=beta1,
                beta2=beta2, eps=eps, weight_decay=weight_decay, momentum=momentum, max_norm=max_norm,
                gradient_scale=gradient_scale)


CASES = {
    "adamw_defaults": case(301, ADAMW, lr=[1e-3] * STEPS),
    "adamw_no_decay": case(302, ADAMW, lr=[3e-3] * STEPS, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.0),
    "adamw_schedule": case(303, ADAMW, lr=[2e-3, 4e-3, 8e-3, 6e-3, 3e-3, 1e-3], beta1=0.85, beta2=0.97,
                           eps=1e-4, weight_decay=0.3),
    # Some steps are above the limit, some below: see the assertion on the factors.
    "adamw_clipped": case(304, ADAMW, lr=[5e-3] * STEPS, beta2=0.95, weight_decay=0.1, max_norm=8.0),
    "adamw_tiny_gradients": case(305, ADAMW, lr=[1e-2] * STEPS, weight_decay=0.1, gradient_scale=1e-7),
    "muon_match_rms": case(311, MUON, lr=[2e-2, 2e-2, 1e-2, 1e-2, 5e-3, 5e-3], beta2=0.95, weight_decay=0.1,
                           momentum=0.95),
    "muon_clipped": case(312, MUON, lr=[1e-2] * STEPS, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.0,
                         momentum=0.9, max_norm=8.0),
}


def draw(c):
    """Weights, and for every step a gradient of each; some of the numbers are exactly 0."""
    gen = torch.Generator().manual_seed(c["seed"])
    randn = lambda shape: torch.randn(*shape, generator=gen)
    weights = {name: randn(shape) for name, shape in SHAPES.items()}
    gradients = []
    for step in range(STEPS):
        size = c["gradient_scale"] * (0.5 + 0.4 * (step % 3))
        gradient = {name: size * randn(shape) for name, shape in SHAPES.items()}
        gradient["embedding"][2] = 0.0  # a token that does not occur
        gradients.append(gradient)
    return weights, gradients


def uses_muon(c, name):
    return c["optimizer"] == "muon" and name.startswith("layers.") and len(SHAPES[name]) == 2


def orthogonalized(m):
    """Five Newton-Schulz steps: singular values are brought near 1."""
    a, b, c = NEWTON_SCHULZ
    x = m.mT if m.shape[0] > m.shape[1] else m
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if m.shape[0] > m.shape[1] else x


def clip(c, gradient):
    """The gradient as torch clips it, and its norm before."""
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradient.values()]
    for parameter, g in zip(parameters, gradient.values()):
        parameter.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, c["max_norm"] or math.inf)
    clipped = {name: p.grad for name, p in zip(gradient, parameters)} if c["max_norm"] else gradient
    return clipped, norm


def with_torch(c, weights, gradients):
    """torch's optimisers; Muon's matrices are left out here and stay as they are."""
    parameters = {n: torch.nn.Parameter(w.clone()) for n, w in weights.items()}
    stepped = {n: p for n, p in parameters.items() if not uses_muon(c, n)}
    decayed = [p for p in stepped.values() if p.dim() > 1]
    vectors = [p for p in stepped.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": c["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}],
        betas=(c["beta1"], c["beta2"]), eps=c["eps"], foreach=False)
    after = []
    for lr, gradient in zip(c["lr"], gradients):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in parameters.items():
            parameter.grad = gradient[name].clone()
        optimizer.step()
        after.append({n: p.detach().clone() for n, p in parameters.items()})
    return after


def written_out(c, weights, gradients):
    """The equations, in float64: AdamW, and Muon where it is used."""
    w = {n: t.double() for n, t in weights.items()}
    first = {n: torch.zeros_like(t) for n, t in w.items()}
    second = {n: torch.zeros_like(t) for n, t in w.items()}
    after = []
    for t, (lr, gradient) in enumerate(zip(c["lr"], gradients), 1):
        for n in w:
            g = gradient[n].double()
            if uses_muon(c, n):
                mu = c["momentum"]
                first[n] = mu * first[n] + g
                step = orthogonalized(g + mu * first[n])  # Nesterov
                size = 0.2 * math.sqrt(max(g.shape))  # the RMS of an AdamW step, arXiv 2502.16982
                w[n] = w[n] - lr * c["weight_decay"] * w[n] - lr * size * step
            else:
                first[n] = c["beta1"] * first[n] + (1 - c["beta1"]) * g
                second[n] = c["beta2"] * second[n] + (1 - c["beta2"]) * g * g
                m, v = first[n] / (1 - c["beta1"] ** t), second[n] / (1 - c["beta2"] ** t)
                decay = c["weight_decay"] if g.dim() > 1 else 0.0
                w[n] = w[n] - lr * decay * w[n] - lr * m / (v.sqrt() + c["eps"])
        after.append({n: x.clone() for n, x in w.items()})
    return after


def with_torch_muon(c, weights, gradients):
    """torch.optim.Muon on the matrices that are Muon's."""
    parameters = {n: torch.nn.Parameter(w.clone()) for n, w in weights.items() if uses_muon(c, n)}
    optimizer = torch.optim.Muon(parameters.values(), momentum=c["momentum"], nesterov=True,
                                 weight_decay=c["weight_decay"], adjust_lr_fn="match_rms_adamw")
    after = []
    for lr, gradient in zip(c["lr"], gradients):
        optimizer.param_groups[0]["lr"] = lr
        for n, p in parameters.items():
            p.grad = gradient[n].clone()
        optimizer.step()
        after.append({n: p.detach().clone() for n, p in parameters.items()})
    return after


def off(a, b):
    """The largest difference, relative to the largest number of each tensor."""
    return max(((x[n].double() - y[n].double()).abs().max() / y[n].double().abs().max()).item()
               for x, y in zip(a, b, strict=True) for n in x)


def main():
    out_dir = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    for name, c in CASES.items():
        weights, drawn = draw(c)
        gradients, norms = zip(*(clip(c, g) for g in drawn))
        if c["max_norm"]:
            above = [bool(norm > c["max_norm"]) for norm in norms]
            assert any(above) and not all(above), norms
        golden, check = with_torch(c, weights, gradients), written_out(c, weights, gradients)
        matrices = [n for n in SHAPES if uses_muon(c, n)]
        for after, exact in zip(golden, check):
            after.update({n: exact[n].float() for n in matrices})
        differences = [f"{off(golden, check):.1e} from the equations"]
        assert off(golden, check) < 5e-7, differences
        if matrices and hasattr(torch.optim, "Muon"):
            coarse = off(with_torch_muon(c, weights, gradients), [{n: a[n] for n in matrices} for a in golden])
            differences.append(f"{coarse:.1e} from torch.optim.Muon (bfloat16)")
            assert coarse < 1e-2, differences

        tensors = {f"w.{n}": w for n, w in weights.items()} | {"norms": torch.stack(norms)}
        for step in range(STEPS):
            tensors |= {f"grad.{step + 1}.{n}": g for n, g in drawn[step].items()}
            tensors |= {f"after.{step + 1}.{n}": w for n, w in golden[step].items()}
        tensors = {n: t.contiguous() for n, t in tensors.items()}
        assert all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())
        save_file(tensors, out_dir / f"{name}.safetensors", {"config": json.dumps(c)})
        print(f"{name:22} {', '.join(differences)}")


if __name__ == "__main__":
    main()
