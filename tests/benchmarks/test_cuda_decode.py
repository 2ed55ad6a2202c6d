"""What a run leaves of an earlier one's results."""

from benchmarks.cuda_decode import merge


def result(batch: int, **speeds: int) -> dict:
    return {"model": "m", "batch": batch, "prompt": 128, "engines": {name: {"speed": s} for name, s in speeds.items()}}


def test_engines_that_are_measured_again_replace_their_results_alone() -> None:
    results = [result(1, fp16=10, int4=20), result(8, fp16=30)]
    merge(results, result(1, fp16=11))
    merge(results, result(64, fp16=40))
    assert results == [result(1, fp16=11, int4=20), result(8, fp16=30), result(64, fp16=40)]
