"""Peak memory and time of the LM-head gather, chunk by chunk size, next to the plain full-vocabulary computation.

    python benchmarks/gather.py                                    # T=4096 V=151936 D=1024 bfloat16
    python benchmarks/gather.py --tokens 512 --vocab 8000 --hidden 64 --chunks 64,512

Every line is measured in a process of its own, forward and backward together, after its inputs exist. On the CPU the
peak is that of the resident set (reset through /proc/self/clear_refs, so Linux), on a GPU that of the allocator.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from asyncopd.losses import gather_logprobs

NUM_IDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--chunks", default="128,512,full", help="comma-separated; `full` is one chunk, `plain` is torch"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments)))
        return
    print(
        f"T={arguments.tokens} V={arguments.vocab} D={arguments.hidden} {arguments.dtype} on {arguments.device}, "
        f"{arguments.threads} thread(s); forward + backward to hidden states and weight"
    )
    print(f"{'chunk':>8} {'peak_MB':>10} {'seconds':>9} {'tokens/s':>9}")
    for chunk in arguments.chunks.split(","):
        found = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--one", chunk], stdout=subprocess.PIPE, text=True, check=False
        )
        if found.returncode:
            print(f"{chunk:>8} {'failed: exit status ' + str(found.returncode):>10}", flush=True)
            continue
        figures = json.loads(found.stdout)
        peak_mb, seconds = figures["peak_bytes"] / 1e6, figures["seconds"]
        print(f"{chunk:>8} {peak_mb:>10.0f} {seconds:>9.2f} {arguments.tokens / seconds:>9.0f}", flush=True)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One forward and backward in this process; a tiny one first, so that libraries are loaded."""
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    run(*inputs(8, 64, arguments.hidden, dtype, arguments.device), arguments.one)
    tensors = inputs(arguments.tokens, arguments.vocab, arguments.hidden, dtype, arguments.device)
    before = start_peak(arguments.device)
    start = time.perf_counter()
    run(*tensors, arguments.one)
    peak_bytes = read_peak(arguments.device) - before
    return {"peak_bytes": peak_bytes, "seconds": time.perf_counter() - start}


def inputs(
    num_tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_TD = torch.randn(num_tokens, hidden_size, device=device).to(dtype).requires_grad_()
    weight_VD = (torch.randn(vocab_size, hidden_size, device=device) / hidden_size**0.5).to(dtype).requires_grad_()
    return hidden_TD, weight_VD, torch.randint(vocab_size, (num_tokens, NUM_IDS), device=device)


def run(hidden_TD: Tensor, weight_VD: Tensor, ids_TJ: Tensor, chunk: str) -> None:
    if chunk == "plain":
        logits_TV = (hidden_TD @ weight_VD.T).float()
        logprobs_TJ = torch.log_softmax(logits_TV, -1).gather(-1, ids_TJ)
    else:
        chunk_tokens = len(hidden_TD) if chunk == "full" else int(chunk)
        logprobs_TJ = gather_logprobs(hidden_TD, weight_VD, ids_TJ, chunk_tokens=chunk_tokens).logprobs_TJ
    logprobs_TJ.sum().backward()


def start_peak(device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # 5 resets the high-water mark of the resident set.
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def read_peak(device: str) -> int:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}.")


if __name__ == "__main__":
    main()
