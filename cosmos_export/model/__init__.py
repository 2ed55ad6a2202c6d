"""The eager model. `cosmos` is the whole of it, `decoder` the plain language model without capability heads;
`backbone`, `attention`, `rope` and `capabilities` are what they are made of."""

from cosmos_export.model.cosmos import CosmosAdvancedModel
from cosmos_export.model.decoder import CosmosDecoder

__all__ = ["CosmosAdvancedModel", "CosmosDecoder"]
