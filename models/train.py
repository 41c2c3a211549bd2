"""Train a small long-context model on source text with planted facts, and export it for mlx-lm and Hugging Face.

    python models/train.py llama --library /usr/lib/python3.13 --out models/tiny-llama --minutes 9

Length grows in three phases by share of the time (1K, 4K, then the full context of 8,704 tokens); batches of about 66K
tokens come from worker processes. The learning rate falls to zero at the end of the time given. Each minute or so the
model is judged on held-out files and held-out needles and exported; at the end the *exported fp16 weights* are loaded
again and judged in fp16. Needs PyTorch, tokenizers and safetensors, which the package itself does not.
"""

import argparse
import json
import math
import multiprocessing as mp
import os
import platform
import random
import sys
import time
from pathlib import Path

import data
import numpy as np
import torch
from network import Config, Network, hf_config, preset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def phases(context: int) -> list[tuple[float, int, int]]:
    """(share of the time at which the phase ends, tokens per sequence, sequences per batch)."""
    return [(0.25, 1024, 64), (0.42, 4096, 16), (1.0, context, 8)] if context > 4096 else [(1.0, context, 4)]


def make_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with each digit a token of its own; `<|bos|>` opens every text."""
    tok = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = list(data.SPECIAL)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(texts, trainer)
    bos = (data.BOS, tok.token_to_id(data.BOS))
    tok.post_processor = processors.TemplateProcessing(
        single=f"{data.BOS} $A", pair=f"{data.BOS} $A {data.BOS} $B", special_tokens=[bos]
    )
    return tok


def answer_mask(ids: np.ndarray, tok: Tokenizer) -> np.ndarray:
    """1 for every token of an answer: what follows `<|assistant|>`, up to and including `<|eos|>`."""
    start, end = tok.token_to_id(data.ASSISTANT), tok.token_to_id(data.EOS)
    level = np.cumsum(ids == start, axis=-1) - np.cumsum(ids == end, axis=-1)
    inside = (level > 0) & (ids != start)
    return (inside | ((ids == end) & (np.roll(level, 1, axis=-1) > 0))).astype(np.uint8)


class Batches:
    """Worker processes that fill a queue with batches of the current phase's shape."""

    def __init__(self, library: data.Library, tok: Tokenizer, shapes: list[tuple[int, int]], workers: int, seed: int):
        context = mp.get_context("fork")
        self.phase = context.Value("i", 0)
        self.queue = context.Queue(4 * workers)
        self.processes = [
            context.Process(target=self._work, args=(library, tok, shapes, seed * 1000 + i), daemon=True)
            for i in range(workers)
        ]
        for p in self.processes:
            p.start()

    def _work(self, library: data.Library, tok: Tokenizer, shapes: list[tuple[int, int]], seed: int) -> None:
        torch.set_num_threads(1)
        rng = random.Random(seed)
        while True:
            phase = self.phase.value
            length, count = shapes[phase]
            rows = [data.sequence(rng, library, tok, length + 1) for _ in range(count)]
            self.queue.put((phase, np.array(rows, dtype=np.int16)))

    def get(self, phase: int) -> np.ndarray:
        self.phase.value = phase
        while True:
            made_for, rows = self.queue.get()
            if made_for == phase:
                return rows

    def close(self) -> None:
        for p in self.processes:
            p.terminate()


class Judge:
    """Held-out measures: bits per byte of text, and exact answers to needles by length and depth."""

    def __init__(self, held: dict[str, str], tok: Tokenizer, device: str):
        self.library, self.tok, self.device = data.Library(held, augment=False), tok, device
        self.held = held

    def bits_per_byte(self, net: Network, length: int, most: int) -> float:
        """Over held-out files in order, each cut into pieces of `length` tokens that open with `<|bos|>`."""
        bos, nll, size = self.tok.token_to_id(data.BOS), 0.0, 0
        pieces: list[list[int]] = []
        for name in sorted(self.held):
            ids = self.tok.encode(self.held[name], add_special_tokens=False).ids
            pieces += [ids[i : i + length] for i in range(0, len(ids), length)]
        random.Random(0).shuffle(pieces)
        for piece in pieces[:most]:
            ids = torch.tensor([[bos, *piece]], device=self.device)
            logits = net.logits(net(ids[:, :-1])).float()
            nll += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
            size += len(self.tok.decode(piece).encode())
        return nll / math.log(2) / size

    def needles(
        self, net: Network, length: int, count: int, distractors: int = 0, kind: str = data.KINDS[0], batch: int = 8
    ) -> list[tuple[float, bool]]:
        """(depth, answered exactly) for `count` held-out needles in prompts of `length` tokens, depths spread evenly.

        The answer is fed in behind the prompt; it counts when every token of it and the end of the turn are the
        argmax, which is the case exactly when greedy decoding gives that answer.
        """
        rng = random.Random(f"needle {length} {distractors} {kind}")
        results: list[tuple[float, bool]] = []
        for low in range(0, count, batch):
            rows = [self._row(rng, (i + 0.5) / count, length, distractors, kind) for i in range(low, low + batch)]
            rows = rows[: count - low]
            longest = max(len(p) + len(a) for _, p, a in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            for r, (_, p, a) in enumerate(rows):
                ids[r, : len(p) + len(a)] = torch.tensor(p + a)
            hidden = net(ids.to(self.device))
            for r, (depth, p, a) in enumerate(rows):
                best = net.logits(hidden[r, len(p) - 1 : len(p) + len(a) - 1]).argmax(-1)
                results.append((depth, best.tolist() == a))
        return results

    def _row(
        self, rng: random.Random, depth: float, length: int, distractors: int, kind: str
    ) -> tuple[float, list[int], list[int]]:
        text = data.cut(self.library.text(rng, 5 * length), self.tok, length - 60 - 30 * distractors)
        content, answer = data.needle(rng, text, depth, distractors, kind)
        whole = data.render([(content, answer)])
        ids = self.tok.encode(whole, add_special_tokens=False).ids
        at = len(ids) - 1 - ids[::-1].index(self.tok.token_to_id(data.ASSISTANT))
        return depth, ids[: at + 1], ids[at + 1 :]


def accuracy(results: list[tuple[float, bool]]) -> float:
    return sum(ok for _, ok in results) / len(results)


def export(net: Network, tok: Tokenizer, out: Path) -> None:
    """Write a folder that mlx-lm and Hugging Face load: fp16 weights, configuration, tokenizer with template."""
    out.mkdir(parents=True, exist_ok=True)
    bos, eos = tok.token_to_id(data.BOS), tok.token_to_id(data.EOS)
    weights = {f"model.{n}": p.detach().to("cpu", torch.float16).contiguous() for n, p in net.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tok.save(str(out / "tokenizer.json"))
    files = {
        "config.json": hf_config(net.config, bos, eos),
        "generation_config.json": {"bos_token_id": bos, "eos_token_id": eos, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": data.BOS,
            "eos_token": data.EOS,
            "pad_token": data.EOS,
            "model_max_length": net.config.context,
            "clean_up_tokenization_spaces": False,
            "chat_template": data.CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def load(folder: Path, config: Config, device: str) -> Network:
    net = Network(config)
    weights = load_file(folder / "model.safetensors")
    net.load_state_dict({n.removeprefix("model."): w.float() for n, w in weights.items()})
    return net.to(device)


@torch.no_grad()
def final_report(folder: Path, config: Config, judge: Judge, needles: int) -> dict:
    """Judge the exported weights in fp16 on the GPU (fp32 elsewhere): the bar, and more than the bar."""
    net = load(folder, config, judge.device).eval()
    if judge.device == "cuda":
        net = net.half()
    full = min(8192, config.context)
    report: dict = {"bits_per_byte": {str(n): round(judge.bits_per_byte(net, n, 10_000), 4) for n in (1024, full)}}
    rows = judge.needles(net, full, needles)
    report["bar"] = {"tokens": full, "needles": needles, "accuracy": accuracy(rows)}
    deciles = [[r for r in rows if int(r[0] * 10) == d] for d in range(10)]
    report["bar"]["by_depth_decile"] = [accuracy(d) if d else None for d in deciles]
    report["needle"] = {
        f"{kind}, {others} others, {n} tokens": accuracy(judge.needles(net, n, max(8, needles // 2), others, kind))
        for kind, others in ((data.KINDS[0], 0), (data.KINDS[0], 8), (data.KINDS[1], 0), (data.KINDS[2], 0))
        for n in (1024, 2048, 4096, full)
        if n <= full
    }
    return report


def train(args: argparse.Namespace) -> None:
    begin = time.time()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.cache_size_limit = 64
    device = "cuda" if args.device == "cuda" else "cpu"
    config = preset(args.arch)
    if args.smoke:
        config = Config(args.arch, hidden=64, layers=3, ffn=96, context=512, window=config.window and 64)
    train_files, held_files = data.read_library(args.library)
    if len(train_files) < 100:
        raise SystemExit(
            f"{args.library} holds {len(train_files)} source files: give --library a Python standard library"
        )
    if args.tokenizer:
        tok = Tokenizer.from_file(str(args.tokenizer))
    else:
        tok = make_tokenizer(list(train_files.values()), config.vocab)
    schedule = phases(config.context)
    shapes = [(length, count) for _, length, count in schedule]
    batches = Batches(data.Library(train_files, augment=True), tok, shapes, args.workers, args.seed)

    net = load(args.resume, config, device) if args.resume else Network(config).to(device)
    judge = Judge(held_files, tok, device)
    decay = [p for p in net.parameters() if p.ndim == 2]
    other = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=device == "cuda")
    if device == "cuda":
        for layer in net.layers:
            layer.compile(dynamic=False)

    args.out.mkdir(parents=True, exist_ok=True)
    log = (args.out / "training.jsonl").open("a" if args.resume else "w")

    def note(**record) -> None:
        line = json.dumps({"seconds": round(time.time() - begin, 1), **record})
        log.write(line + "\n")
        log.flush()
        print(config.arch, line, flush=True)

    chars = sum(map(len, train_files.values()))
    note(
        arch=config.arch,
        parameters=sum(p.numel() for p in net.parameters()),
        files=len(train_files),
        characters=chars,
        held_out_files=len(held_files),
        minutes=args.minutes,
        rate=args.rate,
        seed=args.seed,
        resumed=bool(args.resume),
        device=torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        torch=torch.__version__,
        python=platform.python_version(),
    )
    total = args.minutes * 60 - (time.time() - begin)
    start = time.time()
    step, tokens, next_note, next_judge = 0, 0, 0, args.every
    while (progress := (time.time() - start) / total) < 1:
        where = max(progress, args.skip)
        phase = next(i for i, (end, _, _) in enumerate(schedule) if where < end)
        rows = batches.get(phase)
        mask = torch.from_numpy(answer_mask(rows, tok)[:, 1:]).to(device, torch.float32, non_blocking=True)
        ids = torch.from_numpy(rows).to(device, torch.long, non_blocking=True)
        rate = args.rate * min(1, (step + 1) / 100) * max(0.01, 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device, dtype=torch.bfloat16):
            text, answers = net.loss(ids[:, :-1], ids[:, 1:], mask)
        (text + args.answer_weight * answers).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids[:, 1:].numel()
        if step >= next_note:
            note(
                step=step,
                tokens=tokens,
                length=schedule[phase][1],
                text_loss=round(text.item(), 4),
                answer_loss=round(answers.item(), 4),
                rate=round(rate, 6),
            )
            next_note = step + args.note
        if time.time() - start > next_judge:
            next_judge += args.every
            measure(net, judge, config, note, step)
            export(net, tok, args.out)
    batches.close()
    measure(net, judge, config, note, step)
    export(net, tok, args.out)
    note(trained=True, step=step, tokens=tokens, seconds_per_step=round((time.time() - start) / step, 4))
    report = final_report(args.out, config, judge, 200 if device == "cuda" else 8)
    (args.out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    note(**report)


@torch.no_grad()
def measure(net: Network, judge: Judge, config: Config, note, step: int) -> None:
    """A quick look at the network in training: 16 pieces of held-out text, 32 needles at two lengths."""
    net.eval()
    with torch.autocast(judge.device, dtype=torch.bfloat16):
        full = min(8192, config.context)
        found = {
            f"needle_{n}": accuracy(judge.needles(net, n, 32, others, kind))
            for n, others, kind in ((1024, 4, data.KINDS[0]), (full, 4, data.KINDS[0]))
            if n <= full
        }
        note(step=step, held_out_bits_per_byte=round(judge.bits_per_byte(net, 1024, 64), 4), **found)
    net.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("arch", choices=("llama", "gemma", "qwen"))
    parser.add_argument("--library", type=Path, required=True, help="a Python standard library, best with its tests")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for training, final judgement not included")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json made by an earlier run")
    parser.add_argument("--resume", type=Path, help="a folder exported earlier, whose weights are the start")
    parser.add_argument("--skip", type=float, default=0.0, help="share of the length schedule to leave out")
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--answer-weight", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 4) - 2))
    parser.add_argument("--every", type=float, default=75, help="seconds between judgements")
    parser.add_argument("--note", type=int, default=50, help="steps between notes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="a much smaller network, to try the script on a CPU")
    train(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
