"""`cosmos-run inspect`: what a bundle holds."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cosmos_runtime.manifest import GraphSpec, Manifest, TensorSpec


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Also verify the SHA-256 of every file (reads all of them).")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON instead of a summary.")
def inspect_command(bundle: Path, check: bool, as_json: bool) -> None:
    """Show what BUNDLE holds.

    Model, recipe, graphs, files and the parity verdict. Existence and size of every file are checked always,
    contents with --check.

    \b
    Examples:
      cosmos-run inspect bundles/demo
      cosmos-run inspect bundles/demo --check --json
    """
    from cosmos_runtime.bundle import Bundle
    from cosmos_runtime.quoting import json_text, shown

    opened = Bundle.open(bundle)
    if check:
        opened.check_hashes()
    if as_json:
        document = json.loads(opened.manifest.to_json())
        click.echo(json_text({**document, "hashes_checked": check}, indent=2))
    else:
        click.echo("\n".join(map(shown, _summary(opened.manifest, check))))


def _summary(manifest: "Manifest", checked: bool) -> Iterator[str]:
    model, recipe, source = manifest.model, manifest.recipe, manifest.source
    yield f"{manifest.name}  ({manifest.tool['name']} {manifest.tool['version']}, {manifest.created})"
    yield f"source      {source['kind']} {source['location']}"
    yield (
        f"model       {model['parameters']:,} parameters, vocabulary {manifest.vocab_size:,}, "
        f"sequence up to {manifest.max_sequence_length:,}, head {model['head']}, "
        f"{'causal' if model['causal'] else 'not causal'}"
    )
    if manifest.capabilities is not None:
        yield f"heads       {_capabilities(manifest.capabilities)}"
    yield f"recipe      {recipe['name']}: {recipe['precision']}, dialect {recipe['dialect']}"
    yield f"tokenizer   {manifest.tokenizer or 'none: token ids only'}"
    yield f"generation  {', '.join(f'{key} {value}' for key, value in manifest.generation.items()) or 'no defaults'}"
    for name, graph in manifest.graphs.items():
        yield from _graph_lines(name, graph)
    yield from _file_lines(manifest)
    yield f"parity      {_parity_verdict(manifest)}"
    yield f"hashes      {'verified' if checked else 'not read (use --check)'}"


def _capabilities(heads: Mapping[str, Any]) -> str:
    """Which there are, with the setting of each that says most."""
    settings = heads["settings"]
    details = {
        "reasoning": lambda: settings["reasoning"]["mode"],
        "memory": lambda: f"{heads['memory']['size']:,} entries",
        "safety": lambda: f"level {settings['safety']['level']}",
        "evaluation": lambda: f"{settings['evaluation']['rounds']} rounds",
    }
    return ", ".join(f"{name} ({details[name]()})" for name in heads["names"]) or "none: fusion only"


def _graph_lines(name: str, graph: "GraphSpec") -> Iterator[str]:
    made_of = "a PyTorch program" if graph.opset is None else f"opset {graph.opset}"
    yield f"graph       {name}: {graph.file}, {made_of}"
    for direction, tensors in (("in ", graph.inputs), ("out", graph.outputs)):
        alike: dict[tuple[object, ...], list[TensorSpec]] = {}
        for tensor in tensors:
            alike.setdefault((tensor.role, tensor.dtype, tensor.shape), []).append(tensor)
        for group in alike.values():
            yield f"  {direction}       {_tensors(group)}"


def _tensors(group: "list[TensorSpec]") -> str:
    """Tensors that differ in their names alone, such as the caches of all layers, on one line."""
    first, last = group[0], group[-1]
    names = first.name if len(group) == 1 else f"{first.name} to {last.name} ({len(group)})"
    return f"{names}: {first.dtype} [{', '.join(map(str, first.shape))}], role {first.role}"


def _file_lines(manifest: "Manifest") -> Iterator[str]:
    yield f"files       {len(manifest.files)}, {_size(sum(entry.size for entry in manifest.files.values()))} in all"
    for name, entry in manifest.files.items():
        yield f"  {_size(entry.size):>9} {name}"


def _parity_verdict(manifest: "Manifest") -> str:
    if manifest.parity is None:
        return "not measured"
    return "passed" if manifest.parity["passed"] else "FAILED"


def _size(size: float) -> str:
    """A size in the unit that leaves at most three digits before the point: "13.4 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
