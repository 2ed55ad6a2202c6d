"""What a generation's diagnostics come to, in a few lines."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Report = dict[str, Any]


def diagnostics_summary(reports: Sequence[Report]) -> Iterator[str]:
    """A line for each capability that reported, over all calls of the model."""
    yield f"diagnostics of {len(reports)} calls"
    lines = {"reasoning": _reasoning, "memory": _memory, "safety": _safety, "evaluation": _evaluation}
    for name, line in lines.items():
        found = [report[name] for report in reports if name in report]
        if found:
            yield f"  {name:<11} {line(found)}"
    if any(report.get("output_blocked") for report in reports):
        yield f"  {'blocked':<11} the last call's output was withheld as unsafe"


def _reasoning(reports: list[Report]) -> str:
    first = reports[0]
    details = [f"mode {first['mode']}{', extended' if first.get('extended') else ''}"]
    for key, words in (("num_thoughts", "thoughts"), ("num_branches", "branches")):
        if key in first:
            details.append(f"{first[key]} {words}")
    if "consistency_score" in first:
        details.append(f"consistency {_spread(report['consistency_score'] for report in reports)}")
    if "error_detected" in first:
        details.append(f"errors detected in {sum(report['error_detected'] for report in reports)}")
    return ", ".join(details)


def _memory(reports: list[Report]) -> str:
    length = reports[-1].get("episode_length")
    return "no episodes" if length is None else f"{length} calls remembered, as far as there is room"


def _safety(reports: list[Report]) -> str:
    unsafe = sum(not report["overall_safe"] for report in reports)
    warnings = _counted(text for report in reports for text in report["warnings"])
    interventions = _counted(text for report in reports for text in report["interventions"])
    return (
        f"level {reports[0]['safety_level']}, unsafe in {unsafe}; warnings: {warnings}; interventions: {interventions}"
    )


def _evaluation(reports: list[Report]) -> str:
    final = [report["final_assessment"] for report in reports]
    confidence = _spread(report["confidence"]["confidence"] for report in final)
    grades = _counted(report["quality"]["quality_grade"] for report in final)
    corrections = sum(report["improvements_made"] for report in final)
    ready = sum(report["ready_for_output"] for report in final)
    return f"confidence {confidence}, grades: {grades}; {corrections} corrections; ready for output in {ready}"


def _counted(texts: Iterable[str]) -> str:
    return ", ".join(f"{text} ({count})" for text, count in Counter(texts).most_common()) or "none"


def _spread(values: Iterable[float]) -> str:
    given = list(values)
    return f"{sum(given) / len(given):.2f} ({min(given):.2f} to {max(given):.2f})"
