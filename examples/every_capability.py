"""Every capability of a Cosmos model, one by one: reasoning, memory, safety, evaluation, and all of them in generation.

    python examples/every_capability.py

A small model with random weights: what each capability does can be seen, what it says means nothing.
Needs `pip install -e ".[export,cpu]"`. Takes a few seconds.
"""

from typing import Any

import torch

from cosmos_export import CosmosAdvancedConfig, CosmosAdvancedModel

OFF = {"use_reasoning": False, "use_memory": False, "use_safety": False, "use_evaluation": False}
PROMPT = torch.tensor([[5, 7, 9, 11, 13, 17, 19, 23]])


def small_model(**groups: dict[str, Any]) -> CosmosAdvancedModel:
    """The same weights each time; `groups` are groups of settings, such as `safety={"safety_level": "medium"}`."""
    torch.manual_seed(0)
    config = CosmosAdvancedConfig(dim=128, hidden_dim=256, n_layers=2, head_dim=16, vocab_size=1000, **groups)
    return CosmosAdvancedModel(config).eval()


def show_flags() -> None:
    """The heads change the last position only. Safety and evaluation change it where they find something to correct."""
    model = small_model()
    plain, _ = model(PROMPT, **OFF)
    for flag in OFF:
        logits, report = model(PROMPT, **{**OFF, flag: True}, return_diagnostics=True)
        moved = (logits - plain).abs().amax(-1)[0]
        print(f"{flag}: last logits move by {moved[-1]:.3f}, others by {moved[:-1].max():.3f}; reports {list(report)}")


def show_reasoning() -> None:
    for mode in ("chain_of_thought", "tree_of_thoughts", "self_consistency", "reflexion", "direct"):
        _, report = small_model(reasoning={"mode": mode})(PROMPT, return_diagnostics=True)
        print(f"reasoning {mode}: {report['reasoning']}")


def show_memory() -> None:
    """The working memory lasts as long as the bank that is passed from call to call."""
    model = small_model()
    bank = model.new_memory(batch=1, capacity=8)
    first, _ = model(PROMPT, memory=bank)
    second, report = model(PROMPT, memory=bank, return_diagnostics=True)
    print(f"memory: the second call differs by {(second - first).abs().max():.3f} from the first; {report['memory']}")


def show_safety() -> None:
    """An unsafe row is blocked at the levels high and strict; here the detector is made to find everything harmful."""
    for level in ("medium", "high"):
        model = small_model(safety={"safety_level": level})
        model.safety_system.content_filter.harmful_detector[-1].bias.fill_(9.0)
        logits, report = model(PROMPT, return_diagnostics=True)
        blocked = report.get("output_blocked", False)
        print(f"safety {level}: safe {report['is_safe']}, blocked {blocked}, largest logit {logits.abs().max():.3f}")


def show_evaluation() -> None:
    _, report = small_model(evaluation={"verification_depth": 3})(PROMPT, return_diagnostics=True)
    final = report["evaluation"]["final_assessment"]
    confidence, grade = final["confidence"]["confidence"], final["quality"]["quality_grade"]
    print(f"evaluation: confidence {confidence:.3f}, grade {grade}, ready for output {final['ready_for_output']}")


def show_generation() -> None:
    """Each row of a batch is as if it were alone, and its report has the diagnostics of every step."""
    prompts = torch.cat([PROMPT, PROMPT.flip(1)])
    answers, reports = small_model().generate(prompts, max_new_tokens=4, temperature=0.8, top_k=50, seed=1)
    for answer, report in zip(answers[:, prompts.shape[1] :].tolist(), reports, strict=True):
        print(f"generated {answer}: ended by {report['finish_reason']!r}, {len(report['generation_steps'])} reports")


if __name__ == "__main__":
    with torch.no_grad():
        for show in (show_flags, show_reasoning, show_memory, show_safety, show_evaluation, show_generation):
            show()
