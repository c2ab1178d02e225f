"""Networks as tokens: one row per neuron, in Parquet shards, with vectorized features, statistics
and graphs."""

from weightnet.tokens.features import FEATURES, TokenFeatures, token_features
from weightnet.tokens.graph import EDGES, DenseBlock, Graph, dense_blocks, layer_blocks
from weightnet.tokens.layout import ACTIVATIONS, KINDS, Layout, layout, spec_id
from weightnet.tokens.networks import Networks, Stack
from weightnet.tokens.schema import SCHEMA_VERSION
from weightnet.tokens.shards import iter_tokens, read_networks
from weightnet.tokens.statistics import flat_weights, layer_norms, weight_statistics
from weightnet.tokens.tokenizer import TokensConfig, detokenize, tokenize
from weightnet.tokens.writer import write_tokens

__all__ = [
    "ACTIVATIONS",
    "EDGES",
    "FEATURES",
    "KINDS",
    "SCHEMA_VERSION",
    "DenseBlock",
    "Graph",
    "Layout",
    "Networks",
    "Stack",
    "TokenFeatures",
    "TokensConfig",
    "dense_blocks",
    "detokenize",
    "flat_weights",
    "iter_tokens",
    "layer_blocks",
    "layer_norms",
    "layout",
    "read_networks",
    "spec_id",
    "token_features",
    "tokenize",
    "weight_statistics",
    "write_tokens",
]
