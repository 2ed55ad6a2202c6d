"""The capability heads once more, as the reference's text reads: one row at a time, Python branches, a list as memory,
fifty skills in a loop. Slow and plain, to compare the model's heads with.

A vector is (D,) float64; `state` is a state dict with the checkpoint's names.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_export.config import CosmosAdvancedConfig

State = dict[str, Tensor]
Report = dict[str, Any]

HARM = [
    "violence",
    "hate_speech",
    "sexual_content",
    "self_harm",
    "illegal_activity",
    "misinformation",
    "privacy_violation",
]
TOXIC = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]
BIAS = ["gender_bias", "racial_bias", "age_bias", "religious_bias", "political_bias"]
PII = [
    "name",
    "email",
    "phone",
    "address",
    "ssn",
    "credit_card",
    "ip_address",
    "medical_info",
    "financial_info",
    "credentials",
]
JAILBREAK = ["role_play_attack", "instruction_override", "context_confusion", "encoding_bypass", "prompt_injection"]
ETHICS = ["beneficence", "non_maleficence", "autonomy", "justice", "transparency", "accountability"]
QUALITY = [
    "relevance",
    "coherence",
    "accuracy",
    "completeness",
    "clarity",
    "conciseness",
    "informativeness",
    "helpfulness",
]
ERRORS = ["logical_error", "factual_error", "consistency_error", "relevance_error", "formatting_error"]


class Entry(NamedTuple):
    key: Tensor
    value: Tensor


class Bank:
    """Working memory: the entries, oldest first, and the number of calls."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.calls = 0


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return state[f"{name}.weight"] @ x + state[f"{name}.bias"]


def network(state: State, name: str, x: Tensor) -> Tensor:
    """Linear, a norm where there is one, ReLU, Linear; with the indices that the checkpoint has."""
    indices = sorted({int(key.removeprefix(f"{name}.").split(".")[0]) for key in state if key.startswith(f"{name}.")})
    x = linear(state, f"{name}.{indices[0]}", x)
    for index in indices[1:-1]:
        x = F.layer_norm(x, x.shape, state[f"{name}.{index}.weight"], state[f"{name}.{index}.bias"])
    return linear(state, f"{name}.{indices[-1]}", x.clamp(min=0))


def number(state: State, name: str, x: Tensor) -> float:
    return torch.sigmoid(network(state, name, x)).item()


def named(names: list[str], values: Tensor) -> dict[str, float]:
    assert len(names) == len(values)
    return dict(zip(names, values.tolist(), strict=True))


# Reasoning.


def chain_of_thought(state: State, x: Tensor, steps: int) -> Tensor:
    name, thoughts = "reasoning_engine.cot", []
    for step in range(steps):
        x = linear(state, f"{name}.step_encoder.{step}", x).clamp(min=0)
        norm = f"{name}.step_norms.{step}"
        x = F.layer_norm(x, x.shape, state[f"{norm}.weight"], state[f"{norm}.bias"])
        thoughts.append(x)
    return linear(state, f"{name}.thought_aggregator", torch.cat(thoughts))


def reason(state: State, config: CosmosAdvancedConfig, x: Tensor) -> tuple[Tensor, Report]:
    settings, name = config.reasoning, "reasoning_engine"
    report: Report
    if settings.mode == "chain_of_thought":
        output = chain_of_thought(state, x, settings.reasoning_steps)
        report = {"num_thoughts": settings.reasoning_steps, "mode": "CoT"}
    elif settings.mode == "tree_of_thoughts":
        count = settings.multi_path_exploration
        branches = [linear(state, f"{name}.tot.branch_generators.{i}", x).clamp(min=0) for i in range(count)]
        promise = torch.cat([torch.sigmoid(linear(state, f"{name}.tot.evaluator", branch)) for branch in branches])
        weights = promise.softmax(0)
        output = sum((w * b for w, b in zip(weights, branches, strict=True)), torch.zeros_like(x))
        report = {"num_branches": count, "mode": "ToT"}
    elif settings.mode == "self_consistency":
        count = settings.consistency_checks
        samples = [linear(state, f"{name}.self_consistency.samplers.{i}", x).tanh() for i in range(count)]
        output = sum(samples, torch.zeros_like(x)) / count
        score = linear(state, f"{name}.self_consistency.consistency_checker", torch.cat(samples)).sigmoid().item()
        report = {"consistency_score": score, "mode": "Self-Consistency"}
    elif settings.mode == "reflexion":
        output = x
        judged = linear(state, f"{name}.reflexion.self_evaluator", x)
        error = linear(state, f"{name}.reflexion.error_detector", judged).sigmoid().item()
        report = {"error_detected": error > 0.5, "confidence": 1 - error, "correction_applied": False}
        report["mode"] = "Reflexion"
    else:
        output, report = x, {"mode": "Direct"}
    if settings.extended_thinking:
        output = chain_of_thought(state, output, settings.reasoning_steps)
        report["extended"] = True
    return output, report


# Memory.


def recall(state: State, x: Tensor, bank: Bank) -> Tensor:
    if not bank.entries:
        return torch.zeros_like(x)
    query = linear(state, "memory_system.working_memory.query_proj", x)
    scored = [(torch.cosine_similarity(query, entry.key, dim=0).item(), entry) for entry in bank.entries]
    best = sorted(scored, key=lambda pair: -pair[0])[:5]
    weights = torch.tensor([score for score, _ in best], dtype=x.dtype).softmax(0)
    return sum((w * entry.value for w, (_, entry) in zip(weights, best, strict=True)), torch.zeros_like(x))


def semantic(state: State, x: Tensor) -> Tensor:
    """With torch's own attention module."""
    name = "memory_system.semantic_memory"
    attention = torch.nn.MultiheadAttention(len(x), 8, dtype=x.dtype)
    attention.load_state_dict(
        {part: state[f"{name}.concept_attention.{part}"] for part in attention.state_dict()}, strict=True
    )
    concepts = state[f"{name}.concept_embeddings"]
    with torch.no_grad():
        attended, _ = attention(x[None], concepts, concepts)
    return network(state, f"{name}.knowledge_encoder", x + attended[0])


def procedural(state: State, x: Tensor) -> Tensor:
    name, output = "memory_system.procedural_memory", torch.zeros_like(x)
    weights = linear(state, f"{name}.skill_selector", x).softmax(0)
    for skill, weight in enumerate(weights):
        output = output + weight * network(state, f"{name}.skill_library.{skill}", x)
    return output


def remember(state: State, config: CosmosAdvancedConfig, x: Tensor, bank: Bank) -> tuple[Tensor, Report]:
    memories = (recall(state, x, bank), torch.zeros_like(x), semantic(state, x), procedural(state, x))
    name = "memory_system.working_memory"
    bank.entries.append(Entry(linear(state, f"{name}.key_proj", x), linear(state, f"{name}.value_proj", x)))
    bank.entries = bank.entries[max(0, len(bank.entries) - config.memory.working_memory_size) :]
    bank.calls += 1
    report = {"similar_episodes_found": 0}
    if config.memory.episodic_memory:
        report["episode_length"] = bank.calls
    return network(state, "memory_system.memory_fusion", torch.cat(memories)), report


# Safety.


def guard(state: State, config: CosmosAdvancedConfig, x: Tensor) -> tuple[Tensor, Report]:
    switches, name = config.safety, "safety_system"
    performed: list[str] = []
    warnings: list[str] = []
    interventions: list[str] = []
    report: Report = {"checks_performed": performed, "warnings": warnings, "interventions": interventions}
    safe = True
    if switches.content_filtering:
        performed.append("content_filtering")
        harmful = number(state, f"{name}.content_filter.harmful_detector", x)
        categories = network(state, f"{name}.content_filter.category_classifier", x).softmax(0)
        report["content_filter"] = {
            "overall_harmfulness": harmful,
            "categories": named(HARM, categories),
            "max_category": HARM[int(categories.argmax())],
        }
        if harmful >= 0.5:
            safe = False
            warnings.append("Harmful content detected")
    if switches.toxicity_detection:
        performed.append("toxicity_detection")
        scores = network(state, f"{name}.toxicity_detector.toxicity_scorer", x).sigmoid()
        overall = scores.max().item()
        report["toxicity"] = {**named(TOXIC, scores), "overall": overall, "is_toxic": overall > 0.5}
        if overall > 0.5:
            safe = False
            warnings.append("Toxic content detected")
    if switches.bias_mitigation:
        performed.append("bias_detection")
        scores = network(state, f"{name}.bias_detector.bias_analyzer", x).sigmoid()
        overall = scores.mean().item()
        report["bias"] = {**named(BIAS, scores), "overall_bias": overall, "max_bias_type": BIAS[int(scores.argmax())]}
        report["bias"]["debiasing_applied"] = overall > 0.5
        if overall > 0.5:
            x = network(state, f"{name}.bias_detector.debiaser", x)
            interventions.append("Bias mitigation applied")
    performed.append("hallucination_detection")
    confidence = number(state, f"{name}.hallucination_detector.confidence_estimator", x)
    factuality = number(state, f"{name}.hallucination_detector.factuality_checker", x)
    likely = confidence > 0.7 and factuality < 0.3
    report["hallucination"] = {"confidence": confidence, "factuality": factuality, "likely_hallucination": likely}
    if likely:
        warnings.append("Possible hallucination detected")
    if switches.privacy_protection:
        performed.append("privacy_protection")
        scores = network(state, f"{name}.privacy_protector.pii_detector", x).sigmoid()
        private = scores.max().item() > 0.6
        report["privacy"] = {"pii_types_detected": named(PII, scores), "contains_pii": private}
        report["privacy"] |= {"max_pii_type": PII[int(scores.argmax())], "anonymization_applied": private}
        if private:
            x = linear(state, f"{name}.privacy_protector.anonymizer", x)
            interventions.append("Privacy protection applied")
    if switches.adversarial_defense:
        performed.append("adversarial_defense")
        attack = number(state, f"{name}.adversarial_defense.attack_detector", x)
        attacked = attack > 0.7
        report["adversarial"] = {"attack_probability": attack, "likely_adversarial": attacked}
        report["adversarial"]["defense_applied"] = attacked
        if attacked:
            x = 0.7 * network(state, f"{name}.adversarial_defense.perturbation_cleaner", x) + 0.3 * x
            interventions.append("Adversarial defense applied")
    if switches.jailbreak_prevention:
        performed.append("jailbreak_prevention")
        scores = network(state, f"{name}.jailbreak_prevention.jailbreak_detector", x).sigmoid()
        risk = scores.max().item()
        report["jailbreak"] = {**named(JAILBREAK, scores), "overall_jailbreak_risk": risk}
        report["jailbreak"] |= {"detected_pattern": JAILBREAK[int(scores.argmax())]}
        report["jailbreak"] |= {"is_jailbreak_attempt": risk > 0.65}
        if risk > 0.65:
            safe = False
            warnings.append("Jailbreak attempt detected")
    if switches.ethical_guidelines:
        performed.append("ethical_evaluation")
        scores = network(state, f"{name}.ethical_guardian.ethical_principles", x).sigmoid()
        overall, weakest = scores.mean().item(), ETHICS[int(scores.argmin())]
        report["ethics"] = {**named(ETHICS, scores), "overall_ethical_score": overall, "is_ethical": overall > 0.6}
        report["ethics"]["weakest_principle"] = weakest
        if overall <= 0.6:
            warnings.append(f"Ethical concern: {weakest}")
    report |= {"overall_safe": safe, "safety_level": switches.safety_level}
    report |= {"num_warnings": len(warnings), "num_interventions": len(interventions)}
    return x, report


# Evaluation.


def confidence_report(state: State, x: Tensor) -> Report:
    name = "evaluation_system.confidence_estimator"
    confidence = number(state, f"{name}.confidence_network", x)
    uncertainty = F.softplus(network(state, f"{name}.uncertainty_estimator", x)).item()
    level = "very_low"
    for bound, label in ((0.3, "low"), (0.5, "medium"), (0.7, "high"), (0.9, "very_high")):
        level = label if confidence >= bound else level
    return {
        "confidence": confidence,
        "uncertainty": uncertainty,
        "reliability": confidence * (1 - uncertainty),
        "confidence_level": level,
    }


def quality_report(state: State, x: Tensor) -> Report:
    scores = network(state, "evaluation_system.quality_scorer.quality_dimensions", x).sigmoid()
    overall, grade = scores.mean().item(), "F"
    for bound, label in ((0.5, "D"), (0.6, "C"), (0.7, "B"), (0.8, "A"), (0.9, "A+")):
        grade = label if overall >= bound else grade
    return {
        **named(QUALITY, scores),
        "overall_quality": overall,
        "quality_grade": grade,
        "strengths": [QUALITY[i] for i in scores.topk(3).indices.tolist()],
        "weaknesses": [QUALITY[i] for i in scores.topk(3, largest=False).indices.tolist()],
    }


def evaluate(state: State, config: CosmosAdvancedConfig, x: Tensor, query: Tensor) -> tuple[Tensor, Report]:
    switches, name = config.evaluation, "evaluation_system"
    iterations: list[Report] = []
    improvements = 0
    for iteration in range(switches.verification_depth):
        both = torch.cat((x, query))
        report: Report = {"iteration": iteration + 1}
        if switches.confidence_estimation:
            report["confidence"] = confidence_report(state, x)
        if switches.quality_scoring:
            report["quality"] = quality_report(state, x)
        factual = number(state, f"{name}.factuality_checker.factual_scorer", x)
        report["factuality"] = {"factuality_score": factual, "likely_factual": factual > 0.7}
        report["factuality"] |= {"confidence_in_facts": factual, "verification_needed": factual < 0.5}
        complete = number(state, f"{name}.completeness_checker.completeness_scorer", both)
        report["completeness"] = {"completeness_score": complete, "is_complete": complete > 0.75}
        report["completeness"]["missing_information"] = 1 - complete
        if switches.answer_verification:
            verified = number(state, f"{name}.answer_verifier.verification_network", both)
            report["verification"] = {"verification_score": verified, "answer_matches_query": verified > 0.7}
            report["verification"]["overall_verified"] = verified > 0.7
        if switches.self_correction:
            errors = network(state, f"{name}.self_correction.error_detector", x).sigmoid()
            corrected = errors.max().item() > 0.5
            report["correction"] = {**named(ERRORS, errors), "max_error_type": ERRORS[int(errors.argmax())]}
            report["correction"] |= {"needs_correction": corrected, "correction_applied": corrected}
            report["output_updated"] = corrected
            if corrected:
                x = network(state, f"{name}.self_correction.corrector", both)
                improvements += 1
            elif iteration > 0:
                break
        iterations.append(report)
        if switches.quality_scoring and report["quality"]["overall_quality"] > 0.9:
            break
    final = {"confidence": confidence_report(state, x), "quality": quality_report(state, x)}
    ready = final["confidence"]["confidence"] >= switches.confidence_threshold
    return x, {
        "iterations": iterations,
        "improvements_made": improvements,
        "final_assessment": {
            **final,
            "total_iterations": len(iterations),
            "improvements_made": improvements,
            "ready_for_output": ready and final["quality"]["overall_quality"] >= 0.6,
        },
    }


def enhance(
    state: State, config: CosmosAdvancedConfig, x: Tensor, query: Tensor, capabilities: tuple[str, ...], bank: Bank
) -> tuple[Tensor | None, Report]:
    """The vector (D,) that replaces `x`, None for a blocked row, and the nested report."""
    report: Report = {}
    reasoning = memory = safety = x
    if "reasoning" in capabilities:
        reasoning, report["reasoning"] = reason(state, config, x)
    if "memory" in capabilities:
        memory, report["memory"] = remember(state, config, x, bank)
    if "safety" in capabilities:
        safety, report["safety"] = guard(state, config, x)
        report["is_safe"] = report["safety"]["overall_safe"]
        if not report["is_safe"] and config.safety.safety_level in ("high", "strict"):
            return None, {**report, "output_blocked": True}
    vector = network(state, "capability_fusion", torch.cat((x, reasoning, memory, x, safety)))
    if "evaluation" in capabilities:
        vector, report["evaluation"] = evaluate(state, config, vector, query)
    return vector, report
