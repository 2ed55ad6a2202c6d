"""Are the settings of capability heads in a manifest what scores and reports can be made from?"""

from cosmos_runtime.bounds import MOST_MODULES
from cosmos_runtime.json_fields import Fields
from cosmos_runtime.scores import EVALUATION_CHECKS, SAFETY_CHECKS, SAFETY_LEVELS


def check_head_settings(settings: Fields) -> None:
    """Check the groups that there are (see `cosmos_runtime.scores`). Raises: BundleError naming the key."""
    checks = {"reasoning": _reasoning, "memory": _memory, "safety": _safety, "evaluation": _evaluation}
    for name, group in settings.children().items():
        if name in checks:
            checks[name](group)


def _reasoning(group: Fields) -> None:
    group.text("mode", pattern=r"(?s).*", expected="the name of a mode")
    group.boolean("extended")
    for key in ("thoughts", "branches"):
        group.integer(key, minimum=1, maximum=MOST_MODULES)


def _memory(group: Fields) -> None:
    group.boolean("episodes")


def _safety(group: Fields) -> None:
    group.text("level", pattern="|".join(SAFETY_LEVELS), expected=f"one of {', '.join(SAFETY_LEVELS)}")
    _names(group, "checks", SAFETY_CHECKS)


def _evaluation(group: Fields) -> None:
    group.integer("rounds", minimum=1, maximum=MOST_MODULES)
    _names(group, "checks", EVALUATION_CHECKS)
    threshold = group.value("confidence_threshold")
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold <= 1:
        group.fail("confidence_threshold", "a number from 0 to 1", threshold)


def _names(group: Fields, key: str, known: tuple[str, ...]) -> None:
    value = group.value(key)
    if not isinstance(value, list) or any(name not in known for name in value):
        group.fail(key, f"a list of some of {', '.join(known)}", value)
