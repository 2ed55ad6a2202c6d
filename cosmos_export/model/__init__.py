"""The eager model. `decoder` is the plain language model; `backbone`, `attention` and `rope` are what it is made of."""

from cosmos_export.model.decoder import CosmosDecoder

__all__ = ["CosmosDecoder"]
