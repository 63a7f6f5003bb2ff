"""Starts a vLLM engine with kava's connector, feeds it token ids, and takes keys and values out as they come."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import numpy as np

from ...errors import CaptureError, CheckpointError, KavaError, RecipeError, RetryLaterError, UnsupportedModelError
from ...hub import ModelSource, check_weights, dense_source, load_config, model_geometry, one_line
from ...store import KVGeometry
from ..teacher import Captured, provenance
from ..tokens import Tokens
from .compat import forget_shared_memory, installed_version
from .handover import Inbox
from .limits import max_prompt, sampling_parameters
from .settings import EngineSettings

if TYPE_CHECKING:
    from ..generate import GenerateSettings
    from .assembly import Assembly

T = TypeVar("T")
_CONNECTOR: Final = f"{__package__}.connector"
_WORKER: Final = f"{__package__}.worker.CaptureWorker"
_STOP_SECONDS: Final = 60
_STOP_SECONDS_DEAD: Final = 10
"""An engine whose core was killed may never answer: it is left after this time, and ends with our process."""
_log = logging.getLogger(__name__)


class _EngineThread:
    """Runs what it is given, one after the other, on one thread that does not keep the process alive."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="kava-engine", daemon=True).start()

    def submit(self, work: Callable[..., T], *args: Any) -> Future[T]:
        """The result of `work(*args)`, to come."""
        future: Future[T] = Future()
        self._work.put((future, lambda: work(*args)))
        return future

    def end(self) -> None:
        """Ends the thread after what it was given."""
        self._work.put(None)

    def _run(self) -> None:
        while (given := self._work.get()) is not None:
            future, work = given
            try:
                future.set_result(work())
            except BaseException as error:  # Raised again where the result is asked for.
                future.set_exception(error)
            del given, future, work


class VLLMTeacher:
    """A running engine that captures pre-RoPE keys and values of prompts.

    The engine lives on one thread of its own, where it is also started: vLLM and CUDA keep state per thread, and the
    caller can write samples while the next step is computed.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        dtype: str,
        output_dtype: str,
        settings: EngineSettings,
        batch_tokens: int = 4096,
        decoding: bool = False,
    ) -> None:
        """Starts the engine.

        Args:
            source: the model.
            dtype: of weights and forward pass.
            output_dtype: of the keys and values that `capture` returns.
            settings: options of the engine.
            batch_tokens: tokens in one step, if the settings do not say.
            decoding: for `generate`: with CUDA graphs, which capture has no use for.

        Raises:
            BackendNotInstalledError: if vLLM is not there, or not in a supported version.
            RecipeError: if the engine does not start with these settings.
            UnsupportedModelError: if what this engine computes cannot be captured, or is not what transformers does.
            CheckpointError: if the checkpoint does not hold exactly the tensors of its config.
        """
        self._config = load_config(source)
        _refuse_other_names(source)
        self.max_tokens = max_prompt(self._config, settings)
        version = installed_version()
        _quiet()
        self.geometry: KVGeometry = model_geometry(source)
        self._output_dtype, self._settings, self._decoding = output_dtype, settings, decoding
        self._assembly: Assembly | None = None
        self._calls = 0
        self._closing, self._lost = False, False
        self._engine = _EngineThread()
        self._inbox = Inbox(self._note)
        self._llm: Any = None
        try:
            self._llm = self._on_engine(self._start, dense_source(source), dtype, batch_tokens)
            self._attach()
            tokens = settings.max_num_batched_tokens or batch_tokens
            self.backend = provenance("vllm", version, _device_name(), tokens)
        except BaseException:
            self.close()
            raise

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers, by rank."""
        return [pid for _, pid in sorted(self._inbox.pids.items())]

    def capture(self, samples: Sequence[Tokens]) -> Iterator[Captured]:
        """Pre-RoPE keys and values of each sample, in the order in which they become complete.

        Leaving the iteration early stops the engine.

        Raises:
            CaptureError: if the engine computed other tokens, or did not deliver every row exactly once.
            RetryLaterError: if the engine died.
        """
        import torch

        from .assembly import Assembly

        for index, tokens in enumerate(samples):
            if not np.array_equal(tokens.positions, np.arange(len(tokens))):
                raise UnsupportedModelError(f"prompt {index}: vLLM computes positions 0, 1, ... only")
        self._calls += 1
        lengths = [len(tokens) for tokens in samples]
        assembly = Assembly(
            self._calls, lengths, self.geometry, getattr(torch, self._output_dtype), workers=len(self.worker_pids)
        )
        self._assembly = assembly
        future = self._engine.submit(self._compute, self._calls, samples)
        future.add_done_callback(lambda done: _pass_on(done, assembly))
        finished = False
        try:
            yield from assembly
            assembly.wait()
            finished = True
        finally:
            if not finished:
                self.close()

    def prefill(self, samples: Sequence[Tokens]) -> None:
        """The same computation, of which nothing is captured: what a capture is compared with."""
        self._on_engine(self._compute, None, samples)

    def generate(
        self,
        prompts: Sequence[list[int]],
        settings: GenerateSettings,
        *,
        stop_ids: Sequence[int],
        numbers: Sequence[int],
    ) -> list[list[int]]:
        """Continues each prompt; each is sampled with a seed of its own."""
        return self._on_engine(self._write, prompts, settings, stop_ids, numbers)

    def close(self) -> None:
        """Stops the engine and all its processes."""
        if self._closing:
            return
        self._closing = True
        if self._assembly is not None:
            self._assembly.fail(CaptureError("the engine was stopped"))
        self._inbox.close()  # First: a worker that waits for room in its ring would wait forever.
        with suppress(Exception):
            self._engine.submit(self._stop).result(_STOP_SECONDS_DEAD if self._lost else _STOP_SECONDS)
        self._engine.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # On the engine's thread.

    def _start(self, source: ModelSource, dtype: str, batch_tokens: int) -> Any:
        import torch
        from vllm import LLM
        from vllm.config import KVTransferConfig

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if self._settings.deterministic else "1"
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"  # By the one token that is sampled but never computed.
        if not torch.cuda.is_available():
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        arguments = self._arguments(source, dtype, batch_tokens)
        try:
            return LLM(
                **arguments,
                kv_transfer_config=KVTransferConfig(
                    kv_connector="KavaConnector",
                    kv_connector_module_path=_CONNECTOR,
                    kv_role="kv_producer",
                    kv_connector_extra_config={"parent": os.getpid()},
                ),
            )
        except KavaError:
            raise
        except (ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError, KeyError, OSError) as error:
            _log.info("vLLM did not start", exc_info=True)
            raise RecipeError(f"vLLM does not start with these engine settings: {one_line(error)}") from error

    def _arguments(self, source: ModelSource, dtype: str, batch_tokens: int) -> dict[str, Any]:
        from vllm.engine.arg_utils import EngineArgs

        settings = self._settings
        known = {field.name for field in dataclasses.fields(EngineArgs)}
        for name in settings.engine_args:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise RecipeError(f"engine.engine_args: vLLM has no argument {name!r}{hint}")
        prefix_caching = settings.enable_prefix_caching
        if prefix_caching is None:
            prefix_caching = not getattr(self._config, "sliding_window", None)
        arguments: dict[str, Any] = {
            "model": source.location,
            "revision": source.revision,
            "trust_remote_code": source.trust_remote_code,
            "dtype": dtype,
            "skip_tokenizer_init": True,
            "worker_extension_cls": _WORKER,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "pipeline_parallel_size": settings.pipeline_parallel_size,
            "max_model_len": self.max_tokens + 1,  # The token that vLLM insists to sample is counted, never computed.
            "max_num_batched_tokens": settings.max_num_batched_tokens or batch_tokens,
            "max_num_seqs": min(settings.max_num_seqs, settings.max_num_batched_tokens or batch_tokens),
            "enable_prefix_caching": prefix_caching,
            "enforce_eager": settings.enforce_eager,
            "seed": 0,
            "generation_config": "vllm",  # Not the checkpoint's: the recipe says how to sample.
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if not settings.enforce_eager and not self._decoding:
            arguments["compilation_config"] = {"cudagraph_mode": "NONE"}
        for name in ("gpu_memory_utilization", "kv_cache_memory_bytes", "block_size", "quantization"):
            if (value := getattr(settings, name)) is not None:
                arguments[name] = value
        return arguments | settings.engine_args

    def _compute(self, call: int | None, samples: Sequence[Tokens]) -> None:
        from vllm import SamplingParams

        from .connector import PARAMETER, prompt_digest

        self._llm.reset_prefix_cache()  # What a part holds must not depend on the parts before it.
        prompts = [{"prompt_token_ids": tokens.input_ids.tolist()} for tokens in samples]
        parameters = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                extra_args=None if call is None else {"kv_transfer_params": {PARAMETER: [call, index]}},
            )
            for index in range(len(samples))
        ]
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        if call is None:
            return
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            ids = prompt["prompt_token_ids"]
            reply = output.kv_transfer_params or {}
            if list(output.prompt_token_ids) != ids or reply.get("digest") != prompt_digest(ids):
                raise CaptureError(f"prompt {index}: the engine computed other tokens than it was given")
            if reply.get(PARAMETER) != [call, index] or reply.get("rows") != len(ids):
                raise CaptureError(f"prompt {index}: of {len(ids)} rows the engine planned {reply.get('rows')}")
        self._llm.collective_rpc("kava_flush", args=(call,))

    def _write(
        self, prompts: Sequence[list[int]], settings: GenerateSettings, stop_ids: Sequence[int], numbers: Sequence[int]
    ) -> list[list[int]]:
        from vllm import SamplingParams

        parameters = [SamplingParams(**sampling_parameters(settings, number, stop_ids)) for number in numbers]
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        found = [o.outputs[0].token_ids for o in self._llm.generate(asked, parameters, use_tqdm=False)]
        return [list(ids[:-1] if ids and ids[-1] in stop_ids else ids) for ids in found]

    def _stop(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory
        from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        # An engine in this process leaves both behind, and one that did not start its connector too.
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()

    # Here.

    def _on_engine(self, work: Callable[..., T], *args: Any) -> T:
        return self._engine.submit(work, *args).result()

    def _attach(self) -> None:
        settings, address = self._settings, self._inbox.address
        ring_bytes = settings.handover_bytes
        config = self._config.to_json_string(use_diff=False)
        arguments = ((address.name, address.key), self._output_dtype, ring_bytes, self.geometry.shape, config)
        problems = self._on_engine(lambda: self._llm.collective_rpc("kava_attach", args=arguments))
        if found := next((problem for problem in problems if problem), None):
            raise UnsupportedModelError(f"{self._config.model_type} under vLLM: {found}")
        self._inbox.wait(len(problems))
        forget_shared_memory(self.worker_pids)

    def _note(self, rank: int, note: Any, data: memoryview | None) -> None:
        if self._closing:
            return
        self._lost = self._lost or note is None
        if self._assembly is not None:
            self._assembly.take(rank, note, data)


def _refuse_other_names(source: ModelSource) -> None:
    """Check the checkpoint before the engine starts: vLLM leaves parameters that it lacks as they are allocated."""
    if not source.gguf_file and check_weights(source):
        raise CheckpointError(
            f"model {source.name!r}: the checkpoint's names have prefixes of wrappers, which vLLM does not remove. "
            "Load it once with transformers (key_mapping) and save it with save_pretrained, or set extract.backend: hf"
        )


def _pass_on(done: Future[None], assembly: Assembly) -> None:
    error = done.exception()
    if error is None:
        assembly.finish()
        return
    if not isinstance(error, KavaError) and type(error).__name__ == "EngineDeadError":
        error = RetryLaterError("the vLLM engine died; finished parts are kept, run the same command again")
    assembly.fail(error)


def _quiet() -> None:
    """Before vLLM is imported: it reports home and logs at length otherwise."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    if os.environ.get("KAVA_VERBOSE"):
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def _device_name() -> str:
    """Kind and model of the device, by vLLM: asking torch would start CUDA in this process."""
    from vllm.platforms import current_platform

    return f"{current_platform.device_type} {current_platform.get_device_name()}"
