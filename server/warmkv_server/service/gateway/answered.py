"""An answer's events as a gateway gets them: the tokens themselves, whose text, calls and reasoning it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from warmkv_server.agents.types import (
    CandidateDelta,
    CandidateFinished,
    GenerateEvent,
    GenerateFinished,
    GenerateRequest,
    GenerateStarted,
)
from warmkv_server.contract.generation import Delta, Finish, Logprobs

_FINISHES = {Finish.STOP: "stop", Finish.LENGTH: "length", Finish.STOP_SEQUENCE: "stop"}


class Answered:
    """Makes the messages of one request.

    Args:
        own_logprobs: whether only the answer's own tokens have some, without alternatives.
        silent: tokens that end an answer without having been asked for.
    """

    def __init__(self, request: GenerateRequest, own_logprobs: bool, silent: frozenset[int]) -> None:
        self._asked = request
        self._own_logprobs = own_logprobs
        self._silent = silent
        self._tokens: list[list[int]] = [[] for _ in range(request.candidates or 1)]
        self._logprobs: list[list[Logprobs]] = [[] for _ in self._tokens]
        self._prompt = self._cached = 0

    def messages(self, event: GenerateEvent) -> Iterator[vllm.GenerateResponse]:
        match event:
            case GenerateStarted(_, cache):
                self._prompt, self._cached = cache.prompt_tokens, cache.cached_tokens
            case Delta():
                yield from self._chunk(event, 0)
            case CandidateDelta(number, delta):
                yield from self._chunk(delta, number)
            case GenerateFinished():
                ends: Sequence[GenerateFinished | CandidateFinished] = event.candidates or (event,)
                for number, end in enumerate(ends):
                    yield self._complete(end, number)

    def _chunk(self, delta: Delta, number: int) -> Iterator[vllm.GenerateResponse]:
        self._tokens[number] += delta.token_ids
        self._logprobs[number] += delta.logprobs
        if self._asked.whole or not delta.token_ids:
            return
        chunk = vllm.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=self._prompt,
            completion_tokens=len(self._tokens[number]),
            cached_tokens=self._cached,
            output_logprobs=self._told(delta.logprobs),
            index=number,
        )
        yield vllm.GenerateResponse(chunk=chunk)

    def _complete(self, end: GenerateFinished | CandidateFinished, number: int) -> vllm.GenerateResponse:
        tokens = self._tokens[number][: end.completion_tokens]
        matched: dict[str, Any] = {}
        if end.matched_stop:
            matched["matched_stop_str"] = end.matched_stop
        elif end.finish is Finish.STOP and tokens[-1] in self._asked.answer.stop_tokens - self._silent:
            matched["matched_token_id"] = tokens[-1]
        complete = vllm.GenerateComplete(
            output_ids=tokens,
            finish_reason=_FINISHES[end.finish],
            prompt_tokens=self._prompt,
            completion_tokens=len(tokens),
            cached_tokens=self._cached,
            output_logprobs=self._told(self._logprobs[number][: len(tokens)]),
            index=number,
            **matched,
        )
        return vllm.GenerateResponse(complete=complete)

    def _told(self, logprobs: Sequence[Logprobs]) -> vllm.OutputLogProbs | None:
        if not logprobs:
            return None
        tops = [] if self._own_logprobs else [each.top for each in logprobs]
        return vllm.OutputLogProbs(
            token_logprobs=[each.logprob for each in logprobs],
            token_ids=[each.token_id for each in logprobs],
            top_logprobs=[
                vllm.TopLogProbs(values=[value for _, value in top], token_ids=[token for token, _ in top])
                for top in tops
            ],
        )
