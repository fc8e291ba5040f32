"""Cost of curvature in gradients: products, top-5 eigenvalues and density, beside PyHessian, curvlinops and torch.func.

The unit is one gradient of the same loss on the same batch in the same run: `loss.backward()` of the transformers model
as a user trains it, with its fused attention. Calls are timed in turns; ratios are of medians. Each of our results is
checked in the same run: products against the float64 operator and a central difference of float64 gradients,
eigenvalues against a Lanczos run of 60 steps in float64 (full re-orthogonalisation), the density's first two moments
against the trace and Frobenius norm from independent probes.

The rivals are optional and never part of the tests. They pull in torchvision unless installed without dependencies:

    pip install --target rivals --no-deps curvlinops-for-pytorch backpack-for-pytorch pyhessian unfoldNd einops \
        einconv opt_einsum linear_operator
    PYTHONPATH=rivals OMP_NUM_THREADS=1 python benchmarks/curvature.py --out benchmarks/results/curvature.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from specdef.curvature.basis import gaussian_vectors
from specdef.curvature.density import spectral_density
from specdef.curvature.eigenvalues import top_eigenvalues
from specdef.curvature.lanczos import lanczos
from specdef.curvature.losses import LMLoss
from specdef.curvature.operators import GGNOperator, HessianOperator
from specdef.curvature.trace import frobenius_norm_squared, trace
from specdef.data.texts import load_text

# A small llama: 4 layers, width 256, vocabulary 8192, and a batch of 8 x 64 words of Moby Dick.
SHAPE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8192}  # fmt: skip


def small_llama(steps: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build the model, train it for a few steps on words of one text, and return it with a batch of another."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch("sotu", step)).loss.backward()
        optimizer.step()
    return model, batch("moby-dick", 0)


def batch(text: str, index: int) -> dict[str, Tensor]:
    """Return 8 windows of 64 words; a word's number is its rank by frequency in both texts together."""
    words = {name: re.findall(r"\w+|[^\w\s]", load_text(name).lower()) for name in ("sotu", "moby-dick")}  # fmt: skip
    counts: dict[str, int] = {}
    for word in [*words["sotu"], *words["moby-dick"]]:
        counts[word] = counts.get(word, 0) + 1
    rank = {w: i for i, w in enumerate(sorted(counts, key=lambda w: (-counts[w], w)))}
    ids = [min(rank[word], SHAPE["vocab_size"] - 1) for word in words[text]]
    start = (index * 512) % (len(ids) - 512)
    tokens = torch.tensor(ids[start : start + 512]).view(8, 64)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}  # fmt: skip


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of every call, in turns, each after itself: it finds the caches and heap that it left."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def rival_products(
    model: nn.Module, data: dict[str, Tensor], v: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Return products by other means, each as a flat vector, those that are installed.

    The rivals differentiate twice through math attention: they have no second derivative otherwise.
    """
    targets = torch.cat([data["labels"][:, 1:], torch.full((len(data["labels"]), 1), -100)], 1)
    inputs = data["input_ids"]
    params = [p for p in model.parameters()]
    parts = [u.view_as(p) for u, p in zip(v.split([p.numel() for p in params]), params, strict=True)]  # fmt: skip

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.inner(input_ids=ids, use_cache=False).logits
            return logits.flatten(0, 1)

    net, criterion = Logits(), nn.CrossEntropyLoss()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(net, {f"inner.{k}": w for k, w in weights.items()}, (inputs,))  # fmt: skip
        value: Tensor = criterion(out, targets.flatten())
        return value

    def recomputed() -> Tensor:
        gradients = torch.autograd.grad(criterion(net(inputs), targets.flatten()), params, create_graph=True)  # fmt: skip
        return flat(torch.autograd.grad(gradients, params, parts))

    def functional() -> Tensor:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        _, product = torch.func.vjp(torch.func.grad(loss), weights)
        return flat(list(product(dict(zip(weights, parts, strict=True)))[0].values()))

    found = {"Hessian, recomputed": recomputed, "Hessian, torch.func": functional}
    with suppress(ImportError):
        hessian = importlib.import_module("pyhessian").hessian
        utils = importlib.import_module("pyhessian.utils")
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = hessian(net, criterion, data=(inputs, targets.flatten()), cuda=False)
        found["Hessian, PyHessian"] = lambda: flat(utils.hessian_vector_product(one.gradsH, one.params, parts))  # fmt: skip
    with suppress(ImportError):
        curvlinops = importlib.import_module("curvlinops")
        options = {"check_deterministic": False, "batch_size_fn": len}
        for name in ("Hessian", "GGN"):
            kind = getattr(curvlinops, f"{name}LinearOperator")
            operator = kind(net, criterion, params, [(inputs, targets.flatten())], **options)
            found[f"{name}, curvlinops"] = lambda operator=operator: operator @ v
    return found


def flat(tensors: Any) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def pyhessian_eigenvalues(
    model: nn.Module, data: dict[str, Tensor], price: float, k: int
) -> dict[str, Any] | None:
    """Run PyHessian's power iteration with deflation as it stands, at its own tolerance 1e-3, and count its products."""
    try:
        module = importlib.import_module("pyhessian.hessian")
    except ImportError:
        return None
    product, count = module.hessian_vector_product, 0

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return product(*args)

    module.hessian_vector_product = counted

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.inner(input_ids=ids, use_cache=False).logits
            return logits[:, :-1].flatten(0, 1)

    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        one = module.hessian(Logits(), nn.CrossEntropyLoss(), data=(data["input_ids"], data["labels"][:, 1:].flatten()), cuda=False)  # fmt: skip
        values, _ = one.eigenvalues(maxIter=100, tol=1e-3, top_n=k)
    return {"matvecs": count, "gradients": count * price, "values": values}


def main() -> None:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--train-steps", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="products only")
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    model, data = small_llama(args.train_steps)
    hessian, ggn = HessianOperator(model, [data], LMLoss()), GGNOperator(model, [data], LMLoss())
    n = hessian.shape[0]
    v = torch.randn(n, generator=torch.Generator().manual_seed(0))

    def gradient() -> None:
        model.zero_grad()
        model(**data).loss.backward()

    rivals = rival_products(model, data, v)

    def in_math(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return call()

        return run

    failed = {}
    for name, call in list(rivals.items()):
        try:
            in_math(call)()
        except NotImplementedError as error:  # forward mode through silu_backward
            failed[name] = str(error).splitlines()[0]
            del rivals[name]
    unkept = HessianOperator(model, [data], LMLoss(), memory_limit=0)
    # Two rounds, each with the gradient: graphs of the rivals kept in memory do not slow down what is timed first.
    ours = {
        "gradient": gradient, "Hessian, ours": lambda: hessian @ v, "GGN, ours": lambda: ggn @ v,
        "Hessian, ours without a kept graph": lambda: unkept @ v,
    }  # fmt: skip
    seconds = in_turns(ours, args.repeats)
    one = seconds["gradient"]
    products = {name: s / one for name, s in seconds.items()}
    again = in_turns({"gradient": gradient, **{name: in_math(call) for name, call in rivals.items()}}, args.repeats)  # fmt: skip
    products |= {name: again[name] / again["gradient"] for name in rivals}
    record: dict[str, Any] = {
        "command": "python benchmarks/curvature.py", "torch": torch.__version__, "machine": platform.machine(),
        "threads": torch.get_num_threads(), "load": os.getloadavg()[0], "model": SHAPE, "parameters": n,
        "tokens": 512, "gradient_seconds": one, "repeats": args.repeats,
        "products_in_gradients": products,
        "rivals_that_fail": failed,
        "kept_graph_megabytes": {"Hessian": hessian._memory.used / 1e6, "GGN": ggn._memory.used / 1e6},
    }  # fmt: skip
    for name, ratio in record["products_in_gradients"].items():
        print(f"{name:40} {ratio:6.2f} gradients", flush=True)

    # Correctness in the same run.
    exact = HessianOperator(model, [data], LMLoss(), dtype=torch.float64)
    truth, unit = exact @ v, v.double() / float(v.norm())
    step = 1e-4
    difference = (exact.gradient_at(step * unit) - exact.gradient_at(-step * unit)) / (2 * step)
    exact_ggn = GGNOperator(model, [data], LMLoss(), dtype=torch.float64) @ v
    checks = {
        "float64 product against central difference": relative(exact @ unit, difference),
        "Hessian, ours": relative(hessian @ v, truth), "GGN, ours": relative(ggn @ v, exact_ggn),
    }  # fmt: skip
    for name, call in rivals.items():
        with sdpa_kernel(SDPBackend.MATH):
            checks[name] = relative(call(), exact_ggn if name.startswith("GGN") else truth)
    record["relative_error_of_products"] = checks
    print(json.dumps(checks, indent=1), flush=True)
    model.zero_grad()

    def save() -> None:
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")

    save()
    if not args.quick:
        start = time.perf_counter()
        top = top_eigenvalues(hessian, 5, tol=1e-3)
        spent = (time.perf_counter() - start) / one
        reference = lanczos(exact, torch.randn(n, generator=torch.Generator().manual_seed(9), dtype=torch.float64), 60)  # fmt: skip
        ritz = reference.ritz()[0]
        ritz = ritz[ritz.abs().argsort(descending=True)][:5]
        record["top_5"] = {
            "gradients": spent, "matvecs": top.num_matvecs, "values": top.values.tolist(), "reference": ritz.tolist(),
            "relative_error": float(((top.values - ritz) / ritz).abs().max()), "converged": bool(top.converged.all()),
        }  # fmt: skip
        print(json.dumps(record["top_5"], indent=1), flush=True)
        start = time.perf_counter()
        density = spectral_density(hessian, num_probes=2, num_steps=64)
        record["slq_64x2"] = {"gradients": (time.perf_counter() - start) / one, "matvecs": density.num_matvecs}  # fmt: skip
        mean, second = trace(exact, 20, seed=5), frobenius_norm_squared(exact, 20, seed=6)
        # A rule of m nodes has the first moments of its own probe exactly.
        probe = next(gaussian_vectors(hessian, 0)).double()
        probe /= float(probe.norm())
        image = exact @ probe
        own = [float(probe @ image), float(image @ image)]
        rule = [float(density.weights[0] @ density.nodes[0] ** power) for power in (1, 2)]
        record["slq_64x2"] |= {
            "moments_of_first_probe": rule, "moments_of_first_probe_reference": own,
            "trace": n * density.moment(1)[0], "trace_reference": [mean.value, mean.standard_error],
            "frobenius_squared": n * density.moment(2)[0], "frobenius_squared_reference": [second.value, second.standard_error],
        }  # fmt: skip
        print(json.dumps(record["slq_64x2"], indent=1), flush=True)
        shared = time.perf_counter()
        found = top_eigenvalues(hessian, 5, tol=1e-3)
        density = spectral_density(hessian, num_probes=2, num_steps=64, runs=[found.run])
        record["top_5_and_slq_64x2_sharing_a_run"] = {
            "gradients": (time.perf_counter() - shared) / one, "matvecs": found.num_matvecs + density.num_matvecs,
        }  # fmt: skip
        save()
        record["PyHessian_top_5"] = pyhessian_eigenvalues(
            model, data, products.get("Hessian, PyHessian", math.nan), 5
        )
        print(json.dumps(record["PyHessian_top_5"], indent=1), flush=True)
    save()


def relative(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())


if __name__ == "__main__":
    main()
