"""Trains a small Cosmos model on a text file and saves a checkpoint that every command of this project accepts.

What it does, in the order of `train_and_save` below: hold out the last tenth of the text, train a byte-level BPE
tokenizer on the rest, train the model of `configs/models/demo.json` (2.6 million parameters) on random windows of it,
and keep the weights that predict the held-out text best. Try it on any UTF-8 text of about a megabyte:

    python examples/train_demo.py shakespeare.txt --out checkpoints/mine                          # one GPU: minutes
    python examples/train_demo.py shakespeare.txt --out checkpoints/try --steps 60 --batch-size 4 --eval-every 30

The second command is for a CPU: it takes a few minutes and shows the loss fall; the whole training takes hours there.

The figure to watch is the held-out loss in nats per *character*: unlike nats per token it does not depend on the
tokenizer, so models with other vocabularies can be compared (1.0 nat is 1.44 bits).
"""

from __future__ import annotations

import copy
import hashlib
import math
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cosmos_export.config import CosmosAdvancedConfig
from cosmos_export.errors import ConfigError, CosmosExportError, TargetError
from cosmos_export.model import CosmosDecoder

DEMO_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "models" / "demo.json"
CHECKPOINT_FILES = {"config.json", "model.safetensors", "model_info.json", "tokenizer.json", "README.md"}
HELD_OUT = 0.1  # share of the text's characters, at its end
WARM_UP = 100  # steps until the full learning rate, a tenth of the run at most
AVERAGE_DECAY = 0.99  # the evaluated weights are a moving average over about the last 100 steps
PATIENCE = 5  # evaluations without a better held-out loss before the run stops
EVALUATION_TOKENS = 1 << 14  # tokens of one batch of the evaluation
NOT_SCORED = -100  # cross_entropy's own ignore_index


@dataclass(frozen=True)
class Run:
    """What the command line asked for."""

    text: Path
    out: Path
    config: Path
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    device: str
    eval_every: int
    compile: bool
    overwrite: bool


@dataclass(frozen=True)
class Best:
    """The weights (float32, on the CPU) with the lowest held-out loss of a run, in nats per character."""

    loss: float
    step: int
    weights: dict[str, Tensor]


def train_and_save(run: Run, console: Console) -> Best:
    check_target(run.out, run.overwrite)
    device = choose_device(run.device)
    config = CosmosAdvancedConfig.from_file(run.config)
    text = read_text(run.text)
    first_held_out = len(text) - int(len(text) * HELD_OUT)
    training, held_out = text[:first_held_out], text[first_held_out:]

    tokenizer = train_tokenizer(training, config.vocab_size)
    if tokenizer.get_vocab_size() < config.vocab_size:  # an id without text could be sampled but not decoded
        config.vocab_size = tokenizer.get_vocab_size()
        console.print(f"the text gives {config.vocab_size} tokens only: the model's vocabulary is made that small")
    tokens, unseen = (torch.tensor(tokenizer.encode(part).ids, device=device) for part in (training, held_out))
    exam = HeldOutText(unseen, len(held_out), config.max_sequence_length)
    if len(tokens) <= config.max_sequence_length:
        raise ConfigError(f"{len(tokens)} training tokens, need over {config.max_sequence_length}: use a longer text")

    torch.manual_seed(run.seed)
    model = CosmosDecoder(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters:,} parameters, {len(tokens):,} training tokens, {len(held_out):,} characters held out")
    best = train(model, tokens, exam, run, console)
    save(run, config, best, tokenizer, describe(run, best, text, len(held_out), parameters))
    return best


def read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # bytes: line ends stay as they are
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: the 256 bytes are tokens themselves, so any text encodes and decodes to itself."""
    if vocab_size < 256:
        raise ConfigError(f"vocab_size must be at least 256 (one token a byte), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


class HeldOutText:
    """Overlapping windows of the held-out tokens; each token but the very first is scored exactly once.

    A window scores its last half only, so that every prediction sees at least half a window of context; the first
    window has nothing before it and scores all. The last one is padded with targets that do not count.
    """

    def __init__(self, tokens: Tensor, characters: int, window: int) -> None:
        if len(tokens) < 2:
            raise ConfigError(f"the held-out part has {len(tokens)} tokens, need at least 2: use a longer text")
        stride = max(1, window // 2)
        count = 1 + max(0, math.ceil((len(tokens) - 1 - window) / stride))
        padding = (count - 1) * stride + window + 1 - len(tokens)
        self.characters = characters
        self.inputs = F.pad(tokens, (0, padding))[:-1].unfold(0, window, stride)  # (count, window)
        self.targets = F.pad(tokens, (0, padding), value=NOT_SCORED)[1:].unfold(0, window, stride).clone()
        self.targets[1:, : window - stride] = NOT_SCORED
        self.rows = max(1, EVALUATION_TOKENS // window)

    @torch.no_grad()
    def nats_per_character(self, model: nn.Module) -> float:
        total = 0.0
        for inputs, targets in zip(self.inputs.split(self.rows), self.targets.split(self.rows), strict=True):
            total += cross_entropy(model, inputs, targets, "sum").item()
        return total / self.characters


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten(), reduction=reduction)


def train(model: CosmosDecoder, tokens: Tensor, exam: HeldOutText, run: Run, console: Console) -> Best:
    """Trains for `run.steps` steps, or until the held-out loss no longer falls; returns the best averaged weights."""
    averaged = copy.deepcopy(model).eval()
    best, not_better, started = Best(math.inf, 0, {}), 0, time.monotonic()
    for step, train_loss in training(model, averaged, tokens, run, console):
        loss = exam.nats_per_character(averaged)
        if not math.isfinite(loss + train_loss):
            raise CosmosExportError(f"training diverged by step {step}: try a lower --learning-rate")
        seen = step * run.batch_size * model.config.max_sequence_length
        console.print(progress_line(step, run.steps, train_loss, loss, seen, time.monotonic() - started))
        not_better += 1
        if loss < best.loss:
            weights = {n: w.detach().to("cpu", torch.float32, copy=True) for n, w in averaged.state_dict().items()}
            best, not_better = Best(loss, step, weights), 0
        if not_better == PATIENCE and step < run.steps:
            console.print(f"no better held-out loss in {PATIENCE} evaluations: stopped")
            break
    return best


def training(
    model: CosmosDecoder, averaged: nn.Module, tokens: Tensor, run: Run, console: Console
) -> Iterator[tuple[int, float]]:
    """Updates the weights and their average; yields (step, mean loss in nats per token) when an evaluation is due."""
    forward: nn.Module = torch.compile(model) if run.compile else model  # type: ignore[assignment]
    optimizer = make_optimizer(model, run.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, run.steps))
    batches = random_windows(tokens, model.config.max_sequence_length, run.batch_size)
    losses: list[Tensor] = []
    steps = range(1, run.steps + 1)
    for step in track(steps, "training", console=console, transient=True, disable=not console.is_terminal):
        losses.append(train_step(forward, optimizer, *next(batches)))
        schedule.step()
        decay = min(AVERAGE_DECAY, step / (step + 9))  # quickly at first, when the old weights are worth nothing
        get_ema_multi_avg_fn(decay)(list(averaged.parameters()), list(model.parameters()), step)
        if step % run.eval_every == 0 or step == run.steps:
            yield step, torch.stack(losses).mean().item()
            losses.clear()


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor) -> Tensor:
    """One update; returns the loss in nats per token, left on the device so that the GPU never waits for Python."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.device.type == "cuda"):
        loss = cross_entropy(model, inputs, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


def random_windows(tokens: Tensor, window: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (inputs, targets), each (batch_size, window), the targets one token later."""
    offsets = torch.arange(window + 1, device=tokens.device)
    while True:
        starts = torch.randint(len(tokens) - window, (batch_size, 1), device=tokens.device)
        windows = tokens[starts + offsets]
        yield windows[:, :-1], windows[:, 1:]


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW whose weight decay pulls on matrices only: a norm's gain has no reason to be small."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=parameters[0].is_cuda)


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm_up = max(1, min(WARM_UP, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def progress_line(step: int, steps: int, train_loss: float, held_out_loss: float, tokens: int, seconds: float) -> str:
    left = timedelta(seconds=round(seconds / step * (steps - step)))
    return (
        f"step {step:>{len(str(steps))}}/{steps}  train {train_loss:.3f} nats/token  "
        f"held-out {held_out_loss:.4f} nats/char  {tokens / seconds:,.0f} tokens/s  {left} left"
    )


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this PyTorch sees no CUDA GPU; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_target(out: Path, overwrite: bool) -> None:
    """Refuses before the training what could not be saved after it, and never replaces files of someone else."""
    if not out.exists():
        return
    if not overwrite:
        raise TargetError(f"{out} exists: choose another --out, or replace it with --overwrite")
    others = [p.name for p in out.iterdir() if p.name not in CHECKPOINT_FILES] if out.is_dir() else [out.name]
    if others:
        raise TargetError(f"{out} is not just a checkpoint (it holds {others[0]}): choose another --out")


def save(run: Run, config: CosmosAdvancedConfig, best: Best, tokenizer: Tokenizer, readme: str) -> None:
    """Writes everything beside the target, then renames: the folder appears whole or not at all."""
    from cosmos_export.checkpoint import save_checkpoint

    out = run.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".train_demo_") as scratch:
        tokenizer_file, folder = Path(scratch, "tokenizer.json"), Path(scratch, "checkpoint")
        tokenizer.save(str(tokenizer_file))
        save_checkpoint(folder, config, best.weights, tokenizer=tokenizer_file)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        if out.exists():
            check_target(out, run.overwrite)
            shutil.rmtree(out)
        folder.rename(out)


def describe(run: Run, best: Best, text: str, held_out: int, parameters: int) -> str:
    """The README of the folder: the figure and all that is needed to get it again."""
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return f"""# A Cosmos model trained on `{run.text.name}`

Held-out loss: **{best.loss:.4f} nats per character**

```
{command_line(run)}
```

| | |
|---|---|
| held out | the last {HELD_OUT:.0%} of the text: {held_out:,} of {len(text):,} characters, in no training data |
| how it is measured | total cross-entropy of the held-out tokens in float32 / held-out characters; \
overlapping windows, each token scored once, with at least half a window of context |
| weights | moving average after step {best.step} of {run.steps}: the best of the evaluations every {run.eval_every} \
steps on the same held-out text, so the figure is slightly optimistic for other text |
| parameters | {parameters:,}, float32 |
| text | SHA-256 `{digest}` |
| PyTorch | {torch.__version__} |
"""


def command_line(run: Run) -> str:
    """The command with every setting spelt out, and names instead of the paths of one computer."""
    out = run.out.name if run.out.is_absolute() else str(run.out)
    words = ["python", "examples/train_demo.py", run.text.name, "--out", out]
    if run.config.resolve() != DEMO_CONFIG:
        words += ["--config", run.config.name]
    for name in ("steps", "batch_size", "learning_rate", "seed", "device", "eval_every"):
        words += [f"--{name.replace('_', '-')}", str(getattr(run, name))]
    return shlex.join([*words, *(["--compile"] if run.compile else [])])


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new checkpoint.")
@click.option("--config", type=click.Path(path_type=Path), default=DEMO_CONFIG, help="Model to train (a config.json).")
@click.option("--steps", type=click.IntRange(1), default=2000, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Windows of one step.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=2e-3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--eval-every", type=click.IntRange(1), default=100, show_default=True, help="Steps between evaluations.")
@click.option("--compile/--no-compile", default=False, show_default=True, help="Use torch.compile.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in --out.")
def main(**options: object) -> None:
    run = Run(**options)  # type: ignore[arg-type]
    try:
        best = train_and_save(run, Console(highlight=False, soft_wrap=True))
    except torch.OutOfMemoryError:
        raise click.ClickException("the GPU's memory is not enough: try a lower --batch-size") from None
    except (CosmosExportError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{run.out}: {best.loss:.4f} nats per held-out character")


if __name__ == "__main__":
    main()
