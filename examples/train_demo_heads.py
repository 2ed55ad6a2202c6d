"""Gives a checkpoint that `train_demo.py` made its capability heads, trained on the same text.

What it does, in the order of `train_and_save` below: leave the backbone as it is, bit for bit; train the safety checks
on sentences written for the purpose and on text that was broken on purpose (`demo_heads/safety.py`); train reasoning,
memory, fusion and evaluation on the vectors that the backbone gives for random windows of the text, with the plain
decoder as their teacher and a random set of capabilities at each position (`demo_heads/reading.py`, `evaluation.py`);
round the heads to float16; and measure on the held-out text, call after call as in generation, what every set of
capabilities costs (`demo_heads/exam.py`). The figures go into the folder's README.md.

    python examples/train_demo_heads.py shakespeare.txt --checkpoint checkpoints/demo --out checkpoints/demo --overwrite

For the demo that is 11 minutes of CPU time on one core (`OMP_NUM_THREADS=1`) and 4 more to measure. Held-out text then
reads at 3.239 nats per token through all four capabilities, 0.7 % better than through the plain decoder (3.262), and
better than through it for every set of capabilities and every mode of reasoning.
"""

from __future__ import annotations

import random
import shlex
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from demo_heads.card import describe, with_section
from demo_heads.evaluation import evaluation_losses
from demo_heads.figures import Figures, measure
from demo_heads.reading import random_calls, reading_losses
from demo_heads.safety import train_safety
from demo_heads.sentences import examples
from demo_heads.starting_points import as_identity, as_plain_decoder
from demo_heads.storage import heads_of, save
from demo_heads.texts import Corpus
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor
from train_demo import HELD_OUT, HeldOutText, check_target, learning_rate_factor, read_text

from cosmos_export.checkpoint import Checkpoint
from cosmos_export.errors import CheckpointError, ConfigError, CosmosExportError
from cosmos_export.model import CosmosAdvancedModel
from cosmos_export.model.loading import load_decoder

SENTENCES_TRAINED, SENTENCES_MEASURED = 80, 40  # texts of each label
SHORTEST = 200  # held-out tokens, from which pieces of text are taken
REPORTS = 10  # lines of progress in a training


@dataclass(frozen=True)
class Run:
    """What the command line asked for."""

    text: Path
    checkpoint: Path
    out: Path
    steps: int
    safety_steps: int
    learning_rate: float
    seed: int
    compared_windows: int
    overwrite: bool


def train_and_save(run: Run, console: Console) -> Figures:
    check_target(run.out, run.overwrite)
    checkpoint = Checkpoint.open(run.checkpoint)
    tokenizer = tokenizer_of(checkpoint)
    text = read_text(run.text)
    first_held_out = len(text) - int(len(text) * HELD_OUT)
    training, held_out = text[:first_held_out], text[first_held_out:]
    corpus, unseen = (Corpus.of(tokenizer.encode(part).ids, tokenizer) for part in (training, held_out))
    window = checkpoint.config.max_sequence_length
    if len(unseen.tokens) <= max(window, SHORTEST):
        raise ConfigError(
            f"{run.text}: {len(unseen.tokens)} tokens held out, need over {max(window, SHORTEST)}: use a longer text"
        )
    exam = HeldOutText(unseen.tokens, len(held_out), window)

    torch.manual_seed(run.seed)
    model, started = model_with_new_heads(checkpoint), time.process_time()
    sentences = examples(training, random.Random(run.seed), SENTENCES_TRAINED, held_out=False)
    console.print(f"{len(corpus.tokens):,} training tokens, {len(sentences):,} texts for the safety checks")
    train_safety(model, corpus, tokenizer, sentences, run.safety_steps, console)
    train_reading(model, corpus, run, console)
    minutes = (time.process_time() - started) / 60
    console.print(f"trained in {minutes:.0f} minutes of CPU time; measuring")
    source = random.Random(run.seed + 1)
    texts = {held: examples(held_out, source, SENTENCES_MEASURED, held_out=held) for held in (False, True)}
    figures = measure(model, exam, unseen, tokenizer, texts, run.compared_windows)
    readme = with_section(run.checkpoint / "README.md", describe(figures, command_line(run), minutes))
    save(run.out, checkpoint, model, readme, overwrite=run.overwrite)
    return figures


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.tokenizer is None:
        raise CheckpointError(f"{checkpoint.origin['location']} has no tokenizer.json, which makes tokens of the text")
    return Tokenizer.from_file(str(checkpoint.tokenizer))


def model_with_new_heads(checkpoint: Checkpoint) -> CosmosAdvancedModel:
    """The checkpoint's backbone, frozen, under heads that start from giving back what they are given."""
    model = CosmosAdvancedModel(checkpoint.config)
    backbone = load_decoder(checkpoint)
    model.requires_grad_(False).load_state_dict(backbone.state_dict(), strict=False)
    for head in heads_of(model).values():
        head.requires_grad_()
    size = checkpoint.tensor("norm.weight").float().square().mean().sqrt().item()  # about that of a normed vector
    as_plain_decoder(model.capability_fusion, size)
    as_identity(model.evaluation_system.self_correction.corrector)
    return model.eval()


def train_reading(model: CosmosAdvancedModel, corpus: Corpus, run: Run, console: Console) -> None:
    """Trains all heads but safety, which has been trained and is only read through."""
    heads = [head for head in heads_of(model).values() if head is not model.safety_system]
    parameters = [parameter for head in heads for parameter in head.train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, run.steps))
    steps, every, sums = range(1, run.steps + 1), max(1, run.steps // REPORTS), Counter[str]()
    for step in track(steps, "reading", console=console, transient=True, disable=not console.is_terminal):
        losses = step_losses(model, corpus)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        schedule.step()
        sums.update({name: loss.item() for name, loss in losses.items()})
        if step % every == 0:
            console.print(f"step {step}/{run.steps}  " + "  ".join(f"{n} {s / every:.3f}" for n, s in sums.items()))
            sums.clear()
    model.eval()


def step_losses(model: CosmosAdvancedModel, corpus: Corpus) -> dict[str, Tensor]:
    hidden, calls = random_calls(model, corpus)
    losses, fused = reading_losses(model, hidden, calls)
    return losses | evaluation_losses(model, corpus, calls, fused)


def command_line(run: Run) -> str:
    """The command with every setting spelt out, and names instead of the paths of one computer."""
    checkpoint, out = (p.name if p.is_absolute() else str(p) for p in (run.checkpoint, run.out))
    words = ["python", "examples/train_demo_heads.py", run.text.name, "--checkpoint", checkpoint, "--out", out]
    for name in ("steps", "safety_steps", "learning_rate", "seed", "compared_windows"):
        words += [f"--{name.replace('_', '-')}", str(getattr(run, name))]
    return shlex.join([*words, *(["--overwrite"] if run.overwrite else [])])


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.argument("text", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--checkpoint",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the trained model whose backbone is kept.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the new checkpoint.")
@click.option("--steps", type=click.IntRange(1), default=600, show_default=True, help="Of all heads but safety.")
@click.option("--safety-steps", type=click.IntRange(1), default=3000, show_default=True, help="Of the safety checks.")
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--compared-windows",
    type=click.IntRange(1),
    default=12,
    show_default=True,
    help="Held-out windows on which all sets are compared.",
)
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in --out.")
def main(**options: object) -> None:
    run = Run(**options)  # type: ignore[arg-type]
    try:
        figures = train_and_save(run, Console(highlight=False, soft_wrap=True))
    except (CosmosExportError, OSError) as error:
        raise click.ClickException(str(error)) from None
    loss, excess = figures.whole.loss, figures.whole.excess
    click.echo(f"{run.out}: {loss:.4f} nats per held-out token, {excess:+.2%} beside the plain decoder")


if __name__ == "__main__":
    main()
