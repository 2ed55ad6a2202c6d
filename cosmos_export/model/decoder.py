"""The plain decoder: the backbone's next-token logits, without capability heads.

It is what language modelling, imported models and comparison with other engines need. `cosmos_export.model.cosmos` is
the same backbone with the heads.
"""

from __future__ import annotations

from torch import Tensor

from cosmos_export.model.backbone import CosmosBackbone


class CosmosDecoder(CosmosBackbone):
    """`logits = model(input_ids)`: input_ids (B, T) integers below V, logits (B, T, V).

    Raises ConfigError for other ids.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.logits(self.hidden_states(input_ids))
