# SPDX-License-Identifier: Apache-2.0
"""vLLM's ExampleConnector for vllm-ascend, where the KV cache of a layer is a pair of tensors. The connector itself
takes it for one tensor: ``start_load_kv`` ends with "'tuple' object has no attribute 'device'"."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class PairConnector(ExampleConnector):
    """Leaves the whole blocks of a prompt in a folder, one file per layer, with keys and values [B, T, H, D]: blocks,
    tokens, heads, dimension."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if forward_context.attn_metadata is None:
            return
        for request in self._get_connector_metadata().requests:
            if request.is_store:
                continue
            for name, layer in forward_context.no_compile_layers.items():
                pair = getattr(layer, "kv_cache", None)
                if pair is not None:
                    stored = load_file(self._file(name, request))
                    for tensor, blocks in zip(pair, (stored["keys"], stored["values"]), strict=True):
                        for number, block in zip(self._blocks(request), blocks, strict=True):
                            tensor[number].copy_(block)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        for request in self._get_connector_metadata().requests:
            if request.is_store:
                kept = [torch.stack([tensor[number].cpu() for number in self._blocks(request)]) for tensor in kv_layer]
                save_file(dict(zip(("keys", "values"), kept, strict=True)), self._file(layer_name, request))

    def _file(self, layer: str, request: Any) -> str:
        return self._generate_filename_debug(layer, request.token_ids, request.mm_hashes)

    def _blocks(self, request: Any) -> list[int]:
        """The numbers of the whole blocks of a prompt in the cache."""
        return (request.slot_mapping[:: self._block_size] // self._block_size).tolist()
