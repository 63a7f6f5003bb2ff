"""The KV connector: vLLM's public plug-in through which every prompt's rows leave the paged cache.

One instance runs in the engine core and plans: after each scheduling it knows which rows of which prompt the coming
step computes, or found in the prefix cache, and in which blocks they lie. One instance runs in every worker and copies
those rows at the end of that very step, when nothing can have been freed or overwritten: chunked prefill, shared
prefixes, preemption and sliding windows are all the same case. A row is planned once, so it is copied once.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)

from .compat import resumed_requests
from .copier import Copier, RequestRows
from .handover import leave_with

PARAMETER = "kava"
"""Under `kv_transfer_params`: `[call, request]` of a prompt to capture, and the reply about it."""


def prompt_digest(token_ids: Sequence[int]) -> int:
    """CRC-32 of token ids as 64-bit integers."""
    return zlib.crc32(array("q", token_ids).tobytes())


@dataclass
class CapturePlan(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is untyped here.
    """The rows that workers copy after one step."""

    rows: list[RequestRows] = field(default_factory=list)


@dataclass
class _Prompt:
    call: int
    request: int
    length: int
    digest: int
    blocks: list[int]
    planned: int = 0
    """Rows that were planned already, in this life of the request or before a preemption."""


class KavaConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Sends keys and values of captured prompts to kava; loads nothing."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.vllm_config, self.kv_cache_config = vllm_config, kv_cache_config
        self.block_size: int = vllm_config.cache_config.block_size
        self.caches: dict[str, torch.Tensor] = {}
        self.copier: Copier | None = None
        self._prompts: dict[str, _Prompt] = {}
        if role == KVConnectorRole.SCHEDULER:
            leave_with(vllm_config.kv_transfer_config.kv_connector_extra_config["parent"])

    @property
    def requires_kv_delivery(self) -> bool:
        """False: rows are copied as they are computed, so no finished request is ever computed again for us."""
        return False

    # In the engine core.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Nothing is loaded."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded."""

    def build_connector_meta(self, scheduler_output: Any) -> CapturePlan:
        """Plans which rows of which prompts are copied after the step that was just scheduled."""
        plan = CapturePlan()
        for new in scheduler_output.scheduled_new_reqs:
            prompt = self._prompts.get(new.req_id) or self._begin(new)
            if prompt is not None:
                prompt.blocks = list(new.block_ids[0])
                self._plan(plan, prompt, new.num_computed_tokens + scheduler_output.num_scheduled_tokens[new.req_id])
        cached = scheduler_output.scheduled_cached_reqs
        resumed = resumed_requests(cached)
        for index, req_id in enumerate(cached.req_ids):
            prompt = self._prompts.get(req_id)
            if prompt is None:
                continue
            blocks = cached.new_block_ids[index]
            if req_id in resumed:
                prompt.blocks = []
            prompt.blocks.extend(blocks[0] if blocks else ())
            computed = cached.num_computed_tokens[index] + scheduler_output.num_scheduled_tokens[req_id]
            self._plan(plan, prompt, computed)
        return plan

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Replies with the digest of the ids that were computed and how many rows were planned."""
        prompt = self._prompts.pop(request.request_id, None)
        if prompt is None:
            return False, None
        return False, {PARAMETER: [prompt.call, prompt.request], "digest": prompt.digest, "rows": prompt.planned}

    def _begin(self, new: Any) -> _Prompt | None:
        extra = (new.sampling_params.extra_args or {}) if new.sampling_params is not None else {}
        asked = (extra.get("kv_transfer_params") or {}).get(PARAMETER)
        if asked is None:
            return None
        ids = new.prompt_token_ids
        prompt = _Prompt(asked[0], asked[1], len(ids), prompt_digest(ids), [])
        self._prompts[new.req_id] = prompt
        return prompt

    def _plan(self, plan: CapturePlan, prompt: _Prompt, computed: int) -> None:
        stop = min(computed, prompt.length)
        if stop <= prompt.planned:
            return
        first_block, last_block = prompt.planned // self.block_size, (stop - 1) // self.block_size
        blocks = prompt.blocks[first_block : last_block + 1]
        plan.rows.append(RequestRows(prompt.call, prompt.request, prompt.planned, stop, blocks))
        prompt.planned = stop

    # In every worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Remembers the caches; `CaptureWorker` makes the copier once the model is known."""
        self.caches = kv_caches

    def wait_for_save(self) -> None:
        """Copies the rows that this step computed, on the stream that computed them."""
        plan = self._get_connector_metadata()
        assert isinstance(plan, CapturePlan)
        if plan.rows:
            assert self.copier is not None, "a prompt to capture came before the workers were attached"
            self.copier.copy(plan.rows)

    def shutdown(self) -> None:
        """Closes the way to our process."""
        if self.copier is not None:
            self.copier.close()
            self.copier = None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: it is skipped inside CUDA graphs; rows are copied at the end of the step instead."""
