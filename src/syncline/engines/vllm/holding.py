"""Tokens nobody waits for stay with the scheduler for a while, and travel to the server in one piece.

vLLM's engine core sends the server every token by itself, and with logprobs each of them as three arrays to pack and
unpack: at hundreds of requests that takes the server longer than the GPU takes for the step. A request whose caller
wants the final answer alone (`RequestOutputKind.FINAL_ONLY`), with the sampled tokens' logprobs or none, is held here:
its first token goes out at once, then `HELD_TOKENS` at a time, and whatever is left with its last one. Nothing is held
while the engine is paused, and a pause is not complete before all that was held has gone out, so the server knows how
many tokens of which version there are.
"""

from typing import Any

import numpy as np

HELD_TOKENS = 32


class Holding:
    """Goes before vLLM's scheduler among a class's bases (`schedulers.py`)."""

    requests: Any
    pause_state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, list[Any]] = {}
        """Request id → its `EngineCoreOutput`s, one a step."""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        found = super().update_from_output(scheduler_output, model_runner_output)  # pyright: ignore[reportAttributeAccessIssue]
        holds = self.pause_state.name == "UNPAUSED"
        for outputs in found.values():
            outputs.outputs = [one for one in outputs.outputs if not (holds and self._hold(one))]
            for one in outputs.outputs:
                if (earlier := self._held.pop(one.request_id, None)) is not None:
                    _join([*earlier, one])
        if not holds:
            self._let_go(found)
        return found

    def has_requests(self) -> bool:
        """True as well while a paused engine holds tokens: a step without requests lets them go."""
        has_requests = super().has_requests()  # pyright: ignore[reportAttributeAccessIssue]
        return has_requests or (bool(self._held) and self.pause_state.name == "PAUSED_ALL")

    def finish_requests(self, request_ids: Any, finished_status: Any) -> list[Any]:
        finished = super().finish_requests(request_ids, finished_status)  # pyright: ignore[reportAttributeAccessIssue]
        for request in finished:
            self._held.pop(request.request_id, None)
        return finished

    def _hold(self, output: Any) -> bool:
        if not _is_plain(output):
            return False
        earlier = self._held.get(output.request_id)
        if earlier is None:
            if not _may_wait(self.requests[output.request_id]):
                return False
            self._held[output.request_id] = [output]
            return True
        if len(earlier) + 1 >= HELD_TOKENS:
            return False
        earlier.append(output)
        return True

    def _let_go(self, found: dict[int, Any]) -> None:
        from vllm.v1.engine import EngineCoreOutputs

        for request_id, outputs in self._held.items():
            client = self.requests[request_id].client_index
            found.setdefault(client, EngineCoreOutputs()).outputs.append(_join(outputs))
        self._held.clear()


def _is_plain(output: Any) -> bool:
    """Tokens, with or without logprobs, and nothing else: not a request's first, nor its last."""
    return (
        output.finish_reason is None
        and output.prefill_stats is None
        and output.events is None
        and output.new_prompt_logprobs_tensors is None
        and output.routed_experts is None
        and output.pooling_output is None
        and getattr(output, "new_sampling_mask", None) is None
    )


def _may_wait(request: Any) -> bool:
    """Stop strings are looked for by the server, in every token."""
    from vllm.sampling_params import RequestOutputKind

    params = request.sampling_params
    alone = params.output_kind is RequestOutputKind.FINAL_ONLY and not request.resumable
    return alone and not params.stop and not params.logprobs and not params.logprob_token_ids


def _join(outputs: list[Any]) -> Any:
    """The last of them, with the tokens and logprobs of all. A row of logprobs begins with the sampled token's; others
    follow when another request of that step asked for more."""
    last = outputs[-1]
    last.new_token_ids = [token for output in outputs for token in output.new_token_ids]
    pieces = [output.new_logprobs for output in outputs if output.new_logprobs is not None]
    if pieces:
        ids = np.concatenate([piece.logprob_token_ids[:, :1] for piece in pieces])
        logprobs = np.concatenate([piece.logprobs[:, :1] for piece in pieces])
        ranks = np.concatenate([piece.sampled_token_ranks for piece in pieces])
        last.new_logprobs = type(pieces[0])(ids, logprobs, ranks)
    return last
