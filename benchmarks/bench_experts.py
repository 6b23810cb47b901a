"""
LoRA experts against everything they could be replaced with: time, memory and agreement, as ratios inside one run.

    python benchmarks/bench_experts.py [--only own-mid-fp32] [--repeats 7] [--threads 1] [--device cuda] \
        [--output benchmarks/results/experts.md]

Every candidate of a case lives in a process of its own, since libraries keep kernels per shape and per process; the
candidates take turns step by step, in rotating order, so that whatever else the machine does meets all of them. Shown
are medians of the quotients of one round, with the middle half of them. With one thread the clock is the process's CPU
time. Routing is drawn anew from a skewed router; "fixed" repeats one draw, "changing" draws at every step.

(a) dense SwiGLU of equal active FLOPs, `F.linear`; (a*) the same through the fastest product (the limit); (b) the
original: a loop over PEFT-wrapped layers; (b ckpt) under gradient checkpointing; (c) Mixtral's experts under PEFT's
`target_parameters`; (d) MixLoRA; (e), on a GPU, our layer through torch's grouped kernels.
"""

import argparse
import dataclasses
import multiprocessing
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
from comparing import WARM_UP, publish, quotient


# Hidden, intermediate, tokens; and the activation of an LLM whose layers are so large, where it is not SiLU.
SHAPES = {
    "tiny": (64, 128, 256),
    "mid": (512, 1376, 1024),
    "large": (1024, 2816, 2048),
    "7b": (4096, 11008, 8192),
    "qwen3-0.6b": (1024, 3072, 1024),
    "gemma3-1b": (1152, 6912, 1024),
}
ACTIVATION_OF = {"gemma3-1b": "gelu_pytorch_tanh"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Relative error (Frobenius) against (b) that counts as agreement: rounding of the dtype, summed in another order.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row block of the table."""

    storage: str  # own | shared
    shape: str
    dtype: str
    kind: str = "train"  # forward | train | changing | decode
    experts: int = 4
    rank: int = 8
    tokens: int | None = None

    @property
    def name(self) -> str:
        """What `--only` looks for."""
        tokens = "" if self.tokens is None else f"-T{self.tokens}"
        return f"{self.storage}-{self.shape}-{self.dtype}-{self.kind}-E{self.experts}-r{self.rank}{tokens}"

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.tokens or (1 if self.kind == "decode" else SHAPES[self.shape][2])


def cases(device: str) -> list[Case]:
    """What is measured: every target, and what lies around it."""
    if device != "cpu":
        listed = [Case(storage, "7b", "bf16", kind) for storage in ("own", "shared") for kind in ("train", "decode")]
        return listed + [Case("own", shape, "bf16", "train") for shape in ("mid", "large")]
    listed = []
    for storage in ("own", "shared"):
        for dtype in DTYPES:
            listed += [Case(storage, shape, dtype, "forward") for shape in ("mid", "large")]
            listed += [Case(storage, shape, dtype, "train") for shape in ("tiny", "mid", "large")]
            listed += [Case(storage, shape, dtype, "changing") for shape in ("tiny", "mid")]
            listed += [Case(storage, "mid", dtype, "train", rank=64), Case(storage, "mid", dtype, "train", experts=8)]
            listed += [Case(storage, "mid", dtype, "train", experts=64)]
            listed += [Case(storage, shape, dtype, "decode") for shape in ("tiny", "mid", "large")]
            listed += [Case(storage, "mid", dtype, "decode", tokens=8)]
    for shape in ("qwen3-0.6b", "gemma3-1b"):
        for storage, dtype in (("own", "fp32"), ("shared", "fp32"), ("shared", "bf16")):
            listed += [Case(storage, shape, dtype, kind) for kind in ("forward", "train", "decode")]
    return listed


def candidates(case: Case, device: str) -> list[str]:
    """Names of what competes in a case."""
    grouped = ["(e)"] * (device != "cpu")
    if case.kind == "decode":
        return ["ours, merged"] * (case.storage == "own") + ["ours, live", "(a)", "(b)", "(c)"] + grouped
    names = grouped + ["ours"] + ["ours, recompute", "(b ckpt)"] * (case.kind == "train") + ["(a)", "(a*)", "(b)"]
    return names + (["(c)"] if case.storage == "own" else ["(d)"])


class Candidate:
    """One layer, or, when decoding, several that take turns so that their weights are not in a cache."""

    def __init__(self, case: Case, name: str, device: str):
        # Not at the top: the parent process must not start threads before it forks.
        import expert_baselines as layers

        torch.manual_seed(0)
        hidden, inner, _ = SHAPES[case.shape]
        shape = {"hidden_size": hidden, "intermediate_size": inner, "num_experts": case.experts}
        shape |= {"expert_lora_rank": case.rank, "shared_expert_base": case.storage == "shared"}
        shape |= {"hidden_act": ACTIVATION_OF.get(case.shape, "silu")}
        recompute = "recompute" if name == "ours, recompute" else "save"
        build = {
            "(a)": layers.Dense,
            "(a*)": layers.FastestDense,
            "(b)": layers.OriginalExperts,
            "(b ckpt)": lambda experts: layers.OriginalExperts(experts, checkpointed=True),
            "(c)": layers.MixtralPeftExperts,
            "(d)": layers.MixLoraExperts,
        }
        copies = 1
        self.case, self.device, self.turn = case, device, 0
        if case.kind == "decode":
            hit = len(self.routing(0)[1].unique())
            build["(a)"] = lambda experts: layers.DenseOnSameBytes(experts, hit)
            bytes_of_one = 3 * hidden * inner * DTYPES[case.dtype].itemsize * case.experts
            copies = max(1, min(24, int(3e8 // bytes_of_one)))
        self.layers = []
        for _ in range(copies):
            with torch.device(device):
                experts = layers.ours(shape, expert_activations=recompute).to(DTYPES[case.dtype])
                experts.experts_implementation = "grouped_mm" if name == "(e)" else "auto"
                if name == "ours, merged":
                    experts.merge_lora()
                    experts.requires_grad_(False)
                self.layers.append(build.get(name, lambda experts: experts)(experts))

    def step(self, seed: int) -> float:
        """Seconds of one pass on the tokens and routing that `seed` draws."""
        routing = self.routing(seed)
        # Short passes several times in a row, as in life: the first one meets caches that others have used.
        passes = {"tiny": 48, "mid": 12}.get(self.case.shape, 4) if self.case.kind == "decode" else 1
        passes = 4 if self.case.shape == "tiny" and self.case.kind == "train" else passes
        self.synchronize()
        clock = time.process_time if torch.get_num_threads() == 1 and self.device == "cpu" else time.perf_counter
        start = clock()
        for _ in range(passes):
            layer = self.layers[self.turn % len(self.layers)]
            self.turn += 1
            self.run(layer, *routing)
            layer.zero_grad(set_to_none=True)
        self.synchronize()
        return (clock() - start) / passes

    def run(self, layer: torch.nn.Module, tokens, index, weights, grad_output) -> torch.Tensor:
        """The pass that the case names."""
        if self.case.kind in ("forward", "decode"):
            with torch.no_grad():
                return layer(tokens, index, weights)
        output = layer(tokens, index, weights)
        output.backward(grad_output if output.shape == grad_output.shape else grad_output.repeat(2, 1))
        return output

    def routing(self, seed: int) -> tuple[torch.Tensor, ...]:
        """Tokens, experts and weights as a router with preferences gives them, and an incoming gradient."""
        case, generator = self.case, torch.Generator().manual_seed(seed)
        shape = (case.num_tokens, SHAPES[case.shape][0])
        tokens, grad_output = (torch.randn(*shape, generator=generator) for _ in range(2))
        logits = torch.randn(case.num_tokens, case.experts, generator=generator)
        logits += 0.8 * torch.randn(case.experts, generator=generator)
        chosen, index = logits.topk(2)
        tokens, weights, grad_output = (
            tensor.to(self.device, DTYPES[case.dtype]) for tensor in (tokens, chosen.softmax(-1), grad_output)
        )
        return tokens.requires_grad_(), index.to(self.device), weights.requires_grad_(), grad_output

    def memory(self, _: int) -> tuple[float, float]:
        """MiB that a forward pass leaves for backward, and the most that a step holds, both above the weights."""
        routing = self.routing(0)
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            output = self.layers[0](*routing[:3])
            kept = torch.cuda.memory_allocated() - before
            output.backward(torch.ones_like(output))
            return kept / 2**20, (torch.cuda.max_memory_allocated() - before) / 2**20
        tracked = []
        for passes in ("forward", "both"):
            with torch.profiler.profile(profile_memory=True) as profile:
                output = self.layers[0](*routing[:3])
                if passes == "both":
                    output.backward(torch.ones_like(output))
            events = profile.profiler.kineto_results.events()
            sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
            held, most = 0, 0
            for _, size in sorted(sizes):
                held += size
                most = max(most, held)
            tracked.append((held, most))
        return tracked[0][0] / 2**20, tracked[1][1] / 2**20

    def results(self, _: int) -> list:
        """Output and gradients as lists of arrays, for comparison; empty where the numbers are others by nature."""
        layer, routing = self.layers[0], self.routing(0)
        output = self.run(layer, *routing)
        tensors = [output.detach()]
        if self.case.kind in ("train", "changing"):
            factors = ("gate_up_a", "gate_up_b", "down_a", "down_b")
            learned = getattr(layer, "lora_gradients", lambda: [getattr(layer.lora, name).grad for name in factors])
            tensors += [routing[0].grad, routing[2].grad, *learned()]
            layer.zero_grad(set_to_none=True)
        return [tensor.double().cpu().numpy() for tensor in tensors]

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device != "cpu":
            torch.cuda.synchronize()


def serve(connection, case: Case, name: str, device: str, threads: int) -> None:
    """A candidate's process: answers (method, argument) until it is told to end."""
    torch.set_num_threads(threads)
    candidate = Candidate(case, name, device)
    while (order := connection.recv()) is not None:
        method, argument = order
        connection.send(getattr(candidate, method)(argument))


def measure(case: Case, repeats: int, device: str, threads: int) -> dict[str, dict]:
    """For each candidate: seconds of every round, kept and peak memory, largest relative error against (b)."""
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    workers = {}
    for name in candidates(case, device):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, case, name, device, threads), daemon=True)
        process.start()
        workers[name] = (here, process)

    def ask(name: str, method: str, argument: int = 0):
        workers[name][0].send((method, argument))
        return workers[name][0].recv()

    found = {name: {"seconds": []} for name in workers}
    if case.kind == "changing":  # the shapes of the past are part of the past
        warm_up, rounds = 20, max(30, repeats)
    elif case.kind == "decode" or case.shape == "tiny":
        warm_up, rounds = 3, max(11, repeats)
    else:
        warm_up, rounds = WARM_UP, repeats
    names = list(workers)
    for number in range(warm_up + rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds = ask(name, "step", number if case.kind == "changing" else 0)
            fixed = ask(name, "step", 0) if case.kind == "changing" else None
            if number >= warm_up:
                found[name]["seconds"].append(seconds)
                found[name].setdefault("fixed", []).append(fixed)
    wanted = ask("(b)", "results")
    for name in names:
        if name in ("(a)", "(a*)", "(c)"):
            continue
        pairs = zip(ask(name, "results"), wanted, strict=True)
        found[name]["error"] = max(float(((a - b) ** 2).sum() ** 0.5 / (b**2).sum() ** 0.5) for a, b in pairs)
    if case.kind == "train":
        for name in names:
            found[name]["memory"] = ask(name, "memory")
    for connection, process in workers.values():
        connection.send(None)
        process.join()
    return found


def lines_of(case: Case, found: dict[str, dict]) -> list[str]:
    """Table rows of one case."""
    lines = []
    for name, mine in found.items():
        if not name.startswith("ours"):
            continue
        cells = [case.name, name, f"{1000 * statistics.median(mine['seconds']):.3g}"]
        for other in ("(a)", "(a*)"):
            cells.append(quotient(mine["seconds"], found[other]["seconds"]) if other in found else "")
        rival = "(b ckpt)" if name == "ours, recompute" else "(b)"
        for other in (rival, "(c)", "(d)", "(e)"):
            cells.append(quotient(found[other]["seconds"], mine["seconds"]) if other in found else "")
        cells.append(quotient(mine["seconds"], mine["fixed"]) if case.kind == "changing" else "")
        if "memory" in mine:
            (kept, peak), (rival_kept, rival_peak) = mine["memory"], found["(b)"]["memory"]
            cells.append(f"{kept:.1f} / {peak:.1f}")
            cells.append(f"{kept / rival_kept:.3f} / {peak / rival_peak:.3f}")
        else:
            cells += ["", ""]
        error = mine["error"]
        cells.append(f"{error:.1e}" + ("" if error <= TOLERANCE[case.dtype] else " DISAGREES"))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def product_ratio(dtype: torch.dtype) -> float:
    """g: how many times faster the fastest product is than `F.linear`, at the middle shape."""
    from expert_baselines import _linear

    rows, weight = torch.randn(512, 512, dtype=dtype), torch.randn(1376, 512, dtype=dtype)
    quotients = []
    for _ in range(21):
        times = []
        for product in (torch.nn.functional.linear, _linear):
            start = time.perf_counter()
            for _ in range(5):
                product(rows, weight)
            times.append(time.perf_counter() - start)
        quotients.append(times[0] / times[1])
    return statistics.median(quotients)


def processor() -> str:
    """The processor's name and family, where Linux tells them."""
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{fields.get('model name', platform.machine())} (family {fields.get('cpu family')}, {fields.get('model')})"


def main() -> None:
    """Prints the table row by row, and writes it where `--output` says."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--only", default="", help="Words that a case's name must hold, divided by spaces.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        publish(["There is no GPU here, so nothing was measured on one."], args.output)
        return
    g = (
        f"; g = {product_ratio(torch.float32):.2f} (fastest fp32 product over `F.linear`)"
        if args.device == "cpu"
        else ""
    )
    device = processor() if args.device == "cpu" else torch.cuda.get_device_name()
    lines = [
        f"LoRA experts, {date.today()}, torch {torch.__version__}, {device}, {args.threads} thread(s){g}. "
        f"Top 2; medians over at least {args.repeats} rounds (middle half). "
        + "GPU: not run."
        * (args.device == "cpu"),
        "",
        "| case | | ms | time / (a) | time / (a*) | (b) / time | (c) / time | (d) / time | (e) / time "
        "| changing / fixed | kept / peak MiB | kept / peak over (b) | error |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    print("\n".join(lines), flush=True)
    for case in cases(args.device):
        if all(word in case.name for word in args.only.split()):
            added = lines_of(case, measure(case, args.repeats, args.device, args.threads))
            print("\n".join(added), flush=True)
            lines += added
            if args.output:  # what was measured stays, should time run out
                args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
