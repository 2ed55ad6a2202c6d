"""The plain decoder: the backbone's next-token logits, without capability heads.

It is what language modelling, imported models and comparison with other engines need, and the head that
`cosmos_export.model.capabilities` (sections 3 to 7 of the reference) will stand beside.
"""

from __future__ import annotations

from torch import Tensor

from cosmos_export.model.backbone import CosmosBackbone


class CosmosDecoder(CosmosBackbone):
    """`logits = model(input_ids)`: input_ids (B, T) integers below V, logits (B, T, V)."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.logits(self.hidden_states(input_ids))
