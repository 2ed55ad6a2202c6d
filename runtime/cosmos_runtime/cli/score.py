"""`cosmos-run score`: how likely the model finds a text."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cosmos_runtime.cli.text import read_file, read_text

if TYPE_CHECKING:
    from cosmos_runtime.scoring import Score
    from cosmos_runtime.tokenizer import Tokenizer


@click.command("score")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", metavar="TEXT", help="Text to score; '-' (or nothing, in a pipe) reads standard input.")
@click.option("--file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="UTF-8 file to score.")
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Device.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: the physical cores there are.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every token's log-probability.")
def score_command(
    bundle: Path, text: str | None, file: Path | None, provider: str, threads: int | None, as_json: bool
) -> None:
    """Show how likely the model in BUNDLE finds a text.

    Log-probabilities are natural logarithms (nats); the first token is given, not scored. Text from standard input
    loses one newline at its end, a file is scored as it is.

    \b
    Examples:
      cosmos-run score bundles/demo --text "Once upon a time there was a cat."
      cosmos-run score bundles/demo --file story.txt --json
    """
    if text is not None and file is not None:
        raise click.UsageError("--text and --file both name what to score: give one of them.")
    given = read_file(file) if file is not None else read_text(text, "--text")

    from cosmos_runtime.quoting import json_text
    from cosmos_runtime.scoring import score
    from cosmos_runtime.session import load

    session = load(bundle, provider=provider, threads=threads)
    result = score(session, given)
    if as_json:
        click.echo(json_text(_report(result, session.tokenizer)))
    else:
        click.echo(
            f"{len(result.ids)} tokens, log-probability {result.total:.4f}, "
            f"{result.mean_nats:.4f} nats a token, perplexity {result.perplexity:.4f}"
        )


def _report(result: "Score", tokenizer: "Tokenizer") -> dict[str, Any]:
    return {
        "tokens": result.ids,
        "texts": [tokenizer.decode([token]) for token in result.ids],
        "log_probabilities": result.log_probabilities.tolist(),
        "total": result.total,
        "mean_nats": result.mean_nats,
        "perplexity": result.perplexity,
    }
