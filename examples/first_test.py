"""A first test: make a small Cosmos model, call it, read its diagnostics, save it and load it again.

    python examples/first_test.py

The weights are random, so the numbers mean nothing; what works here works with trained weights too.
Needs `pip install -e ".[export,cpu]"`. Takes a few seconds and leaves no files behind.
"""

import tempfile

import torch

from cosmos_export import CosmosAdvancedConfig, CosmosAdvancedModel


def beginner_model() -> CosmosAdvancedModel:
    """About 21 million parameters, ready to be called: dropout is off after `eval()`."""
    torch.manual_seed(0)
    config = CosmosAdvancedConfig(
        dim=256, n_layers=2, n_heads=8, n_kv_heads=8, vocab_size=1000, max_sequence_length=1024
    )
    return CosmosAdvancedModel(config).eval()


@torch.no_grad()
def main() -> None:
    model = beginner_model()
    print(f"1. made a model of {sum(p.numel() for p in model.parameters()):,} parameters")

    input_ids = torch.randint(model.config.vocab_size, (1, 16))  # one row of 16 token ids
    logits, diagnostics = model(input_ids, return_diagnostics=True)
    print(f"2. logits (rows, positions, vocabulary): {tuple(logits.shape)}")
    print(f"   the likeliest next token is {int(logits[0, -1].argmax())}")

    assert isinstance(diagnostics, dict)  # one row gives a dict, several rows a list of dicts
    print(f"3. diagnostics of: {', '.join(diagnostics)}")
    print(f"   the row is safe: {diagnostics['is_safe']}")

    answer, report = model.generate(input_ids, max_new_tokens=5, seed=0)
    assert isinstance(report, dict)
    print(f"4. generated {answer[0, 16:].tolist()}, ended by {report['finish_reason']!r}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again, _ = CosmosAdvancedModel.from_pretrained(folder)(input_ids)
    difference = float((again - logits).abs().max())
    print(f"5. saved and loaded: the logits differ by at most {difference:.0e}")
    if difference > 1e-5:
        raise SystemExit("the loaded model is another model: this should never happen, please report it")
    print("all good")


if __name__ == "__main__":
    main()
