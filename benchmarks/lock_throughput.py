"""Time and memory of an absorbed lock, beside a plain copy of the same folder.

    python benchmarks/lock_throughput.py --out benchmarks/results/lock_throughput.json

Makes a llama-shaped bfloat16 checkpoint (sharded, 2.2 GB), then alternates: `cp -r`; `cp -r` with every file synced to the
disk; the lock. A lock hashes every tensor twice and syncs what it writes, so the synced copy is the like for like and the
plain copy the stricter one; both ratios are given. Each lock runs in a process of its own; time and memory are counted
from where torch and specdef are imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

LOCK = """
import json, re, sys, time
import torch, specdef, specdef.lock.lock
torch.set_num_threads(int(sys.argv[3]))
def peak():  # the high-water mark of this process; ru_maxrss would count the parent's, inherited at the fork
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
base, began = peak(), time.perf_counter()
c = specdef.lock_checkpoint(sys.argv[1], sys.argv[2])
print(json.dumps({"seconds": time.perf_counter() - began, "mib": peak() - base, "base_mib": base,
                  "sites": len(c.sites), "changed": c.tensors_changed, "total": c.tensors_total}))
"""


def make_checkpoint(
    folder: Path, *, layers: int, hidden: int, inner: int, vocab: int, per_shard: int = 6
) -> int:
    """Write a llama-shaped checkpoint of random bfloat16 weights and return its size in bytes."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    kv = hidden // 8
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    num_shards = -(-layers // per_shard)
    weight_map, size = {}, 0
    for shard in range(num_shards):
        tensors = {}
        for i in range(shard * per_shard, min(layers, (shard + 1) * per_shard)):
            prefix = f"model.layers.{i}."
            tensors |= {f"{prefix}{name}.weight": draw(*shape) for name, shape in shapes.items()}
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{name}.weight"] = 1 + draw(hidden)
        if shard == 0:
            tensors["model.embed_tokens.weight"] = draw(vocab, hidden)
        if shard == num_shards - 1:
            tensors |= {
                "model.norm.weight": 1 + draw(hidden),
                "lm_head.weight": draw(vocab, hidden),
            }
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        size += sum(t.numel() * 2 for t in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    )
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": hidden // 64, "num_key_value_heads": kv // 64, "num_hidden_layers": layers, "vocab_size": vocab,
        "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return size


def copy(source: Path, target: Path, *, synced: bool) -> float:
    """Copy with cp -r and return the seconds it took, with the time to sync every file if asked."""
    shutil.rmtree(target, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    if synced:
        for path in target.iterdir():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    return time.perf_counter() - began


def lock(source: Path, target: Path, threads: int) -> dict[str, float]:
    """Lock in a fresh process and return what it measured."""
    shutil.rmtree(target, ignore_errors=True)
    target.with_name(target.name + ".key.safetensors").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", LOCK, str(source), str(target), str(threads)],
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lock_throughput.json"))
    parser.add_argument(
        "--work", type=Path, default=None, help="folder for the checkpoints, 7 GB free"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=22)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        source, target = Path(work) / "source", Path(work) / "target"
        size = make_checkpoint(source, layers=options.layers, hidden=2048, inner=5632, vocab=32000)
        plain, synced, locks = [], [], []
        copy(source, target, synced=True)  # warms the page cache for all three
        for _ in range(options.repeats):
            plain.append(copy(source, target, synced=False))
            os.sync()  # the copy's dirty pages are not to be written on the next one's time
            synced.append(copy(source, target, synced=True))
            locks.append(lock(source, target, threads=1))
            os.sync()
    seconds = [item["seconds"] for item in locks]
    report = {
        "checkpoint_bytes": size,
        "cp_seconds": plain,
        "cp_synced_seconds": synced,
        "lock_seconds": seconds,
        "ratio_to_cp": statistics.median(seconds) / statistics.median(plain),
        "ratio_to_cp_synced": statistics.median(seconds) / statistics.median(synced),
        "peak_mib_above_import": max(item["mib"] for item in locks),
        "import_mib": locks[0]["base_mib"],
        "sites": locks[0]["sites"],
        "tensors_changed": locks[0]["changed"],
        "tensors_total": locks[0]["total"],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
