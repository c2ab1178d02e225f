"""Networks as tokens: one row per neuron, in Parquet shards, with vectorized features, statistics
and graphs."""

from weightnet.tokens.features import FEATURES, TokenFeatures, token_features, token_rows
from weightnet.tokens.fields import token_fields
from weightnet.tokens.layout import ACTIVATIONS, KINDS, Layout, layout, spec_id
from weightnet.tokens.messages import TOKEN_MESSAGES, message_statistics, token_messages
from weightnet.tokens.networks import Modules, Networks, Stack
from weightnet.tokens.probes import (
    ProbesConfig,
    network_outputs,
    probe_responses,
    response_features,
    response_statistics,
)
from weightnet.tokens.schema import SCHEMA_VERSION
from weightnet.tokens.shards import iter_tokens, read_networks
from weightnet.tokens.spectra import spectral_statistics
from weightnet.tokens.statistics import flat_weights, layer_norms, weight_statistics
from weightnet.tokens.tokenizer import TokensConfig, detokenize, tokenize, tokenize_stack
from weightnet.tokens.writer import write_tokens

__all__ = [
    "ACTIVATIONS",
    "FEATURES",
    "KINDS",
    "SCHEMA_VERSION",
    "TOKEN_MESSAGES",
    "Layout",
    "Modules",
    "Networks",
    "ProbesConfig",
    "Stack",
    "TokenFeatures",
    "TokensConfig",
    "detokenize",
    "flat_weights",
    "iter_tokens",
    "layer_norms",
    "layout",
    "message_statistics",
    "network_outputs",
    "probe_responses",
    "read_networks",
    "response_features",
    "response_statistics",
    "spec_id",
    "spectral_statistics",
    "token_features",
    "token_fields",
    "token_messages",
    "token_rows",
    "tokenize",
    "tokenize_stack",
    "weight_statistics",
    "write_tokens",
]
