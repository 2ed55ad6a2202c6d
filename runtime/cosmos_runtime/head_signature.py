"""Does a graph have the state and the scores that its bundle's capabilities call for?"""

from cosmos_runtime.errors import BundleError
from cosmos_runtime.heads import STATE_PARTS
from cosmos_runtime.manifest import GraphSpec, Manifest, Role, TensorSpec
from cosmos_runtime.scores import score_specs

HEAD_INPUTS = {Role.ENDS_CALL, Role.WANTS_SCORES, Role.MEMORY_CALLS, *(past for past, _ in STATE_PARTS)}


def check_heads(graph: GraphSpec, manifest: Manifest) -> None:
    """Check that a graph gives the scores of the manifest's settings, keeps what their heads keep, and nothing else.

    Raises: BundleError saying what differs.
    """
    settings = (manifest.capabilities or {}).get("settings", {})
    promised = {spec.name: (spec.dtype, spec.shape) for spec in score_specs(settings)}
    given = {t.name: (t.dtype, t.shape[1:]) for t in graph.outputs if t.role == Role.SCORE}
    differing = sorted(name for name in promised.keys() | given.keys() if promised.get(name) != given.get(name))
    if differing:
        name = differing[0]
        raise BundleError(
            f"{graph.file}: score {name!r}: the capabilities call for {promised.get(name)}, the graph gives "
            f"{given.get(name)}; export the bundle again"
        )
    _check_state(graph, manifest)


def _check_state(graph: GraphSpec, manifest: Manifest) -> None:
    inputs = {tensor.role for tensor in graph.inputs} & HEAD_INPUTS
    if inputs and manifest.capabilities is None:
        raise BundleError(
            f"{graph.file}: wants {', '.join(sorted(inputs))}, and the manifest has no capabilities; export it again"
        )
    outputs = {tensor.role for tensor in graph.outputs}
    for past, present in STATE_PARTS:
        if (past in inputs) != (present in outputs):
            raise BundleError(
                f"{graph.file}: expected both {str(past)!r} and {str(present)!r}, got one of them; export it again"
            )
        if past in inputs and _form(graph.input(past)) != _form(graph.output(present)):
            raise BundleError(
                f"{graph.file}: {graph.output(present).name}: expected the type and shape of "
                f"{graph.input(past).name}; export it again"
            )


def _form(tensor: TensorSpec) -> tuple[str, tuple[int | str, ...]]:
    return tensor.dtype, tensor.shape
