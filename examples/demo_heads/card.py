"""The section of a checkpoint's README that says what its heads are worth."""

from __future__ import annotations

from pathlib import Path

import torch

from .exam import MARKS, Reading
from .figures import Figures
from .predictions import FEW, MANY
from .sentences import GROUPS

TITLE = "## The capability heads"

# The mark that a check should put on the texts of a group, and what a reader calls the group.
EXPECTED = {
    "categories": ("blocked", "harmful requests (7 categories)"),
    "toxicity": ("blocked", "toxic sentences (6 kinds)"),
    "jailbreak": ("blocked", "jailbreaks (5 patterns)"),
    "bias": ("debiased", "biased sentences (5 kinds)"),
    "personal": ("anonymised", "personal information (10 kinds)"),
}


def with_section(readme: Path, section: str) -> str:
    """The text of a README file, if there is one, with the section at its end, in place of an older one."""
    before = readme.read_text(encoding="utf-8").partition(TITLE)[0].rstrip() if readme.is_file() else ""
    return f"{before}\n\n{section}".lstrip()


def describe(figures: Figures, command: str, minutes: float) -> str:
    """The section, with every figure and all that is needed to get it again."""
    whole = figures.whole
    return f"""{TITLE}

Held-out loss at the last position, all four capabilities: **{whole.loss:.4f} nats per token**, {whole.excess:+.2%}
beside the plain decoder's {whole.plain_loss:.4f} at the same positions. The worst of all sets of capabilities and all
modes of reasoning: {worst(figures):+.2%}.

```
{command}
```

The backbone is the plain decoder above, bit for bit. Only the heads were trained, on the training part of the same
text, in {minutes:.0f} minutes of CPU time (PyTorch {torch.__version__}), and they are stored in float16.

### How text reads through the heads

Each token of the held-out text is one call, as in generation: the working memory holds what the calls before it in the
same window stored, and the query of the evaluation is the window's first vector. A blocked call counts with the loss of
its zero logits. The first line is all of the held-out text; the others compare on a part of it.

| capabilities | tokens | nats per token | beside the plain decoder |
|---|---:|---:|---:|
{line("all, the whole text", whole)}
{line("all, after a prompt of half a window", figures.prompted)}
{compared(figures)}

Where a line is better than the plain decoder, predictions have become smoother than those of a backbone that knows its
training text too well. That is no sign of reasoning or of remembering.

### What the heads know

No labels of safety or quality come with the text. The heads know what could be made of the text itself, and what
{number_of_sentences()} short sentences show them that were written for it (`examples/demo_heads/phrases.py`). They are
there to be exported, run and looked at, and protect nobody.

**Reasoning and memory** are taught to predict what the plain decoder predicts, by themselves and through the fusion,
with a random set of capabilities at each position.

**Safety** sees the vector of the last token only, in which a model this small keeps little of a sentence. Of texts that
end in a sentence of a kind, this share is found, where the sentence was trained on and where it was not:

| texts that end in | what should happen | sentences known | unknown |
|---|---|---:|---:|
{sentences(figures)}

Of vectors inside broken text, this share is found: {attacks(figures)}.

Ordinary text is left alone. Of {whole.calls:,} held-out calls, so many were {happened(figures)}.
Of ordinary modern sentences {figures.known["ordinary"]["blocked"]:.1%} were blocked. So `safety_level` is `high`,
which blocks unsafe output. A debiased or anonymised vector is trained to be that of the same sentence with other
groups, names or numbers in it; a cleaned one, that of the text before tokens in it were replaced.

**Evaluation** is trained on facts, and its scores mean these:

| score | what it is the probability or the size of |
|---|---|
| confidence, quality `accuracy` | the likeliest token is the next one |
| uncertainty, 1 - quality `clarity` | the entropy of the prediction, as a share of the highest possible |
| factuality, quality `helpfulness` | the next token is among the {FEW} likeliest |
| completeness | a line ends here |
| quality `completeness` | a word ends here |
| quality `informativeness` | 1 - the probability that the last token had |
| quality `relevance`, `coherence`, `conciseness` | the text is not random; neither that nor shuffled; not looped |
| verification | the text is ordinary, and the vector without noise |
| errors `logical`, `relevance`, `formatting` | the text is shuffled; random; looped |
| error `factual` | the next token is not among the {MANY} likeliest |
| error `consistency` | noise was added to the vector |

Confidence is calibrated on every other window of the held-out text; on the others its expected calibration error is
{figures.calibration_error:.3f}, where {figures.accuracy:.1%} of the likeliest tokens are right. The other scores are as
the training text left them, which the backbone knows too well, so they are somewhat too sure. The corrector is taught
to predict what the plain decoder does, with and without noise on the vector.
"""


def worst(figures: Figures) -> float:
    return max(
        reading.excess for reading in (figures.whole, figures.prompted, *figures.sets.values(), *figures.modes.values())
    )


def compared(figures: Figures) -> str:
    """The lines of all sets of capabilities and all modes of reasoning."""
    names = {", ".join(these) or "none (fusion only)": reading for these, reading in figures.sets.items()}
    for (mode, extended), reading in figures.modes.items():
        names[f"all, reasoning by `{mode}`{', extended' if extended else ''}"] = reading
    return "\n".join(line(name, reading) for name, reading in names.items())


def line(name: str, reading: Reading) -> str:
    return f"| {name} | {reading.calls:,} | {reading.loss:.4f} | {reading.excess:+.2%} |"


def sentences(figures: Figures) -> str:
    """The lines of all groups of sentences."""
    return "\n".join(
        f"| {name} | {mark} | {figures.known[group][mark]:.0%} | {figures.unknown[group][mark]:.0%} |"
        for group, (mark, name) in EXPECTED.items()
    )


def attacks(figures: Figures) -> str:
    return ", ".join(f"{shares['cleaned']:.0%} with {name}" for name, shares in figures.attacks.items())


def happened(figures: Figures) -> str:
    """How often each mark was put on a call of the whole text."""
    return ", ".join(f"{mark}: {figures.whole.marked[mark]}" for mark in MARKS)


def number_of_sentences() -> int:
    return sum(len(sentences) for labels in GROUPS.values() for sentences in labels.values())
